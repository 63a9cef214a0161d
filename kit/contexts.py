"""The contexts of trained ContextBlocks over a token file: c_t = ContextBlock(c_{t-1}, e_t), c_{-1} = 0.

    python prep.py --stage=contexts --init_from=out/phase1       # phase 2 of train.py makes the cache if it is missing

`plain_loop` is the definition. Lanes of it side by side, each from a little before its own tokens, take seconds where
it takes minutes, and are as exact as float32 is: no further than twice as far from a loop in float64.
`window_contexts` needs no cache, for a corpus too large.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from pydantic import NonNegativeFloat, PositiveInt
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from kit.files import InputError, replacing
from kit.tokens import TokenFile

MAX_LANES = 128  # lanes of a chunk that advance in lockstep


@dataclass(frozen=True)
class ContextSettings:
    """How contexts are computed, and from what."""

    init_from: str = ""  # the run of a trained ContextBlock, such as out/phase1
    overlap: PositiveInt = 100  # tokens before its first that a lane begins at, to forget where it started
    tolerance: NonNegativeFloat = 1e-6  # a lane whose state is further from the end of the lane before is run again
    chunk_tokens: PositiveInt = 100_000  # tokens on the device at a time, and what an interruption loses at most


def plain_loop(block: Any, halves: Tensor, ids: Tensor, c: Tensor, contexts: Tensor) -> Tensor:
    """The definition, one token after the other: ids (L, T), from states c (L, E) on, into contexts (L, T, E).

    Returns the last states. halves (V, ...), block.token_half of the table: what a step takes from a token, by its id.
    """
    for t in range(ids.size(1)):
        c = contexts[:, t] = block.step(c, F.embedding(ids[:, t], halves))
    return c


class Recurrence:
    """One ContextBlock on its way through a token file, chunk after chunk.

        tokens of a chunk   0 -------------- 800 ------------- 1600 ------------- 2400
        lane 0              |--------------->
        lane 1                       0 . . . |---------------->        . . . its overlap, from zero, not kept
        lane 2                                         0 . . . |---------------->

    The recurrence forgets where it started, so that after its overlap a lane should be where the one before ends. A
    lane that is not is run again from there until it meets what is written; to its end, if the block does not forget.
    """

    def __init__(self, block: Any, table: Tensor, settings: ContextSettings, c: Tensor | None = None) -> None:
        self.block, self.settings = block, settings
        self.halves = block.token_half(table)  # (V, ...)
        self.c = table.new_zeros(1, block.context_dim) if c is None else c  # (1, E), after the last chunk
        self.num_lanes, self.num_run_again, self.num_whole = 0, 0, 0  # the last: how often to the lane's end
        self.seam = 0.0  # largest difference left where a lane, or what was run again of it, meets what follows

    def contexts(self, ids: Tensor) -> Tensor:
        """The contexts (n, E) of the next tokens (n,). Raises InputError if they are no numbers."""
        block, halves, overlap = self.block, self.halves, self.settings.overlap
        L = min(MAX_LANES, max(len(ids) // overlap, 1))
        T = len(ids) // L
        contexts = self.c.new_empty(len(ids), self.c.size(1))
        lanes, rows = ids[: L * T].view(L, T), contexts[: L * T].view(L, T, -1)
        starts = self.c.repeat(L, 1)  # (L, E), the states that lanes begin with
        unkept = rows[1:, :overlap]  # written over next
        starts[1:] = plain_loop(block, halves, lanes[:-1, -overlap:], torch.zeros_like(starts[1:]), unkept)
        plain_loop(block, halves, lanes, starts, rows)
        numbers = torch.arange(1, L, device=ids.device)
        for which in (numbers, *numbers.split(1)):  # side by side; then in order, where the lane before ends elsewhere
            self.run_again(lanes, rows, starts, which)
        self.num_lanes += L
        self.c = plain_loop(block, halves, ids[None, L * T :], rows[-1, -1:], contexts[None, L * T :]).clone()
        if not torch.cat([rows[:, -1], self.c]).isfinite().all():  # once one is not, none is to the end of its lane
            raise InputError(f"{self.settings.init_from or 'this run'}: the contexts are not finite, train it again")
        return contexts

    def run_again(self, lanes: Tensor, rows: Tensor, starts: Tensor, which: Tensor) -> None:
        """Write lanes `which` (l,) anew from where the lane before ends, each until it meets what is written."""
        c, t = rows[which - 1, -1], 0
        apart = self.apart(c, starts[which])
        starts[which] = c
        self.num_run_again += int(apart.sum())
        while apart.any() and t < lanes.size(1):
            which, c = which[apart], c[apart]
            c = self.block.step(c, F.embedding(lanes[which, t], self.halves))
            apart = self.apart(c, rows[which, t])
            rows[which, t] = c
            t += 1
        self.num_whole += int(apart.sum())

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """Which (l,) of the states a and b (l, E) have not met; the seam keeps how well the others have."""
        gap = (a - b).abs().amax(dim=1)
        self.seam = max(0.0, self.seam, *gap[gap <= self.settings.tolerance].tolist())
        return gap > self.settings.tolerance


@torch.no_grad()
def exact_contexts(block: Any, table: Tensor, tokens: Tensor) -> Tensor:
    """The contexts (N, E) that the recurrence from zero gives for tokens (N,), both on the CPU."""
    settings = ContextSettings()
    recurrence = Recurrence(block, table, settings)
    return torch.cat([recurrence.contexts(ids.to(table.device)).cpu() for ids in tokens.split(settings.chunk_tokens)])


@torch.no_grad()
def window_contexts(model: Any, tokens: np.ndarray, starts: np.ndarray, width: int, overlap: int) -> Tensor:
    """The contexts (B, width, E) of windows that begin at starts (B,), without a cache, the blocks side by side.

    All advance in lockstep from zero, `overlap` tokens before the window; from the stream's start, exactly, if nearer.
    """
    table, widths = model.embed_in.weight, [block.context_dim for block in model.context_blocks]
    places = starts[:, None] + np.arange(-overlap, width)  # (B, overlap + width)
    has_begun = torch.from_numpy(places >= 0).to(table.device)[..., None]
    ids = torch.from_numpy(tokens[places.clip(0)].astype(np.int64)).to(table.device)
    distinct, rows = ids.unique(return_inverse=True)
    contexts = table.new_empty(len(starts), width, sum(widths))
    for block, out in zip(model.context_blocks, contexts.split(widths, dim=2), strict=True):
        halves, c = block.token_half(table[distinct]), torch.zeros_like(out[:, 0])
        for t in range(overlap + width):
            c = block.step(c, F.embedding(rows[:, t], halves)) * has_begun[:, t]
            if t >= overlap:
                out[:, t - overlap] = c
    return contexts


@torch.no_grad()
def window_error(model: Any, tokens: np.ndarray, overlap: int) -> float:
    """The largest difference of windows' contexts from the exact ones, at 1,000 places of the first 20,000 tokens."""
    ids = torch.from_numpy(tokens[:20_000].astype(np.int64))
    starts = np.linspace(0, len(ids) - 1, 1000).astype(np.int64)
    exact = [exact_contexts(block, model.embed_in.weight, ids)[starts] for block in model.context_blocks]
    windows = window_contexts(model, tokens, starts, 1, overlap)[:, 0].cpu()
    return (windows - torch.cat(exact, dim=1)).abs().max().item()


