"""Check of exercise 8: what holds for every model of the project, here for the repaired memory."""

from typing import Any

import torch

from exercises.check import LENGTH, SMALL, assert_causal, assert_same, assert_streams, build, rows
from model_infini import InfiniConfig, InfiniPythiaModel, reference

CONFIG = InfiniConfig(**SMALL, segment_len=8)


@torch.no_grad()
def test_equal_to_its_reference(attempt: Any) -> None:
    model, idx = build(attempt.RepairedModel, CONFIG), rows(1, LENGTH)
    assert_same(model(idx)[0], reference(model, idx), "logits of a batch of one in one pass against the reference")


def test_causal(attempt: Any) -> None:
    assert_causal(build(attempt.RepairedModel, CONFIG))


@torch.no_grad()
def test_rows_are_independent(attempt: Any) -> None:
    model, idx = build(attempt.RepairedModel, CONFIG), rows(2, LENGTH)
    what = "rows are not independent: the logits of the first row beside a second one against those of the first alone"
    assert_same(model(idx)[0][:1], model(idx[:1])[0], what)


def test_streamable(attempt: Any) -> None:
    assert_streams(build(attempt.RepairedModel, CONFIG))


def test_gradients(attempt: Any) -> None:
    """Equal to those of the project's own memory with the same weights."""
    models = [build(model_class, CONFIG) for model_class in (attempt.RepairedModel, InfiniPythiaModel)]
    idx = rows(1, LENGTH)
    for model in models:
        model(idx[:, :-1], idx[:, 1:])[1].backward()
    for (name, actual), expected in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert actual.grad is not None, f"{name} gets no gradient: something is detached"
        assert_same(
            actual.grad,
            expected.grad,
            f"gradient of {name}, against that of model_infini.py (NaN: look for a 0/0 that what follows hides)",
        )
