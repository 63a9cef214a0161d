"""What the checks share: real text, small models, seconds of training, and what is wrong in words."""

import functools
import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_mla import ALiBiPositionEncoding, LatentAttention, LatentCache, MLAConfig, MLAPythiaModel
from pythia_base import merge_heads, split_heads

SMALL: dict[str, Any] = {
    "vocab_size": 256,  # bytes
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 128,
}
MLA = MLAConfig(**SMALL, kv_dim=12, alibi_slope=0.5)
LENGTH = 40  # tokens of an equality check: past every window and segment of the exercises
WINDOW = 64  # tokens of a training window


def load(path: Path) -> ModuleType:
    """A module from a file whose name cannot be imported, such as 03_sliding_window.py."""
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------- text, models
@functools.cache
def source_text() -> tuple[Tensor, Tensor]:
    """The project's own source as byte ids, real text that is always there: what is trained on, what is held out."""
    files = sorted(Path(__file__).parents[1].glob("*.py"))
    ids = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    held_out = len(ids) // 10
    return ids[:-held_out], ids[-held_out:]


def rows(num_rows: int, length: int) -> Tensor:
    """The beginning of the held-out text, (num_rows, length)."""
    return source_text()[1][: num_rows * length].view(num_rows, length)


class OpenAttention(LatentAttention):
    """MLA's expanded form in the open: its `positions` are anything that has apply_to_scores."""

    positions: Any

    def forward(self, x: Tensor, start: int, cache: LatentCache | None) -> Tensor:
        H, D = self.config.num_heads, self.config.head_size
        c_kv = self.W_DKV(x) if cache is None else cache.append(self.W_DKV(x), start)  # (B, P, L)
        q, k, v = split_heads(self.W_Q(x), H), split_heads(self.W_UK(c_kv), H), split_heads(self.W_UV(c_kv), H)
        scores = self.positions.apply_to_scores(q @ k.mT / math.sqrt(D), x.size(1))  # (B, H, T, P)
        return self.W_O(merge_heads(scores.softmax(dim=-1) @ v))


class OpenMLA(MLAPythiaModel):
    """MLA-Pythia with a position encoding of any kind."""

    def __init__(self, config: MLAConfig, positions: Any) -> None:
        super().__init__(config)
        for attention in self.attentions():
            attention.positions = positions

    def make_attention(self, layer: int) -> LatentAttention:
        return OpenAttention(self.config)


@torch.no_grad()
def build(model_class: Any, *arguments: Any) -> Any:
    """A model with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = model_class(*arguments).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
    return model


@torch.enable_grad()
def train(model_class: Any, *arguments: Any, steps: int = 150) -> Any:
    """A model after seconds of training, on the same windows as any other."""
    torch.manual_seed(0)
    model, text, generator = model_class(*arguments), source_text()[0], torch.Generator().manual_seed(0)
    moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    for _ in range(steps):
        begins = torch.randint(len(text) - WINDOW, (8,), generator=generator)
        windows = torch.stack([text[begin : begin + WINDOW + 1] for begin in begins])
        model.zero_grad()
        model(windows[:, :-1], windows[:, 1:])[1].backward()
        unused = [name for name, p in model.named_parameters() if p.grad is None]
        assert not unused, f"{', '.join(unused)}: no gradient, so nothing trains it"
        for p, first, second in moments:  # Adam; the first step of torch.optim imports for five seconds
            first.lerp_(p.grad, 0.1)
            second.lerp_(p.grad.square(), 0.05)
            p.data.sub_(5e-3 * first / (second.sqrt() + 1e-8))
    return model.eval()


@functools.cache
def trained_mla() -> Any:
    """Plain MLA after seconds of training, for all checks that measure against it."""
    return train(OpenMLA, MLA, ALiBiPositionEncoding(MLA.alibi_slope))


def held_out() -> Tensor:
    """Windows for a perplexity, (32, WINDOW + 1): each token but the last predicts the next one."""
    return rows(32, WINDOW + 1)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean cross entropy of windows (B, T + 1), in one full pass."""
    return model(windows[:, :-1], windows[:, 1:])[1].exp().item()


@torch.no_grad()
def perplexity_in_chunks(model: Any, windows: Tensor, size: int) -> float:
    """The same, through the cache, size tokens at a time."""
    logits = in_chunks(model, windows[:, :-1], size)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()


def in_chunks(model: Any, idx: Tensor, sizes: int | list[int]) -> Tensor:
    """The logits of tokens (B, T) that go through a cache, so many tokens at a time."""
    cache = model.init_cache(idx.size(0), idx.size(1))
    return torch.cat([model(chunk, cache=cache)[0] for chunk in idx.split(sizes, dim=1)], dim=1)


# ------------------------------------------------------------------------------------------ what is wrong, in words
def assert_same(actual: Tensor, expected: Tensor, what: str, atol: float = 1e-4) -> None:
    """Equal up to rounding, or what is said to be wrong, with the shape or the size of the difference."""
    __tracebackhide__ = True
    ours, theirs = tuple(actual.shape), tuple(expected.shape)
    assert ours == theirs, f"{what}: the shape is {ours}, it has to be {theirs}"
    assert actual.isfinite().all(), f"{what}: there are NaN or infinite numbers in it"
    apart = (actual.double() - expected.double()).abs().max().item()
    assert apart <= atol, f"{what}: {apart:.1e} apart at most, {atol:.0e} is allowed"


@torch.no_grad()
def assert_causal(model: Any) -> None:
    """Another token t changes no logit before t."""
    __tracebackhide__ = True
    idx = rows(1, LENGTH)
    before = model(idx)[0]
    for t in (1, LENGTH // 2, LENGTH - 1):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 256
        moved = (model(changed)[0] - before)[0].abs().amax(dim=-1) > 1e-5  # (T,)
        first = moved.nonzero()[0].item() if moved.any() else t
        assert first >= t, f"not causal: another token at position {t} changes the logits at position {first} before it"


@torch.no_grad()
def assert_streams(model: Any) -> None:
    """Chunks of any sizes through the cache give the logits of one full pass."""
    __tracebackhide__ = True
    idx = rows(2, LENGTH)
    full = model(idx)[0]
    for sizes in ([1] * LENGTH, [LENGTH], [3, 6, 24, 7], [30, 1, 9]):
        apart = (in_chunks(model, idx, sizes) - full).abs().amax(dim=(0, 2))  # (T,)
        wrong = (apart > 1e-4).nonzero().flatten().tolist()
        shown = "one by one" if sizes[0] == 1 else f"in chunks of {sizes}"
        assert not wrong, f"streaming is not the full pass: fed {shown} the logits differ from position {wrong[0]} on"
