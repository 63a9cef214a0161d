"""Scores trained models on the same data with the same code.

    python eval.py out/pythia-laptop out/mla_kv128-laptop
    python eval.py out/pythia-laptop --tasks=val,wikitext,lambada_openai --include_path=tasks
    python eval.py --verify                                   # EleutherAI/pythia-70m against published figures

A row is a run folder, a checkpoint file, or a Hugging Face GPT-NeoX folder or hub id; every model is scored in float32.
The table is printed, out_dir gets report.md with pictures and results.json. train.py ends runs with the same functions.
"""

import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from configurator import baseline_cache_bytes, load_source, parse_settings
from kit.contexts import exact_contexts, freeze_contexts
from kit.fast import prepare_decoding, score_tokens
from kit.files import InputError, run
from kit.harness import find_tasks
from kit.recall import recall_groups
from kit.report import AFTER_FIRST, format_comparison, format_table, write_report
from kit.runs import pick_device
from kit.text import ReversalPair, Tokenizer, get_reversal_pairs, load_tokenizer
from kit.tokens import TokenFile, document_bounds, load_tokens
from model_context import effective_rank, settled_share
from prep import PrepSettings
from pythia_base import stream_tokens

RUN_TASKS = ("val", "reversal", "long", "cache")  # those that end a training run
TASKS = (*RUN_TASKS, "speed")  # any other is one of lm-evaluation-harness
PUBLISHED = {  # of EleutherAI/pythia-70m, zero-shot, with this harness
    "lambada_openai acc": 0.1842,
    "lambada_openai perplexity": 141.3,
    "pile_10k word_perplexity": 130.6,
    "pile_10k bits_per_byte": 1.0493,
}
CACHE_LENGTHS = (256, 2048, 8192)  # tokens at which caches are compared
DECODE_TOKENS = 32  # tokens generated at each of these lengths to time it
SPEED_REPEATS = 3
CONTEXT_TOKENS = 100_000  # whose contexts are looked at, unless the checkpoint says how many phase 1 took
LONG_WINDOWS = 8  # windows of a long document that are scored, 4,096 tokens at a block_size of 512
RESAMPLES = 10_000  # of the documents, for the interval and the p of a difference between two runs
POSITION_EDGES = (0, 16, 64, 256, 1024, 4096)  # position ranges of the window; the last one ends with the window
Figures = dict[str, Any]
Run = tuple[str, Any, dict[str, Any] | None]  # name, model, contents of its checkpoint, None of Hugging Face's


@dataclass(frozen=True)
class EvalSettings:
    """eval.py"""

    tasks: str = ",".join(TASKS)  # separated by commas; other names are tasks of lm-evaluation-harness: wikitext, ...
    include_path: str | None = None  # a folder of task files in the harness's format, such as tasks
    data_dir: str = "data"  # where the token files are
    dataset: str | None = None  # score on this dataset; None: the one that the first run was trained on
    block_size: PositiveInt | None = None  # tokens per window, of every task; None: the smallest of the runs' training
    batch_size: PositiveInt = 8  # windows at a time
    out_dir: str = "out/compare"  # where report.md, its pictures and results.json go
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu
    allow_untrained: bool = False  # score a model that was never trained
    verify: bool = False  # score EleutherAI/pythia-70m, or what is named, and compare with its published figures
    tolerance: NonNegativeFloat = 0.01  # how far, relatively, --verify lets a figure be from the published one


