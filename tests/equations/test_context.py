"""The context family: Phase 1, the shared contexts of Context-Pythia, the intervals of Context-KV.

What holds for every model is in test_models.py.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, in_chunks, make_tokens, randomise
from test_models import make_model

import pythia_base
from kit.contexts import freeze_contexts
from model_context import (
    CausalContextAttention,
    ContextBlock,
    ContextKVConfig,
    ContextKVPythiaModel,
    ContextPythiaConfig,
    ContextPythiaModel,
    compute_convergence_rate,
    effective_rank,
    first_contexts,
    interval_columns,
    oacd_iteration,
    oacd_loss,
    reference_contexts,
)
from pythia_base import PythiaConfig, PythiaModel
from train import LMSettings, Phase1Settings, make_optimizers

SETTINGS = Phase1Settings()
PASS = {
    name: getattr(SETTINGS, name)
    for name in ("batch_size", "context_noise", "centroid_weight", "gradient_clip", "convergence_threshold")
}
both_models = pytest.mark.parametrize("name", ["context", "context_kv"])


def make_block(num_layers: int = 1, embed_norm: bool = True) -> ContextBlock:
    torch.manual_seed(0)
    return ContextBlock(6, 5, num_layers, 1e-5, "normal", embed_norm).double()


# ----------------------------------------------------------------------------------------- the recurrence, Phase 1


@pytest.mark.parametrize(("num_layers", "embed_norm"), [(1, True), (1, False), (2, True)])
@torch.no_grad()
def test_the_recurrence_is_the_plain_loop(num_layers: int, embed_norm: bool) -> None:
    """Whole, continued, and one step."""
    block, embeddings = make_block(num_layers, embed_norm), torch.randn(2, 9, 6, dtype=torch.float64)
    expected = torch.stack([reference_contexts(block, row) for row in embeddings])
    torch.testing.assert_close(block.recurrence(embeddings, None), expected, atol=1e-12, rtol=0)
    rest = block.recurrence(embeddings[:, 4:], expected[:, 3])
    torch.testing.assert_close(rest, expected[:, 4:], atol=1e-12, rtol=0)
    torch.testing.assert_close(block(expected[:, 3], embeddings[:, 4]), expected[:, 4], atol=1e-12, rtol=0)


def test_the_init_and_the_phase_1_table_are_context_mds() -> None:
    """These were once lost in an edit, and Phase 1 stopped converging."""
    torch.manual_seed(0)
    block, embeddings = ContextPythiaModel(ContextPythiaConfig(vocab_size=97)).context_block, torch.randn(3, 512)
    (linear,) = block.linears
    assert linear.weight.shape == (256, 256 + 512)
    assert linear.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert linear.bias.std().item() == pytest.approx(0.01, rel=0.2)
    assert abs(linear.weight.mean().item()) < 0.001
    torch.testing.assert_close(block.embed_norm(embeddings), torch.nn.functional.layer_norm(embeddings, (512,)))
    assert not list(block.embed_norm.parameters()), "embed_norm's scale and shift stay at 1 and 0"
    others: dict[Any, float] = {"xavier": (2 / (256 + 768)) ** 0.5, "kaiming": (2 / 768) ** 0.5}  # to be compared with
    for init, std in others.items():
        (linear,) = ContextBlock(512, 256, 1, 1e-5, init, True).linears
        assert linear.weight.std().item() == pytest.approx(std, rel=0.02)
        assert not linear.bias.any()
    assert first_contexts(1000, 256).std().item() == pytest.approx(0.01, rel=0.02)
    table = {
        "num_tokens": 100_000, "max_iterations": 100, "convergence_threshold": 0.03, "learning_rate": 0.003,
        "batch_size": 5_000, "gradient_clip": 2.0, "context_noise": 0.05, "early_stopping_threshold": 0.9,
        "centroid_weight": 0.1,
    }  # fmt: skip
    assert {name: getattr(SETTINGS, name) for name in table} == table


def test_oacd_loss_convergence_and_rank_by_hand() -> None:
    contexts = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 3.0]])  # centroid (2, 1), deviations 2 + 2 + 4 squared
    assert oacd_loss(contexts, centroid_weight=0.1).item() == pytest.approx(-math.sqrt(8) / 3 + 0.1 * 5)
    moved = contexts + torch.tensor([[0.0, 0.1], [0.0, 0.3], [0.2, 0.1]])  # mean squares 0.005, 0.045, 0.025
    assert compute_convergence_rate(moved, contexts, threshold=0.03) == pytest.approx(2 / 3)
    assert effective_rank(torch.eye(7)[:, :5]) == pytest.approx(5)
    assert effective_rank(torch.ones(9, 5)) == pytest.approx(1, abs=1e-3)
    contexts = torch.randn(25_000, 8) @ torch.randn(8, 8)
    p = torch.linalg.svdvals(contexts.double())
    p = p / p.sum()
    assert effective_rank(contexts) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_one_iteration_is_the_plain_loop(num_layers: int) -> None:
    """Shifted contexts, noise, batches, loss / number of batches, one clipped step: 23 tokens in batches of 10."""
    block, plain = make_block(num_layers), make_block(num_layers)
    table = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(11, (23,))
    before = torch.randn(23, 5, dtype=torch.float64)
    contexts = before.clone()
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)  # left over from the iteration before
    torch.manual_seed(7)
    numbers = {**PASS, "batch_size": 10, "gradient_clip": 0.01, "convergence_threshold": 1.0}
    loss, rate = oacd_iteration(block, table, tokens, contexts, **numbers)
    optimizer.step()

    torch.manual_seed(7)
    losses, new = torch.zeros(3, dtype=torch.float64), []
    for i, (start, size) in enumerate([(0, 10), (10, 10), (20, 3)]):
        noise = 0.05 * torch.randn(size, 5, dtype=torch.float64)
        batch = []
        for t in range(start, start + size):
            c = before[t - 1] if t > 0 else torch.zeros(5, dtype=torch.float64)
            batch.append(plain(c + noise[t - start], table[tokens[t]].detach()))
        losses[i] = oacd_loss(torch.stack(batch), centroid_weight=0.1) / 3
        new += batch
    expected = torch.stack(new)
    torch.testing.assert_close(contexts, expected.detach(), atol=1e-12, rtol=0)
    assert loss == pytest.approx(losses.sum().item())
    assert 0 < rate < 1
    assert rate == pytest.approx(compute_convergence_rate(expected, before, threshold=1.0))
    parameters = list(plain.parameters())
    grads = torch.autograd.grad(losses.sum(), parameters)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    assert norm > 0.01
    for mine, theirs, grad in zip(block.parameters(), parameters, grads, strict=True):
        torch.testing.assert_close(mine, theirs - grad * 0.01 / norm, atol=1e-7, rtol=0)
    assert table.grad is None, "Phase 1 trains the ContextBlock alone"


def test_phase_1_settles_on_diverse_contexts() -> None:
    """On real text, the bytes of a file of this project: 90% within the 100 iterations."""
    torch.manual_seed(0)
    tokens = torch.tensor(list(Path(pythia_base.__file__).read_bytes()))[:20_000]
    table, block = 0.02 * torch.randn(256, 96), ContextBlock(96, 64, 1, 1e-5, "normal", True)
    optimizer = torch.optim.Adam(block.parameters(), lr=SETTINGS.learning_rate)
    contexts, rates = first_contexts(len(tokens), 64), [0.0]
    while rates[-1] < SETTINGS.early_stopping_threshold and len(rates) <= SETTINGS.max_iterations:
        rates.append(oacd_iteration(block, table, tokens, contexts, **PASS)[1])
        optimizer.step()
    assert rates[1] < 0.1
    assert rates[-1] >= 0.9
    assert effective_rank(contexts) > 0.6 * 64


# ------------------------------------------------------------------------------------- what both models share


@both_models
@torch.no_grad()
def test_known_contexts_take_the_place_of_the_recurrence(name: str) -> None:
    model, idx = make_model(name), make_tokens(2, 30)
    contexts = model.context_block.recurrence(model.embed_in(idx), None)
    with torch.autocast("cpu", torch.bfloat16):  # rounding would add up from token to token
        assert torch.equal(model.context_block.recurrence(model.embed_in(idx), None), contexts)
    full, others = model(idx)[0], model(idx, contexts=contexts.flip(1))[0]
    torch.testing.assert_close(model(idx, contexts=contexts)[0], full, atol=1e-6, rtol=0)
    assert (others - full).abs().max() > 1e-2
    if name == "context":  # which reads the embedding through its contexts only
        assert torch.equal(model(idx.flip(1), contexts=contexts)[0], model(idx, contexts=contexts)[0])
    cache = model.init_cache(batch_size=2, max_len=30)
    model(idx[:, :17], cache=cache, contexts=contexts[:, :17])
    continued = model(idx[:, 17:], cache=cache)[0]  # the recurrence goes on from the last context that was given
    torch.testing.assert_close(continued, full[:, 17:], atol=1e-4, rtol=0)


@both_models
def test_starting_from_a_baseline_takes_over_what_reads_the_stream(name: str) -> None:
    """Queries and output projections; keys, values and the recurrence have nothing there to start from.

    A phase 2 step with weight decay then changes every parameter but those the contexts were computed with.
    """
    baseline, model, x = randomise(PythiaModel(PythiaConfig(**SMALL))), make_model(name), torch.randn(2, 5, 32)
    report = model.start_from(baseline)
    theirs, mine = baseline.layers[2].attention, model.layers[2].attention
    q = theirs.query_key_value(x).unflatten(-1, (4, 3, 8))[:, :, :, 0].flatten(2)
    torch.testing.assert_close(mine.W_Q(x), q)
    assert torch.equal(mine.dense.weight, theirs.dense.weight)
    new = {k.split("attention.")[-1] for k, how in report.items() if how == "new"}
    block = {f"context_block.{k}" for k in ("linears.0.weight", "linears.0.bias", "norms.0.weight", "norms.0.bias")}
    assert new == {"W_K.weight", "W_V.weight", *block} | ({"W_in.weight"} if name == "context" else set())

    before, idx = {k: v.clone() for k, v in model.state_dict().items()}, make_tokens(2, 9)
    freeze_contexts(model)
    optimizers = make_optimizers(model, LMSettings(optimizer="muon", learning_rate=0.1)).values()
    model(idx, idx.roll(-1, dims=1))[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    assert unchanged == {"embed_in.weight", *block}


# ------------------------------------------------------------------------------------------------- Context-Pythia


@pytest.mark.parametrize("rotary_pct", [0.0, 0.25, 1.0])
def test_the_absorbed_form_equals_the_expanded_one(rotary_pct: float) -> None:
    config = ContextPythiaConfig(**SMALL, context_dim=12, rotary_pct=rotary_pct)
    attention = randomise(CausalContextAttention(config)).double()
    for P in (1, 2, 30):
        q, contexts = torch.randn(2, 4, 1, 8, dtype=torch.float64), torch.randn(2, P, 12, dtype=torch.float64)
        absorbed, expanded = (form(q, contexts) for form in (attention.absorbed, attention.expanded))
        torch.testing.assert_close(absorbed, expanded, atol=1e-12, rtol=0)


@torch.no_grad()
def test_long_chunks_and_single_tokens_give_the_full_pass() -> None:
    model, idx = make_model("context"), make_tokens(2, 62)
    for cut in (1, 2, 40):
        rest = [cut] * (57 // cut) + [57 % cut]
        torch.testing.assert_close(in_chunks(model, idx, 5, *filter(None, rest)), model(idx)[0], atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------- Context-KV


@pytest.mark.parametrize(
    ("position", "oldest", "count"),
    [(350, 30, 11), (1000, 8, 32), (31, 31, 1), (32, 0, 2), (991, 31, 31), (992, 0, 32), (993, 1, 32), (1024, 32, 32)],
)
@pytest.mark.parametrize("new", [1, 5, 32, 40, 2000])
def test_the_attended_positions_are_context_mds(position: int, oldest: int, count: int, new: int) -> None:
    """Contexts that hold their own position, the last `new` of them in a chunk of its own."""
    model = ContextKVPythiaModel(ContextKVConfig(**SMALL, context_dim=1))
    ring = model.init_cache(1, 2000).layers[0]
    contexts = torch.arange(position + 1.0).view(1, -1, 1)
    start = max(position + 1 - new, 0)
    ring.write(contexts[:, :start], 0)
    columns, seen = interval_columns(contexts[:, start:], start, ring, model.config)
    row, last = divmod(position - start, len(columns))  # of the last position
    attended = columns[last, seen[last, 0, row], 0].tolist()
    assert attended == list(range(oldest, position + 1, 32))
    assert len(attended) == count
