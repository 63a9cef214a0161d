"""Check of exercise 1: the ALiBi matrix turned round."""

import math
from typing import Any

import pytest
import torch

from exercises.check import MLA, OpenMLA, held_out, perplexity, perplexity_in_chunks, train, trained_mla


def test_the_matrix_is_turned(attempt: Any) -> None:
    scores = attempt.TurnedALiBi(0.5).apply_to_scores(torch.zeros(1, 1, 4, 4), 4)[0, 0]
    for i in range(4):
        seen = [j for j in range(4) if scores[i, j] > -math.inf]
        assert seen == list(range(i, 4)), (
            f"query {i} sees the keys {seen}: turned round, it sees {list(range(i, 4))}, itself and the future"
        )
        biases = scores[i, i:].tolist()
        expected = [-0.5 * distance for distance in range(4 - i)]
        assert biases == expected, f"query {i} with slope 0.5 adds {biases} to what it sees: it has to add {expected}"


def test_a_chunk_stands_at_the_end(attempt: Any) -> None:
    """Two queries of four positions are the last two."""
    positions = attempt.TurnedALiBi(0.5)
    whole = positions.apply_to_scores(torch.zeros(1, 1, 4, 4), 4)
    chunk = positions.apply_to_scores(torch.zeros(1, 1, 2, 4), 2)
    assert torch.equal(chunk, whole[:, :, 2:]), "with seq_len = 2 of 4 positions the queries are the LAST two, 2 and 3"


def test_token_by_token(attempt: Any) -> None:
    """Of the right model, whose cache is right: what it gives token by token is what it gives in one pass."""
    windows = held_out()[:8]
    whole, stepped = perplexity(trained_mla(), windows), attempt.perplexity_token_by_token(trained_mla(), windows)
    assert stepped == pytest.approx(whole, rel=1e-3), (
        f"of the model with the right matrix you measure {stepped:.3f} token by token, one pass gives {whole:.3f}. "
        "Each of the first T tokens goes through the cache alone, and its logits predict the token after it"
    )


def test_what_the_perplexity_says(attempt: Any) -> None:
    turned = train(OpenMLA, MLA, attempt.TurnedALiBi(MLA.alibi_slope))
    models = {"right": trained_mla(), "turned": turned}
    in_one_pass = {name: perplexity(model, held_out()) for name, model in models.items()}
    stepped = {name: attempt.perplexity_token_by_token(model, held_out()) for name, model in models.items()}
    print(f"\nPPL in one pass:    right {in_one_pass['right']:.2f}, turned {in_one_pass['turned']:.2f}")
    print(f"PPL token by token: right {stepped['right']:.2f}, turned {stepped['turned']:.2f}")
    streamed = perplexity_in_chunks(turned, held_out(), 1)
    assert stepped["turned"] == pytest.approx(streamed, rel=1e-3), (
        f"of the turned model you measure {stepped['turned']:.2f} token by token: when each token goes through the "
        f"cache alone, and sees nothing that comes after it, it is {streamed:.2f}"
    )
    for ppl, name in ((in_one_pass, "PREDICTED_IN_ONE_PASS"), (stepped, "PREDICTED_TOKEN_BY_TOKEN")):
        predicted, ratio = getattr(attempt, name), ppl["turned"] / ppl["right"]
        measured = "lower" if ratio < 0.95 else "higher" if ratio > 1.05 else "equal"
        assert predicted, f"write down {name} first"
        assert predicted == measured, (
            f"{name} is {predicted!r}, measured is {measured!r}: {ppl['turned']:.2f} against {ppl['right']:.2f}"
        )
