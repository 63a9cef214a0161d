"""The contexts of trained ContextBlocks over a token file: c_t = ContextBlock(c_{t-1}, e_t), c_{-1} = 0.

    python prep.py --stage=contexts --init_from=out/phase1       # phase 2 of train.py makes the cache if it is missing

`plain_loop` is the definition. Lanes of it side by side, each from a little before its own tokens, take seconds where
it takes minutes, and are as exact as float32 is: no further than twice as far from a loop in float64. Of a block that
does not forget where it started the loop is what remains. `window_contexts` needs no cache, for a corpus too large.
"""

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from filelock import FileLock
from pydantic import NonNegativeFloat, PositiveInt
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


# --------------------------------------------------------------------------------------------------- the recurrence


def plain_loop(block: Any, halves: Tensor, ids: Tensor, c: Tensor, contexts: Tensor) -> Tensor:
    """The definition, one token after the other, for L streams at once.

    Token ids (L, T), from the states c (L, E) on, into contexts (L, T, E); returns the last states. halves (V, ...) are
    block.token_half of the embedding table: what a step takes from its token depends on the id alone.
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

    The recurrence forgets where it started, so that after its overlap a lane should be where the one before ends. If
    it is not, it is run again from there.
    """

    def __init__(self, block: Any, table: Tensor, settings: ContextSettings, c: Tensor | None = None) -> None:
        self.block, self.settings = block, settings
        self.halves = block.token_half(table)  # (V, ...)
        self.c = table.new_zeros(1, block.context_dim) if c is None else c  # (1, E), after the last chunk
        self.num_lanes, self.num_run_again, self.num_not_met = 0, 0, 0  # the last: chunks whose lanes did not meet
        self.seam = 0.0  # largest difference left where a lane, or what was run again of it, meets what follows

    def contexts(self, ids: Tensor) -> Tensor:
        """The contexts (n, E) of the next tokens (n,). Raises InputError if they are no numbers."""
        contexts = self.c.new_empty(len(ids), self.c.size(1))
        done = self.in_lanes(ids, contexts)
        before = contexts[done - 1 : done] if done else self.c
        self.c = plain_loop(self.block, self.halves, ids[None, done:], before, contexts[None, done:]).clone()
        if not self.c.isfinite().all():  # once it is not, it never is again
            name = self.settings.init_from or "this run"
            raise InputError(f"{name}: the contexts are not finite, train its ContextBlock again")
        return contexts

    def in_lanes(self, ids: Tensor, contexts: Tensor) -> int:
        """The same for as many tokens as fill the lanes; returns how many, 0 if the lanes do not meet."""
        overlap, tolerance = self.settings.overlap, self.settings.tolerance
        L = min(MAX_LANES, len(ids) // overlap)
        if L < 2:
            return 0
        T = len(ids) // L
        lanes, rows = ids[: L * T].view(L, T), contexts[: L * T].view(L, T, -1)
        starts = self.c.repeat(L, 1)  # (L, E), the states that lanes begin with
        zeros, unkept = torch.zeros_like(starts[1:]), rows[1:, :overlap]  # rows that are written over next
        starts[1:] = plain_loop(self.block, self.halves, lanes[:-1, -overlap:], zeros, unkept)
        plain_loop(self.block, self.halves, lanes, starts, rows)
        self.num_lanes += L
        last_gap, left = math.inf, 0.0
        while True:
            gaps = (rows[:-1, -1] - starts[1:]).abs().amax(dim=1)  # (L - 1,)
            gap = gaps.max().item()
            if gap <= tolerance:
                self.seam = max(self.seam, left, gap)
                return L * T
            if not gap <= last_gap / 2:  # nor if it is no number
                if not self.num_not_met:
                    tqdm.write(f"a difference outlives {T:,} tokens: one token after the other where lanes do not meet")
                self.num_not_met += 1
                return 0
            which = 1 + (gaps > tolerance).nonzero()[:, 0]
            starts[which] = rows[which - 1, -1]
            left = max(left, self.run_again(which, starts[which], lanes, rows))
            last_gap, self.num_run_again = gap, self.num_run_again + len(which)

    def run_again(self, which: Tensor, c: Tensor, lanes: Tensor, rows: Tensor) -> float:
        """Write some lanes anew from the states c, each until it meets what is written; how far off that is at most."""
        met = 0.0
        for t in range(lanes.size(1)):
            c = self.block.step(c, F.embedding(lanes[which, t], self.halves))
            gaps = (c - rows[which, t]).abs().amax(dim=1)
            rows[which, t] = c
            apart = gaps > self.settings.tolerance
            met = max([met, *gaps[~apart].tolist()])
            which, c = which[apart], c[apart]
            if not len(which):
                break
        return met


@torch.no_grad()
def exact_contexts(block: Any, table: Tensor, tokens: Tensor) -> Tensor:
    """The contexts (N, E) that the recurrence from zero gives for tokens (N,), both on the CPU."""
    settings = ContextSettings()
    recurrence = Recurrence(block, table, settings)
    return torch.cat([recurrence.contexts(ids.to(table.device)).cpu() for ids in tokens.split(settings.chunk_tokens)])


@torch.no_grad()
def window_contexts(
    model: Any, tokens: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64], width: int, overlap: int
) -> Tensor:
    """The contexts (B, width, E) of windows that begin at starts (B,), the blocks side by side, without a cache.

    All windows advance in lockstep, each from zero, `overlap` tokens before its first: as exact as what the blocks
    still know of that is small. Where the stream has no so many before, from its start, exactly.
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
def window_error(model: Any, tokens: npt.NDArray[np.uint16], overlap: int) -> float:
    """The largest difference of windows' contexts from the exact ones, at 1,000 places of the first 20,000 tokens."""
    ids = torch.from_numpy(tokens[:20_000].astype(np.int64))
    starts = np.linspace(0, len(ids) - 1, 1000).astype(np.int64)
    exact = [exact_contexts(block, model.embed_in.weight, ids)[starts] for block in model.context_blocks]
    windows = window_contexts(model, tokens, starts, 1, overlap)[:, 0].cpu()
    return (windows - torch.cat(exact, dim=1)).abs().max().item()


