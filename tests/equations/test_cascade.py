"""The cascade: its blocks, its size, what phase 2 trains. What holds for every model is in test_models.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_tokens
from test_models import CONFIGS, make_model

from configurator import baseline_config
from eval import evaluate_cache
from model_cascade import CascadeConfig, CascadeContextLLM
from pythia_base import PythiaConfig, PythiaModel

MODES: Any = {name: config for name, config in CONFIGS.items() if isinstance(config, CascadeConfig)}
SMALL = replace(MODES["cascade"], vocab_size=61, hidden_size=10, context_dim=7)
every_mode = pytest.mark.parametrize("name", MODES)


@every_mode
@torch.no_grad()
def test_all_blocks_at_once_are_each_block_alone(name: str) -> None:
    """Whole, and continued; in float32 under autocast, where rounding would add up from token to token."""
    model, idx = make_model(name), make_tokens(2, 23)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.recurrences(idx, None)
    assert torch.equal(rough, model.recurrences(idx, None))
    model = model.double()
    together, halfway = model.recurrences(idx, None), model.recurrences(idx[:, :9], None)[:, -1]
    alone = [block.recurrence(model.embed_in(idx), None) for block in model.context_blocks]
    torch.testing.assert_close(together, torch.cat(alone, dim=-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(model.recurrences(idx[:, 9:], halfway), together[:, 9:], atol=1e-12, rtol=0)


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
    assert baseline_config(CascadeConfig(hidden_size=512)).hidden_size == 512
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
    first, second = model.context_blocks
    assert not torch.equal(first.linears[0].weight, second.linears[0].weight)


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
    model.freeze_for_phase2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    contexts = model.recurrences(idx, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(idx, idx.roll(-1, dims=1), contexts=contexts)[1].backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if not name.startswith("token_block.")} == trained
    assert {"token_block.linear.weight", "token_block.norm.bias"} <= changed
    assert torch.equal(model.recurrences(idx, None), contexts), "the cached contexts went stale"


def test_a_frozen_table_is_trained_in_no_phase() -> None:
    """But a copy of it that is to be trained is."""
    for name in MODES:
        model = make_model(name)
        assert model.embed_in.weight.requires_grad != model.config.freeze_embedding
        assert model.token_weight.requires_grad != model.config.freeze_embedding


def test_a_trained_copy_starts_as_the_table_of_phase_1() -> None:
    phase1, phase2 = (
        make_model("cascade-one-block"),
        CascadeContextLLM(replace(MODES["cascade-one-block"], freeze_embedding=False)),
    )
    report = phase2.start_from(phase1)
    assert torch.equal(phase2.embed_token.weight, phase1.embed_in.weight)
    assert report["embed_token.weight"] == "converted"
    phase2.embed_token.weight.data.add_(1)
    later = CascadeContextLLM(phase2.config)
    assert later.start_from(phase2)["embed_token.weight"] == "copied"
    assert torch.equal(later.embed_token.weight, phase2.embed_token.weight)


def test_of_a_baseline_it_takes_the_table_alone() -> None:
    baseline = PythiaModel(PythiaConfig(vocab_size=61, hidden_size=10, num_heads=1, intermediate_size=8, rotary_pct=0))
    report = CascadeContextLLM(SMALL).start_from(baseline)
    assert [name for name, how in report.items() if how != "new"] == ["embed_in.weight"]
