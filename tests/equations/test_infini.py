"""Infini-Pythia's memory, and what implementations of it get wrong; what holds for every model is in test_models.py."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import test_models
import torch
from conftest import make_tokens
from test_models import CONFIGS, build, make_baseline
from torch import Tensor

from model_infini import InfiniAttention, InfiniConfig, Memory, phi, reference_memory, retrieve
from pythia_base import SelfAttention

S, C, H, D = 4, 32, 4, 8
every_mode = pytest.mark.parametrize("mode", [n for n, config in CONFIGS.items() if isinstance(config, InfiniConfig)])


def make_model(mode: str, **changes: Any) -> Any:
    return test_models.make_model(mode, std=0.3, segment_len=S, **changes)


def make_attention(mode: str) -> InfiniAttention:
    return make_model(mode).layers[0].attention


def make_input(B: int, T: int) -> Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(T))


# ---------------------------------------------------------------------------------------------------- the equations
@every_mode
def test_output_and_gradients_are_those_of_the_plain_loop(mode: str) -> None:
    """Through reads, writes and what the delta rule reads before it writes: nothing is detached within a pass."""
    attention, x = make_attention(mode), make_input(1, 7 * S + 2).requires_grad_()
    exact, x64 = copy.deepcopy(attention).double(), x.detach().double().requires_grad_()
    out, expected = attention(x, 0, None)[0], reference_memory(exact, x64[0])
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=0)
    direction = torch.randn(out.shape)
    gradients = torch.autograd.grad((out * direction).sum(), [x, *attention.parameters()])
    exactly = torch.autograd.grad((expected * direction).sum(), [x64, *exact.parameters()])
    torch.testing.assert_close([g.double() for g in gradients], list(exactly), atol=1e-4, rtol=1e-4)


@every_mode
def test_a_normaliser_of_0_reads_0_and_its_gradient_is_finite(mode: str) -> None:
    """An empty memory's; and a full one's for features that underflow, phi(-100) in float32."""
    attention, x = make_attention(mode), make_input(2, S).requires_grad_()
    out = attention(x, 0, None)
    assert not out.any()
    gradients = torch.autograd.grad(out.sum(), [x, attention.W_Q.weight])
    low = torch.full((1, 1, 3), -100.0, requires_grad=True)
    A, _ = retrieve(phi(low), torch.ones(1, 3, 4))
    assert not A.any()
    assert all(gradient.isfinite().all() for gradient in [*gradients, *torch.autograd.grad(A.sum(), low)])


# ---------------------------------------------------------------- by hand, what the plain loop could have wrong as well
@every_mode
def test_nothing_of_a_segment_is_seen_within_it(mode: str) -> None:
    attention, x = make_attention(mode), make_input(1, 3 * S)
    before, changed = attention(x, 0, None), x.clone()
    changed[:, S + 1] += 1  # the second token of the second segment
    difference = (attention(changed, 0, None) - before).abs().amax(dim=(0, 2))
    assert not difference[[*range(S + 1), *range(S + 2, 2 * S)]].any()
    assert (difference[2 * S :] > 1e-4).all()


def read_back(attention: InfiniAttention, q: Tensor, k: Tensor, num_segments: int) -> Tensor:
    """What queries find (H, T, D) where values name their segment, so that a reading shows each segment's weight."""
    v = torch.eye(D)[:num_segments].repeat_interleave(S, dim=0).expand(1, H, -1, -1)
    return attention.attend(q, k, v, 0, Memory(1, attention.config, like=v))[0]


def test_the_newest_segment_weighs_most_under_alibi() -> None:
    attention, ones = make_attention("infini-alibi2"), torch.ones(1, H, 5 * S, D)
    A = read_back(attention, ones, ones, 5)[:, -1, :4]  # plain rule: equal keys give the weighted mean of the values
    for weights, slope in zip(A, (2 * 2**-2, 2 * 2**-4, 2 * 2**-6, 2 * 2**-8), strict=True):
        torch.testing.assert_close(weights, (-slope * torch.tensor([3.0, 2.0, 1.0, 0.0])).softmax(0))
        assert (weights.diff() > 0).all()


def test_relevance_is_each_querys_own() -> None:
    """Two memories with unlike keys, two unlike queries in one segment: each finds its own memory."""
    attention, (q, k) = make_attention("infini-multi"), torch.zeros(2, 1, H, 3 * S, D)
    k[:, :, :S, 0] = k[:, :, S:, 1] = 5
    q[:, :, 2 * S :: 2, 0] = q[:, :, 2 * S + 1 :: 2, 1] = 1
    A = read_back(attention, q + 0.01, k, 3)[0, 2 * S :]  # (T, segment)
    scores = (q + 0.01)[0, 0, 2 * S :] @ k[0, 0, [0, -1]].T
    torch.testing.assert_close(A[:, :2], scores.softmax(-1))
    assert (A[::2, 0] > 0.9).all()
    assert (A[1::2, 1] > 0.9).all()


