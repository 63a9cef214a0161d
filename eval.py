"""Scores trained models on the same data with the same code.

    python eval.py out/pythia-laptop out/mla_kv128-laptop

A row is a run folder, a checkpoint file, or a Hugging Face GPT-NeoX folder or hub id. Every model is rebuilt from its
checkpoint and scored in float32, from an empty state at the start of each window. The table is printed; out_dir gets
report.md with pictures and results.json. train.py ends every run with the same functions.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configurator import (
    EvalSettings,
    InputError,
    PrepSettings,
    baseline_config,
    build_model,
    load_source,
    parse_settings,
    pick_device,
    run,
)
from prep import ReversalPair, TokenFile, Tokenizer, get_reversal_pairs, load_tokenizer, load_tokens
from pythia_base import score_tokens
from report import AFTER_FIRST, format_comparison, write_report

TASKS = ("val", "reversal", "long", "cache")
CACHE_LENGTHS = (256, 2048, 8192)  # tokens at which caches are compared
LONG_WINDOWS = 8  # windows of a long document that are scored, 4,096 tokens at a block_size of 512
POSITION_EDGES = (0, 16, 32, 64, 96)  # position ranges of the window; the last one ends with the window
PPL_MEANING = (
    (5, "abnormal: a leak or a causal-mask error, inspect the code"),
    (30, "suspicious: overfitting possible, check data volume and split"),
    (100, "normal at large scale"),
    (500, "normal from scratch"),
    (1000, "still falling"),
    (math.inf, "undertrained: more steps or another learning rate"),
)


def ppl_meaning(ppl: float) -> str:
    """What a perplexity says about a run; it presumes a subword vocabulary of about 50,000."""
    return next((meaning for limit, meaning in PPL_MEANING if ppl < limit), PPL_MEANING[-1][1])


# ------------------------------------------------------------------------------------------------ validation data


def eval_windows(num_tokens: int, block_size: int) -> list[tuple[int, int]]:
    """(start, end) of windows whose targets cover every token but the first exactly once; the last may be short."""
    return [(s, min(s + block_size, num_tokens - 1)) for s in range(0, num_tokens - 1, block_size)]


def window_batches(
    tokens: np.ndarray, windows: list[tuple[int, int]], batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T) of windows, those of equal length together."""
    for first in range(0, len(windows), batch_size):
        group = windows[first : first + batch_size]
        while group:
            width = group[0][1] - group[0][0]
            alike = [w for w in group if w[1] - w[0] == width]
            group = [w for w in group if w[1] - w[0] != width]
            rows = torch.from_numpy(np.stack([tokens[s : e + 1] for s, e in alike]).astype(np.int64)).to(device)
            yield rows[:, :-1], rows[:, 1:]


@torch.inference_mode()
def evaluate_val(
    model: Any, tokens: np.ndarray, block_size: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Loss, PPL, accuracy and position-wise PPL over all of a token file, each token counted once."""
    windows = eval_windows(len(tokens), block_size)
    loss, right, count = (np.zeros(block_size) for _ in range(3))  # per position of the window
    progress = tqdm(desc="validation", total=len(tokens) - 1, unit="tok", unit_scale=True, leave=False, mininterval=1)
    for idx, targets in window_batches(tokens, windows, batch_size, device):
        losses, correct = score_tokens(model.hidden_states(idx), model.head_weight, targets)
        T = idx.size(1)
        loss[:T] += losses.double().sum(0).cpu().numpy()
        right[:T] += correct.sum(0).cpu().numpy()
        count[:T] += idx.size(0)
        progress.update(idx.numel())
    progress.close()
    mean = loss.sum() / count.sum()
    return {
        "val_loss": mean,
        "val_ppl": safe_exp(mean),
        "val_accuracy": right.sum() / count.sum(),
        "val_tokens": int(count.sum()),
        "position_ppl": position_ppl(loss, count),
    }


def position_ppl(loss: np.ndarray, count: np.ndarray) -> dict[str, float]:
    """PPL per position range of the window, from losses and counts per position."""
    edges = [e for e in POSITION_EDGES if e < len(loss)] + [len(loss)]
    ranges = [(a, b) for a, b in itertools.pairwise(edges) if count[a:b].sum()]
    return {f"{a}-{b}": safe_exp(loss[a:b].sum() / count[a:b].sum()) for a, b in ranges}


def safe_exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


# ------------------------------------------------------------------------------------------------ long documents


def document_bounds(data: TokenFile) -> tuple[np.ndarray, np.ndarray]:
    """Where each document's leading end-of-text token stands, and where its closing one."""
    starts = data.doc_index["start"]
    return starts, np.append(starts[1:], len(data.tokens) - 1)


def long_documents(data: TokenFile, block_size: int) -> list[tuple[int, int]]:
    """(start, end) of the documents that fill two windows, cut after LONG_WINDOWS, the shortest first."""
    starts, ends = document_bounds(data)
    lengths = np.minimum(ends - starts, LONG_WINDOWS * block_size)
    order = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths < 2 * block_size) :]
    return [(int(starts[i]), int(starts[i] + lengths[i])) for i in order]


