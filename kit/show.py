"""What `python pythia_base.py`, `python model_mla.py`, ... print of every architecture; each file adds its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHOWN_LENGTH = 2048  # tokens at which caches are compared
CHUNKS = [1, 2, 3, 5, 7, 11]  # tokens that go through the cache at a time


def text_ids(text: str, num_tokens: int) -> Tensor:
    """The first UTF-8 bytes of a text as token ids, (1, num_tokens): real text without a tokenizer."""
    return torch.tensor([list(text.encode())[:num_tokens]])


@torch.no_grad()
def show(model: Any, reference: Callable[[Any, Tensor], Tensor], baseline: Any, text: str) -> None:
    """Print a model's size beside the baseline's, and how far its logits for text are from those it has to give."""
    ours, theirs = (m.init_cache(1, SHOWN_LENGTH).nbytes for m in (model, baseline))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, baseline)]
    say(type(model).__name__, f"{sizes[0]:,} parameters, the baseline {sizes[1]:,}")
    saved = f"{ours / SHOWN_LENGTH:,.1f} a token, {1 - ours / theirs:.1%} less than the baseline"
    say(f"cache at {SHOWN_LENGTH:,} tokens", f"{ours:,} bytes, {saved}")
    idx = text_ids(text, sum(CHUNKS))
    logits, cache = model(idx)[0], model.init_cache(1, idx.size(1))
    cached = torch.cat([model(chunk, cache=cache)[0] for chunk in idx.split(CHUNKS, dim=1)], dim=1)
    say("module against reference", f"{largest(logits, reference(model, idx)):.1e} apart at most, {idx.size(1)} tokens")
    say("cached against uncached", f"{largest(logits, cached):.1e} apart at most")


def say(what: str, value: str) -> None:
    print(f"{what:>34}   {value}")


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors."""
    return (a.double() - b.double()).abs().max().item()
