"""Token files, and which of their tokens a training step sees: windows in random order, or documents in their own.

Where a step's windows begin is a function of the seed and of the step alone: nothing of it has to be saved for a run to
go on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kit.files import InputError, sha256_of
from kit.runs import World

SPLITS = ("train", "val")
DATASETS = ("mini", "pile", "pile10k", "wikitext2", "ultrachat")  # that prep.py knows by name
TOKENIZERS = ("neox", "gpt2")
INDEX_DTYPE = np.dtype([("start", "<i8"), ("subset", "<i2")])  # position of a document's leading end-of-text token
VERIFIED_BYTES = 2**30  # larger token files are not hashed every time they are opened: a second's work
REMAKE = "make it again with prep.py and --overwrite=True"


# ------------------------------------------------------------------------------------------------- a token file


@dataclass(frozen=True)
class TokenFile:
    """One split of a prepared set."""

    path: Path
    meta: dict[str, Any]  # meta.json
    tokens: npt.NDArray[np.uint16]  # a memmap, (number of tokens,)

    @property
    def digest(self) -> str:
        """SHA-256 of the token file, as meta.json has it."""
        return str(self.meta["files"][self.path.name]["sha256"])

    @cached_property
    def doc_index(self) -> npt.NDArray[np.void]:
        """A memmap with a record per document: `start`, where its leading end-of-text token is, and `subset`."""
        path = self.path.with_name(f"{self.path.stem}_doc_index.npy")
        try:
            index: npt.NDArray[np.void] = np.load(path, mmap_mode="r")
            if index.dtype != INDEX_DTYPE:
                raise ValueError
        except (ValueError, EOFError):  # of pickled objects, say, which are never loaded
            raise InputError(f"{path} is no document index: {REMAKE}") from None
        return index


def load_tokens(folder: str | Path, split: str) -> TokenFile:
    """The token file of a split, 'train' or 'val', mapped into memory.

    Raises InputError if the set is missing, or its files are not those that meta.json describes: by size, and unless
    they are larger than VERIFIED_BYTES by content.
    """
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        raise InputError(f"{folder} holds no token files; make them with: {command_for(folder)}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files = {name: meta["files"][name] for name in (f"{split}.bin", f"{split}_doc_index.npy")}
        sizes = {name: file["bytes"] for name, file in files.items()}
        if not (isinstance(meta["max_id"], int) and meta["tokenizer"] in TOKENIZERS):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / 'meta.json'} cannot be read: {REMAKE}") from None
    for name, size in sizes.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            raise InputError(f"{path} does not match its meta.json: {REMAKE}")
        if size <= VERIFIED_BYTES and sha256_of(path) != files[name]["sha256"]:
            raise InputError(f"{path} does not match its meta.json: {REMAKE}")
    path = folder / f"{split}.bin"
    return TokenFile(path, meta, np.memmap(path, dtype="<u2", mode="r"))


def command_for(folder: Path) -> str:
    """The prep command that makes the set in folder."""
    dataset = folder.name.removesuffix("-gpt2")
    options = [f"--dataset={dataset}"]
    options += ["--tokenizer=gpt2"] if dataset != folder.name else []
    options += [f"--data_dir={folder.parent}"] if folder.parent != Path("data") else []
    options += ["--files=GLOB"] if dataset not in DATASETS else []
    return " ".join(["python", "prep.py", *options])


def document_bounds(data: TokenFile) -> tuple[np.ndarray, np.ndarray]:
    """Where each document's leading end-of-text token stands, and where its closing one."""
    starts = data.doc_index["start"]
    return starts, np.append(starts[1:], len(data.tokens) - 1)


# ---------------------------------------------------------------------------------------- what a training step sees