def document_batches(
    tokens: np.ndarray, documents: list[tuple[int, int]], block_size: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, whole windows) of documents, a row each; after a row's end its targets are -100."""
    for first in range(0, len(documents), batch_size):
        group = documents[first : first + batch_size]
        width = -(-max(e - s for s, e in group) // block_size) * block_size
        idx, targets = np.zeros((len(group), width), np.int64), np.full((len(group), width), -100)
        for row, (s, e) in enumerate(group):
            idx[row, : e - s], targets[row, : e - s] = tokens[s:e], tokens[s + 1 : e + 1]
        yield torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)


@torch.inference_mode()
def score_documents(
    model: Any,
    tokens: np.ndarray,
    documents: list[tuple[int, int]],
    block_size: int,
    batch_size: int,
    device: torch.device,
    carry: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of tokens per window of the documents; carry takes the memory from window to window."""
    num_windows = math.ceil(max(e - s for s, e in documents) / block_size)
    loss, count = np.zeros(num_windows), np.zeros(num_windows, np.int64)
    for idx, targets in document_batches(tokens, documents, block_size, batch_size, device):
        inputs = {"memory": model.init_memory(len(idx))} if carry else {}
        for w, (x, y) in enumerate(zip(idx.split(block_size, 1), targets.split(block_size, 1), strict=True)):
            losses, _ = score_tokens(model.hidden_states(x, **inputs), model.head_weight, y)
            loss[w] += losses.double().sum().item()
            count[w] += (y != -100).sum().item()
    return loss, count


def evaluate_long(
    model: Any, data: TokenFile, block_size: int, batch_size: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """PPL of long documents per window: the memory carried from window to window, and the memory reset before each.

    A model without memory sees its window. Where no document is long enough, nothing is measured.
    """
    documents, has_memory = long_documents(data, block_size), hasattr(model, "init_memory")
    if not documents:
        return {}
    if has_memory and block_size % model.config.segment_len:
        print(f"long documents: not measured, windows of {block_size} end within a segment", file=sys.stderr)
        return {}
    arguments = (model, data.tokens, documents, block_size, batch_size, device)
    loss, count = score_documents(*arguments, carry=has_memory)
    reached = np.array([sum(e - s > w * block_size for s, e in documents) for w in range(len(count))])
    results = {
        "long_documents": {**by_window(reached), AFTER_FIRST: len(documents)},
        "long_tokens": by_window(count),
        "long_ppl": window_ppl(loss, count),
    }
    if has_memory:
        results["long_ppl_reset"] = window_ppl(*score_documents(*arguments, carry=False))
    return results


def by_window(sums: np.ndarray) -> dict[str, float]:
    """Of each window, by its number from 1, and of all after the first, which are those where a memory can help."""
    return {**{str(w): value for w, value in enumerate(sums.tolist(), 1)}, AFTER_FIRST: sums[1:].sum().item()}


def window_ppl(loss: np.ndarray, count: np.ndarray) -> dict[str, float]:
    losses, tokens = by_window(loss), by_window(count)
    return {where: safe_exp(losses[where] / tokens[where]) for where in tokens}


# ------------------------------------------------------------------------------------------------ reversal curse


def evaluate_reversal_curse(
    model: Any, tokenizer: Tokenizer, pairs: list[ReversalPair], device: torch.device
) -> dict[str, float]:
    """PPL of sentences "A is B" that the training data holds, and of their reversals, which it does not.

    (Berglund et al. 2023, arXiv 2309.12288.) PPL = exp(mean over sentences of the mean token loss), every token scored
    after a leading end-of-text token. ratio = forward / backward (nearer 1 is better), gap = backward - forward (nearer
    0 is better). The answer figures score the answer's tokens alone: the B of "A is B", the A of "B is A".
    """
    forward, forward_answer = sentence_ppl(model, tokenizer, [(p.forward, p.forward_answer) for p in pairs], device)
    backward, backward_answer = sentence_ppl(model, tokenizer, [(p.backward, p.backward_answer) for p in pairs], device)
    return {
        "reversal_forward_ppl": forward,
        "reversal_backward_ppl": backward,
        "reversal_ratio": forward / backward,
        "reversal_gap": backward - forward,
        "reversal_forward_answer_ppl": forward_answer,
        "reversal_backward_answer_ppl": backward_answer,
        "reversal_answer_ratio": forward_answer / backward_answer,
        "reversal_answer_gap": backward_answer - forward_answer,
    }


@torch.inference_mode()
def sentence_ppl(
    model: Any, tokenizer: Tokenizer, sentences: list[tuple[str, str]], device: torch.device
) -> tuple[float, float]:
    """PPL of whole sentences and of their answers alone, for (sentence, answer it ends with) pairs."""
    ids = [tokenizer.encode(sentence) for sentence, _ in sentences]
    starts = [len(tokenizer.encode(s[: s.rindex(answer)].rstrip())) for s, answer in sentences]
    longest = max(map(len, ids))
    idx = torch.zeros(len(ids), longest, dtype=torch.long)  # rows are padded on the right, which nothing before sees
    targets = torch.full((len(ids), longest), -100)
    for row, sentence in enumerate(ids):
        idx[row, : len(sentence)] = torch.tensor([tokenizer.end_of_text, *sentence[:-1]])
        targets[row, : len(sentence)] = torch.tensor(sentence)
    scored = targets != -100
    answers = scored & (torch.arange(longest) >= torch.tensor(starts)[:, None])
    losses, _ = score_tokens(model.hidden_states(idx.to(device)), model.head_weight, targets.to(device))
    losses = losses.cpu().double()
    means = [(torch.where(mask, losses, 0).sum(1) / mask.sum(1)).mean().item() for mask in (scored, answers)]
    return safe_exp(means[0]), safe_exp(means[1])


# ------------------------------------------------------------------------------------------------------ the cache


def evaluate_cache(model: Any) -> dict[str, Any]:
    """Bytes that init_cache allocates for one row, per length and per token, beside the baseline of the same widths."""
    with torch.device("meta"):
        baseline = build_model("pythia", baseline_config(model.config))
    ours = {n: model.init_cache(1, n).nbytes for n in CACHE_LENGTHS}
    theirs = {n: baseline.init_cache(1, n).nbytes for n in CACHE_LENGTHS}
    return {
        "cache_bytes": {str(n): ours[n] for n in CACHE_LENGTHS},
        "cache_bytes_per_token": {str(n): ours[n] / n for n in CACHE_LENGTHS},
        "baseline_cache_bytes_per_token": {str(n): theirs[n] / n for n in CACHE_LENGTHS},
        "cache_saved": {str(n): 1 - ours[n] / theirs[n] for n in CACHE_LENGTHS},
    }


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters in all, those that training changes, and those of the embedding tables."""
    tables = [p for p in model.parameters() if p.size(0) == model.config.vocab_size]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "embedding_parameters": sum(p.numel() for p in tables),
    }


