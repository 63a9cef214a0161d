"""MLA: its position bias, its two forms, its conversion. What holds for every model is in test_models.py."""

import math
import re
from typing import Any

import pytest
import torch
from conftest import in_chunks, make_tokens
from test_models import make_baseline, make_model

import model_mla
from kit.show import show
from model_mla import ALiBiPositionEncoding, LatentAttention, alibi_attention


# --------------------------------------------------------------------------------------------------- the position bias
def test_alibi_lowers_the_past_by_distance_and_hides_the_future() -> None:
    bias = ALiBiPositionEncoding(slope=0.5).apply_to_scores(torch.full((1, 1, 3, 3), 10.0), seq_len=3)
    assert bias[0, 0].tolist() == [[10.0, -math.inf, -math.inf], [9.5, 10.0, -math.inf], [9.0, 9.5, 10.0]]
    last_two = ALiBiPositionEncoding(slope=0.5).apply_to_scores(torch.full((1, 1, 2, 3), 10.0), seq_len=2)
    assert torch.equal(last_two, bias[:, :, 1:])


@pytest.mark.parametrize("slope", [0.0, 0.0625, 1 / 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float16, 3e-3), (torch.bfloat16, 0.02)])
def test_the_fast_alibi_is_the_readable_one(dtype: torch.dtype, bound: float, slope: float) -> None:
    """float32 to 1e-4: a bias reaches 682, where its steps are 6e-5. The others to their steps near 2.

    In bfloat16, which counts to 256 only, also far away.
    """
    torch.manual_seed(0)
    far = [(70, 40_000)] if dtype == torch.bfloat16 else []
    for T, P in [(2048, 2048), (300, 2048), (1, 2048), (70, 70), (0, 5), *far]:
        q, k, v = (torch.randn(1, 2, n, 64).to(dtype) for n in (T, P, P))
        scores = q.double() @ k.double().mT / math.sqrt(64)
        expected = ALiBiPositionEncoding(slope).apply_to_scores(scores, T).softmax(dim=-1) @ v.double()
        torch.testing.assert_close(alibi_attention(q, k, v, slope).double(), expected, atol=bound, rtol=0)


# ------------------------------------------------------------------------------------------ expanded and absorbed form
@pytest.mark.parametrize("kv_dim", [4, 8, 9, 24])
def test_absorbed_is_expanded(kv_dim: int) -> None:
    attention = make_model("mla", kv_dim=kv_dim).layers[0].attention
    for T in range(1, 41):
        q, c_kv = torch.randn(2, 4, T, 8), torch.randn(2, 40, kv_dim)
        torch.testing.assert_close(attention.absorbed(q, c_kv), attention.expanded(q, c_kv), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("not_used", "cached", "sizes"),
    [("expanded", True, (1, 1, 1)), ("absorbed", True, (2, 50)), ("absorbed", False, (2,))],
)
def test_one_token_is_absorbed_and_several_are_expanded(
    monkeypatch: Any, not_used: str, cached: bool, sizes: Any
) -> None:
    monkeypatch.setattr(LatentAttention, not_used, lambda *_: pytest.fail("the other form was to be used"))
    model, idx = make_model("mla"), make_tokens(1, sum(sizes))
    assert (in_chunks(model, idx, *sizes) if cached else model(idx)[0]).isfinite().all()


def test_what_the_file_shows_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes beside the baseline's 768 a token, and differences that would be seen if there were any."""
    model, baseline = make_model("mla", vocab_size=256, kv_dim=8), make_baseline(vocab_size=256)

    def shown(reference: Any) -> list[float]:
        show(model, reference, baseline, str(model_mla.__doc__))
        text = capsys.readouterr().out
        assert "196,608 bytes, 96.0 a token, 87.5% less than the baseline" in text
        assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
        return [float(difference) for difference in re.findall(r"(\S+) apart", text)]

    assert [difference < 1e-4 for difference in shown(model_mla.reference)] == [True, True]
    assert shown(lambda m, idx: model_mla.reference(m, idx) + 1)[0] == pytest.approx(1, rel=0.01)


# ----------------------------------------------------------------------------------------- conversion of a baseline
@pytest.mark.parametrize("kv_dim", [32, 20, 4])
@torch.no_grad()
def test_conversion_is_the_best_approximation_of_its_rank(kv_dim: int) -> None:
    """What the latent loses of [W_K; W_V] is the tail of its singular values: nothing at full rank."""
    baseline, model = make_baseline(), make_model("mla", kv_dim=kv_dim)
    model.start_from(baseline)
    for theirs, mine in zip(baseline.attentions(), model.attentions(), strict=True):
        rows = theirs.query_key_value.weight.split(8)  # q, k, v of head 0, then of head 1
        original = torch.cat([*rows[1::3], *rows[2::3]]).double()
        up, down = torch.cat([mine.W_UK.weight, mine.W_UV.weight]), mine.W_DKV.weight
        tail = torch.linalg.svdvals(original)[kv_dim:].norm()
        torch.testing.assert_close((original - up.double() @ down.double()).norm(), tail, atol=1e-4, rtol=1e-6)
        assert tail == 0 if kv_dim == 32 else tail > 1
        torch.testing.assert_close(up.norm(), down.norm())  # sqrt(S) each


@pytest.mark.parametrize(("changed", "theirs"), [({"rotary_pct": 0.5}, "4, 10000"), ({"rotary_base": 5.0}, "2, 5")])
def test_a_baseline_that_turns_otherwise_is_no_source(changed: dict[str, float], theirs: str) -> None:
    with pytest.raises(ValueError, match=rf"use_rope turns \(2, 10000.0\).*the source \({theirs}"):
        make_model("mla-rope").start_from(make_baseline(**changed))
    with pytest.raises(ValueError, match="use_rope=False, this model True"):
        make_model("mla-rope").start_from(make_model("mla"))


@pytest.mark.parametrize("use_rope", [False, True])
@torch.no_grad()
def test_a_baseline_with_the_same_positions_converts_exactly(use_rope: bool) -> None:
    """With RoPE or nothing on both sides, no biases of queries and keys, they are one model: other biases are kept."""
    baseline = make_baseline(rotary_pct=0.25 if use_rope else 0.0)
    for attention in baseline.attentions():
        attention.query_key_value.bias.view(4, 3, 8)[:, :2] = 0
    model, idx = make_model("mla", kv_dim=32, alibi_slope=0.0, use_rope=use_rope), make_tokens(2, 40)
    report = model.start_from(baseline)
    torch.testing.assert_close(model(idx)[0], baseline(idx)[0], atol=1e-4, rtol=0)
    converted = {f"layers.{i}.attention.{W}.weight" for i in range(3) for W in ("W_Q", "W_DKV", "W_UK", "W_UV", "W_O")}
    converted |= {f"layers.{i}.mlp.dense_4h_to_h.bias" for i in range(3)}
    assert report == {name: "converted" if name in converted else "copied" for name in model.state_dict()}