def context_cache(model: Any, file: TokenFile, settings: ContextSettings) -> np.memmap:
    """The contexts (number of tokens, E) of a token file, blocks side by side; made unless they lie beside it.

    Raises InputError if a token has no embedding, or the contexts are not finite.
    """
    if (ids := file.meta["n_vocab"]) > (rows := model.embed_in.num_embeddings):
        raise InputError(f"{file.path} is of {ids} token ids, the model has {rows} rows")
    # all that the numbers depend on; wherever lanes are cut, they meet to the tolerance
    record: dict[str, Any] = {"weights": weights_digest(model), "tokens": file.digest}
    record |= {"overlap": settings.overlap, "tolerance": settings.tolerance}
    fingerprint = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]
    record["source"] = os.path.abspath(settings.init_from)
    path = file.path.with_name(f"contexts_{fingerprint}_{file.path.stem}.bin")
    shape = (len(file.tokens), sum(block.context_dim for block in model.context_blocks))
    with FileLock(path.with_name(".contexts.lock")):  # of two at once, the second finds the first one's file
        if path.exists() and path.stat().st_size == 4 * shape[0] * shape[1]:
            print(f"reading {path}")
        else:
            remove_stale(path, record)
            with replacing(path.with_suffix(".json")) as out:  # first, so that half a cache can be told to be stale
                out.write(json.dumps(record, indent=1).encode())
            print(f"building {path}", flush=True)
            build_contexts(path, model, file, settings)
    return np.memmap(path, dtype="<f4", mode="r", shape=shape)


