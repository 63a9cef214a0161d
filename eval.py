"""Scores trained models on the same data with the same code.

    python eval.py out/pythia-laptop out/mla_kv128-laptop
    python eval.py out/pythia-laptop --tasks=wikitext,lambada --wikitext=wiki.test.raw --lambada=lambada.jsonl
    python eval.py --verify                                   # EleutherAI/pythia-70m against published figures

A row is a run folder, a checkpoint file, or a Hugging Face GPT-NeoX folder or hub id. Every model is rebuilt from its
checkpoint and scored in float32, from an empty state at the start of each window. The table is printed; out_dir gets
report.md with pictures and results.json. train.py ends every run with the same functions.
"""

import hashlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

from benchmarks import Document, Unavailable, evaluate_benchmarks, load_texts
from configurator import baseline_config, build_model, load_source, parse_settings
from kit.contexts import exact_contexts
from kit.fast import safe_exp, score_tokens
from kit.files import InputError, make_folder, run
from kit.report import AFTER_FIRST, format_comparison, format_table, write_report
from kit.runs import pick_device
from kit.text import ReversalPair, Tokenizer, get_reversal_pairs, load_tokenizer
from kit.tokens import TokenFile, document_bounds, load_tokens
from model_context import effective_rank, settled_share
from prep import PrepSettings
from pythia_base import stream_tokens

TASKS = ("val", "reversal", "wikitext", "lambada", "pile", "long", "cache", "speed")
RUN_TASKS = ("val", "reversal", "long", "cache")  # those that end a training run
CACHE_LENGTHS = (256, 2048, 8192)  # tokens at which caches are compared
DECODE_TOKENS = 32  # tokens generated at each of these lengths to time it
SPEED_REPEATS = 3
CONTEXT_TOKENS = 100_000  # whose contexts are looked at, unless the checkpoint says how many phase 1 took
LONG_WINDOWS = 8  # windows of a long document that are scored, 4,096 tokens at a block_size of 512
POSITION_EDGES = (0, 16, 32, 64, 96)  # position ranges of the window; the last one ends with the window
VERIFIED = "EleutherAI/pythia-70m"
PUBLISHED = {  # of that model: EleutherAI's, with a newer lm-evaluation-harness; of the Pile its first 10,000 documents
    "lambada_accuracy": 0.1842,
    "lambada_ppl": 141.3,
    "pile_word_ppl": 130.6,
    "pile_bits_per_byte": 1.0493,
}
PPL_MEANING = (
    (5, "abnormal: a leak or a causal-mask error, inspect the code"),
    (30, "suspicious: overfitting possible, check data volume and split"),
    (100, "normal at large scale"),
    (500, "normal from scratch"),
    (1000, "still falling"),
    (math.inf, "undertrained: more steps or another learning rate"),
)


@dataclass(frozen=True)
class EvalSettings:
    """eval.py"""

    tasks: str = "all"  # some of val,reversal,wikitext,lambada,pile,long,cache,speed, separated by commas; or 'all'
    wikitext: str = "EleutherAI/wikitext_document_level"  # or a .jsonl file with a 'page' a line, or wiki.test.raw
    lambada: str = "EleutherAI/lambada_openai"  # or a .jsonl file with a 'text' a line
    pile_test: str = "monology/pile-uncopyrighted"  # or a .jsonl(.zst) file: 'text', and its subset as in the Pile
    pile_documents: PositiveInt | None = 1000  # of the Pile's test set, from its start; None: all
    data_dir: str = "data"  # where the token files are
    dataset: str | None = None  # score on this dataset; None: the one that the first run was trained on
    block_size: PositiveInt | None = None  # tokens per window, of every task; None: the smallest of the runs' training
    batch_size: PositiveInt = 8  # windows at a time
    out_dir: str = "out/compare"  # where report.md, its pictures and results.json go
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu
    allow_untrained: bool = False  # score a model that was never trained
    verify: bool = False  # score EleutherAI/pythia-70m, or the folder named, and compare with published figures
    tolerance: NonNegativeFloat = 0.01  # how far, relatively, --verify lets a figure be from the published one


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


# ------------------------------------------------------------------------------------------------ long documents


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


# ------------------------------------------------------------------------------------------------------- contexts


