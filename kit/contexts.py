"""The context cache: what the trained ContextBlocks of a model make of every token of a token file.

    python prep.py --stage=contexts --init_from=out/phase1       # phase 2 of train.py makes it itself if it is missing

The recurrence c_t = ContextBlock(c_{t-1}, e_t) runs exactly and in order over the whole file. Lanes of it run side by
side, each from a little before its own tokens, until they meet; so it takes seconds where a loop over tokens takes
minutes, and equals it. Of a block that does not forget where it started, the loop is what remains.
"""

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from kit.files import InputError, replacing
from kit.tokens import TokenFile

EXACT = 1e-5  # what a context may differ by from the recurrence run token by token


@dataclass(frozen=True)
class ContextSettings:
    """How contexts are computed, and from what."""

    init_from: str = ""  # the run of a trained ContextBlock, such as out/phase1
    method: Literal["lanes", "sequential"] = "lanes"  # parts of the stream in lockstep, or token by token
    lanes: int = 128  # parts of a chunk that advance in lockstep
    overlap: int = 100  # tokens before its first that a lane begins at, to forget where it started
    tolerance: float = 1e-6  # a lane whose state is further from the end of the lane before is run again
    chunk_tokens: int = 100_000  # tokens on the device at a time, and what an interruption loses at most
    context_stride: int = 1  # keep one of so many, that much less disk; phase 2 runs the others again


@dataclass(frozen=True)
class ContextFile:
    """Contexts of the tokens of one split, as the recurrence from its first token gives them."""

    path: Path
    fingerprint: str  # of all that the numbers depend on
    stride: int  # S: kept are those of tokens S - 1, 2 S - 1, ...; of every token with S = 1
    contexts: npt.NDArray[np.float32]  # a memmap, (number of tokens // S, E), the blocks side by side


def context_cache(model: Any, file: TokenFile, settings: ContextSettings) -> ContextFile:
    """The contexts that a model's blocks, on the device where they are, give for a token file.

    They lie beside it, and are made unless they are there already. Raises InputError.
    """
    if file.meta["max_id"] >= model.embed_in.num_embeddings:
        raise InputError(f"{file.path} holds token id {file.meta['max_id']}, which the model's embedding does not have")
    if (stride := settings.context_stride) > len(file.tokens):
        raise InputError(f"context_stride={stride} is above the {len(file.tokens)} tokens of {file.path}")
    shape = [len(file.tokens) // stride, sum(block.context_dim for block in model.context_blocks)]
    record = {
        "weights": weights_digest(model),
        "tokens": file.digest,
        "tolerance": settings.tolerance,
        "overlap": settings.overlap,
        "stride": stride,
        "shape": shape,
        "source": os.path.abspath(settings.init_from),
    }
    # where lanes and chunks are cut is not among it: wherever that is, they meet to the tolerance
    made_with = [record[key] for key in ("weights", "tokens", "tolerance", "overlap", "stride")]
    fingerprint = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:8]
    path = file.path.with_name(f"contexts_{fingerprint}_{file.path.stem}.bin")
    with FileLock(path.with_name(".contexts.lock")):  # of two at once, the second finds the first one's file
        if is_complete(path, record):
            print(f"reading {path}")
        else:
            stale = stale_records(path, record)
            for old, what in stale.items():
                print(f"stale: {old.with_suffix('.bin')} is of other {what}")
            print(f"building {path}", flush=True)
            build_contexts(path, model, file, settings)
            with replacing(path.with_suffix(".json")) as out:
                out.write(json.dumps(record, indent=1).encode())
            for old in stale:  # nothing can ask for them again
                old.unlink()
                old.with_suffix(".bin").unlink(missing_ok=True)
    return ContextFile(path, fingerprint, stride, np.memmap(path, dtype="<f4", mode="r", shape=tuple(shape)))


def weights_digest(model: Any) -> str:
    """SHA-256 of all that contexts are computed with."""
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


def is_complete(path: Path, record: dict[str, Any]) -> bool:
    """Whether the file is there, whole, and made from what the record says, whichever run that came from."""
    same = {**read_record(path.with_suffix(".json")), "source": record["source"]} == record
    return same and path.exists() and path.stat().st_size == 4 * math.prod(record["shape"])


