"""The fast forms of kit/fast.py against the plain ones that they stand for."""

import copy
import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import in_chunks, make_tokens, randomise
from test_models import make_model
from torch import Tensor, nn
from torch.utils import cpp_extension

from configurator import MODELS
from kit import fast
from kit.fast import LOSS_ROWS, MOST_ROWS, TURNED_ROWS, head_loss, prepare_decoding, row_linear, score_tokens
from model_context import ContextBlock, reference_contexts
from pythia_base import PythiaConfig, rotate

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
def test_head_loss_and_scores_are_cross_entropy(ignored: slice) -> None:
    """In value, with and without gradients, in both gradients, and with a frozen head; and token by token."""
    head = make_head(ignored)
    expected = loss_and_gradients(plain_loss, *head)
    torch.testing.assert_close(loss_and_gradients(head_loss, *head), expected, atol=1e-6, rtol=1e-5)
    h, weight, targets = head
    with torch.no_grad():
        torch.testing.assert_close(head_loss(h, weight, targets), expected[0], atol=1e-6, rtol=1e-5)
    losses, right = score_tokens(h, weight, targets)
    logits = h.double() @ weight.double().T
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    torch.testing.assert_close(losses.double(), each, atol=1e-5, rtol=0)
    assert torch.equal(right, logits.argmax(-1) == targets)
    assert not score_tokens(torch.zeros_like(h), weight, targets)[1].any(), "all alike is not the likeliest"
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
    torch.testing.assert_close(value, fast.next_token_loss(logits, targets), atol=1e-5, rtol=0)
    _, expected_dh, expected_dw = loss_and_gradients(plain_loss, h, weight, targets)
    for gradient, expected in ((dh, expected_dh), (dw, expected_dw)):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.02 * expected.norm()


# ------------------------------------------------------------------------------------- decoding, by kit/decode.cpp
@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The compiled kernels, for one test."""
    monkeypatch.setattr(fast, "kernels", None)
    prepare_decoding(nn.Linear(1, 1))
    return fast.kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 700, 512), (8, 70, 500), (11, 33, 64), (3, 5, 7)], ids=str)
def test_a_product_with_a_few_rows(kernels: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Of any sizes, one of them shared out among threads block by block, and of a part of a matrix's columns."""
    M, N, K = shape
    x, W, b = torch.randn(1, M, K), torch.randn(N, K + 3).to(dtype)[:, 3:], torch.randn(N)
    expected = x.double() @ W.double().T + b
    torch.testing.assert_close(kernels.linear(x, W, b).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1, TURNED_ROWS, TURNED_ROWS + 1])
