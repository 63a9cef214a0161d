"""The context family: Phase 1, shared contexts, intervals. What holds for every model is in test_models.py."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, make_tokens
from test_models import CONFIGS, build, make_baseline, make_model
from torch import Tensor

import model_context
import pythia_base
from kit.contexts import freeze_contexts
from model_context import ContextBlock, ContextKVConfig, ContextPythiaConfig, effective_rank, oacd_iteration, oacd_loss
from train import LMSettings, Phase1Settings, make_optimizers

SETTINGS = Phase1Settings()
PASS = {
    name: getattr(SETTINGS, name)
    for name in ("batch_size", "context_noise", "centroid_weight", "gradient_clip", "convergence_threshold")
}


def make_block(num_layers: int = 1, embed_norm: bool = True) -> ContextBlock:
    torch.manual_seed(0)
    return ContextBlock(6, 5, num_layers, 1e-5, "normal", embed_norm).double()


# ----------------------------------------------------------------------------------------- the recurrence, Phase 1
@pytest.mark.parametrize(("num_layers", "embed_norm"), [(1, True), (1, False), (2, True)])
@torch.no_grad()
def test_the_recurrence_is_the_plain_loop(num_layers: int, embed_norm: bool) -> None:
    """Whole, continued, and one step."""
    block, embeddings = make_block(num_layers, embed_norm), torch.randn(2, 9, 6, dtype=torch.float64)
    expected = torch.stack([model_context.reference_contexts(block, row) for row in embeddings])
    whole, rest = block.recurrence(embeddings, None), block.recurrence(embeddings[:, 4:], expected[:, 3])
    step = block(expected[:, 3], embeddings[:, 4])
    wanted = expected, expected[:, 4:], expected[:, 4]
    torch.testing.assert_close((whole, rest, step), wanted, atol=1e-12, rtol=0)


def test_the_init_and_the_phase_1_table_are_context_mds() -> None:
    """These were once lost in an edit, and Phase 1 stopped converging."""
    block, embeddings = build(ContextPythiaConfig(vocab_size=97)).context_block, torch.randn(3, 512)
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
    with pytest.raises(ValueError, match="init='orthogonal' is not one of normal, xavier, kaiming"):
        build(ContextPythiaConfig(**SMALL, context_dim=4, init="orthogonal"))  # type: ignore[arg-type]
    assert model_context.first_contexts(1000, 256).std().item() == pytest.approx(0.01, rel=0.02)
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
    assert model_context.compute_convergence_rate(moved, contexts, threshold=0.03) == pytest.approx(2 / 3)
    assert effective_rank(torch.eye(7)[:, :5]) == pytest.approx(5)
    assert effective_rank(torch.ones(9, 5)) == pytest.approx(1, abs=1e-3)
    contexts = torch.randn(25_000, 8) @ torch.randn(8, 8)
    p = torch.linalg.svdvals(contexts.double())
    p = p / p.sum()
    assert effective_rank(contexts) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_one_iteration_by_hand(num_layers: int) -> None:
    """Shifted contexts, noise, batches, loss / number of batches, one clipped step: 23 tokens in batches of 10."""
    block, plain = make_block(num_layers), make_block(num_layers)
    table, tokens = torch.randn(11, 6, dtype=torch.float64, requires_grad=True), torch.randint(11, (23,))
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
    noise = torch.cat([0.05 * torch.randn(size, 5, dtype=torch.float64) for size in (10, 10, 3)])
    shifted = torch.cat([torch.zeros(1, 5), before[:-1]])
    expected = plain(shifted + noise, table[tokens].detach())
    torch.testing.assert_close(contexts, expected.detach(), atol=1e-12, rtol=0)
    expected_loss = torch.stack([oacd_loss(batch, centroid_weight=0.1) for batch in expected.split(10)]).sum() / 3
    assert loss == pytest.approx(expected_loss.item())
    assert 0 < rate < 1
    assert rate == pytest.approx(model_context.compute_convergence_rate(expected, before, threshold=1.0))
    parameters = list(plain.parameters())
    grads = torch.autograd.grad(expected_loss, parameters)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    assert norm > 0.01
    stepped = [parameter - grad * 0.01 / norm for parameter, grad in zip(parameters, grads, strict=True)]
    torch.testing.assert_close(list(block.parameters()), stepped, atol=1e-7, rtol=0)
    assert table.grad is None, "Phase 1 trains the ContextBlock alone"


def settle(block: ContextBlock, table: Tensor, tokens: Tensor) -> tuple[Tensor, list[float]]:
    """Train a block by phase 1's own settings -> its last contexts, and the convergence rate of every iteration."""
    optimizer = torch.optim.Adam(block.parameters(), lr=SETTINGS.learning_rate)
    contexts, rates = model_context.first_contexts(len(tokens), block.context_dim), [0.0]
    while rates[-1] < SETTINGS.early_stopping_threshold and len(rates) <= SETTINGS.max_iterations:
        rates.append(oacd_iteration(block, table, tokens, contexts, **PASS)[1])
        optimizer.step()
    assert rates[-1] >= 0.9
    return contexts, rates[1:]


def test_phase_1_settles_on_diverse_contexts() -> None:
    """On real text, the bytes of a file of this project: 90% within the 100 iterations."""
    torch.manual_seed(0)
    tokens = torch.tensor(list(Path(pythia_base.__file__).read_bytes()))[:20_000]
    contexts, rates = settle(ContextBlock(96, 64, 1, 1e-5, "normal", True), 0.02 * torch.randn(256, 96), tokens)
    assert rates[0] < 0.1
    assert effective_rank(contexts) > 0.6 * 64


