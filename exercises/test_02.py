"""Check of exercise 2: a slope for each head."""

from typing import Any

import pytest
import torch

from exercises.check import (
    LENGTH,
    MLA,
    OpenMLA,
    assert_causal,
    assert_same,
    assert_streams,
    build,
    held_out,
    perplexity,
    rows,
    train,
    trained_mla,
)
from model_mla import ALiBiPositionEncoding, reference


def test_slopes(attempt: Any) -> None:
    for H in (8, 4, 16):
        slopes, first = attempt.alibi_slopes(H), 2 ** (-8 / H)
        assert slopes.shape == (H,), f"the slopes of {H} heads have the shape {tuple(slopes.shape)}"
        assert slopes[0].item() == pytest.approx(first), f"of {H} slopes the first is {slopes[0]:.4f}, not {first:.4f}"
        assert slopes[-1].item() == pytest.approx(2**-8), f"of {H} slopes the last is {slopes[-1]:.4f}, not 2^-8"
        ratios = slopes[1:] / slopes[:-1]
        assert (ratios - first).abs().max() < 1e-4, f"no geometric sequence: the ratios of neighbours are {ratios}"


def test_every_head_has_the_bias_of_its_own_slope(attempt: Any) -> None:
    """As many heads as positions, so that slopes along a wrong axis are no error of shapes."""
    torch.manual_seed(0)
    scores, slopes = torch.randn(2, 4, 4, 4), torch.tensor([2.0, 1.0, 0.5, 0.25])
    for T in (4, 2):  # all queries, and the last two
        weights = attempt.HeadwiseALiBi(slopes).apply_to_scores(scores[:, :, 4 - T :], T).softmax(dim=-1)
        for h, slope in enumerate(slopes.tolist()):
            expected = ALiBiPositionEncoding(slope).apply_to_scores(scores[:, h, 4 - T :], T).softmax(dim=-1)
            what = f"weights of head {h}, {T} queries, against ALiBi with its slope {slope} (slopes go along axis 1, H)"
            assert_same(weights[:, h], expected, what)


def test_equal_slopes_are_the_original(attempt: Any) -> None:
    model = build(OpenMLA, MLA, attempt.HeadwiseALiBi(torch.full((4,), MLA.alibi_slope)))
    idx = rows(1, LENGTH)
    assert_same(model(idx)[0], reference(model, idx), "logits with four equal slopes against model_mla.reference")


def test_causal_and_streamable(attempt: Any) -> None:
    model = build(OpenMLA, MLA, attempt.HeadwiseALiBi(attempt.alibi_slopes(4)))
    assert_causal(model)
    assert_streams(model)


def test_reach(attempt: Any) -> None:
    for slope in (0.5, 0.0625, 2**-8):
        bias = ALiBiPositionEncoding(slope).apply_to_scores(torch.zeros(1, 2048), 1)[0].flip(0)  # by distance
        measured = (bias.exp() < 1e-3).nonzero()[0].item()
        predicted = attempt.reach(slope)
        assert predicted == measured, f"reach({slope}) is {predicted}: at distance {measured} the weight falls below"


def test_what_it_changes(attempt: Any) -> None:
    """Shown, not judged: seconds of training on one seed."""
    models = train(OpenMLA, MLA, attempt.HeadwiseALiBi(attempt.alibi_slopes(4))), trained_mla()
    own, shared = (perplexity(model, held_out()) for model in models)
    print(f"\nPPL with a slope for each head {own:.2f}, with {MLA.alibi_slope} for all of them {shared:.2f}")
    assert own < 256, "with your slopes the model has learned nothing: 256 is the PPL of a guess among 256 bytes"
