"""Check of exercise 6: smaller latents, and what they cost."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from exercises.check import (
    LENGTH,
    MLA,
    WINDOW,
    OpenAttention,
    OpenMLA,
    assert_same,
    held_out,
    in_chunks,
    perplexity,
    perplexity_in_chunks,
    rows,
    trained_mla,
)
from model_mla import ALiBiPositionEncoding, MLAConfig

L = MLA.kv_dim


class NoNaN(TorchDispatchMode):
    """Complains of the first operation that gives NaN, also where what follows hides it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor) and out.is_floating_point():
            assert not out.isnan().any(), "there is a NaN on the way: token 9 is zero, and of 0/0 int8 makes anything"
        return out


def stored_as(cache_class: Any) -> Any:
    """The trained model, its latents kept in such a cache."""

    class SmallAttention(OpenAttention):
        def init_cache(self, batch_size: int, max_len: int) -> Any:
            return cache_class(batch_size, max_len, self.config.kv_dim, like=self.W_DKV.weight)

    class SmallMLA(OpenMLA):
        def make_attention(self, layer: int) -> OpenAttention:
            return SmallAttention(self.config)

    model = SmallMLA(MLA, ALiBiPositionEncoding(MLA.alibi_slope))
    model.load_state_dict(trained_mla().state_dict())
    return model.eval()


def latents() -> Tensor:
    """Of real text, (2, LENGTH, L); those of token 7 a hundred times as large, those of token 9 zero."""
    model = trained_mla()
    c_kv = model.layers[0].attention.W_DKV(model.embed_in(rows(2, LENGTH)))
    c_kv[:, 7] *= 100
    c_kv[:, 9] = 0
    return c_kv


def assert_comes_back(cache_class: Any, c_kv: Tensor, allowed: Tensor, hint: str) -> None:
    """Latents stored in two chunks come back with errors of at most `allowed`, (B, T, 1) or (B, T, L)."""
    cache = cache_class(2, LENGTH, L, like=c_kv)
    with NoNaN():
        cache.append(c_kv[:, :25], 0)
        stored = cache.append(c_kv[:, 25:], 25)
    assert stored.dtype == c_kv.dtype, f"append returns {stored.dtype} for latents in {c_kv.dtype}"
    assert stored.shape == c_kv.shape, f"append returns {tuple(stored.shape)} for {tuple(c_kv.shape)} latents so far"
    assert stored.isfinite().all(), f"NaN or infinite numbers come back for token {position(~stored.isfinite())}"
    wrong = (stored - c_kv).abs() > allowed * 1.01 + 1e-7
    assert not wrong.any(), f"{cache_class.__name__}: too large an error at token {position(wrong)}. {hint}"


def position(wrong: Tensor) -> int:
    """The first token of (B, T, L) for which anything holds."""
    return wrong.any(dim=-1).any(dim=0).nonzero()[0].item()


@torch.no_grad()
def test_bfloat16_comes_back(attempt: Any) -> None:
    c_kv = latents()
    hint = "bfloat16 keeps 8 bits of a number, its error is at most 2^-8 of it"
    assert_comes_back(attempt.BFloat16Latents, c_kv, c_kv.abs() * 2**-8, hint)


@torch.no_grad()
def test_int8_comes_back(attempt: Any) -> None:
    c_kv = latents()
    half_a_step = c_kv.abs().amax(dim=-1, keepdim=True) / 127 / 2
    hint = (
        "Half a step is allowed, a step being the token's largest magnitude / 127. Is the scale the token's own "
        "(token 7 is a hundred times as large as the others)? Do you round, and not cut off?"
    )
    assert_comes_back(attempt.Int8Latents, c_kv, half_a_step, hint)


@torch.no_grad()
def test_bytes(attempt: Any) -> None:
    for name, bytes_a_token in (("BFloat16Latents", 2 * L), ("Int8Latents", L + 4)):
        used, right = nbytes(getattr(attempt, name)(1, 100, L, like=torch.zeros(1))), 100 * bytes_a_token
        assert used == right, f"{name} takes {used:,} bytes for 100 tokens with latents of {L}: it has to be {right:,}"
    config = MLAConfig()
    for name, cache_class in (("bfloat16", attempt.BFloat16Latents), ("int8", attempt.Int8Latents)):
        measured = config.num_layers * nbytes(cache_class(1, 1, config.kv_dim, like=torch.zeros(1)))
        predicted = attempt.PREDICTED_BYTES[name]
        assert predicted == measured, f"PREDICTED_BYTES of {name} are {predicted:,}, measured {measured:,} a token"


def nbytes(cache: Any) -> int:
    return sum(tensor.nbytes for tensor in vars(cache).values() if isinstance(tensor, Tensor))


@torch.no_grad()
def test_any_chunking_stores_the_same(attempt: Any) -> None:
    for cache_class in (attempt.BFloat16Latents, attempt.Int8Latents):
        model, idx = stored_as(cache_class), rows(2, LENGTH)
        at_once = in_chunks(model, idx, LENGTH)
        for size in (1, 7):
            what = f"{cache_class.__name__}: logits after chunks of {size} against one chunk of {LENGTH}"
            assert_same(in_chunks(model, idx, size), at_once, what, atol=0.05)  # a number may round the other way


def test_what_it_costs(attempt: Any) -> None:
    exact = perplexity(trained_mla(), held_out())
    print(f"\nPPL with float32 latents {exact:.4f}")
    for name, cache_class in (("bfloat16", attempt.BFloat16Latents), ("int8", attempt.Int8Latents)):
        ppl = perplexity_in_chunks(stored_as(cache_class), held_out(), WINDOW)
        rise, predicted = ppl / exact - 1, attempt.PREDICTED_COST[name]
        print(f"PPL with {name} latents {ppl:.4f}, {rise:+.3%}")
        measured = "below 1%" if rise < 0.01 else "1% to 10%" if rise < 0.1 else "above 10%"
        assert predicted == measured, (
            f"PREDICTED_COST of {name} is {predicted!r}, measured is {measured!r}: {rise:+.3%}"
        )
