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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

from benchmarks import evaluate_benchmarks, load_texts, verify
from configurator import baseline_config, build_model, load_source, parse_settings
from kit.contexts import exact_contexts
from kit.fast import safe_exp, score_tokens
from kit.files import InputError, make_folder, run
from kit.report import AFTER_FIRST, format_comparison, write_report
from kit.runs import pick_device
from kit.text import ReversalPair, Tokenizer, get_reversal_pairs, load_tokenizer
from kit.tokens import TokenFile, document_bounds, load_tokens, window_batch
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
Figures = dict[str, Any]
Run = tuple[str, Any, dict[str, Any]]  # name, model, contents of its checkpoint, empty where there is none


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


# ------------------------------------------------------------------------------------------------ validation data


def windows(tokens: np.ndarray, block_size: int, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Windows, batch_size at a time, whose targets are every token but the first, once; the last one may be short."""
    starts = np.arange(0, len(tokens) - block_size, block_size)
    for first in range(0, len(starts), batch_size):
        yield window_batch(tokens, starts[first : first + batch_size], block_size, device)
    if rest := (len(tokens) - 1) % block_size:
        yield window_batch(tokens, np.array([len(tokens) - 1 - rest]), rest, device)


@torch.inference_mode()
def evaluate_val(model: Any, tokens: np.ndarray, block_size: int, batch_size: int, device: torch.device) -> Figures:
    """Loss, PPL, accuracy and position-wise PPL over all of a token file, each token counted once."""
    loss, right, count = np.zeros((3, block_size))  # per position of the window
    with tqdm(desc="validation", total=len(tokens) - 1, unit="tok", unit_scale=True, leave=False, mininterval=1) as bar:
        for batch in windows(tokens, block_size, batch_size, device):
            losses, correct = score_tokens(model.hidden_states(batch["idx"]), model.head_weight, batch["targets"])
            B, T = losses.shape
            loss[:T] += losses.double().sum(0).cpu().numpy()
            right[:T] += correct.sum(0).cpu().numpy()
            count[:T] += B
            bar.update(B * T)
    edges = [e for e in POSITION_EDGES if e < block_size] + [block_size]
    ranges = [(a, b) for a, b in itertools.pairwise(edges) if count[a:b].any()]
    mean = loss.sum() / count.sum()
    return {
        "val_loss": mean,
        "val_ppl": safe_exp(mean),
        "val_accuracy": right.sum() / count.sum(),
        "val_tokens": int(count.sum()),
        "position_ppl": {f"{a}-{b}": safe_exp(loss[a:b].sum() / count[a:b].sum()) for a, b in ranges},
    }


# ------------------------------------------------------------------------------------------------- long documents


def long_documents(data: TokenFile, block_size: int) -> list[tuple[int, int]]:
    """(start, end) of the documents that fill two windows, cut after LONG_WINDOWS, the shortest first."""
    starts, ends = document_bounds(data)
    lengths = np.minimum(ends - starts, LONG_WINDOWS * block_size)
    order = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths < 2 * block_size) :]
    return [(int(starts[i]), int(starts[i] + lengths[i])) for i in order]


def evaluate_long(model: Any, data: TokenFile, block_size: int, batch_size: int, device: torch.device) -> Figures:
    """PPL of long documents per window: the memory carried from window to window, and the memory reset before each.

    A model without memory sees its window. Where no document is long enough, nothing is measured.
    """
    documents, has_memory = long_documents(data, block_size), hasattr(model, "init_memory")
    if not documents:
        return {}
    if has_memory and block_size % model.config.segment_len:
        print(f"long documents: not measured, windows of {block_size} end within a segment", file=sys.stderr)
        return {}
    groups = [documents[first : first + batch_size] for first in range(0, len(documents), batch_size)]
    figures: Figures = {}
    for key, carry in (("long_ppl", has_memory), ("long_ppl_reset", False))[: 1 + has_memory]:
        loss, count = document_losses(model, data.tokens, groups, block_size, device, carry)
        figures["long_tokens"] = tokens = by_window(count)
        figures[key] = {w: safe_exp(total / tokens[w]) for w, total in by_window(loss).items()}
    reached = np.array([sum(e - s > w * block_size for s, e in documents) for w in range(len(count))])
    return {**figures, "long_documents": {**by_window(reached), AFTER_FIRST: len(documents)}}


@torch.inference_mode()
def document_losses(
    model: Any, tokens: np.ndarray, groups: list[list[tuple[int, int]]], size: int, device: torch.device, carry: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of tokens per window of the documents, a row each; carry keeps the memory in between."""
    num_windows = math.ceil(max(e - s for group in groups for s, e in group) / size)
    loss, count = np.zeros(num_windows), np.zeros(num_windows, np.int64)
    for group in groups:
        memory = {"memory": model.init_memory(len(group))} if carry else {}
        for w in range(math.ceil(max(e - s for s, e in group) / size)):
            idx, targets = np.zeros((len(group), size), np.int64), np.full((len(group), size), -100)
            for row, (s, e) in enumerate(group):  # targets after a document's end stay -100
                start, n = s + w * size, max(min(e - s - w * size, size), 0)
                idx[row, :n], targets[row, :n] = tokens[start : start + n], tokens[start + 1 : start + n + 1]
            h = model.hidden_states(torch.from_numpy(idx).to(device), **memory)
            losses, _ = score_tokens(h, model.head_weight, torch.from_numpy(targets).to(device))
            loss[w] += losses.double().sum().item()
            count[w] += (targets != -100).sum()
    return loss, count


def by_window(sums: np.ndarray) -> dict[str, float]:
    """Of each window, by its number from 1, and of all after the first, which are those where a memory can help."""
    return {**{str(w): value for w, value in enumerate(sums.tolist(), 1)}, AFTER_FIRST: sums[1:].sum().item()}


@torch.no_grad()
def evaluate_contexts(model: Any, tokens: np.ndarray, trained: list[dict[str, Any]]) -> Figures:
    """Effective rank of a model's contexts on the start of a token file, for each block and for all.

    Also whether they settle, where the checkpoint says how phase 1 trained each block.
    """
    num_tokens = max((how["num_tokens"] for how in trained), default=CONTEXT_TOKENS)
    ids, table = torch.from_numpy(tokens[:num_tokens].astype(np.int64)), model.embed_in.weight
    contexts = [exact_contexts(block, table, ids) for block in model.context_blocks]
    together = torch.cat(contexts, dim=1)
    figures: Figures = {
        "context_effective_ranks": [effective_rank(each) for each in contexts],
        "context_dim": together.size(1),
        "context_effective_rank": effective_rank(together),
    }
    if len(trained) == len(contexts):
        figures["context_convergence_rates"] = [
            settled_share(block, table, ids, **{key: how[key] for key in ("iterations", "noise", "threshold")})
            for block, how in zip(model.context_blocks, trained, strict=True)
        ]
    return figures


def evaluate_reversal_curse(
    model: Any, tokenizer: Tokenizer, pairs: list[ReversalPair], device: torch.device
) -> dict[str, float]:
    """PPL of sentences "A is B" that the training data holds, and of their reversals, which it does not.

    (Berglund et al. 2023, arXiv 2309.12288.) PPL = exp(mean over sentences of the mean token loss), every token scored
    after a leading end-of-text token. ratio = forward / backward (nearer 1 is better), gap = backward - forward (nearer
    0 is better). The answer figures score the answer's tokens alone: the B of "A is B.", the A of "B is A.".
    """
    forward = sentence_ppl(model, tokenizer, [(p.forward, p.forward_answer) for p in pairs], device)
    backward = sentence_ppl(model, tokenizer, [(p.backward, p.backward_answer) for p in pairs], device)
    figures: dict[str, float] = {}
    for part, f, b in zip(("", "answer_"), forward, backward, strict=True):
        figures |= {f"reversal_forward_{part}ppl": f, f"reversal_backward_{part}ppl": b}
        figures |= {f"reversal_{part}ratio": f / b, f"reversal_{part}gap": b - f}
    return figures


@torch.inference_mode()
def sentence_ppl(
    model: Any, tokenizer: Tokenizer, sentences: list[tuple[str, str]], device: torch.device
) -> tuple[float, float]:
    """PPL of whole sentences and of their answers alone, for (sentence, answer before its full stop) pairs."""
    ids = [[tokenizer.end_of_text, *tokenizer.encode(sentence)] for sentence, _ in sentences]
    longest = max(map(len, ids)) - 1
    idx = torch.zeros(len(ids), longest, dtype=torch.long)  # rows are padded on the right, which nothing before sees
    targets, answers = torch.full_like(idx, -100), torch.zeros_like(idx, dtype=torch.bool)
    for row, each in enumerate(ids):
        idx[row, : len(each) - 1], targets[row, : len(each) - 1] = torch.tensor(each[:-1]), torch.tensor(each[1:])
        answers[row, slice(*answer_span(tokenizer, *sentences[row]))] = True
    losses, _ = score_tokens(model.hidden_states(idx.to(device)), model.head_weight, targets.to(device))
    losses = losses.cpu().double()
    means = [(torch.where(mask, losses, 0).sum(1) / mask.sum(1)).mean().item() for mask in (targets != -100, answers)]
    return safe_exp(means[0]), safe_exp(means[1])


def answer_span(tokenizer: Tokenizer, sentence: str, answer: str) -> tuple[int, int]:
    """(start, end) of the tokens of a sentence's answer: the blank before it is theirs, the full stop behind it not."""
    start = sentence.rindex(answer)
    before, through = sentence[:start].rstrip(), sentence[: start + len(answer)]
    return len(tokenizer.encode(before)), len(tokenizer.encode(through))


# ------------------------------------------------------------------------------------- cache, speed, parameters


def evaluate_cache(model: Any) -> Figures:
    """Bytes that init_cache allocates for one row, per length and per token, beside the baseline of the same widths."""
    with torch.device("meta"):
        baseline = build_model("pythia", baseline_config(model.config))
    ours, theirs = ({str(n): m.init_cache(1, n).nbytes for n in CACHE_LENGTHS} for m in (model, baseline))
    return {
        "cache_bytes": ours,
        "cache_bytes_per_token": {n: ours[n] / int(n) for n in ours},
        "baseline_cache_bytes_per_token": {n: theirs[n] / int(n) for n in theirs},
        "cache_saved": {n: 1 - ours[n] / theirs[n] for n in ours},
    }


def prompt(tokens: np.ndarray, n: int, device: torch.device) -> Tensor:
    """The first n tokens of a text (1, n), repeated if it is shorter."""
    return torch.from_numpy(np.resize(tokens[:n], n).astype(np.int64))[None].to(device)


def generation_peak(model: Any, tokens: np.ndarray, device: torch.device) -> Figures:
    """Bytes that CUDA has allocated at the peak of generating text up to each length, the weights among them."""
    figures: Figures = {"cuda_bytes_before": torch.cuda.memory_allocated(device), "cuda_peak_bytes": {}}
    for n in CACHE_LENGTHS:
        torch.cuda.reset_peak_memory_stats(device)
        model.generate(prompt(tokens, n - DECODE_TOKENS, device), DECODE_TOKENS, temperature=0.0)
        figures["cuda_peak_bytes"][str(n)] = torch.cuda.max_memory_allocated(device)
    return figures


def evaluate_speed(model: Any, tokens: np.ndarray, device: torch.device) -> Figures:
    """Tokens per second of reading a prompt, and of generating after it, one row of each of CACHE_LENGTHS.

    Beyond max_position_embeddings a model is timed all the same; what it would say there is not asked. Medians.
    """
    speeds: Figures = {"prefill_tokens_per_s": {}, "decode_tokens_per_s": {}}
    generation_times(model, prompt(tokens, CACHE_LENGTHS[0], device))  # warms up
    for n in tqdm(CACHE_LENGTHS, desc="speed", leave=False):
        times = [generation_times(model, prompt(tokens, n, device)) for _ in range(SPEED_REPEATS)]
        prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
        speeds["prefill_tokens_per_s"][str(n)] = n / prefill
        speeds["decode_tokens_per_s"][str(n)] = DECODE_TOKENS / decode
    return speeds


def generation_times(model: Any, idx: Tensor) -> tuple[float, float]:
    """Seconds until the first token after a prompt (1, T) is drawn, and for DECODE_TOKENS more."""
    cache = model.init_cache(1, idx.size(1) + DECODE_TOKENS)
    clock = [time.perf_counter()]
    for number, _ in enumerate(stream_tokens(model, idx, cache, 1 + DECODE_TOKENS, temperature=0.0)):
        if number in (0, DECODE_TOKENS):
            if idx.device.type != "cpu":
                torch.accelerator.synchronize(idx.device)
            clock.append(time.perf_counter())
    return clock[1] - clock[0], clock[2] - clock[1]


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters in all, those that training changes, and those of the embedding tables."""
    tables = [p for p in model.parameters() if p.dim() == 2 and len(p) == model.config.vocab_size]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "embedding_parameters": sum(p.numel() for p in tables),
    }


# ----------------------------------------------------------------------------------------------------- one model


def evaluate_model(
    model: Any, val: TokenFile, tokenizer: Tokenizer, block_size: int, batch_size: int, trained: list[dict[str, Any]],
    tasks: tuple[str, ...] = RUN_TASKS, texts: dict[str, Any] | None = None,
) -> Figures:  # fmt: skip
    """All figures of the tasks for one model on its device, in float32.

    trained: how phase 1 trained its ContextBlocks, as its checkpoint has it; texts: those of the benchmarks among the
    tasks. Raises InputError if the tokenizer has ids that the model has not.
    """
    if tokenizer.n_vocab > (rows := model.config.vocab_size):
        raise InputError(
            f"{val.path} holds {tokenizer.name} tokens, {tokenizer.n_vocab} of them; the model has {rows} rows"
        )
    model.eval()
    device = model.head_weight.device
    figures: Figures = count_parameters(model)
    if "val" in tasks:
        figures |= evaluate_val(model, val.tokens, block_size, batch_size, device)
        figures |= evaluate_contexts(model, val.tokens, trained) if hasattr(model, "context_blocks") else {}
    if "reversal" in tasks:
        figures |= evaluate_reversal_curse(model, tokenizer, get_reversal_pairs(), device)
    figures |= evaluate_benchmarks(model, tasks, texts or {}, tokenizer, block_size, batch_size, device)
    if "long" in tasks:
        figures |= evaluate_long(model, val, block_size, batch_size, device)
    if "cache" in tasks:
        figures |= evaluate_cache(model)
        figures |= generation_peak(model, val.tokens, device) if device.type == "cuda" else {}
    if "speed" in tasks:
        figures |= evaluate_speed(model, val.tokens, device)
    return figures


# ------------------------------------------------------------------------------------------------ the command line


def open_runs(sources: list[str], allow_untrained: bool) -> list[Run]:
    """The runs, by name. Raises InputError for a model that was never trained."""
    runs = []
    for source in sources:
        model, checkpoint = load_source(source)
        phase = checkpoint["config"]["phase"] if checkpoint else ""
        if checkpoint and (checkpoint["iter_num"] == 0 or phase == "phase1") and not allow_untrained:
            raise InputError(f"{source} was never trained on text; --allow_untrained scores it all the same")
        if phase == "phase2":
            model.freeze_for_phase2()  # what is counted as trainable is what was trained
        runs.append((source, model, checkpoint or {}))
    return runs


def data_of(settings: EvalSettings, runs: list[Run]) -> tuple[TokenFile, int]:
    """The validation data and the window that all runs are scored with. Raises InputError where they do not fit."""
    configs = [checkpoint["config"] for _, _, checkpoint in runs if checkpoint]
    dataset = settings.dataset or (configs[0]["dataset"] if configs else PrepSettings.dataset)
    val = load_tokens(Path(settings.data_dir, dataset), "val")
    folder, tokenizer = val.path.parent, val.meta["tokenizer"]
    limits = {source: model.config.max_position_embeddings for source, model, _ in runs}
    trained = [config["block_size"] for config in configs if "block_size" in config]  # phase 1 knows no windows
    block_size = settings.block_size or min([*limits.values(), *trained])
    for source, model, checkpoint in runs:
        if val.meta["max_id"] >= (rows := model.config.vocab_size):
            raise InputError(f"{folder} holds token id {val.meta['max_id']}, outside the {rows} rows of {source}")
        if checkpoint and (theirs := checkpoint["data"]["tokenizer"]) != tokenizer:
            raise InputError(f"{source} was trained on {theirs} tokens, {folder} holds {tokenizer} tokens")
        if block_size > limits[source]:
            raise InputError(f"block_size={block_size} is above {source}'s limit of {limits[source]}")
    return val, block_size


def about(source: str, model: Any, checkpoint: dict[str, Any]) -> Figures:
    """Which weights a row stands for, and what they were trained on; of Hugging Face's only the former is known."""
    file, digest = Path(source, "ckpt.pt"), hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy())
    row: Figures = {"run": source, "model": type(model).__name__, "checkpoint": str(file if file.is_file() else source)}
    row["weights_sha256"] = digest.hexdigest()
    if checkpoint:
        row |= {name: checkpoint[name] for name in ("tokens_seen", "parents", "commit", "data")}
        row |= {"steps": checkpoint["iter_num"], "seed": checkpoint["config"]["seed"]}
        row["settings"] = {**checkpoint["config"], "model_args": checkpoint["model_args"]}
    return row


