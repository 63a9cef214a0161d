"""MLA against plain loops in float64: the attention, its position bias, its two forms, its cache, its conversion."""

import math
from typing import Any

import pytest
import torch
from test_pythia import make_tokens, plain_attention, randomize
from torch import Tensor

from model_mla import ALiBiPositionEncoding, LatentAttention, MLAConfig, MLAPythiaModel, alibi_attention
from pythia_base import PythiaConfig, PythiaModel, causal_attention

SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 80}
every_slope = pytest.mark.parametrize("slope", [0.0625, 1 / 3])


def make_attention(**fields: Any) -> LatentAttention:
    return randomize(LatentAttention(MLAConfig(**SMALL, **fields)))


def attend_in_chunks(attention: LatentAttention, x: Tensor, *sizes: int) -> Tensor:
    cache, start, out = attention.init_cache(x.size(0), x.size(1)), 0, []
    for chunk in x.split(sizes, dim=1):
        out.append(attention(chunk, start, cache))
        start += chunk.size(1)
    return torch.cat(out, dim=1)


# ------------------------------------------------------------------------------------------------------ the attention


@every_slope
@pytest.mark.parametrize("sizes", [(13,), (1,) * 13, (5, 1, 7)], ids=["at-once", "one-by-one", "in-chunks"])
def test_latent_attention_is_the_plain_loop(slope: float, sizes: tuple[int, ...]) -> None:
    """c_kv = x W_DKV; q = x W_Q, k = c_kv W_UK, v = c_kv W_UV per head; W_O on what the heads attend to."""
    attention, x = make_attention(kv_dim=24, alibi_slope=slope), torch.randn(2, 13, 64)
    weights = {name: parameter.detach().double() for name, parameter in attention.named_parameters()}
    c_kv = x.double() @ weights["W_DKV.weight"].T
    inputs = {"W_Q": x.double(), "W_UK": c_kv, "W_UV": c_kv}
    q, k, v = ((y @ weights[f"{W}.weight"].T).view(2, 13, 4, 16).transpose(1, 2) for W, y in inputs.items())
    expected = plain_attention(q, k, v, slope).transpose(1, 2).reshape(2, 13, 64) @ weights["W_O.weight"].T
    torch.testing.assert_close(attend_in_chunks(attention, x, *sizes).double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(attention(x, 0, None).double(), expected, atol=1e-4, rtol=0)


def test_alibi_lowers_the_past_by_distance_and_hides_the_future() -> None:
    future = -math.inf
    bias = ALiBiPositionEncoding(slope=0.5).apply_to_scores(torch.full((1, 1, 4, 4), 10.0), seq_len=4)
    assert bias[0, 0].tolist() == [
        [10.0, future, future, future],
        [9.5, 10.0, future, future],
        [9.0, 9.5, 10.0, future],
        [8.5, 9.0, 9.5, 10.0],
    ]
    last_two = ALiBiPositionEncoding(slope=0.5).apply_to_scores(torch.full((1, 1, 2, 4), 10.0), seq_len=2)
    assert torch.equal(last_two, bias[:, :, 2:])


def readable_attention(q: Tensor, k: Tensor, v: Tensor, slope: float) -> Tensor:
    """Attention through apply_to_scores, in float64."""
    scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.size(-1))
    return ALiBiPositionEncoding(slope).apply_to_scores(scores, q.size(-2)).softmax(dim=-1) @ v.double()


