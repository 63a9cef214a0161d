"""The tables of README.md and RESULTS.md say what the files assets/results-*.json hold, which eval.py wrote."""

import json
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from kit.report import AFTER_FIRST, SHOWN, Config, format_table, group_runs

FILES = [json.loads(file.read_text()) for file in sorted((ROOT / "assets").glob("results-*.json"))]
PPL, RATIO = ("val_ppl", "{:.1f}"), ("reversal_ratio", "{:.3f}")
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "README.md": {
        "cache bytes a token": ("cache_bytes_per_token", "{:,.1f}", SHOWN),
        "saved": ("cache_saved", "{:.1%}", SHOWN),
        "validation PPL": PPL,
        "against `pythia`": (),
        "p": (),
        "reversal ratio": RATIO,
    },
    "RESULTS.md": {
        "PPL": PPL,
        "against `pythia`": (),
        "p": (),
        "accuracy": ("val_accuracy", "{:.1%}"),
        "recall PPL, 0-10 in training": ("recall_ppl", "{:.1f}", "0-10"),
        "others": ("recall_ppl", "{:.1f}", "others"),
        "at 0-16": ("position_ppl", "{:.0f}", "0-16"),
        "256-512": ("position_ppl", "{:.1f}", "256-512"),
        "long documents": ("long_ppl", "{:.1f}", AFTER_FIRST),
        "rev. ratio": RATIO,
        "answers' ratio": ("reversal_answer_ratio", "{:.3f}"),
    },
}


def against_the_baseline(config: Config) -> dict[str, str]:
    """How much higher the PPL is, its mean over the seeds, and the largest p of any seed; of the baseline nothing."""
    found: list[dict[str, Any]] = [run["against"] for run in config.runs if "against" in run]
    if not found:
        return {"against `pythia`": "", "p": ""}
    higher, p = np.mean([np.expm1(of["loss"]) for of in found]), max(of["p"] for of in found)
    return {"against `pythia`": f"{higher:+.1%}", "p": "<0.001" if p < 0.001 else f"{p:.3f}"}


@pytest.mark.parametrize("page", TABLES)
def test_the_table_of_a_page_is_that_of_the_results(page: str) -> None:
    rows = []
    for config in group_runs([run for file in FILES for run in file["runs"]]):
        cells = {header: config.show(*column) for header, column in TABLES[page].items() if column}
        cells |= against_the_baseline(config)
        rows.append([f"`{config.name.removesuffix('-laptop')}`", *(cells[header] for header in TABLES[page])])
    table = format_table(["run", *TABLES[page]], rows)
    assert table in (ROOT / page).read_text(), f"\n{table}"


def test_all_results_are_of_one_state_on_one_set_and_small() -> None:
    assert len({run["commit"] for file in FILES for run in file["runs"]}) == 1
    assert len({(file["data"], file["block_size"]) for file in FILES}) == 1
    assert sum(file.stat().st_size for file in (ROOT / "assets").glob("results-*.json")) < 200_000