def test_banks_start_with_equal_shares() -> None:
    """After three segments bank 0 holds two, bank 1 one, bank 2 none: a half each, nothing for the empty one."""
    attention = build(replace(CONFIGS["infini-banks"], segment_len=S, use_delta_rule=False)).layers[0].attention
    ones, expected = torch.ones(1, H, 4 * S, D), torch.tensor([0.25, 0.25, 0.5, 0, 0, 0, 0, 0]).expand(H, -1)
    torch.testing.assert_close(read_back(attention, ones, ones, 4)[:, -1], expected)


@pytest.mark.parametrize("mode", ["infini", "infini-banks", "infini-multi-alibi"])
def test_under_bf16_autocast_the_memory_is_float32(mode: str) -> None:
    """It is what float32 arithmetic makes of the bfloat16 queries, keys and values."""
    attention, x = make_attention(mode), make_input(2, 5 * S + 1)
    cache, expected = attention.init_cache(batch_size=2, max_len=x.size(1)), Memory(2, attention.config, like=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(x, 0, cache).dtype == torch.bfloat16
        projected = [W(x).float() for W in (attention.W_Q, attention.W_K, attention.W_V)]
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in projected)
    attention.attend(phi(q), phi(k), v, 0, expected)
    torch.testing.assert_close(vars(cache), vars(expected), atol=1e-6, rtol=1e-6)  # dtypes as well
    cache = attention.bfloat16().init_cache(batch_size=2, max_len=x.size(1))  # nor does the model's dtype matter
    assert attention(x.bfloat16(), 0, cache).dtype == torch.bfloat16
    assert cache.Mz.dtype == cache.pending.dtype == torch.float32


# ------------------------------------------------------------------------------------- documents, window by window
@every_mode
def test_windows_with_a_carried_memory_equal_one_pass_of_layer_0(mode: str) -> None:
    """With layer 0 alone: the layers above see their window only."""
    model, idx = make_model(mode, num_layers=1), make_tokens(2, 8 * S)
    memory = model.init_memory(batch_size=2)
    windows = [model(window, cache=memory)[0] for window in idx.split([2 * S, S, 3 * S, 2 * S], dim=1)]
    torch.testing.assert_close(torch.cat(windows, dim=1), model(idx)[0], atol=1e-4, rtol=0)


@every_mode
def test_consecutive_windows_train_with_a_detached_memory_and_only_so(mode: str) -> None:
    model, idx = make_model(mode), make_tokens(2, 2 * S)
    memory, W_K = model.init_memory(batch_size=2), model.layers[0].attention.W_K.weight
    for _ in range(2):
        model.zero_grad()
        model(idx, idx, cache=memory)[1].backward()
        assert W_K.grad.abs().max() > 1e-5
        for tensor in memory.tensors():
            tensor.detach_()
    model(idx, idx, cache=memory)[1].backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        model(idx, idx, cache=memory)[1].backward()


@every_mode
def test_of_what_came_before_a_window_only_the_carried_memory_counts(mode: str) -> None:
    """Which is resumed exactly; with an empty one the layers above see their window alone, wherever it stands.

    And a window that ends within a segment is refused.
    """
    model, idx = make_model(mode), make_tokens(2, 3 * S)
    memory, resumed, empty = (model.init_memory(batch_size=2) for _ in range(3))
    first = model(idx, cache=memory)[0]
    for tensor, kept in zip(resumed.tensors(), memory.tensors(), strict=True):
        tensor.data.copy_(kept)
    second = model(idx, cache=memory)[0]
    assert torch.equal(second, model(idx, cache=resumed)[0])
    assert (second - first).abs().max() > 1e-3
    torch.testing.assert_close((first, model(idx, cache=empty)[0]), 2 * (model(idx)[0],))
    with pytest.raises(ValueError, match="multiple of segment_len=4"):
        model(idx[:, : S + 1], cache=memory)


# ------------------------------------------------------------------------------------------- settings and weights
def test_layer_0_starts_from_a_baselines_projections() -> None:
    """While the memory is empty, layer 0 adds what the baseline's attention adds of zero-mean values: its constants."""
    baseline, model = make_baseline(), build(CONFIGS["infini"])
    assert [type(attention) for attention in model.attentions()] == [InfiniAttention, SelfAttention, SelfAttention]
    assert isinstance(model.init_cache(1, 8).layers[0], Memory)
    report = model.start_from(baseline)
    theirs, mine = baseline.layers[0], model.layers[0]
    q, k, v = theirs.attention.query_key_value.weight.unflatten(0, (H, 3, -1)).unbind(1)
    for W, rows in ((mine.attention.W_Q, q), (mine.attention.W_K, k), (mine.attention.W_V, v)):
        assert torch.equal(W.weight, rows.flatten(0, 1))
    assert {name for name, how in report.items() if how != "copied"} == {
        "layers.0.mlp.dense_4h_to_h.bias", *(f"layers.0.attention.W_{name}.weight" for name in "QKVO")
    }  # fmt: skip
    x = make_input(1, S)
    with torch.no_grad():  # a baseline whose weighted values are 0, but for their bias
        theirs.attention.query_key_value.weight.unflatten(0, (H, 3, -1))[:, 2] = 0
    torch.testing.assert_close(mine(x, 0, None), theirs(x, 0, None))
