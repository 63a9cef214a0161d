"""Which tokens a training step sees: windows of a token file in a pseudo-random order, or documents window by window.

Where a window begins is a function of the seed and of its running number alone. Nothing of it has to be saved for a run
to go on, and no table grows with the corpus.
"""

import numpy as np
import torch
from torch import Tensor

from configurator import InputError
from eval import document_bounds
from prep import TokenFile


class Windows:
    """Training windows in a pseudo-random order, each once an epoch."""

    def __init__(self, num_tokens: int, block_size: int, seed: int) -> None:
        if num_tokens <= block_size:
            raise InputError(f"{num_tokens} tokens in the training file: too few for block_size={block_size}")
        self.num_tokens, self.block_size, self.seed = num_tokens, block_size, seed
        self.per_epoch = max(1, num_tokens // block_size - 1)

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """Where in the token file the windows of these running numbers begin."""
        epochs, places = np.divmod(numbers, self.per_epoch)
        starts = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            slack = self.num_tokens - self.per_epoch * self.block_size  # each epoch cuts its windows elsewhere
            offset = np.random.default_rng([self.seed, epoch]).integers(slack)
            mine = epochs == epoch
            starts[mine] = offset + self.block_size * permute(places[mine], self.per_epoch, self.seed + epoch)
        return starts


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

    def starts(self, numbers: np.ndarray) -> np.ndarray:
        """Where in the token file the windows of these running numbers begin."""
        steps, rows = np.divmod(numbers, self.rows)
        turns, windows = np.divmod(steps, self.windows_each)
        epochs, places = np.divmod(turns * self.rows + rows, len(self.begins))
        starts = windows * self.block_size
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            starts[mine] += self.begins[permute(places[mine], len(self.begins), self.seed + epoch)]
        return starts


def window_batch(tokens: np.ndarray, starts: np.ndarray, block_size: int, device: torch.device) -> dict[str, Tensor]:
    """idx and targets (B, T) of the windows that begin at starts."""
    rows = torch.from_numpy(np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return {"idx": rows[:, :-1].to(device), "targets": rows[:, 1:].to(device)}


def permute(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Places of 0..n-1 in a pseudo-random order, without a table.

    A Feistel network of four rounds permutes the next power of four; what falls outside 0..n-1 is sent through again.
    """
    half = ((n - 1).bit_length() + 1) // 2
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng([seed, n]).integers(2**63, size=4, dtype=np.uint64) | np.uint64(1)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            mixed = (right + key) * key
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) * key >> np.uint64(32)) & mask
        return left << np.uint64(half) | right

    out = network(index.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)
