"""Token files, and which of their tokens a training step sees: windows in random order, or documents in their own.

Where a step's windows begin is a function of the seed and of the step alone: nothing of it has to be saved for a run to
go on.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kit.files import InputError, sha256_of

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
    """Training windows at uniformly random places, with replacement: a step's from a generator of (seed, step)."""

    def __init__(self, num_tokens: int, block_size: int, rows: int, seed: int) -> None:
        if num_tokens <= block_size:
            raise InputError(f"{num_tokens} tokens in the training file: too few for block_size={block_size}")
        self.num_tokens, self.block_size, self.rows, self.seed = num_tokens, block_size, rows, seed

    def starts(self, step: int) -> np.ndarray:
        """Where in the token file the windows of a step begin, (rows,)."""
        return np.random.default_rng([self.seed, step]).integers(self.num_tokens - self.block_size, size=self.rows)


class Stretches:
    """Stretches of documents, walked window by window: a row of a step goes on where it was in the step before.

    All rows begin and end theirs together.
    """

    def __init__(self, data: TokenFile, tokens_per_doc: int, block_size: int, rows: int, seed: int) -> None:
        starts, ends = document_bounds(data)
        counts = (ends - starts) // tokens_per_doc  # stretches that lie whole within each document
        if not counts.any():
            raise InputError(f"no training document has tokens_per_doc={tokens_per_doc} tokens")
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # 0, 1, .. in each document
        self.begins = np.repeat(starts, counts) + tokens_per_doc * within
        self.windows_each = tokens_per_doc // block_size
        self.block_size, self.rows, self.seed = block_size, rows, seed

    def starts(self, step: int) -> np.ndarray:
        """Where in the token file the windows of a step begin, (rows,)."""
        turn, window = divmod(step, self.windows_each)
        epochs, places = np.divmod(turn * self.rows + np.arange(self.rows), len(self.begins))
        orders = {epoch: self.order(epoch) for epoch in np.unique(epochs)}
        chosen = [orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)]
        return self.begins[chosen] + window * self.block_size

    def order(self, epoch: int) -> np.ndarray:
        """The stretches in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.begins))


def window_batch(tokens: np.ndarray, starts: np.ndarray, block_size: int, device: torch.device) -> dict[str, Tensor]:
    """idx and targets (B, T) of the windows that begin at starts."""
    rows = torch.from_numpy(np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return {"idx": rows[:, :-1].to(device), "targets": rows[:, 1:].to(device)}
