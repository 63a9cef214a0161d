"""The fast forms of kit/fast.py against the plain ones that they stand for."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import in_chunks, make_tokens, randomise
from test_models import CONFIGS, build, make_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from configurator import MODELS
from kit.fast import LOSS_ROWS, compile_step, head_loss, input_major, next_token_loss, score_tokens

# ------------------------------------------------------------------------------------------- the loss without logits

IGNORED: dict[str, slice] = {"none": slice(0), "some": slice(3, None, 2), "a-whole-chunk": slice(0, LOSS_ROWS + 3)}


def make_head(ignored: slice) -> tuple[Tensor, Tensor, Tensor]:
    """h (B, T, C), weight (V, C) and targets (B, T): two full chunks of the loss and a part of a third."""
    torch.manual_seed(0)
    targets = torch.randint(11, (2 * LOSS_ROWS + 90,))
    targets[ignored] = -100
    return torch.randn(2, len(targets) // 2, 6), torch.randn(11, 6), targets.view(2, -1)


def loss_and_gradients(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], h: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    h, weight = h.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(h, weight, targets)
    return value.detach(), *torch.autograd.grad(3 * value, [h, weight])


def plain_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((h.double() @ weight.double().T).flatten(0, 1), targets.flatten()).float()


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_head_loss_is_cross_entropy(ignored: slice) -> None:
    """In value, with and without gradients, in both gradients, and with a frozen head."""
    head = make_head(ignored)
    expected = loss_and_gradients(plain_loss, *head)
    torch.testing.assert_close(loss_and_gradients(head_loss, *head), expected, atol=1e-6, rtol=1e-5)
    h, weight, targets = head
    with torch.no_grad():
        torch.testing.assert_close(head_loss(h, weight, targets), expected[0], atol=1e-6, rtol=1e-5)
    without_targets = make_head(slice(None))
    assert not any(result.any() for result in loss_and_gradients(head_loss, *without_targets))
    (3 * head_loss(h.requires_grad_(), weight, targets)).backward()
    torch.testing.assert_close(h.grad, expected[1], atol=1e-6, rtol=1e-5)


def test_a_token_s_loss_is_not_capped() -> None:
    """Of 400 nats, where a softmax in float32 is 0 and its logarithm would stop at 87."""
    h, weight, targets = torch.tensor([[[400.0, 0.0]]]), torch.eye(2), torch.tensor([[1]])
    value, dh, _ = loss_and_gradients(head_loss, h, weight, targets)
    assert value == 400
    torch.testing.assert_close(dh, torch.tensor([[[3.0, -3.0]]]))
    assert score_tokens(h, weight, targets)[0] == 400


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_loss_under_autocast_is_cross_entropy_of_rounded_inputs(dtype: torch.dtype) -> None:
    """The products are of the low precision, the logarithm and the sums are not."""
    h, weight, targets = make_head(IGNORED["some"])
    with torch.autocast("cpu", dtype=dtype):
        value, dh, dw = loss_and_gradients(head_loss, h, weight, targets)
    logits = (h.to(dtype) @ weight.to(dtype).T).flatten(0, 1)
    torch.testing.assert_close(value, next_token_loss(logits, targets), atol=1e-5, rtol=0)
    _, expected_dh, expected_dw = loss_and_gradients(plain_loss, h, weight, targets)
    for gradient, expected in ((dh, expected_dh), (dw, expected_dw)):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_scores_of_tokens() -> None:
    h, weight, targets = make_head(IGNORED["some"])
    losses, right = score_tokens(h, weight, targets)
    logits = h.double() @ weight.double().T
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(right, logits.argmax(-1) == targets)


# ------------------------------------------------------------------------------------------------ decoding, compiled


@pytest.mark.parametrize(("num_rows", "name"), [(1 + (name == "mla"), name) for name in MODELS])
@torch.no_grad()
def test_compiled_steps_are_the_model_s(num_rows: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few programs for all 34 positions; a layer that is not compiled parts them in two."""
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options, **keys: compiled(function, backend=counter, **keys))
    torch._dynamo.reset()
    fewer = {"num_layers": 2, "context_layers": (0,)}
    config: Any = CONFIGS[name]
    model = randomise(build(replace(config, **{key: fewer[key] for key in fewer if hasattr(config, key)})))
    idx = make_tokens(num_rows, 41)
    full, step, cache = model(idx)[0], compile_step(model), model.init_cache(num_rows, 41)
    model(idx[:, :7], cache=cache)
    logits = torch.cat([step(token, cache=cache)[0] for token in idx[:, 7:].split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, full[:, 7:], atol=1e-4, rtol=1e-4)
    assert counter.frame_count <= 4


@torch.no_grad()
def test_a_step_that_is_compiled_for_the_machine() -> None:
    config: Any = CONFIGS["mla"]
    model, idx = randomise(build(replace(config, num_layers=1))), make_tokens(1, 41)
    full, step, cache = model(idx)[0], compile_step(model), model.init_cache(1, 41)
    logits = torch.cat([step(token, cache=cache)[0] for token in idx.split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_input_major_matrices_give_the_same_logits(name: str) -> None:
    """Of a prompt and of single tokens; the weights keep names, shapes and values."""
    model, idx = make_model(name), make_tokens(2, 9)
    before, expected = copy.deepcopy(model.state_dict()), in_chunks(model, idx, 7, 1, 1)
    input_major(model)
    assert model.embed_in.weight.is_contiguous()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(module.weight.T.is_contiguous() for module in linears)
    torch.testing.assert_close(in_chunks(model, idx, 7, 1, 1), expected, atol=1e-5, rtol=1e-5)