@torch.no_grad()
def evaluate_contexts(model: Any, tokens: np.ndarray, trained: list[dict[str, Any]]) -> dict[str, Any]:
    """Effective rank of a model's contexts on the start of a token file, for each block and for all.

    Also whether they settle, where the checkpoint says how phase 1 trained each block.
    """
    num_tokens = max((how["num_tokens"] for how in trained), default=CONTEXT_TOKENS)
    ids, table = torch.from_numpy(tokens[:num_tokens].astype(np.int64)), model.embed_in.weight
    contexts = [exact_contexts(block, table, ids) for block in model.context_blocks]
    together = torch.cat(contexts, dim=1)
    results: dict[str, Any] = {
        "context_effective_ranks": [effective_rank(each) for each in contexts],
        "context_dim": together.size(1),
        "context_effective_rank": effective_rank(together),
    }
    if len(trained) == len(contexts):
        results["context_convergence_rates"] = [
            settled_share(block, table, ids, **{key: how[key] for key in ("iterations", "noise", "threshold")})
            for block, how in zip(model.context_blocks, trained, strict=True)
        ]
    return results


# ------------------------------------------------------------------------------------------------ reversal curse


def evaluate_reversal_curse(
    model: Any, tokenizer: Tokenizer, pairs: list[ReversalPair], device: torch.device
) -> dict[str, float]:
    """PPL of sentences "A is B" that the training data holds, and of their reversals, which it does not.

    (Berglund et al. 2023, arXiv 2309.12288.) PPL = exp(mean over sentences of the mean token loss), every token scored
    after a leading end-of-text token. ratio = forward / backward (nearer 1 is better), gap = backward - forward (nearer
    0 is better). The answer figures score the answer's tokens alone: the B of "A is B.", the A of "B is A.".
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
    """PPL of whole sentences and of their answers alone, for (sentence, answer before its full stop) pairs."""
    ids = [tokenizer.encode(sentence) for sentence, _ in sentences]
    spans = [answer_span(tokenizer, *sentence) for sentence in sentences]
    longest = max(map(len, ids))
    idx = torch.zeros(len(ids), longest, dtype=torch.long)  # rows are padded on the right, which nothing before sees
    targets = torch.full((len(ids), longest), -100)
    for row, sentence in enumerate(ids):
        idx[row, : len(sentence)] = torch.tensor([tokenizer.end_of_text, *sentence[:-1]])
        targets[row, : len(sentence)] = torch.tensor(sentence)
    scored = targets != -100
    starts, ends = torch.tensor(spans)[..., None].unbind(1)
    answers = (torch.arange(longest) >= starts) & (torch.arange(longest) < ends)
    losses, _ = score_tokens(model.hidden_states(idx.to(device)), model.head_weight, targets.to(device))
    losses = losses.cpu().double()
    means = [(torch.where(mask, losses, 0).sum(1) / mask.sum(1)).mean().item() for mask in (scored, answers)]
    return safe_exp(means[0]), safe_exp(means[1])


def answer_span(tokenizer: Tokenizer, sentence: str, answer: str) -> tuple[int, int]:
    """(start, end) of the tokens of a sentence's answer: the blank before it is theirs, the full stop behind it not."""
    start = sentence.rindex(answer)
    before, through = sentence[:start].rstrip(), sentence[: start + len(answer)]
    return len(tokenizer.encode(before)), len(tokenizer.encode(through))


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


