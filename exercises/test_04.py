"""Check of exercise 4: absorbed MLA."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from exercises.check import SMALL, assert_same, build
from model_mla import LatentAttention, MLAConfig, reference_attention

CONFIG = MLAConfig(**SMALL, kv_dim=12)
B, P = 2, 30


class ProductCounter(TorchDispatchMode):
    """Counts the multiplications of matrix products (torch's own flop counter takes five seconds to import)."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.count += out.numel() * args[0].size(-1)
        return out


def example() -> tuple[LatentAttention, torch.Tensor]:
    """An attention and what it reads, (B, P, C)."""
    attention = build(LatentAttention, CONFIG)
    return attention, torch.randn(B, P, CONFIG.hidden_size)


@torch.no_grad()
def test_shapes(attempt: Any) -> None:
    attention, _ = example()
    C, L, H = CONFIG.hidden_size, CONFIG.kv_dim, CONFIG.num_heads
    for name, folded, shape in zip(("W_QK", "W_VO"), attempt.fold(attention), ((H, C, L), (H, L, C)), strict=True):
        assert folded.shape == shape, f"{name} is {tuple(folded.shape)}, it has to be {shape}"


@torch.no_grad()
def test_scores(attempt: Any) -> None:
    """Head by head, x W_QK c_kv^T is q k^T."""
    attention, x = example()
    c_kv, (W_QK, _) = attention.W_DKV(x), attempt.fold(attention)
    heads = (W.weight.chunk(CONFIG.num_heads) for W in (attention.W_Q, attention.W_UK))
    for h, (W_Q, W_UK) in enumerate(zip(*heads, strict=True)):
        expected = (x @ W_Q.T) @ (c_kv @ W_UK.T).mT
        assert_same(x @ W_QK[h] @ c_kv.mT, expected, f"scores of head {h}, x W_QK c_kv^T against q k^T", atol=1e-3)


@torch.no_grad()
def test_output(attempt: Any) -> None:
    attention, x = example()
    expected = torch.stack([reference_attention(attention.double(), row) for row in x.double()])
    attention.float()
    for T in (P, 7, 1):
        out = attempt.absorbed(x[:, P - T :], attention.W_DKV(x), *attempt.fold(attention), CONFIG)
        what = f"the last {T} of {P} outputs against model_mla.reference_attention"
        assert_same(out, expected[:, P - T :], what)


@torch.no_grad()
def test_nothing_is_rebuilt(attempt: Any) -> None:
    attention, _ = example()
    folded, C, L = attempt.fold(attention), CONFIG.hidden_size, CONFIG.kv_dim
    for length in (100, 1000):
        with ProductCounter() as counter:
            attempt.absorbed(torch.randn(1, 1, C), torch.randn(1, length, L), *folded, CONFIG)
        counted, rebuilding = counter.count, 2 * length * L * C
        assert counted < rebuilding, (
            f"one query and {length} latents take {counted:,} multiplications, and to rebuild keys and values alone "
            f"takes {rebuilding:,}: c_kv has to meet the queries and the weights, never W_QK or W_VO"
        )
        predicted = attempt.products(length, CONFIG)
        assert predicted == counted, f"products({length}) predicts {predicted:,}, your `absorbed` took {counted:,}"