def padded(texts: Sequence[Any], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """idx and targets (B, T) of token ids, a text a row, T a multiple; behind a text's end the targets are -100."""
    rows = pad_sequence([torch.tensor(np.asarray(text, np.int64)) for text in texts], True, -100)
    rows = F.pad(rows, (0, (1 - rows.size(1)) % multiple), value=-100)
    return rows[:, :-1].where(rows[:, 1:] != -100, 0), rows[:, 1:]


@torch.inference_mode()
def score(model: Any, idx: Tensor, targets: Tensor, **memory: Any) -> tuple[np.ndarray, np.ndarray]:
    """Loss in nats, and whether the arg-max is right: (B, T) in float64, NaN where there is no target."""
    head = model.head_weight
    losses, right = score_tokens(model.hidden_states(idx.to(head.device), **memory), head, targets.to(head.device))
    scores = losses.nan_to_num(torch.inf, torch.inf), right  # no number is the worst loss, not one that is left out
    loss, hits = (each.cpu().double().where(targets != -100, torch.nan).numpy() for each in scores)
    return loss, hits


def ppl(loss: np.ndarray) -> float:
    return np.exp(np.nanmean(loss))


def evaluate_val(model: Any, val: TokenFile, block_size: int, batch_size: int) -> Figures:
    """Loss, PPL and accuracy over all tokens of a file, once each; PPL by position in the window; kit/recall.py's."""
    count = len(val.tokens) - 1
    starts = range(0, count, block_size)
    loss, right = np.full((2, len(starts), block_size), np.nan)
    for first in tqdm(range(0, len(starts), batch_size), desc="validation", leave=False, mininterval=1):
        rows = slice(first, first + batch_size)
        idx, targets = padded([val.tokens[s : s + block_size + 1] for s in starts[rows]])
        loss[rows, : idx.size(1)], right[rows, : idx.size(1)] = score(model, idx, targets)
    edges = [edge for edge in POSITION_EDGES if edge < min(block_size, count)]
    groups = {name: loss.ravel()[places] for name, places in recall_groups(val, block_size).items() if len(places)}
    begins = val.doc_index["start"]
    return {
        "document_losses": np.add.reduceat(loss.ravel()[:count], begins[begins < count]),  # sums, an array
        "val_loss": np.nanmean(loss),
        "val_ppl": ppl(loss),
        "val_accuracy": np.nanmean(right),
        "val_tokens": count,
        "position_ppl": {f"{a}-{b}": ppl(loss[:, a:b]) for a, b in itertools.pairwise([*edges, block_size])},
        "recall_loss": {name: losses.mean() for name, losses in groups.items()},
        "recall_ppl": {name: ppl(losses) for name, losses in groups.items()},
        "recall_tokens": {name: len(losses) for name, losses in groups.items()},
    }


def compare_documents(losses: np.ndarray, others: np.ndarray, lengths: np.ndarray) -> Figures:
    """How much more loss a token costs than another model on the same documents: mean, 95% interval, two-sided p.

    Paired bootstrap (Efron and Tibshirani 1993; Koehn 2004): documents are drawn with replacement, both models' losses
    of each together. losses, others: sums (documents,) over so many tokens each, lengths.
    """
    rng, count = np.random.default_rng(0), len(lengths)
    drawn = (rng.integers(count, size=count) for _ in range(RESAMPLES))
    means = np.array([(losses - others)[these].sum() / lengths[these].sum() for these in drawn])
    low, high = np.quantile(means, [0.025, 0.975])
    p = 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + RESAMPLES)
    p = min(1.0, max(p, 2.0 ** (1 - count)))  # so few documents could have fallen on one side by chance
    return {"loss": (losses - others).sum() / lengths.sum(), "low": low, "high": high, "p": p}


def evaluate_long(model: Any, data: TokenFile, block_size: int, batch_size: int) -> Figures:
    """PPL per window of documents that fill two windows: the memory carried on, and reset before each window."""
    has_memory = hasattr(model, "init_memory")
    if has_memory and block_size % model.config.segment_len:
        print(f"long documents: not measured, windows of {block_size} end within a segment", file=sys.stderr)
        return {}
    long = [(s, min(e, s + LONG_WINDOWS * block_size)) for s, e in document_bounds(data) if e - s >= 2 * block_size]
    documents = sorted((data.tokens[s : e + 1] for s, e in long), key=len)
    if not documents:
        return {}
    loss = np.full((1 + has_memory, len(documents), LONG_WINDOWS, block_size), np.nan)
    for first in range(0, len(documents), batch_size):
        rows = slice(first, first + batch_size)
        batch = [each.split(block_size, dim=1) for each in padded(documents[rows], block_size)]
        memory = {"cache": model.init_memory(len(batch[0][0]))} if has_memory else {}
        for w, (idx, targets) in enumerate(zip(*batch, strict=True)):
            for losses, carried in zip(loss, (memory, {}), strict=False):
                losses[rows, w] = score(model, idx, targets, **carried)[0]
    windows = {str(w + 1): np.s_[:, w] for w in range(LONG_WINDOWS)} | {AFTER_FIRST: np.s_[:, 1:]}
    counts = {name: int((~np.isnan(loss[0][here])).sum()) for name, here in windows.items()}
    figures: Figures = {"long_documents": len(documents), "long_tokens": {k: n for k, n in counts.items() if n}}
    for name, losses in zip(("long_ppl", "long_ppl_reset"), loss, strict=False):
        figures[name] = {k: ppl(losses[windows[k]]) for k in figures["long_tokens"]}
    return figures