def stale_records(path: Path, record: dict[str, Any]) -> dict[Path, str]:
    """Records of contexts of this split and this run that were made before one of the two changed, and which did."""
    split = path.stem.rpartition("_")[2]
    others = {old: read_record(old) for old in path.parent.glob(f"contexts_*_{split}.json") if old.stem != path.stem}
    return {
        old: "tokens" if made["weights"] == record["weights"] else "weights"
        for old, made in others.items()
        if made.get("source") == record["source"] and any(made[key] != record[key] for key in ("weights", "tokens"))
    }


@torch.no_grad()
def build_contexts(path: Path, model: Any, file: TokenFile, settings: ContextSettings) -> None:
    """Append chunk after chunk to a partial file, whose length says where to go on, and rename it when complete."""
    blocks, table = model.context_blocks, model.embed_in.weight
    widths = [block.context_dim for block in blocks]
    row_bytes, num_tokens, stride = 4 * sum(widths), len(file.tokens), settings.context_stride
    chunk_tokens = settings.chunk_tokens // stride * stride
    for other in set(path.parent.glob(f"contexts_*_{file.path.stem}.partial")) - {path.with_suffix(".partial")}:
        other.unlink()  # of a run that was cut off; it would lie there for good
    with path.with_suffix(".partial").open("a+b") as out:
        done = out.tell() * stride // (chunk_tokens * row_bytes) * chunk_tokens
        out.truncate(done // stride * row_bytes)
        check_space(path, (num_tokens - done) // stride * row_bytes)
        states = last_row(out, row_bytes).to(table.device).split(widths)
        first = torch.from_numpy(file.tokens[:chunk_tokens].astype(np.int64)).to(table.device)
        rows = table.new_empty(min(chunk_tokens, num_tokens), sum(widths))  # of one chunk
        columns = rows.split(widths, dim=1)
        block_runs = [BlockRun(*parts, table, settings) for parts in zip(blocks, columns, strict=True)]
        for block_run, state in zip(block_runs, states, strict=True):
            if done:  # what the first chunk shows decides over all others, interrupted or not
                block_run.fill(first)
            block_run.state = state
        with tqdm(initial=done, total=num_tokens, unit=" tokens", unit_scale=True, mininterval=1) as bar:
            for start in range(done, num_tokens, chunk_tokens):
                chunk = file.tokens[start : start + chunk_tokens].astype(np.int64)
                ids = torch.from_numpy(chunk).to(table.device)
                for block_run in block_runs:
                    block_run.fill(ids)
                    if start == done and stride > 1:
                        block_run.check_stride(ids, stride)
                out.write(rows[stride - 1 : len(chunk) : stride].cpu().contiguous().numpy().data)
                bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    path.with_suffix(".partial").replace(path)
    for block_run in block_runs:
        if block_run.num_lanes:
            print(block_run.summary())


def check_space(path: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise InputError(f"{path} needs another {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB of the disk are free")


def last_row(file: BinaryIO, row_bytes: int) -> Tensor:
    """The contexts of the last token in a file; zeros, where the recurrence starts, if it is empty."""
    file.seek(max(file.seek(0, os.SEEK_END) - row_bytes, 0))
    return torch.from_numpy(np.frombuffer(file.read() or bytes(row_bytes), dtype="<f4").copy())


class BlockRun:
    """One ContextBlock on its way through a token file.

        tokens of a chunk   0 -------------- 800 ------------- 1600 ------------- 2400
        lane 0              |--------------->
        lane 1                       0 . . . |---------------->        . . . its overlap, from zero, not kept
        lane 2                                         0 . . . |---------------->

    The recurrence forgets where it started, so that after its overlap a lane should be where the one before ends. If
    it is not, it is run again from there.
    """

    def __init__(self, block: Any, rows: Tensor, table: Tensor, settings: ContextSettings) -> None:
        self.block, self.settings = block, settings
        self.state = table.new_zeros(block.context_dim)  # (E,), after the last chunk
        self.rows = rows  # (chunk_tokens, E), of the current chunk
        self.halves = block.token_half(table)  # (V, ...), of every token that there is
        self.forgets: bool | None = None  # the first chunk shows it
        self.num_lanes, self.num_run_again = 0, 0
        self.largest_left = 0.0  # of the differences where one lane, or what was run again of it, meets the next

    def fill(self, ids: Tensor) -> None:
        """The contexts of the next tokens (n,), into the first n rows."""
        n, done = len(ids), 0
        if self.settings.method == "lanes" and self.forgets is not False:
            done = self.in_lanes(ids)
        before = self.rows[done - 1] if done else self.state
        self.state = self.in_order(ids[None, done:], before[None], self.rows[None, done:n])[0]
        if not self.state.isfinite().all():  # once it is not, it never is again
            raise InputError(f"{self.settings.init_from}: the contexts are not finite, train its ContextBlock again")

    def in_order(self, ids: Tensor, c: Tensor, rows: Tensor) -> Tensor:
        """The definition, one token after the other: ids (L, T) from the states c (L, E) on, into rows (L, T, E).

        Returns the last states.
        """
        for t in range(ids.size(1)):
            c = self.block.step(c, F.embedding(ids[:, t], self.halves))
            rows[:, t] = c
        return c.clone()

    def in_lanes(self, ids: Tensor) -> int:
        """The same, all lanes at once, for as many tokens as fill them; returns how many, 0 if seams do not meet."""
        overlap = self.settings.overlap
        L = min(self.settings.lanes, len(ids) // overlap)
        if L < 2:
            return 0
        T = len(ids) // L
        lanes, rows = ids[: L * T].view(L, T), self.rows[: L * T].unflatten(0, (L, T))
        zeros = self.state.new_zeros(L - 1, self.block.context_dim)
        begun = self.in_order(lanes[:-1, -overlap:], zeros, rows[1:, :overlap])  # rows that are written over next
        starts = torch.cat([self.state[None], begun])  # (L, E)
        self.in_order(lanes, starts, rows)
        self.num_lanes += L
        has_met = self.close_seams(lanes, starts, rows)
        if self.forgets is None:
            self.forgets = has_met
        if not has_met:
            stretch = "this chunk" if self.forgets else "the whole stream"
            tqdm.write(f"a difference outlives {T:,} tokens: one token after the other over {stretch}")
        return L * T * has_met

    def close_seams(self, lanes: Tensor, starts: Tensor, rows: Tensor) -> bool:
        """Run lanes again until each starts from where the one before ends; False if a round brings them no closer."""
        last_gap = math.inf
        while True:
            gaps = (rows[:-1, -1] - starts[1:]).abs().amax(dim=1)  # (L - 1,)
            gap = gaps.max().item()
            if gap <= self.settings.tolerance:
                self.largest_left = max(self.largest_left, gap)
                return True
            if not gap <= last_gap / 2:  # and where it is no number
                return False
            apart = (gaps > self.settings.tolerance).nonzero()[:, 0]
            starts[apart + 1] = rows[apart, -1]
            self.run_again(apart + 1, starts[apart + 1], lanes, rows)
            self.num_run_again += len(apart)
            last_gap = gap

    def run_again(self, which: Tensor, c: Tensor, lanes: Tensor, rows: Tensor) -> None:
        """Write some lanes anew from the states c, each until it meets what is written."""
        for t in range(lanes.size(1)):
            c = self.block.step(c, F.embedding(lanes[which, t], self.halves))
            gaps = (c - rows[which, t]).abs().amax(dim=1)
            apart = gaps > self.settings.tolerance
            rows[which, t] = c
            which, c = which[apart], c[apart]
            if not apart.all():
                self.largest_left = max(self.largest_left, gaps[~apart].max().item())
            if not len(which):
                return

    def check_stride(self, ids: Tensor, stride: int) -> None:
        """Raises InputError unless from each stored state of a chunk (n,) the recurrence comes to the next again."""
        lanes = ids[: len(ids) // stride * stride].view(-1, stride)
        rows = self.rows[: lanes.numel()].unflatten(0, lanes.shape)  # what lies between stored states is not kept
        stored = rows[:, -1].clone()
        again = self.in_order(lanes[1:], stored[:-1], rows[1:])
        rows[:, -1] = stored
        if ((again - stored[1:]).abs() > EXACT).any():
            raise InputError(
                f"{self.settings.init_from}: its ContextBlock magnifies rounding, so that contexts run again from one "
                f"in {stride} would be others: keep them all, --context_stride=1"
            )

    def summary(self) -> str:
        again = f"{self.num_run_again} of {self.num_lanes:,} lanes run again"
        return f"largest difference left at a seam {self.largest_left:.1e}, {again}"


class ContextReader:
    """The contexts of any positions of a token file: read from its cache, or run again from those that it keeps.

        kept        c_{-1} = 0       c_{S-1}          c_{2S-1}         c_{3S-1}
        wanted             [ . . . . . . . . . . . . . . . . . . ]
        run again   ----------------->
                                     ----------------->
                                                      ------------>

    Segments of S tokens with a wanted position are lanes in lockstep, each as far as its last one: S steps at most,
    however many and however long the windows.
    """

    @torch.no_grad()
    def __init__(self, model: Any, file: TokenFile, cache: ContextFile) -> None:
        self.file, self.cache = file, cache
        self.blocks, table = model.context_blocks, model.embed_in.weight
        self.device = table.device
        self.halves = [block.token_half(table) for block in self.blocks] if cache.stride > 1 else []  # (V, ...) each

    def at(self, positions: npt.NDArray[np.int64]) -> Tensor:
        """The contexts (..., E) of positions (...), on the model's device."""
        if self.cache.stride == 1:
            return torch.from_numpy(self.cache.contexts[positions]).to(self.device)
        return self.run_again(positions.ravel()).view(*positions.shape, -1)

    @torch.no_grad()
    def run_again(self, positions: npt.NDArray[np.int64]) -> Tensor:
        """Positions (P,) -> (P, E)."""
        stride, widths = self.cache.stride, [block.context_dim for block in self.blocks]
        segments, lanes = np.unique(positions // stride, return_inverse=True)  # (L,), (P,)
        offsets = positions % stride
        last = np.zeros_like(segments)
        np.maximum.at(last, lanes, offsets)
        longest_first = np.argsort(-last)  # so that the lanes that still run are the first ones
        segments, lanes = segments[longest_first], np.argsort(longest_first)[lanes]
        T = int(last.max()) + 1
        running = [int((last >= t).sum()) for t in range(T)]

        places = segments[:, None] * stride + np.arange(T)
        tokens = self.file.tokens[np.minimum(places, len(self.file.tokens) - 1)].astype(np.int64)
        kept = self.cache.contexts[segments - 1]
        kept[segments == 0] = 0
        order, counts = np.argsort(offsets), np.bincount(offsets).tolist()
        ids, starts, wanted, lane = (torch.from_numpy(x).to(self.device) for x in (tokens, kept, order, lanes[order]))
        steps = list(zip(running, ids.unbind(1), wanted.split(counts), lane.split(counts), strict=True))

        contexts = starts.new_empty(len(positions), sum(widths))
        columns = zip(self.blocks, self.halves, starts.split(widths, 1), contexts.split(widths, 1), strict=True)
        for block, halves, c, out in columns:
            for n, tokens_t, wanted_t, lane_t in steps:
                c = block.step(c[:n], F.embedding(tokens_t[:n], halves))
                out[wanted_t] = c[lane_t]
        return contexts


@torch.no_grad()
def exact_contexts(block: Any, table: Tensor, tokens: Tensor) -> Tensor:
    """The contexts (N, E) that the recurrence from zero gives for tokens (N,), both on the CPU."""
    making = ContextSettings()
    contexts = torch.empty(len(tokens), block.context_dim)
    rows = table.new_empty(making.chunk_tokens, block.context_dim)
    block_run = BlockRun(block, rows, table, making)
    for ids, out in zip(tokens.split(making.chunk_tokens), contexts.split(making.chunk_tokens), strict=True):
        block_run.fill(ids.to(table.device))
        out.copy_(rows[: len(ids)])
    return contexts