# ------------------------------------------------------------------------------------- what models do with contexts
@pytest.mark.parametrize("name", ["context", "context_kv", "cascade"])
@torch.no_grad()
def test_known_contexts_take_the_place_of_the_recurrence(name: str) -> None:
    model, idx = make_model(name), make_tokens(2, 30)
    embeddings, blocks = model.embed_in(idx), model.context_blocks
    contexts = torch.cat([block.recurrence(embeddings, None) for block in blocks], dim=-1)
    with torch.autocast("cpu", torch.bfloat16):  # rounding would add up from token to token
        assert torch.equal(torch.cat([block.recurrence(embeddings, None) for block in blocks], dim=-1), contexts)
    full, others = model(idx)[0], model(idx, contexts=contexts.flip(1))[0]
    torch.testing.assert_close(model(idx, contexts=contexts)[0], full, atol=1e-6, rtol=0)
    assert (others - full).abs().max() > 1e-2
    if name == "context":  # which reads the embedding through its contexts only
        assert torch.equal(model(idx.flip(1), contexts=contexts)[0], model(idx, contexts=contexts)[0])
    if name == "cascade":  # whose positions are independent given their contexts: each may be a row of its own
        apart = model(idx.view(-1, 1), contexts=contexts.flatten(0, 1)[:, None])[0]
        torch.testing.assert_close(apart.view_as(full), full)
    cache = model.init_cache(batch_size=2, max_len=30)
    model(idx[:, :17], cache=cache, contexts=contexts[:, :17])
    continued = model(idx[:, 17:], cache=cache)[0]  # the recurrence goes on from the last context that was given
    torch.testing.assert_close(continued, full[:, 17:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith(("context", "cascade"))])
def test_phase_2_trains_all_but_what_the_contexts_were_computed_with(name: str) -> None:
    """Neither gradients nor weight decay reach that, or cached contexts would go stale."""
    model, idx = make_model(name), make_tokens(2, 9)
    freeze_contexts(model)
    before = copy.deepcopy(model.state_dict())
    model(idx, idx.roll(-1, dims=1))[1].backward()
    for optimizer in make_optimizers(model, LMSettings(optimizer="muon", learning_rate=0.1)).values():
        optimizer.step()
    unchanged = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, before[key])}
    assert unchanged == {key for key in before if key.startswith(("context_block", "embed_in."))}


@pytest.mark.parametrize("name", ["context", "context_kv"])
def test_starting_from_a_baseline_takes_over_what_reads_the_stream(name: str) -> None:
    """Queries and output projections; keys, values and the recurrence have nothing there to start from."""
    baseline, model, x = make_baseline(), make_model(name), torch.randn(2, 5, 32)
    report = model.start_from(baseline)
    theirs, mine = baseline.layers[2].attention, model.layers[2].attention
    q = theirs.query_key_value(x).unflatten(-1, (4, 3, 8))[:, :, :, 0].flatten(2)
    torch.testing.assert_close(mine.W_Q(x), q)
    assert torch.equal(mine.dense.weight, theirs.dense.weight)
    new = {k.split("attention.")[-1] for k, how in report.items() if how == "new"}
    block = {f"context_block.{k}" for k in model.context_block.state_dict()}
    assert new == {"W_K.weight", "W_V.weight", *block} | ({"W_in.weight"} if name == "context" else set())


# ------------------------------------------------------------------------------------------------- Context-Pythia
@pytest.mark.parametrize("rotary_pct", [0.0, 0.25, 1.0])
def test_the_absorbed_form_equals_the_expanded_one(rotary_pct: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_context, "REBUILT_KEYS", 7)
    attention = make_model("context", rotary_pct=rotary_pct).layers[0].attention.double()
    for P in (1, 2, 30):
        q, contexts = torch.randn(2, 4, 1, 8, dtype=torch.float64), torch.randn(2, P, 12, dtype=torch.float64)
        absorbed, expanded = (form(q, contexts) for form in (attention.absorbed, attention.expanded))
        torch.testing.assert_close(absorbed, expanded, atol=1e-12, rtol=0)


# ----------------------------------------------------------------------------------------------------- Context-KV
@pytest.mark.parametrize(
    ("position", "oldest", "count"),
    [(350, 30, 11), (1000, 8, 32), (31, 31, 1), (32, 0, 2), (991, 31, 31), (992, 0, 32), (993, 1, 32), (1024, 32, 32)],
)
@pytest.mark.parametrize("new", [1, 5, 32, 40, 2000])
def test_the_attended_positions_are_context_mds(position: int, oldest: int, count: int, new: int) -> None:
    """Contexts that hold their own position, the last `new` of them in a chunk of its own."""
    model = build(ContextKVConfig(**SMALL, context_dim=1))
    ring = model.init_cache(1, 2000).layers[0]
    contexts = torch.arange(position + 1.0).view(1, -1, 1)
    start = max(position + 1 - new, 0)
    ring.write(contexts[:, :start], 0)
    columns, seen = model_context.interval_columns(contexts[:, start:], start, ring, model.config)
    row, last = divmod(position - start, len(columns))  # of the last position
    attended = columns[last, seen[last, 0, row], 0].tolist()
    assert attended == list(range(oldest, position + 1, 32))
    assert len(attended) == count