def evaluate_reversal_curse(
    model: Any, tokenizer: Tokenizer, pairs: list[ReversalPair], device: torch.device
) -> Figures:
    """PPL of sentences "A is B." that the training data holds, and of their reversals "B is A.", which it does not.

    (Berglund et al. 2023, arXiv 2309.12288.) PPL = exp(mean over sentences of the mean token loss), every token scored
    after a leading end-of-text token. ratio = forward / backward (nearer 1 is better), gap = backward - forward (nearer
    0 is better). The answer figures score the answer's tokens alone: those between the verb and the full stop.
    """
    figures: Figures = {}
    for way in ("forward", "backward"):
        texts = [(getattr(pair, way), getattr(pair, f"{way}_answer")) for pair in pairs]
        ids = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text, _ in texts]
        starts = [len(tokenizer.encode(text[: text.rindex(answer)].rstrip())) for text, answer in texts]
        loss, _ = score(model.to(device), *padded(ids))
        answers = [row[start : len(each) - 2].mean() for row, start, each in zip(loss, starts, ids, strict=True)]
        figures[f"reversal_{way}_ppl"] = np.exp(np.nanmean(loss, axis=1).mean())
        figures[f"reversal_{way}_answer_ppl"] = np.exp(np.mean(answers))
    for part in ("", "answer_"):
        forward, backward = (figures[f"reversal_{way}_{part}ppl"] for way in ("forward", "backward"))
        figures |= {f"reversal_{part}ratio": forward / backward, f"reversal_{part}gap": backward - forward}
    return figures


@torch.no_grad()
def evaluate_contexts(model: Any, tokens: np.ndarray, trained: list[dict[str, Any]]) -> Figures:
    """Effective rank of contexts on the first tokens, of each block and of all; whether they settle, as in phase 1."""
    num_tokens = max((how["num_tokens"] for how in trained), default=CONTEXT_TOKENS)
    ids, table = torch.from_numpy(tokens[:num_tokens].astype(np.int64)), model.embed_in.weight
    contexts = [exact_contexts(block, table, ids) for block in model.context_blocks]
    together = torch.cat(contexts, dim=1)
    rank, width = effective_rank(together), together.size(1)
    figures: Figures = {
        "context_effective_ranks": [effective_rank(each) for each in contexts],
        "context_effective_rank": rank,
        "context_dim": width,
        "context_rank_share": rank / width,
    }
    if len(trained) == len(contexts):
        figures["context_convergence_rates"] = [
            settled_share(block, table, ids, **{key: how[key] for key in ("iterations", "noise", "threshold")})
            for block, how in zip(model.context_blocks, trained, strict=True)
        ]
    return figures


def evaluate_cache(model: Any) -> Figures:
    """Bytes that init_cache allocates for one row, per length and per token, beside the baseline of the same widths."""
    ours = {str(n): model.init_cache(1, n).nbytes for n in CACHE_LENGTHS}
    theirs = {str(n): baseline_cache_bytes(model.config, n) for n in CACHE_LENGTHS}
    return {
        "cache_bytes": ours,
        "cache_bytes_per_token": {n: ours[n] / int(n) for n in ours},
        "baseline_cache_bytes_per_token": {n: theirs[n] / int(n) for n in theirs},
        "cache_saved": {n: 1 - ours[n] / theirs[n] for n in ours},
    }