# ---------------------------------------------------------------------------------------------------- one model


def evaluate_model(
    model: Any,
    tasks: tuple[str, ...],
    data_folder: Path,
    data_dir: str,
    block_size: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """All metrics of the tasks for one model, moved to the device, in float32."""
    model = model.to(device).eval()
    data = load_tokens(data_folder, "val")
    if data.meta["max_id"] >= model.config.vocab_size:
        raise InputError(
            f"{data_folder} holds token id {data.meta['max_id']}, outside the model's {model.config.vocab_size} rows"
        )
    results: dict[str, Any] = count_parameters(model)
    if "val" in tasks:
        results |= evaluate_val(model, data.tokens, block_size, batch_size, device)
        results["ppl_meaning"] = ppl_meaning(results["val_ppl"])
    if "reversal" in tasks:
        tokenizer = load_tokenizer(data.meta["tokenizer"], data_dir)
        results |= evaluate_reversal_curse(model, tokenizer, get_reversal_pairs(), device)
    if "long" in tasks:
        results |= evaluate_long(model, data, block_size, batch_size, device)
    if "cache" in tasks:
        results |= evaluate_cache(model)
    return results


# ------------------------------------------------------------------------------------------------ the command line


def open_runs(sources: list[str], allow_untrained: bool) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, model, its checkpoint's contents) of each run. Raises InputError for a model that was never trained."""
    runs = []
    for source in sources:
        model, checkpoint = load_source(source)
        # a run of phase 1 trains no head
        untrained = checkpoint and (checkpoint["iter_num"] == 0 or checkpoint["config"]["phase"] == "phase1")
        if untrained and not allow_untrained:
            raise InputError(f"{source} was never trained on text; --allow_untrained scores it all the same")
        runs.append((source, model, checkpoint or {}))
    return runs


def data_of(settings: EvalSettings, runs: list[tuple[str, Any, dict[str, Any]]]) -> tuple[Path, int]:
    """The data folder and the window that all runs are scored with. Raises InputError if their tokenizers differ."""
    configs = [checkpoint["config"] for _, _, checkpoint in runs if checkpoint]
    dataset = settings.dataset or (configs[0]["dataset"] if configs else PrepSettings.dataset)
    folder = Path(settings.data_dir, dataset)
    tokenizer = load_tokens(folder, "val").meta["tokenizer"]
    for source, _, checkpoint in runs:
        theirs = checkpoint["data"]["tokenizer"] if checkpoint else tokenizer
        if theirs != tokenizer:
            raise InputError(f"{source} was trained on {theirs} tokens, {folder} holds {tokenizer} tokens")
    block_size = settings.block_size or min((c["block_size"] for c in configs if "block_size" in c), default=512)
    limits = {source: model.config.max_position_embeddings for source, model, _ in runs}
    for source, limit in limits.items():
        if block_size > limit:
            raise InputError(f"block_size={block_size} is above {source}'s limit of {limit}")
    return folder, block_size


def chosen_tasks(text: str) -> tuple[str, ...]:
    """--tasks=val,reversal -> the tasks. Raises InputError at one that does not exist."""
    tasks = TASKS if text == "all" else tuple(text.split(","))
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"no task {task!r}: choose from {', '.join(TASKS)}")
    return tasks