# -------------------------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class ContextFile:
    """Contexts of the tokens of one split, as the recurrence from its first token gives them."""

    path: Path
    contexts: npt.NDArray[np.float32]  # a memmap, (number of tokens, E), the blocks side by side


def context_cache(model: Any, file: TokenFile, settings: ContextSettings) -> ContextFile:
    """The contexts that a model's blocks, on the device where they are, give for a token file.

    They lie beside it, and are made unless they are there already. Raises InputError.
    """
    if file.meta["max_id"] >= model.embed_in.num_embeddings:
        raise InputError(f"{file.path} holds token id {file.meta['max_id']}, which the model's embedding does not have")
    shape = (len(file.tokens), sum(block.context_dim for block in model.context_blocks))
    record: dict[str, Any] = {  # all that the numbers depend on; wherever lanes are cut, they meet to the tolerance
        "weights": weights_digest(model),
        "tokens": file.digest,
        "overlap": settings.overlap,
        "tolerance": settings.tolerance,
    }
    fingerprint = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]
    record["source"] = os.path.abspath(settings.init_from)
    path = file.path.with_name(f"contexts_{fingerprint}_{file.path.stem}.bin")
    with FileLock(path.with_name(".contexts.lock")):  # of two at once, the second finds the first one's file
        found = read_record(path.with_suffix(".json")) | {"source": record["source"]}  # whichever run it was made for
        if found == record and path.exists() and path.stat().st_size == 4 * math.prod(shape):
            print(f"reading {path}")
        else:
            stale = stale_records(path, record)
            for old, changed in stale.items():
                print(f"stale: {old.with_suffix('.bin')} is of other {changed}")
            print(f"building {path}", flush=True)
            build_contexts(path, model, file, settings)
            with replacing(path.with_suffix(".json")) as out:
                out.write(json.dumps(record, indent=1).encode())
            for old in stale:  # nothing can ask for them again
                old.unlink()
                old.with_suffix(".bin").unlink(missing_ok=True)
    return ContextFile(path, np.memmap(path, dtype="<f4", mode="r", shape=shape))


def weights_digest(model: Any) -> str:
    """SHA-256 of all weights that contexts are computed with."""
    digest = hashlib.sha256(str(model.context_blocks).encode())  # sizes, epsilons, embed_norm or none
    weights = [weight for block in model.context_blocks for weight in block.state_dict().values()]
    for weight in [*weights, model.embed_in.weight]:
        digest.update(weight.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """What a context file was made from; nothing if that is not known."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def stale_records(path: Path, record: dict[str, Any]) -> dict[Path, str]:
    """Records of contexts of this split and this run that were made before one of the two changed, and which did."""
    records = {old: read_record(old) for old in path.parent.glob(f"contexts_*_{path.stem.rpartition('_')[2]}.json")}
    return {
        old: " and ".join(changed)
        for old, made in records.items()
        if made.get("source") == record["source"]
        and (changed := [what for what in ("weights", "tokens") if made.get(what) != record[what]])
    }


@torch.no_grad()
def build_contexts(path: Path, model: Any, file: TokenFile, settings: ContextSettings) -> None:
    """Append chunk after chunk to a partial file, whose length says where to go on, and rename it when complete."""
    blocks, table, partial = model.context_blocks, model.embed_in.weight, path.with_suffix(".partial")
    widths = [block.context_dim for block in blocks]
    row_bytes, num_tokens, chunk_tokens = 4 * sum(widths), len(file.tokens), settings.chunk_tokens
    for other in set(path.parent.glob(f"contexts_*_{file.path.stem}.partial")) - {partial}:
        other.unlink()  # of a run that was cut off; it would lie there for good
    with partial.open("a+b") as out:
        done = out.tell() // (chunk_tokens * row_bytes) * chunk_tokens
        out.truncate(done * row_bytes)
        needed, free = (num_tokens - done) * row_bytes, shutil.disk_usage(path.parent).free
        if needed > free:
            raise InputError(
                f"{path} needs another {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB of the disk are free"
            )
        out.seek(max(done - 1, 0) * row_bytes)
        last = np.frombuffer(out.read() or bytes(row_bytes), dtype="<f4").copy()  # zero, where the recurrence starts
        states = torch.from_numpy(last).to(table.device)[None].split(widths, dim=1)
        recurrences = [Recurrence(block, table, settings, c) for block, c in zip(blocks, states, strict=True)]
        with tqdm(initial=done, total=num_tokens, unit=" tokens", unit_scale=True, mininterval=1) as bar:
            for start in range(done, num_tokens, chunk_tokens):
                chunk = file.tokens[start : start + chunk_tokens].astype(np.int64)
                ids = torch.from_numpy(chunk).to(table.device)
                out.write(torch.cat([each.contexts(ids) for each in recurrences], dim=1).cpu().numpy().data)
                bar.update(len(ids))
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
    for each in recurrences:
        again = f"{each.num_run_again} of {each.num_lanes:,} lanes run again"
        print(f"largest difference left at a seam {each.seam:.1e}, {again}, {each.num_not_met} chunks without lanes")