def evaluate_speed(model: Any, tokens: np.ndarray) -> Figures:
    """Tokens per second of reading a prompt and generating after it, one row, medians; on CUDA also the peak bytes."""
    figures: Figures = defaultdict(dict)
    device = model.head_weight.device
    prepare_decoding(model)
    for n in tqdm(CACHE_LENGTHS, desc="speed", leave=False):
        prompt = torch.from_numpy(np.resize(tokens[:n], n).astype(np.int64))[None].to(device)  # a short text repeated
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        spans = []
        for _ in range(1 + SPEED_REPEATS):
            cache, times = model.init_cache(1, n + DECODE_TOKENS), [time.perf_counter()]
            for token in stream_tokens(model, prompt, cache, 1 + DECODE_TOKENS, 0.0):
                token.item()  # waits for the device
                times.append(time.perf_counter())
            spans.append((times[1] - times[0], times[-1] - times[1]))
        prefill, decode = np.median(spans[1:], axis=0)  # the first warmed up
        figures["prefill_tokens_per_s"][str(n)] = n / prefill
        figures["decode_tokens_per_s"][str(n)] = DECODE_TOKENS / decode
        if device.type == "cuda":
            figures["cuda_peak_bytes"][str(n)] = torch.cuda.max_memory_allocated(device)
    return dict(figures)


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters in all, those that training changes, and those of the embedding tables."""
    every = list(model.parameters())
    trainable = [p for p in every if p.requires_grad]
    embedding = [p for p in every if p.dim() == 2 and len(p) == model.config.vocab_size]
    groups = {"parameters": every, "trainable_parameters": trainable, "embedding_parameters": embedding}
    return {name: sum(p.numel() for p in group) for name, group in groups.items()}


# ------------------------------------------------------------------------------------------------ one model, all runs
def evaluate_model(
    model: Any, val: TokenFile, block_size: int, batch_size: int, trained: list[Any], tasks: Sequence[str] = RUN_TASKS
) -> Figures:
    """The figures of these tasks, of a model on its device; trained: how phase 1 trained its ContextBlocks."""
    model.eval()
    figures: Figures = count_parameters(model)
    if "val" in tasks:
        figures |= evaluate_val(model, val, block_size, batch_size)
        figures |= evaluate_contexts(model, val.tokens, trained) if hasattr(model, "context_blocks") else {}
    if "reversal" in tasks:
        tokenizer = load_tokenizer(val.meta["tokenizer"], val.path.parents[1])
        figures |= evaluate_reversal_curse(model, tokenizer, get_reversal_pairs(), model.head_weight.device)
    if "long" in tasks:
        figures |= evaluate_long(model, val, block_size, batch_size)
    if "cache" in tasks:
        figures |= evaluate_cache(model)
    if "speed" in tasks:
        figures |= evaluate_speed(model, val.tokens)
    return figures


def open_runs(settings: EvalSettings, sources: list[str]) -> tuple[list[Run], TokenFile, int]:
    """The runs, the validation data and the window that they are scored with. Raises InputError if they do not fit."""
    runs = [(source, *load_source(source)) for source in sources]
    configs = [checkpoint["config"] for _, _, checkpoint in runs if checkpoint]
    dataset = settings.dataset or next((config["dataset"] for config in configs), PrepSettings.dataset)
    val = load_tokens(Path(settings.data_dir, dataset), "val")
    folder, tokenizer, ids = val.path.parent, val.meta["tokenizer"], val.meta["n_vocab"]
    trained = [config["block_size"] for config in configs if "block_size" in config]  # phase 1 knows no windows
    block_size = settings.block_size or min([*trained, *(m.config.max_position_embeddings for _, m, _ in runs)])
    for source, model, checkpoint in runs:
        phase = checkpoint["config"]["phase"] if checkpoint else ""
        if checkpoint and (checkpoint["iter_num"] == 0 or phase == "phase1") and not settings.allow_untrained:
            raise InputError(f"{source} was never trained on text; --allow_untrained scores it all the same")
        if (theirs := checkpoint["data"]["tokenizer"] if checkpoint else "neox") != tokenizer:
            origin = "was trained on" if checkpoint else "is Hugging Face's, taken to be of"
            raise InputError(f"{source} {origin} {theirs} tokens, {folder} holds {tokenizer} tokens")
        if ids > (rows := model.config.vocab_size):
            raise InputError(f"{folder} is of {ids} token ids, {source} has {rows} rows")
        if block_size > (limit := model.config.max_position_embeddings):
            raise InputError(f"block_size={block_size} is above {source}'s limit of {limit}")
        if phase == "phase2":
            freeze_contexts(model)  # what is counted as trainable is what was trained
    return runs, val, block_size


def about(source: str, model: Any, checkpoint: dict[str, Any] | None) -> Figures:
    """Which weights a row stands for, and what they were trained on; of Hugging Face's only the former is known."""
    file = Path(source, "ckpt.pt")
    row: Figures = {"run": source, "model": type(model).__name__, "checkpoint": str(file if file.is_file() else source)}
    if checkpoint:
        row |= {name: checkpoint[name] for name in ("tokens_seen", "parents", "commit", "data")}
        row |= {"steps": checkpoint["iter_num"], "seed": checkpoint["config"]["seed"]}
        row["settings"] = {**checkpoint["config"], "model_args": checkpoint["model_args"]}
    return row