def main() -> None:
    settings, sources = parse_settings(EvalSettings, sys.argv[1:], takes="RUN [RUN ...]")
    if not sources:
        raise InputError("name at least one run: python eval.py out/pythia-laptop")
    tasks, device = chosen_tasks(settings.tasks), pick_device(settings.device)
    runs = open_runs(sources, settings.allow_untrained)
    folder, block_size = data_of(settings, runs)
    results = []
    for source, model, checkpoint in runs:
        print(f"scoring {source} on {folder} in windows of {block_size}", file=sys.stderr)
        file = Path(source, "ckpt.pt")
        about: dict[str, Any] = {"checkpoint": str(file if file.is_file() else source)}
        if checkpoint:
            about |= {name: checkpoint[name] for name in ("tokens_seen", "parents", "commit", "data")}
            about |= {"steps": checkpoint["iter_num"], "seed": checkpoint["config"]["seed"]}
            about["settings"] = {**checkpoint["config"], "model_args": checkpoint["model_args"]}
        scores = evaluate_model(model, tasks, folder, settings.data_dir, block_size, settings.batch_size, device)
        results.append({"run": source, "model": type(model).__name__, **about, **scores})
    out_dir = Path(settings.out_dir)
    write_report({"block_size": block_size, "data": str(folder), "runs": results}, out_dir)
    print(format_comparison(results))
    print(f"\nwritten to {out_dir / 'report.md'}, with pictures; all figures are in {out_dir / 'results.json'}")


if __name__ == "__main__":
    run(main)
