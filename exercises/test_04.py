"""Check of exercise 4: absorbed MLA."""

from typing import Any

import torch

from exercises.check import SMALL, assert_same, build
from model_mla import LatentAttention, MLAConfig, reference_attention

CONFIG = MLAConfig(**SMALL, kv_dim=12)
B, P = 2, 30


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
def test_values(attempt: Any) -> None:
    """Head by head, c_kv W_VO is what v adds to the output."""
    attention, x = example()
    c_kv, (_, W_VO) = attention.W_DKV(x), attempt.fold(attention)
    W_UV, W_O = attention.W_UV.weight.chunk(CONFIG.num_heads), attention.W_O.weight.chunk(CONFIG.num_heads, dim=1)
    for h in range(CONFIG.num_heads):
        expected = c_kv @ W_UV[h].T @ W_O[h].T
        assert_same(c_kv @ W_VO[h], expected, f"values of head {h}, c_kv W_VO against v W_O", atol=1e-3)


@torch.no_grad()
def test_output(attempt: Any) -> None:
    attention, x = example()
    expected = torch.stack([reference_attention(attention.double(), row) for row in x.double()])
    attention.float()
    for T in (P, 7, 1):
        out = attempt.absorbed(x[:, P - T :], attention.W_DKV(x), *attempt.fold(attention), CONFIG)
        what = f"the last {T} of {P} outputs against model_mla.reference_attention (divisor, bias, sum over heads?)"
        assert_same(out, expected[:, P - T :], what)


def test_nothing_is_rebuilt(attempt: Any) -> None:
    attention, _ = example()
    C, L = CONFIG.hidden_size, CONFIG.kv_dim
    folded = [matrix.detach().requires_grad_() for matrix in attempt.fold(attention)]
    for length in (100, 1000):
        x, c_kv = (torch.randn(1, n, width, requires_grad=True) for n, width in ((1, C), (length, L)))
        counted = multiplications(attempt.absorbed(x, c_kv, *folded, CONFIG))
        assert counted, "no product has a gradient to be counted by: is there a no_grad or detach in `absorbed`?"
        rebuilding = 2 * length * L * C
        assert counted < rebuilding, (
            f"one query and {length} latents take {counted:,} multiplications, and to rebuild keys and values alone "
            f"takes {rebuilding:,}: c_kv has to meet the queries and the weights, never W_QK or W_VO"
        )
        predicted = attempt.products(length, CONFIG)
        assert predicted == counted, f"products({length}) predicts {predicted:,}, your `absorbed` took {counted:,}"


def multiplications(out: Any) -> int:
    """Of all matrix products that led to a result, from its graph of gradients."""
    count, nodes, seen = 0, [out.grad_fn], {None}
    while nodes:
        if (node := nodes.pop()) in seen:
            continue
        seen.add(node)
        if node.name() in ("MmBackward0", "BmmBackward0"):
            count += node._saved_self.numel() * node._saved_mat2.size(-1)
        nodes += [source for source, _ in node.next_functions]
    return count