def freeze_contexts(model: Any) -> None:
    """Phase 2 trains all but what the contexts were computed with."""
    for module in (*model.context_blocks, model.embed_in):
        module.requires_grad_(False)


def weights_digest(model: Any) -> str:
    """SHA-256 of all weights that contexts are computed with."""
    modules = torch.nn.ModuleList([*model.context_blocks, model.embed_in])  # str: sizes, epsilons, embed_norm or none
    return hashlib.sha256(str(modules).encode() + save(modules.state_dict())).hexdigest()


def remove_stale(path: Path, record: dict[str, Any]) -> None:
    """Remove what nothing can ask for again: contexts of this split and run made before weights or tokens changed."""
    for old in path.parent.glob(f"contexts_*_{path.stem.rpartition('_')[2]}.json"):
        try:
            made = dict(json.loads(old.read_text()))
        except (OSError, ValueError, TypeError):  # damaged, of whatever it was made
            continue
        if made.get("source") == record["source"] and any(made.get(k) != record[k] for k in ("weights", "tokens")):
            print(f"stale: {old.with_suffix('.bin')} is of other weights or tokens")
            for suffix in (".bin", ".partial", ".json"):
                old.with_suffix(suffix).unlink(missing_ok=True)


@torch.no_grad()
def build_contexts(path: Path, model: Any, file: TokenFile, settings: ContextSettings) -> None:
    """Append chunk after chunk to a partial file, whose length says where to go on, and rename it when complete."""
    blocks, table, partial = model.context_blocks, model.embed_in.weight, path.with_suffix(".partial")
    widths = [block.context_dim for block in blocks]
    row_bytes, num_tokens, chunk_tokens = 4 * sum(widths), len(file.tokens), settings.chunk_tokens
    with partial.open("a+b") as out:
        done = out.tell() // (chunk_tokens * row_bytes) * chunk_tokens
        out.truncate(done * row_bytes)
        needed, free = (num_tokens - done) * row_bytes, shutil.disk_usage(path.parent).free
        if needed > free:
            raise InputError(f"{path} needs another {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB of the disk are free")
        out.seek(max(done - 1, 0) * row_bytes)
        last = np.frombuffer(out.read() or bytes(row_bytes), dtype="<f4").copy()  # zero, where the recurrence starts
        states = torch.from_numpy(last).to(table.device)[None].split(widths, dim=1)
        recurrences = [Recurrence(block, table, settings, c) for block, c in zip(blocks, states, strict=True)]
        with tqdm(initial=done, total=num_tokens, unit=" tokens", unit_scale=True, mininterval=1) as bar:
            for start in range(done, num_tokens, chunk_tokens):
                ids = torch.from_numpy(file.tokens[start : start + chunk_tokens].astype(np.int64)).to(table.device)
                out.write(torch.cat([each.contexts(ids) for each in recurrences], dim=1).cpu().numpy().data)
                bar.update(len(ids))
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
    for each in recurrences:
        again = f"{each.num_run_again:,} times a lane was run again, {each.num_whole:,} times to its end"
        print(f"{each.num_lanes:,} lanes, largest difference left at a seam {each.seam:.1e}, {again}")