def main() -> None:
    settings, sources = parse_settings(EvalSettings, sys.argv[1:], takes="RUN [RUN ...]")
    tasks = TASKS if settings.tasks == "all" else tuple(settings.tasks.split(","))
    if unknown := set(tasks) - set(TASKS):
        raise InputError(f"no task {min(unknown)!r}: choose from {', '.join(TASKS)}")
    if settings.verify:
        sys.exit(0 if verify(settings, sources, tasks) else 1)
    if not sources:
        raise InputError("name at least one run: python eval.py out/pythia-laptop")
    device, runs = pick_device(settings.device), open_runs(sources, settings.allow_untrained)
    val, block_size = data_of(settings, runs)
    make_folder(out_dir := Path(settings.out_dir))
    texts, tokenizer = load_texts(settings, tasks), load_tokenizer(val.meta["tokenizer"], settings.data_dir)
    rows = []
    for source, model, checkpoint in runs:
        print(f"scoring {source} on {val.path.parent} in windows of {block_size}", file=sys.stderr)
        trained = checkpoint.get("context_blocks", [])
        arguments = (model.to(device), val, tokenizer, block_size, settings.batch_size, trained, tasks, texts)
        rows.append({**about(source, model, checkpoint), **evaluate_model(*arguments)})
    print(format_comparison(rows), flush=True)  # first: the disk may be full
    write_report({"block_size": block_size, "data": str(val.path.parent), "runs": rows}, out_dir)
    print(f"\nwritten to {out_dir / 'report.md'}, with pictures; all figures are in {out_dir / 'results.json'}")


if __name__ == "__main__":
    run(main)