def is_as_published(figures: Figures, tolerance: float) -> bool:
    """Whether all published figures were measured and found again; prints how far off they are."""
    off = {name: figures[name] / published - 1 for name, published in PUBLISHED.items() if name in figures}
    rows = [[name, f"{PUBLISHED[name]:g}", f"{figures[name]:.4f}", f"{by:+.2%}"] for name, by in off.items()]
    print("\n" + format_table(["figure", "published", "here", "off"], rows), flush=True)
    return len(off) == len(PUBLISHED) and all(abs(by) <= tolerance for by in off.values())


def main() -> None:
    settings, sources = parse_settings(EvalSettings, sys.argv[1:], takes="RUN [RUN ...]")
    tasks = [name for task in settings.tasks.split(",") if (name := task.strip())]
    if settings.verify:
        sources, tasks = sources or ["EleutherAI/pythia-70m"], sorted({figure.split()[0] for figure in PUBLISHED})
    if not tasks:
        raise InputError(f"--tasks names none: choose from {', '.join(TASKS)}, or tasks of lm-evaluation-harness")
    if not sources:
        raise InputError("name at least one run: python eval.py out/pythia-laptop")
    device = pick_device(settings.device)
    runs, val, block_size = open_runs(settings, sources)
    harness = find_tasks([task for task in tasks if task not in TASKS], TASKS, settings.include_path)
    if "reversal" in tasks:
        load_tokenizer(val.meta["tokenizer"], val.path.parents[1])  # kept; where it is missing, before the work
    (out_dir := Path(settings.out_dir)).mkdir(parents=True, exist_ok=True)
    lengths = np.diff(document_bounds(val)).ravel()
    rows: list[Figures] = []
    first: dict[Any, tuple[str, np.ndarray]] = {}  # of each seed: run, its loss on each document
    for source, model, checkpoint in runs:
        print(f"scoring {source} on {val.path.parent} in windows of {block_size}", file=sys.stderr)
        trained = checkpoint["context_blocks"] if checkpoint else []
        row = about(source, model, checkpoint)
        row |= evaluate_model(model.to(device), val, block_size, settings.batch_size, trained, tasks)
        if (losses := row.pop("document_losses", None)) is not None:
            if first:
                other, theirs = first.get(row.get("seed"), next(iter(first.values())))
                row["against"] = {"run": other, **compare_documents(losses, theirs, lengths)}
            first.setdefault(row.get("seed"), (source, losses))
        row |= harness.score(model, val.meta["tokenizer"], settings.data_dir, block_size, settings.batch_size)
        rows.append(row)
        model.cpu()  # the next one's peak is its own
    results = {"block_size": block_size, "data": str(val.path.parent), "runs": rows}
    print(format_comparison(results), flush=True)  # first: the disk may be full
    write_report(results, out_dir)
    print(f"written to {out_dir / 'report.md'}, with pictures; all figures are in {out_dir / 'results.json'}")
    if settings.verify and not is_as_published(rows[0].get("harness", {}), settings.tolerance):
        raise InputError(f"{sources[0]} is not as published, to {settings.tolerance:.1%}")


if __name__ == "__main__":
    run(main)