@every_slope
@pytest.mark.parametrize(("T", "P"), [(2048, 2048), (300, 2048), (1, 2048), (70, 70), (0, 5)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 3e-3), (torch.bfloat16, 0.02)])
def test_the_fast_alibi_is_the_readable_one(dtype: torch.dtype, bound: float, T: int, P: int, slope: float) -> None:
    """float32 to 1e-4: a bias reaches 682, where its steps are 6e-5. The others to their steps near 2."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 64).to(dtype) for n in (T, P, P))
    expected = readable_attention(q, k, v, slope)
    torch.testing.assert_close(alibi_attention(q, k, v, slope).double(), expected, atol=bound, rtol=0)


def test_without_a_slope_it_is_causal_attention() -> None:
    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    torch.testing.assert_close(alibi_attention(q, k, v, 0.0), causal_attention(q, k, v), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------ expanded and absorbed form


@pytest.mark.parametrize("kv_dim", [4, 16, 17, 48])
def test_absorbed_is_expanded(kv_dim: int) -> None:
    """For chunks on both sides of the length from which expanding is cheaper."""
    attention = make_attention(kv_dim=kv_dim)
    threshold = next((T for T in range(1, 40) if not attention.absorbing_is_cheaper(T)), 20)
    for T in {1, threshold - 1, threshold, threshold + 1, 40}:
        q, c_kv = torch.randn(2, 4, T, 16), torch.randn(2, 40, kv_dim)
        torch.testing.assert_close(attention.absorbed(q, c_kv), attention.expanded(q, c_kv), atol=5e-5, rtol=0)


@pytest.mark.parametrize("kv_dim", [4, 16, 17, 48])
def test_the_cheaper_form_is_the_one_with_fewer_products(kv_dim: int) -> None:
    attention, (H, D, P) = make_attention(kv_dim=kv_dim), (4, 16, 1000)
    for T in range(1, 60):
        absorbing = T * P * H * 2 * kv_dim
        expanding = P * kv_dim * 2 * H * D + T * P * H * 2 * D
        assert attention.absorbing_is_cheaper(T) == (absorbing < expanding)


def forbidden(q: Tensor, c_kv: Tensor) -> Tensor:
    pytest.fail("the other form was to be used")


@pytest.mark.parametrize(("not_used", "sizes"), [("expanded", (47, 1, 1)), ("absorbed", (48, 50))])
def test_short_chunks_are_absorbed_and_long_ones_expanded(
    monkeypatch: pytest.MonkeyPatch, not_used: str, sizes: tuple[int, ...]
) -> None:
    """With kv_dim 24 and heads of 16 expanding is cheaper from 24 x 16 / (24 - 16) = 48 tokens on."""
    attention, x = make_attention(kv_dim=24), torch.randn(1, sum(sizes), 64)
    monkeypatch.setattr(attention, not_used, forbidden)
    assert attend_in_chunks(attention, x, *sizes).shape == x.shape


def test_without_a_cache_even_one_token_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = make_attention(kv_dim=24), torch.randn(1, 1, 64)
    monkeypatch.setattr(attention, "absorbed", forbidden)
    assert attention(x, 0, None).shape == x.shape


# ---------------------------------------------------------------------------------------------- cache, size, settings


@pytest.mark.parametrize("kv_dim", [64, 128, 256])
def test_a_token_costs_its_latents_and_nothing_else(kv_dim: int) -> None:
    with torch.device("meta"):
        cache = MLAPythiaModel(MLAConfig(kv_dim=kv_dim)).init_cache(batch_size=3, max_len=11)
    assert cache.nbytes == 3 * 11 * 6 * kv_dim * 4
    assert [tensor.shape for tensor in cache.tensors()] == [(3, 11, kv_dim)] * 6


def test_mla_pythia_has_its_parameters() -> None:
    with torch.device("meta"):
        model = MLAPythiaModel(MLAConfig())
    assert sum(p.numel() for p in model.parameters()) == 68_448_256
    assert not [name for name, _ in model.named_parameters() if "attention.W" in name and "bias" in name]


def test_the_output_projection_starts_scaled_down() -> None:
    torch.manual_seed(0)
    attention = MLAPythiaModel(MLAConfig(vocab_size=9, hidden_size=128, num_layers=8, kv_dim=64)).attentions()[0]
    stds = {name: parameter.std().item() for name, parameter in attention.named_parameters()}
    expected = {name: 0.02 / 4 if name == "W_O.weight" else 0.02 for name in stds}
    assert stds == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_dim": 0}, "kv_dim=0"),
        ({"kv_dim": 513}, "kv_dim=513 is above hidden_size=512"),
        ({"alibi_slope": -0.1}, "alibi_slope=-0.1"),
        ({"alibi_slope": math.nan}, "alibi_slope=nan"),
        ({"alibi_slope": math.inf}, "alibi_slope=inf"),
        ({"num_heads": 3}, "num_heads=3 does not divide"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLAConfig(**fields)


# ----------------------------------------------------------------------------------------- conversion of a baseline


def make_baseline(rotary_pct: float = 0.25) -> PythiaModel:
    return randomize(PythiaModel(PythiaConfig(**SMALL, rotary_pct=rotary_pct)))


def key_value_weights(baseline: PythiaModel, layer: int) -> tuple[Tensor, Tensor]:
    """W_K and W_V of one layer, (C, C) each, head by head out of the fused projection."""
    rows = baseline.attentions()[layer].query_key_value.weight.detach().split(16)  # q, k, v of head 0, then of head 1
    return torch.cat(rows[1::3]), torch.cat(rows[2::3])


@pytest.mark.parametrize("kv_dim", [64, 40, 8])
def test_conversion_is_the_best_approximation_of_its_rank(kv_dim: int) -> None:
    """What the latent loses of [W_K; W_V] is the tail of its singular values: nothing at full rank."""
    baseline, model = make_baseline(), MLAPythiaModel(MLAConfig(**SMALL, kv_dim=kv_dim))
    model.start_from(baseline)
    for layer, attention in enumerate(model.attentions()):
        original = torch.cat(key_value_weights(baseline, layer)).double()
        up = torch.cat([attention.W_UK.weight, attention.W_UV.weight]).detach().double()
        error = original - up @ attention.W_DKV.weight.detach().double()
        tail = torch.linalg.svdvals(original)[kv_dim:].norm()
        torch.testing.assert_close(error.norm(), tail, atol=1e-4, rtol=1e-6)
        assert tail == 0 if kv_dim == 64 else tail > 1


def test_at_full_rank_keys_and_values_are_the_baselines() -> None:
    baseline, model = make_baseline(), MLAPythiaModel(MLAConfig(**SMALL, kv_dim=64))
    model.start_from(baseline)
    for layer, attention in enumerate(model.attentions()):
        down = attention.W_DKV.weight
        products = attention.W_UK.weight @ down, attention.W_UV.weight @ down
        torch.testing.assert_close(products, key_value_weights(baseline, layer), atol=1e-5, rtol=0)


def test_a_baseline_without_positions_converts_exactly() -> None:
    """Without RoPE, ALiBi and biases of queries and keys the two are one model: the other biases are kept."""
    baseline = make_baseline(rotary_pct=0.0)
    for attention in baseline.attentions():
        attention.query_key_value.bias.data.view(4, 3, 16)[:, :2] = 0
    model = MLAPythiaModel(MLAConfig(**SMALL, kv_dim=64, alibi_slope=0.0))
    model.start_from(baseline)
    idx = make_tokens(SMALL["vocab_size"])
    torch.testing.assert_close(model(idx)[0], baseline(idx)[0], atol=1e-4, rtol=0)


CONVERTED = {f"layers.{i}.attention.{W}.weight" for i in range(3) for W in ("W_Q", "W_DKV", "W_UK", "W_UV", "W_O")} | {
    f"layers.{i}.mlp.dense_4h_to_h.bias" for i in range(3)
}


def test_the_report_says_what_became_of_every_tensor() -> None:
    model = MLAPythiaModel(MLAConfig(**SMALL, kv_dim=40))
    report = model.start_from(make_baseline())
    assert report == {name: "converted" if name in CONVERTED else "copied" for name in model.state_dict()}


def test_another_latent_is_left_new() -> None:
    """From an MLA of another kv_dim everything is copied but what touches the latent."""
    source, model = (randomize(MLAPythiaModel(MLAConfig(**SMALL, kv_dim=kv_dim))) for kv_dim in (40, 24))
    report = model.start_from(source)
    assert {name for name, how in report.items() if how == "new"} == {
        f"layers.{i}.attention.{W}.weight" for i in range(3) for W in ("W_DKV", "W_UK", "W_UV")
    }
    assert "converted" not in report.values()
