"""What `python pythia_base.py`, `python model_mla.py`, ... print of every architecture; each file adds its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHOWN_LENGTH = 2048  # tokens at which caches are compared
CHUNKS = (1, 2, 3, 5, 7, 11)  # tokens that go through the cache at a time, round and round


def text_ids(text: str, num_tokens: int) -> Tensor:
    """The first UTF-8 bytes of a text as token ids, (1, num_tokens): real text without a tokenizer."""
    return torch.tensor([list(text.encode())[:num_tokens]])


@torch.no_grad()
def show(
    model: Any, reference: Callable[[Any, Tensor], Tensor], baseline: Any, text: str, num_tokens: int = 48
) -> None:
    """Print a model's size beside the baseline's, and how far it is from its reference and from itself without a cache.

    The logits that are compared are those of the first bytes of text.
    """
    model.eval()
    idx = text_ids(text, num_tokens)
    logits = model(idx)[0]
    cache, start = model.init_cache(1, num_tokens), 0
    chunks: list[Tensor] = []
    while start < num_tokens:
        chunk = idx[:, start : start + CHUNKS[len(chunks) % len(CHUNKS)]]
        chunks.append(model(chunk, cache=cache)[0])
        start += chunk.size(1)
    ours, theirs = (m.init_cache(1, SHOWN_LENGTH).nbytes for m in (model, baseline))
    say(type(model).__name__, f"{count(model):,} parameters, the baseline {count(baseline):,}")
    say(
        f"cache at {SHOWN_LENGTH:,} tokens",
        f"{ours:,} bytes, {ours / SHOWN_LENGTH:,.1f} a token, {1 - ours / theirs:.1%} less than the baseline",
    )
    say("module against reference", f"{largest(logits, reference(model, idx)):.1e} apart at most, {num_tokens} tokens")
    say("cached against uncached", f"{largest(logits, torch.cat(chunks, dim=1)):.1e} apart at most")


def say(what: str, value: str) -> None:
    print(f"{what:>34}   {value}")


def count(model: Any) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors."""
    return (a.double() - b.double()).abs().max().item()
