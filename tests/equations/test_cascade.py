"""The cascade: its blocks, its size, what phase 2 trains. What holds for every model is in test_models.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_tokens
from test_models import CONFIGS, make_model

from eval import evaluate_cache
from kit.contexts import freeze_contexts
from model_cascade import CascadeConfig, CascadeContextLLM
from pythia_base import PythiaConfig, PythiaModel

MODES: Any = {name: config for name, config in CONFIGS.items() if isinstance(config, CascadeConfig)}
SMALL = replace(MODES["cascade"], vocab_size=61, hidden_size=10, context_dim=7)


@torch.no_grad()
def test_the_blocks_contexts_stand_side_by_side() -> None:
    """Whole, and continued; in float32 under autocast, where rounding would add up from token to token."""
    model, idx = make_model("cascade"), make_tokens(2, 23)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.recurrences(idx, None)
    together, halfway = model.recurrences(idx, None), model.recurrences(idx[:, :9], None)[:, -1]
    assert torch.equal(rough, together)
    alone = [block.recurrence(model.embed_in(idx), None) for block in model.context_blocks]
    assert torch.equal(together, torch.cat(alone, dim=-1))
    torch.testing.assert_close(model.recurrences(idx[:, 9:], halfway), together[:, 9:], atol=1e-5, rtol=0)


def test_positions_are_independent_given_their_contexts() -> None:
    model, idx = make_model("cascade"), make_tokens(1, 23)
    contexts = model.recurrences(idx, None)
    alone = model(idx.T, contexts=contexts.transpose(0, 1))[0]  # each position a row of its own
    torch.testing.assert_close(alone.transpose(0, 1), model(idx)[0])


# ------------------------------------------------------------------------------------------------- what it holds


def test_parameters_by_hand() -> None:
    def count(**changes: Any) -> int:
        return sum(p.numel() for p in CascadeContextLLM(replace(SMALL, **changes)).parameters())

    V, C, E, N = 61, 10, 7, 3
    block = E * (E + C) + E + 2 * E
    token_block = C * (N * E + C) + C + 2 * C
    table = V * C
    assert count() == table + N * block + token_block
    assert count(tie_weights=False) - count() == table
    assert count(freeze_embedding=False) - count() == table


def test_its_cache_is_held_against_a_pythia_of_its_width() -> None:
    results = evaluate_cache(CascadeContextLLM(SMALL))
    assert results["baseline_cache_bytes_per_token"]["2048"] == 6 * 2 * 10 * 4
    assert results["cache_bytes"] == {"256": 84, "2048": 84, "8192": 84}


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = CascadeContextLLM(CascadeConfig(vocab_size=99, tie_weights=False, freeze_embedding=False))
    for linear in (model.token_block.linear, *(block.linears[0] for block in model.context_blocks)):
        assert linear.weight.std().item() == pytest.approx(0.1, rel=0.01)
        assert linear.bias.std().item() == pytest.approx(0.01, rel=0.1)
    for table in (model.embed_in, model.embed_token, model.embed_out):
        assert table.weight.std().item() == pytest.approx((2 / (5 * 768)) ** 0.5, rel=0.02)
    assert not torch.equal(*(block.linears[0].weight for block in model.context_blocks))


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("cascade", set()),
        ("cascade-trained-copy", {"embed_token.weight"}),
        ("cascade-untied", {"embed_token.weight", "embed_out.weight"}),
    ],
)
def test_what_phase_2_trains(name: str, trained: set[str]) -> None:
    model, idx = make_model(name), make_tokens(2, 9)
    freeze_contexts(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    contexts = model.recurrences(idx, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(idx, idx.roll(-1, dims=1), contexts=contexts)[1].backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if not name.startswith("token_block.")} == trained
    assert {"token_block.linear.weight", "token_block.norm.bias"} <= changed
    assert torch.equal(model.recurrences(idx, None), contexts), "the cached contexts went stale"


def test_a_trained_copy_starts_as_the_table_of_phase_1() -> None:
    """Or of a baseline, of which it takes the table alone."""
    phase1, config = make_model("cascade-one-block"), replace(MODES["cascade-one-block"], freeze_embedding=False)
    phase2, later = CascadeContextLLM(config), CascadeContextLLM(config)
    report = phase2.start_from(PythiaModel(PythiaConfig(vocab_size=97, hidden_size=32, num_heads=4)))
    assert [name for name, how in report.items() if how != "new"] == ["embed_in.weight", "embed_token.weight"]
    assert phase2.start_from(phase1)["embed_token.weight"] == "converted"
    assert torch.equal(phase2.embed_token.weight, phase1.embed_in.weight)
    phase2.embed_token.weight.data.add_(1)
    assert later.start_from(phase2)["embed_token.weight"] == "copied"
    assert torch.equal(later.embed_token.weight, phase2.embed_token.weight)