class Windows:
    """Training windows at uniformly random places, with replacement: a step's from a generator of (seed, step).

    A step's rows are shared out among the processes, and go through the model batch_size at a time. contexts gives the
    contexts (rows, block_size, E) of windows that begin at starts.
    """

    def __init__(
        self,
        data: TokenFile,
        block_size: int,
        rows: int,
        batch_size: int,
        seed: int,
        world: World,
        contexts: Callable[[np.ndarray, int], Tensor] | None = None,
    ) -> None:
        if len(data.tokens) <= block_size:
            raise InputError(f"{len(data.tokens)} tokens in the training file: too few for block_size={block_size}")
        self.data, self.block_size, self.rows, self.batch_size = data, block_size, rows, batch_size
        self.seed, self.world, self.contexts = seed, world, contexts
        self.micro_steps = -(-rows // world.size // batch_size)

    def starts(self, step: int) -> np.ndarray:
        """Where in the token file the windows of a step begin, (rows,)."""
        return np.random.default_rng([self.seed, step]).integers(
            len(self.data.tokens) - self.block_size, size=self.rows
        )

    def batch(self, step: int, micro: int) -> tuple[dict[str, Tensor], float]:
        """The model's arguments for a micro-batch, and its share of this process's rows."""
        mine = np.split(self.starts(step), self.world.size)[self.world.rank]
        starts = mine[micro * self.batch_size : (micro + 1) * self.batch_size]
        batch = window_batch(self.data.tokens, starts, self.block_size, self.world.device)
        if self.contexts is not None:
            batch["contexts"] = self.contexts(starts, self.block_size)
        return batch, len(starts) / len(mine)

    def state_dict(self) -> dict[str, Tensor]:
        """What a run has to keep of its data to go on: nothing, but for Documents."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""

    def __str__(self) -> str:
        return f"windows of {self.block_size:,} tokens"


class Documents(Windows):
    """Stretches of documents, walked window by window: a row of a step goes on where it was in the step before.

    What the model's memory holds goes with it, its gradient does not (truncated backpropagation). All rows begin and
    end their stretches together.
    """

    def __init__(
        self,
        data: TokenFile,
        tokens_per_doc: int,
        block_size: int,
        rows: int,
        batch_size: int,
        seed: int,
        world: World,
        init_memory: Callable[[int], Any],
    ) -> None:
        super().__init__(data, block_size, rows, batch_size, seed, world)
        starts, ends = document_bounds(data)
        counts = (ends - starts) // tokens_per_doc  # stretches that lie whole within each document
        if not counts.any():
            raise InputError(f"no training document has tokens_per_doc={tokens_per_doc} tokens")
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # 0, 1, .. in each document
        self.begins = np.repeat(starts, counts) + tokens_per_doc * within
        self.windows_each = tokens_per_doc // block_size
        self.init_memory = init_memory
        self.memories: dict[int, Any] = {}  # by micro-batch

    def starts(self, step: int) -> np.ndarray:
        turn, window = divmod(step, self.windows_each)
        epochs, places = np.divmod(turn * self.rows + np.arange(self.rows), len(self.begins))
        orders = {epoch: self.order(epoch) for epoch in np.unique(epochs)}
        chosen = [orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)]
        return self.begins[chosen] + window * self.block_size

    def order(self, epoch: int) -> np.ndarray:
        """The stretches in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.begins))

    def batch(self, step: int, micro: int) -> tuple[dict[str, Any], float]:
        batch, share = super().batch(step, micro)
        if step % self.windows_each == 0:
            self.memories[micro] = self.init_memory(len(batch["idx"]))
        self.memories[micro].detach()  # the backward pass of the step before is done
        return {**batch, "memory": self.memories[micro]}, share

    def state_dict(self) -> dict[str, Tensor]:
        """The memories of all processes' rows, none before the first step."""
        states = [self.memories[micro].state_dict() for micro in sorted(self.memories)]
        return {k: self.world.gather(torch.cat([state[k] for state in states])) for k in states[0]} if states else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        each = self.rows // self.world.size
        mine = {name: rows.split(each)[self.world.rank].split(self.batch_size) for name, rows in state.items()}
        for micro in range(self.micro_steps if mine else 0):
            part = {name: parts[micro] for name, parts in mine.items()}
            self.memories[micro] = self.init_memory(len(next(iter(part.values()))))
            self.memories[micro].load_state_dict(part)

    def __str__(self) -> str:
        return f"{len(self.begins):,} stretches of documents, {self.windows_each} windows of {self.block_size:,} each"


def window_batch(tokens: np.ndarray, starts: np.ndarray, block_size: int, device: torch.device) -> dict[str, Tensor]:
    """idx and targets (B, T) of the windows that begin at starts."""
    rows = torch.from_numpy(np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return {"idx": rows[:, :-1].to(device), "targets": rows[:, 1:].to(device)}