def generation_peak(model: Any, tokens: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Bytes that CUDA has allocated at the peak of generating text up to each length, the weights among them."""
    results: dict[str, Any] = {"cuda_bytes_before": torch.cuda.memory_allocated(device), "cuda_peak_bytes": {}}
    for n in CACHE_LENGTHS:
        torch.cuda.reset_peak_memory_stats(device)
        model.generate(prompt(tokens, n - DECODE_TOKENS, device), DECODE_TOKENS, temperature=0.0)
        results["cuda_peak_bytes"][str(n)] = torch.cuda.max_memory_allocated(device)
    return results


def prompt(tokens: np.ndarray, n: int, device: torch.device) -> Tensor:
    """The first n tokens of a text (1, n), repeated if it is shorter."""
    return torch.from_numpy(np.resize(tokens[:n], n).astype(np.int64))[None].to(device)


def evaluate_speed(model: Any, tokens: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Tokens per second of reading a prompt, and of generating after it, one row of each of CACHE_LENGTHS.

    Beyond max_position_embeddings a model is timed all the same; what it would say there is not asked. Medians.
    """
    speeds: dict[str, dict[str, float]] = {"prefill_tokens_per_s": {}, "decode_tokens_per_s": {}}
    model.generate(prompt(tokens, CACHE_LENGTHS[0], device), DECODE_TOKENS, temperature=0.0)  # warms up
    for n in tqdm(CACHE_LENGTHS, desc="speed", leave=False):
        times = [generation_times(model, prompt(tokens, n, device)) for _ in range(SPEED_REPEATS)]
        prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
        speeds["prefill_tokens_per_s"][str(n)] = n / prefill
        speeds["decode_tokens_per_s"][str(n)] = DECODE_TOKENS / decode
    return speeds


def generation_times(model: Any, idx: Tensor) -> tuple[float, float]:
    """Seconds until the first token after a prompt (1, T) is drawn, and for DECODE_TOKENS more."""
    cache = model.init_cache(1, idx.size(1) + DECODE_TOKENS)
    tokens = stream_tokens(model, idx, cache, 1 + DECODE_TOKENS, temperature=0.0)
    started = now(idx.device)
    next(tokens)
    first = now(idx.device)
    for _ in tokens:
        pass
    return first - started, now(idx.device) - first


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters in all, those that training changes, and those of the embedding tables."""
    tables = [p for p in model.parameters() if p.dim() == 2 and len(p) == model.config.vocab_size]
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
    texts: Mapping[str, list[Document] | Unavailable],
    context_blocks: list[dict[str, Any]],
) -> dict[str, Any]:
    """All metrics of the tasks for one model, moved to the device, in float32; texts are those of the benchmarks.

    context_blocks: how phase 1 trained the model's ContextBlocks, as its checkpoint has it.
    """
    model = model.to(device).eval()
    data = load_tokens(data_folder, "val")
    tokenizer = load_tokenizer(data.meta["tokenizer"], data_dir)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise InputError(
            f"{data_folder} holds {tokenizer.name} tokens, {tokenizer.n_vocab} of them; "
            f"the model has {model.config.vocab_size} rows"
        )
    results: dict[str, Any] = count_parameters(model)
    if "val" in tasks:
        results |= evaluate_val(model, data.tokens, block_size, batch_size, device)
        results["ppl_meaning"] = ppl_meaning(results["val_ppl"])
        if hasattr(model, "context_blocks"):
            results |= evaluate_contexts(model, data.tokens, context_blocks)
    if "reversal" in tasks:
        results |= evaluate_reversal_curse(model, tokenizer, get_reversal_pairs(), device)
    results |= evaluate_benchmarks(model, tasks, texts, tokenizer, block_size, batch_size, device)
    if "long" in tasks:
        results |= evaluate_long(model, data, block_size, batch_size, device)
    if "cache" in tasks:
        results |= evaluate_cache(model)
        if device.type == "cuda":
            results |= generation_peak(model, data.tokens, device)
    if "speed" in tasks:
        results |= evaluate_speed(model, data.tokens, device)
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
        if checkpoint and checkpoint["config"]["phase"] == "phase2":
            model.freeze_for_phase2()  # what is counted as trainable is what was trained
        runs.append((source, model, checkpoint or {}))
    return runs


def data_of(settings: EvalSettings, runs: list[tuple[str, Any, dict[str, Any]]]) -> tuple[Path, int]:
    """The data folder and the window that all runs are scored with. Raises InputError where they do not fit."""
    configs = [checkpoint["config"] for _, _, checkpoint in runs if checkpoint]
    dataset = settings.dataset or (configs[0]["dataset"] if configs else PrepSettings.dataset)
    folder = Path(settings.data_dir, dataset)
    meta = load_tokens(folder, "val").meta
    tokenizer = meta["tokenizer"]
    for source, model, checkpoint in runs:
        if meta["max_id"] >= (rows := model.config.vocab_size):
            raise InputError(f"{folder} holds token id {meta['max_id']}, outside the {rows} rows of {source}")
        theirs = checkpoint["data"]["tokenizer"] if checkpoint else tokenizer
        if theirs != tokenizer:
            raise InputError(f"{source} was trained on {theirs} tokens, {folder} holds {tokenizer} tokens")
    lengths = [c.get("config", {}).get("block_size", m.config.max_position_embeddings) for _, m, c in runs]
    block_size = settings.block_size or min(lengths)
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


def about(source: str, model: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Which weights a row stands for, and what they were trained on; of Hugging Face's only the former is known."""
    file = Path(source, "ckpt.pt")
    row: dict[str, Any] = {
        "run": source,
        "model": type(model).__name__,
        "checkpoint": str(file if file.is_file() else source),
        "weights_sha256": weights_digest(model),
    }
    if checkpoint:
        row |= {name: checkpoint[name] for name in ("tokens_seen", "parents", "commit", "data")}
        row |= {"steps": checkpoint["iter_num"], "seed": checkpoint["config"]["seed"]}
        row["settings"] = {**checkpoint["config"], "model_args": checkpoint["model_args"]}
    return row


def weights_digest(model: Any) -> str:
    """SHA-256 of all weights and their names."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy())
    return digest.hexdigest()


def training_differences(rows: list[dict[str, Any]]) -> list[str]:
    """A line, unless all rows were trained on as many tokens of the same data."""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kind = "tokens that are not known"
        if "data" in row:
            kind = f"{row['tokens_seen']:,} tokens of data {row['data']['train_sha256'][:8]}"
        kinds.setdefault(kind, []).append(row["run"])
    if len(kinds) == 1:
        return []
    differences = "; ".join(f"{', '.join(runs)} on {kind}" for kind, runs in kinds.items())
    return [f"not trained on the same tokens: {differences}"]


def verify(settings: EvalSettings, source: str) -> bool:
    """Hold a model's figures against those published for pythia-70m, and print both; whether all are within tolerance.

    Raises InputError if the weights or the texts cannot be had.
    """
    settings = replace(settings, pile_test="NeelNanda/pile-10k", pile_documents=None)
    tasks = tuple(task for task in chosen_tasks(settings.tasks) if task in ("lambada", "pile"))
    model, device = load_source(source)[0], pick_device(settings.device)
    texts = load_texts(settings, tasks)
    tokenizer, block_size = load_tokenizer("neox", settings.data_dir), model.config.max_position_embeddings
    model.to(device).eval()
    results = evaluate_benchmarks(model, tasks, texts, tokenizer, block_size, settings.batch_size, device)
    if missing := results.get("not_measured"):
        raise InputError(f"nothing can be verified: {'; '.join(missing.values())}")
    differences = {name: results[name] / PUBLISHED[name] - 1 for name in PUBLISHED if name in results}
    rows = [[name, f"{PUBLISHED[name]:g}", f"{results[name]:.4f}", f"{d:+.2%}"] for name, d in differences.items()]
    print(format_table([f"{source}, windows of {block_size}", "published", "measured", "difference"], rows))
    is_close = all(abs(difference) <= settings.tolerance for difference in differences.values())
    print(f"\n{'all' if is_close else 'NOT all'} within {settings.tolerance:.1%} of what was published")
    return is_close


def main() -> None:
    settings, sources = parse_settings(EvalSettings, sys.argv[1:], takes="RUN [RUN ...]")
    if settings.verify:
        if len(sources) > 1:
            raise InputError("--verify is for one model: EleutherAI/pythia-70m, or the folder that has it")
        sys.exit(0 if verify(settings, (sources or [VERIFIED])[0]) else 1)
    if not sources:
        raise InputError("name at least one run: python eval.py out/pythia-laptop")
    tasks, device = chosen_tasks(settings.tasks), pick_device(settings.device)
    runs = open_runs(sources, settings.allow_untrained)
    folder, block_size = data_of(settings, runs)
    out_dir = Path(settings.out_dir)
    make_folder(out_dir)
    texts = load_texts(settings, tasks)
    results = [about(*each) for each in runs]
    warnings = training_differences(results)
    for row, (source, model, checkpoint) in zip(results, runs, strict=True):
        print(f"scoring {source} on {folder} in windows of {block_size}", file=sys.stderr)
        row |= evaluate_model(
            model, tasks, folder, settings.data_dir, block_size, settings.batch_size, device, texts,
            checkpoint.get("context_blocks", []),
        )  # fmt: skip
    print("\n\n".join([*warnings, format_comparison(results)]), flush=True)  # first: the disk may be full
    write_report({"block_size": block_size, "data": str(folder), "warnings": warnings, "runs": results}, out_dir)
    print(f"\nwritten to {out_dir / 'report.md'}, with pictures; all figures are in {out_dir / 'results.json'}")


if __name__ == "__main__":
    run(main)
