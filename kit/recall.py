"""Recall: what a smaller cache forgets, read off real text (Zoology, Arora et al. 2023, arXiv 2312.04927).

A target is a hit if its bigram, the token before it and itself, has already stood in the window:

    Django ships with a template engine ... the rest of  Django ships
    `--------' first seen                                        ^ a hit: who kept the first can know the second

It may also have been learnt by heart: hits with ten or fewer occurrences in the training text are those that count.
"""

from contextlib import suppress

import numpy as np
import numpy.typing as npt

from kit.files import replacing
from kit.tokens import TokenFile, load_tokens

CHUNK = 2**24  # training tokens that are counted at a time
# the least and the most training occurrences of a group's hits; -1 stands for what is no hit
GROUPS = {"0": (0, 0), "1-10": (1, 10), "0-10": (0, 10), "more": (11, np.inf), "others": (-1, -1)}


def recall_groups(val: TokenFile, block_size: int) -> dict[str, npt.NDArray[np.int64]]:
    """Where the targets of each group are among all tokens but the first: hits by training count, and all others."""
    counts = np.where(window_hits(val.tokens, block_size), training_counts(val), -1)
    return {name: np.flatnonzero((counts >= least) & (counts <= most)) for name, (least, most) in GROUPS.items()}


def bigrams(tokens: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint64]:
    """Every token but the first with the one before it, as one number, (N - 1,)."""
    return tokens[:-1].astype(np.uint64) << np.uint64(16) | tokens[1:]


def window_hits(tokens: npt.NDArray[np.uint16], block_size: int) -> npt.NDArray[np.bool_]:
    """Whether the bigram of each target stands further left in the same window of block_size, (N - 1,)."""
    targets = np.arange(len(tokens) - 1)
    keys = (targets // block_size).astype(np.uint64) << np.uint64(32) | bigrams(tokens)  # equal in one window only
    hits = np.ones(len(keys), bool)
    hits[np.unique(keys, return_index=True)[1]] = False  # where each stands first
    return hits


def training_counts(val: TokenFile) -> npt.NDArray[np.int64]:
    """How often the bigram of each target stands in the training text, (N - 1,); kept beside val.bin."""
    digests = [val.meta["files"][name]["sha256"][:8] for name in ("train.bin", "val.bin")]
    path = val.path.with_name(f"val_bigram_counts-{'-'.join(digests)}.npy")
    wanted, places = np.unique(bigrams(val.tokens), return_inverse=True)
    with suppress(OSError, ValueError, EOFError):  # not there yet
        counts = np.load(path)
        if counts.shape == wanted.shape:
            return counts[places]
    counts, tokens = np.zeros(len(wanted), np.int64), load_tokens(val.path.parent, "train").tokens
    for start in range(0, len(tokens) - 1, CHUNK):
        found, times = np.unique(bigrams(tokens[start : start + CHUNK + 1]), return_counts=True)
        counts[np.isin(wanted, found)] += times[np.isin(found, wanted)]  # both are sorted
    with suppress(OSError), replacing(path) as file:  # a folder may be read-only
        np.save(file, counts)
    return counts[places]
