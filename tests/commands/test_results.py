"""The tables of README.md and RESULTS.md say what assets/results.json holds: eval.py's figures, losses of the logs."""

import json
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from kit.report import AFTER_FIRST, SHOWN, Config, format_table
from tools.compare import MORE, RECIPES

FILE = ROOT / "assets" / "results.json"
RESULTS = json.loads(FILE.read_text())
Columns = dict[str, Callable[[Config], str]]


def figure(name: str, form: str, place: str = SHOWN) -> Callable[[Config], str]:
    return lambda config: config.show(name, form, place)


def each_seed(config: Config) -> list[float]:
    """How much higher the PPL is than that of the baseline of the same seed; of the baseline nothing."""
    return [math.expm1(run["against"]["loss"]) for run in config.runs if "against" in run]


def p_value(config: Config) -> str:
    """The largest of the seeds'."""
    p = max((run["against"]["p"] for run in config.runs if "against" in run), default=math.nan)
    return "" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


CACHE: Columns = {
    "cache bytes a token": figure("cache_bytes_per_token", "{:,.1f}"),
    "saved": figure("cache_saved", "{:.1%}"),
}
AGAINST: Columns = {
    "validation PPL": figure("val_ppl", "{:.1f}"),
    "against `pythia`": lambda config: f"{np.mean(each_seed(config)):+.1%}" if each_seed(config) else "",
    "each seed": lambda config: ", ".join(f"{x:+.1%}" for x in each_seed(config)),
    "p": p_value,
}
MORE_FIGURES: Columns = {
    "accuracy": figure("val_accuracy", "{:.1%}"),
    "recall": figure("recall_ppl", "{:.0f}", "0-10"),
    "others": figure("recall_ppl", "{:.1f}", "others"),
    "long": figure("long_ppl", "{:.1f}", AFTER_FIRST),
    "reset": figure("long_ppl_reset", "{:.1f}", AFTER_FIRST),
    "rev. ratio": figure("reversal_ratio", "{:.3f}"),
    "answers": figure("reversal_answer_ratio", "{:.2f}"),
    "rank": figure("context_effective_rank", "{:.0f}"),
    "of": figure("context_dim", "{:.0f}"),
}
MOMENTS = {"0.5 M": "1000", "1.0 M": "2000", "1.5 M": "3000", "2.4 M": "4688"}  # tokens: step
AFTER = {"right after": "0", "250,000 tokens": "488", "500,000": "976", "1,000,000": "1953"}
LAPTOP_PLACES, FULL_PLACES = ("0-16", "16-64", "64-256", "256-512"), ("16-64", "64-256", "256-1024", "1024-2048")


def configs(ending: str) -> dict[str, Config]:
    """The runs that are called NAME-ending or NAME-ending-SEED, by NAME."""
    found: dict[str, Config] = {}
    for run in RESULTS["runs"]:
        name, _, rest = run["run"].partition("-")
        if rest.removesuffix(f"-{run['seed']}") == ending:
            found.setdefault(name, Config(name, [])).runs.append(run)
    return {name: found[name] for name in [*RECIPES, *MORE] if name in found}


def only(table: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: table[name] for name in table if name in names}


def places(names: tuple[str, ...], form: str) -> Columns:
    return {f"at {name}": figure("position_ppl", form, name) for name in names}


def ppl_at(step: str) -> Callable[[Config], str]:
    """Of the validation in the course of training, mean and sample standard deviation over the seeds."""

    def cell(config: Config) -> str:
        values = [math.exp(run["val_loss_at"][step]) for run in config.runs]
        return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")

    return cell


def higher(step: str) -> Callable[[Config], str]:
    """Than the baseline, after so many steps."""

    def cell(config: Config) -> str:
        pairs = zip(config.runs, LONG["pythia"].runs, strict=True)
        each = [math.expm1(run["val_loss_at"][step] - base["val_loss_at"][step]) for run, base in pairs]
        return f"{np.mean(each):+.1%}"

    return cell


LONG, SHORT, FULL = configs("laptop-4688"), configs("laptop-1953"), configs("full")
CONVERTED = {name for name in SHORT if name.endswith("_from")}
LAST, EACH = "validation PPL", "each seed"
TABLES: dict[str, tuple[dict[str, Config], Columns]] = {  # title of the first column -> rows and other columns
    "run": (only(LONG, RECIPES), CACHE | AGAINST),
    "2.4 M tokens": (LONG, {"PPL": AGAINST[LAST]} | MORE_FIGURES | places(LAPTOP_PLACES, "{:.1f}")),
    "against `pythia` after": (only(LONG, LONG.keys() - {"pythia"}), {name: higher(MOMENTS[name]) for name in MOMENTS}),
    "1.0 M tokens": (only(SHORT, SHORT.keys() - CONVERTED), AGAINST | MORE_FIGURES),
    "turned into": (  # the validation PPL is the last of these, in float32
        only(SHORT, CONVERTED), {name: ppl_at(AFTER[name]) for name in AFTER} | only(AGAINST, AGAINST.keys() - {LAST}),
    ),
    "100 M tokens": (
        FULL,
        CACHE | {"33 M": ppl_at("510"), "67 M": ppl_at("1020")} | only(AGAINST, AGAINST.keys() - {EACH})
        | {LAST: figure("val_ppl", "{:.2f}")} | MORE_FIGURES | places(FULL_PLACES, "{:.2f}"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("title", TABLES)
def test_a_table_says_what_was_measured(title: str) -> None:
    (found, columns), page = TABLES[title], "README.md" if title == "run" else "RESULTS.md"
    rows = [[f"`{name}`", *(cell(config) for cell in columns.values())] for name, config in found.items()]
    table = format_table([title, *columns], rows)
    assert table in (ROOT / page).read_text(), f"{page} lacks\n{table}"


def test_phase_1() -> None:
    rows = []
    for run in RESULTS["phase1"]:
        rank, width = run["context_effective_rank"], run["context_dim"]
        figures = [f"{run['seed']}", f"{run['iterations']}", f"{run['converged']:.1%}"]
        rows.append([f"`{run['run']}`", *figures, f"{rank:.1f}/{width} = {rank / width:.1%}"])
    table = format_table(["phase 1", "seed", "iterations", "converged", "held-out effective rank"], rows)
    assert table in (ROOT / "RESULTS.md").read_text(), f"RESULTS.md lacks\n{table}"


def test_the_results_are_small_of_one_commit_and_every_row_has_all_its_seeds() -> None:
    assert FILE.stat().st_size < 200_000
    for page in ("README.md", "RESULTS.md"):
        assert f"ommit {RESULTS['commit'][:7]}" in (ROOT / page).read_text()
    for found, seeds in ((LONG, [1337, 1338, 1339]), (SHORT, [1337, 1338]), (FULL, [1337])):
        assert all([run["seed"] for run in config.runs] == seeds for config in found.values())