@torch.no_grad()
def test_a_product_and_gelu_with_any_number_of_rows(kernels: Any, rows: int) -> None:
    """In any of their forms they are PyTorch's, of a part of a wider x and of a wider matrix."""
    x, W = torch.randn(rows, 1, 70)[..., 3:], torch.randn(33, 70)[:, 3:]
    for b in (None, torch.randn(33)):
        torch.testing.assert_close(row_linear(x, W, b), F.linear(x, W, b), atol=1e-4, rtol=1e-5)
    x = 3 * torch.randn(rows, 1, 2050)[..., 1:]
    torch.testing.assert_close(fast.gelu(x).double(), x.double() * torch.special.ndtr(x.double()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "H", "G", "P", "D", "Dv"),
    [(1, 8, 8, 300, 64, 64), (1, 8, 1, 777, 128, 128), (2, 9, 1, 777, 64, 64), (1, 12, 2, 5, 24, 41)],
)
def test_attention_of_one_token(
    kernels: Any, B: int, H: int, G: int, P: int, D: int, Dv: int, dtype: torch.dtype
) -> None:
    """Of groups of heads, over positions in several blocks and threads' parts, with scores beyond what exp holds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    q, k, v = torch.randn(B, H, 1, D), torch.randn(B, G, P, D).to(dtype), torch.randn(B, G, P, Dv).to(dtype)
    bias = 100 * torch.randn(P).expand(B, H, -1)
    for given in (bias, None):
        scores = 0.3 * q.double() @ k.double().repeat_interleave(H // G, 1).transpose(2, 3)
        scores = scores if given is None else scores + given[:, :, None]
        expected = scores.softmax(dim=-1) @ v.double().repeat_interleave(H // G, 1)
        torch.testing.assert_close(fast.attend(q, k, v, 0.3, given).double(), expected, atol=2e-5, rtol=1e-5)
    torch.set_num_threads(threads)


@torch.no_grad()
def test_rope_of_many_rows_and_far_away(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part of a projection, as attention hands it over."""
    config = PythiaConfig(hidden_size=256, num_heads=8, rotary_pct=0.5)
    positions = torch.tensor([0, 1, 2, 77, 2047, 32767, 1_000_000]).repeat(100)
    x = torch.randn(2, len(positions), 8, 96).transpose(1, 2)[..., 32:64]
    turned = rotate(x, positions, config)
    monkeypatch.setattr(fast, "kernels", None)
    torch.testing.assert_close(turned, rotate(x, positions, config), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_the_recurrence_of_several_rows(kernels: Any, num_layers: int) -> None:
    """From zero and from a state, in widths that fill no register, with a LayerNorm that scales and shifts."""
    block, embeddings = randomise(ContextBlock(20, 13, num_layers, 1e-5, "normal", True)), torch.randn(3, 40, 20)
    contexts = block.recurrence(embeddings, None)
    continued = block.recurrence(embeddings[:, 17:], contexts[:, 16])
    expected = torch.stack([reference_contexts(block.double(), row) for row in embeddings.double()])
    for ours, exact in ((contexts, expected), (continued, expected[:, 17:])):
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-4)


def test_every_model_decodes_the_same_after_prompts_of_any_length(monkeypatch: Any, kernels: Any) -> None:
    """One row and several; nothing is compiled for a model, a length or a number of rows."""
    builds: list[Any] = []
    monkeypatch.setattr(subprocess, "run", lambda *words, **_: builds.append(words))
    for name, num_rows, prompt in itertools.product(MODELS, (1, 2), (1, 7, 30)):
        model, idx = make_model(name), make_tokens(num_rows, 41)
        with torch.no_grad():
            full = model(idx)[0]
            prepare_decoding(model)
            logits = in_chunks(model, idx, prompt, *[1] * (41 - prompt))
        torch.testing.assert_close(logits, full, atol=1e-5, rtol=1e-5)
    assert not builds


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rounded_weights_give_the_text_of_float32_with_them(name: str, kernels: Any) -> None:
    """Each matrix is read in bfloat16, whether the cache is float32, which is exact, or bfloat16, which is near."""
    model, idx = make_model(name), make_tokens(2, 12)
    plain, before = copy.deepcopy(model), model(idx)[0]
    for weight in plain.parameters():
        if weight.dim() == 2:
            weight.copy_(weight.bfloat16())
    prepare_decoding(model)
    fast.round_weights(model)
    assert torch.equal(model.generate(idx, 20, temperature=0), plain.double().generate(idx, 20, temperature=0))
    assert not torch.equal(model(idx)[0], before)
    cache = copy.deepcopy(model).bfloat16().init_cache(2, 12)
    logits = torch.cat([model(chunk, cache=cache)[0] for chunk in idx.split([5, *[1] * 7], dim=1)], dim=1)
    assert (logits - model(idx)[0]).norm() < 0.02 * logits.norm()
    model.head_weight.__dict__["rounded"].zero_()
    assert not model(idx[:, :1])[0].any()


def test_without_a_compiler_it_says_so_and_decodes(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Nor with one that fails; no half a library is left."""
    monkeypatch.setattr(fast, "kernels", None)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        model, idx = make_model("mla"), make_tokens(1, 9)
        expected = model.generate(idx, 5, temperature=0)
        prepare_decoding(model)
        assert "slower without kit/decode.cpp" in capsys.readouterr().out
        assert torch.equal(model.generate(idx, 5, temperature=0), expected)
        assert not list(tmp_path.iterdir())
