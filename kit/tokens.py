"""Token files, and which of their tokens a training step sees: windows in random order, or documents in their own.

Where a step's windows begin is a function of the seed and of the step alone: nothing of it has to be saved.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kit.files import InputError, refusing, sha256_of
from kit.runs import World

SPLITS = ("train", "val")
DATASETS = ("mini", "pile", "pile10k", "wikitext2", "ultrachat")  # that prep.py knows by name
INDEX_DTYPE = np.dtype([("start", "<i8"), ("subset", "<i2")])  # position of a document's leading end-of-text token
VERIFIED_BYTES = 2**30  # larger token files are not hashed every time they are opened: a second's work
REMAKE = "make it again with prep.py and --overwrite=True"


@dataclass(frozen=True)
class TokenFile:
    """One split of a prepared set."""

    path: Path
    meta: dict[str, Any]  # meta.json
    tokens: np.ndarray  # uint16, a memmap, (number of tokens,)

    @property
    def digest(self) -> str:
        """SHA-256 of the token file, as meta.json has it."""
        return str(self.meta["files"][self.path.name]["sha256"])

    @cached_property
    def doc_index(self) -> np.ndarray:
        """A memmap with a record per document: `start`, where its leading end-of-text token is, and `subset`."""
        path = self.path.with_name(f"{self.path.stem}_doc_index.npy")
        with refusing(f"{path} is no document index", REMAKE, (ValueError, EOFError)):  # of pickled objects, say
            return np.load(path, mmap_mode="r").view(INDEX_DTYPE)


def load_tokens(folder: str | Path, split: str) -> TokenFile:
    """A split, 'train' or 'val', mapped into memory. Raises InputError if it is missing or not as meta.json has it."""
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        dataset = folder.name.removesuffix("-gpt2")
        command = f"python prep.py --dataset={dataset}" + (" --tokenizer=gpt2" if dataset != folder.name else "")
        command += f" --data_dir={folder.parent}" + ("" if dataset in DATASETS else " --files=GLOB")
        raise InputError(f"{folder} holds no token files; make them with: {command}")
    paths = [folder / f"{split}.bin", folder / f"{split}_doc_index.npy"]
    with refusing(f"{folder / 'meta.json'} cannot be read", REMAKE, (ValueError, KeyError, TypeError)):
        meta = json.loads((folder / "meta.json").read_text())
        files = [(path, meta["files"][path.name]["bytes"], meta["files"][path.name]["sha256"]) for path in paths]
        if not (isinstance(meta["n_vocab"], int) and meta["tokenizer"] in ("neox", "gpt2")):
            raise ValueError("n_vocab or tokenizer")
    for path, size, digest in files:
        is_as_long = path.exists() and path.stat().st_size == size
        if not is_as_long or (size <= VERIFIED_BYTES and sha256_of(path) != digest):
            raise InputError(f"{path} does not match its meta.json: {REMAKE}")
    return TokenFile(paths[0], meta, np.memmap(paths[0], dtype="<u2", mode="r"))


def document_bounds(data: TokenFile) -> np.ndarray:
    """Where each document's leading end-of-text token stands, and where its closing one, (documents, 2)."""
    starts = data.doc_index["start"]
    return np.stack([starts, np.append(starts[1:], len(data.tokens) - 1)], axis=1)


@dataclass
class Windows:
    """Training windows at uniformly random places, with replacement: a step's from a generator of (seed, step).

    A step's rows are shared out among the processes, and go through the model batch_size at a time.
    """

    data: TokenFile
    block_size: int
    rows: int
    batch_size: int
    seed: int
    world: World
    contexts: Callable[[np.ndarray, int], Tensor] | None = None  # where windows begin, block_size -> (rows, T, E)

    def __post_init__(self) -> None:
        count = len(self.data.tokens)
        if count <= self.block_size:
            raise InputError(f"{count} tokens in the training file: too few for block_size={self.block_size}")
        self.micro_steps = -(-self.rows // self.world.size // self.batch_size)

    def starts(self, step: int) -> np.ndarray:
        """Where in the token file the windows of a step begin, (rows,)."""
        places = len(self.data.tokens) - self.block_size
        return np.random.default_rng([self.seed, step]).integers(places, size=self.rows)

    def batch(self, step: int, micro: int) -> tuple[dict[str, Any], float]:
        """The model's arguments for a micro-batch, and its share of this process's rows."""
        mine = np.split(self.starts(step), self.world.size)[self.world.rank]
        starts = mine[micro * self.batch_size : (micro + 1) * self.batch_size]
        batch = window_batch(self.data.tokens, starts, self.block_size, self.world.device)
        if self.contexts is not None:
            batch["contexts"] = self.contexts(starts, self.block_size)
        return batch, len(starts) / len(mine)


@dataclass(kw_only=True)
class Documents(Windows):
    """Stretches of documents, walked window by window: a row of a step goes on where it was in the step before.

    The model's memory goes with it, its gradient does not (truncated backpropagation). All rows begin and end together.
    """

    tokens_per_doc: int
    init_memory: Callable[[int], Any]  # number of rows -> an empty memory

    def __post_init__(self) -> None:
        super().__post_init__()
        length, bounds = self.tokens_per_doc, document_bounds(self.data)
        long = bounds[bounds[:, 1] - bounds[:, 0] >= length]
        if not len(long):
            raise InputError(f"no training document has tokens_per_doc={length} tokens")
        self.begins = np.concatenate([np.arange(start, end - length + 1, length) for start, end in long])
        self.windows_each = self.tokens_per_doc // self.block_size
        self.memories: dict[int, Any] = {}  # by micro-batch
        count = len(self.begins)  # an epoch's order is drawn once, not for every micro-batch
        self.order = lru_cache(2)(lambda epoch: np.random.default_rng([self.seed, epoch]).permutation(count))

    def starts(self, step: int) -> np.ndarray:
        turn, window = divmod(step, self.windows_each)
        epochs, places = np.divmod(turn * self.rows + np.arange(self.rows), len(self.begins))
        chosen = [self.order(epoch)[place] for epoch, place in zip(epochs, places, strict=True)]
        return self.begins[chosen] + window * self.block_size

    def batch(self, step: int, micro: int) -> tuple[dict[str, Any], float]:
        batch, share = super().batch(step, micro)
        if step % self.windows_each == 0:
            self.memories[micro] = self.init_memory(len(batch["idx"]))
        for tensor in self.memories[micro].tensors():
            tensor.detach_()  # the backward pass of the step before is done
        return {**batch, "cache": self.memories[micro]}, share

    def state_dict(self) -> dict[str, Tensor]:
        """The memories of all processes' rows, none before the first step."""
        parts = zip(*(self.memories[micro].tensors() for micro in sorted(self.memories)), strict=True)
        return {str(i): self.world.gather(torch.cat(part).detach()) for i, part in enumerate(parts)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        mine = [rows.chunk(self.world.size)[self.world.rank].split(self.batch_size) for rows in state.values()]
        for micro, part in enumerate(zip(*mine, strict=True)):
            self.memories[micro] = self.init_memory(len(part[0]))
            for tensor, saved in zip(self.memories[micro].tensors(), part, strict=True):
                tensor.copy_(saved)


def window_batch(tokens: np.ndarray, starts: np.ndarray, block_size: int, device: torch.device) -> dict[str, Tensor]:
    """idx and targets (B, T) of the windows that begin at starts."""
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    rows = rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)
    return {"idx": rows[:, :-1], "targets": rows[:, 1:]}
