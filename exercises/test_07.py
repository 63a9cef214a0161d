"""Check of exercise 7: a latent for two layers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pythia_base
from exercises.check import (
    LENGTH,
    SMALL,
    assert_causal,
    assert_same,
    assert_streams,
    build,
    held_out,
    perplexity,
    rows,
    train,
)
from model_mla import ALiBiPositionEncoding, MLAConfig, MLAPythiaModel

CONFIG = MLAConfig(**SMALL | {"num_layers": 4}, kv_dim=12)


def attend_in_pairs() -> Callable[[Any, Tensor], Tensor]:
    """For pythia_base.reference, which calls it layer by layer: each second call attends to the first one's latents."""
    latents: list[Tensor] = []  # one for each layer so far

    def attend(a: Any, x: Tensor) -> Tensor:
        D, heads = a.config.head_size, []
        latents.append(latents[-1] if len(latents) % 2 else x @ a.W_DKV.weight.T)
        for W_Q, W_UK, W_UV in zip(*(W.weight.split(D) for W in (a.W_Q, a.W_UK, a.W_UV)), strict=True):
            scores = (x @ W_Q.T) @ (latents[-1] @ W_UK.T).T / math.sqrt(D)
            weights = ALiBiPositionEncoding(a.config.alibi_slope).apply_to_scores(scores, len(x)).softmax(dim=-1)
            heads.append(weights @ latents[-1] @ W_UV.T)
        return torch.cat(heads, dim=-1) @ a.W_O.weight.T

    return attend


@torch.no_grad()
def test_equal_to_the_equations(attempt: Any) -> None:
    model, idx = build(attempt.SharedMLAModel, CONFIG), rows(2, LENGTH)
    expected = pythia_base.reference(model, idx, attend_in_pairs())
    what = "logits against the equations: layer 1 reads the latents that layer 0 made of ITS input, 3 those of 2"
    assert_same(model(idx)[0], expected, what)


@torch.no_grad()
def test_parameters(attempt: Any) -> None:
    less = count(MLAPythiaModel(CONFIG)) - count(attempt.SharedMLAModel(CONFIG))
    expected = 2 * CONFIG.hidden_size * CONFIG.kv_dim
    assert less == expected, (
        f"{less:,} parameters less than MLA: of four layers two do without their W_DKV, {expected:,} parameters"
    )
    predicted, less = attempt.PREDICTED_PARAMETERS_LESS, 3 * MLAConfig().hidden_size * MLAConfig().kv_dim
    assert predicted == less, f"PREDICTED_PARAMETERS_LESS is {predicted:,}: at full size it is {less:,}"


def test_causal_and_streamable(attempt: Any) -> None:
    model = build(attempt.SharedMLAModel, CONFIG)
    assert_causal(model)
    assert_streams(model)


@torch.no_grad()
def test_bytes(attempt: Any) -> None:
    used, mla = (m(CONFIG).init_cache(1, 100).nbytes for m in (attempt.SharedMLAModel, MLAPythiaModel))
    assert used == mla // 2, f"the cache takes {used:,} bytes for 100 tokens, MLA's {mla:,}: half of that is enough"
    predicted, measured = attempt.PREDICTED_BYTES, MLAPythiaModel(MLAConfig(vocab_size=1)).init_cache(1, 1).nbytes // 2
    assert predicted == measured, f"PREDICTED_BYTES is {predicted:,}: at full size a token takes {measured:,}"


def test_both_layers_train_the_latent(attempt: Any) -> None:
    """Without a cache, as in training: the gradients of the logits' sum are those of the equations."""
    model, idx = build(attempt.SharedMLAModel, CONFIG).double(), rows(1, LENGTH)
    weight = model.layers[0].attention.W_DKV.weight
    logits = (model(idx)[0], pythia_base.reference(model, idx, attend_in_pairs()))
    actual, expected = (torch.autograd.grad((y * y).sum(), weight, allow_unused=True)[0] for y in logits)
    assert actual is not None, "layer 0's W_DKV gets no gradient"
    what = "gradient of layer 0's W_DKV, which has to come through layer 0 and through layer 1, against the equations"
    assert_same(actual / expected.norm(), expected / expected.norm(), what)


def test_what_it_costs(attempt: Any) -> None:
    """Shown, not judged: seconds of training on one seed."""
    shared, own = (perplexity(train(m, CONFIG, steps=80), held_out()) for m in (attempt.SharedMLAModel, MLAPythiaModel))
    print(f"\nPPL with a latent for two layers {shared:.2f}, with one each {own:.2f}")
    assert shared < 256, "with your model nothing is learned: 256 is the PPL of a guess among 256 bytes"


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
