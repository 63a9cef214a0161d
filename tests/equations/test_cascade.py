"""The cascade: its size, and how it starts. The rest is in test_context.py and test_models.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_models import CONFIGS, make_baseline, make_model

from eval import evaluate_cache
from model_cascade import CascadeConfig, CascadeContextLLM

MODES: Any = {name: config for name, config in CONFIGS.items() if isinstance(config, CascadeConfig)}
SMALL = replace(MODES["cascade"], vocab_size=61, hidden_size=10, context_dim=7)


# ------------------------------------------------------------------------------------------------- what it holds
def test_its_size_by_hand() -> None:
    """Parameters, and a cache beside that of a Pythia of its width."""

    def count(**changes: Any) -> int:
        return sum(p.numel() for p in CascadeContextLLM(replace(SMALL, **changes)).parameters())

    V, C, E, N = 61, 10, 7, 3
    block = E * (E + C) + E + 2 * E
    token_block = C * (N * E + C) + C + 2 * C
    table = V * C
    assert count() == table + N * block + token_block
    assert count(tie_weights=False) - count() == table
    assert count(freeze_embedding=False) - count() == table
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


def test_a_trained_copy_starts_as_the_table_of_phase_1() -> None:
    """Or of a baseline, of which it takes the table alone."""
    phase1 = make_model("cascade-one-block")
    phase2, later = (make_model("cascade-one-block", freeze_embedding=False) for _ in range(2))
    report = phase2.start_from(make_baseline())
    assert [name for name, how in report.items() if how != "new"] == ["embed_in.weight", "embed_token.weight"]
    assert phase2.start_from(phase1)["embed_token.weight"] == "converted"
    assert torch.equal(phase2.embed_token.weight, phase1.embed_in.weight)
    phase2.embed_token.weight.data.add_(1)
    assert later.start_from(phase2)["embed_token.weight"] == "copied"
    assert torch.equal(later.embed_token.weight, phase2.embed_token.weight)
