"""The tables of README.md and RESULTS.md say what assets/ holds: reports of eval.py, losses of training logs."""

import json
import math
from typing import Any

import numpy as np
from conftest import ROOT

from kit.report import AFTER_FIRST, SHOWN, Config, format_table, group_runs
from tools.compare import MORE, RECIPES

FILES = [json.loads(file.read_text()) for file in sorted((ROOT / "assets").glob("results-*.json"))]
TRAINING = json.loads((ROOT / "assets" / "training.json").read_text())["runs"]
CONFIGS = {c.name.removesuffix("-laptop"): c for c in group_runs([run for file in FILES for run in file["runs"]])}
SCORED: dict[str, tuple[str, ...]] = {
    "PPL": ("val_ppl", "{:.1f}"),
    "accuracy": ("val_accuracy", "{:.1%}"),
    "recall PPL, 0-10 in training": ("recall_ppl", "{:.1f}", "0-10"),
    "others": ("recall_ppl", "{:.1f}", "others"),
    "at 0-16": ("position_ppl", "{:.0f}", "0-16"),
    "256-512": ("position_ppl", "{:.1f}", "256-512"),
    "long documents": ("long_ppl", "{:.1f}", AFTER_FIRST),
    "rev. ratio": ("reversal_ratio", "{:.3f}"),
    "answers' ratio": ("reversal_answer_ratio", "{:.3f}"),
}
CACHE: dict[str, tuple[str, ...]] = {
    "cache bytes a token": ("cache_bytes_per_token", "{:,.1f}", SHOWN),
    "saved": ("cache_saved", "{:.1%}", SHOWN),
}
MOMENTS = {"0.5 M": "1000", "1.0 M": "2000", "1.5 M": "3000", "2.4 M": "4688"}  # tokens: step
AFTER = {"right after": "0", "250,000 tokens": "488", "500,000": "976", "1,000,000": "1953"}


def assert_stands_in(page: str, header: list[str], rows: list[list[str]]) -> None:
    table = format_table(header, rows)
    assert table in (ROOT / page).read_text(), f"{page} lacks\n{table}"


def shown(config: Config, columns: dict[str, tuple[str, ...]]) -> list[str]:
    return [config.show(*column) for column in columns.values()]


def against_the_baseline(config: Config) -> list[str]:
    """How much higher the PPL is, its mean over the seeds, and the largest p of any seed; of the baseline nothing."""
    found: list[dict[str, Any]] = [run["against"] for run in config.runs if "against" in run]
    if not found:
        return ["", ""]
    higher, p = np.mean([np.expm1(of["loss"]) for of in found]), max(of["p"] for of in found)
    return [f"{higher:+.1%}", "<0.001" if p < 0.001 else f"{p:.3f}"]


def losses(prefix: str = "", ending: str = "") -> dict[str, dict[int, dict[str, float]]]:
    """Validation losses of the runs that are called so: by name, seed and step."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in TRAINING:
        if run["run"].startswith(prefix) and run["run"].endswith(ending) and "val_loss" in run:
            found.setdefault(run["run"].removeprefix(prefix).removesuffix(ending), {})[run["seed"]] = run["val_loss"]
    return {name: found[name] for name in [*RECIPES, *MORE] if name in found}


def higher(found: dict[str, dict[int, dict[str, float]]], name: str, step: str) -> list[float]:
    """How much higher a run's PPL is than the baseline's with the same seed, for each seed that both have."""
    seeds = sorted(seed for seed, of in found[name].items() if step in of and step in found["pythia"].get(seed, {}))
    return [math.expm1(found[name][seed][step] - found["pythia"][seed][step]) for seed in seeds]


def mean_ppl(of: dict[int, dict[str, float]], step: str) -> str:
    """Mean and sample standard deviation over the seeds."""
    values = [math.exp(by_step[step]) for by_step in of.values() if step in by_step]
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def compared(found: dict[str, dict[int, dict[str, float]]], name: str, step: str) -> list[str]:
    """Mean PPL, how much higher it is than the baseline's, and the same of each seed."""
    each = higher(found, name, step)
    against = [f"{np.mean(each):+.1%}", ", ".join(f"{x:+.1%}" for x in each)] if name != "pythia" else ["", ""]
    return [mean_ppl(found[name], step), *against]


def test_the_main_table() -> None:
    found = losses(ending="-laptop-4688")
    rows = [[f"`{name}`", *shown(CONFIGS[name], CACHE), *compared(found, name, "4688")] for name in found]
    assert_stands_in("README.md", ["run", *CACHE, "validation PPL", "against `pythia`", "each seed"], rows)


def test_how_the_differences_move_with_training() -> None:
    found = losses(ending="-laptop-4688")
    means = {name: [f"{np.mean(higher(found, name, step)):+.1%}" for step in MOMENTS.values()] for name in found}
    rows = [[f"`{name}`", *cells] for name, cells in means.items() if name != "pythia"]
    assert_stands_in("RESULTS.md", ["against `pythia` after", *MOMENTS], rows)


def test_modes_and_ablations() -> None:
    found = losses(ending="-laptop-1953")
    rows = [[f"`{name}`", *compared(found, name, "1953")] for name in found]
    assert_stands_in("RESULTS.md", ["run", "validation PPL", "against `pythia`", "each seed"], rows)


def test_from_a_trained_baseline() -> None:
    found = losses(prefix="conv-")
    rows = [[f"`{name}`", *(mean_ppl(found[name], step) for step in AFTER.values())] for name in found]
    assert_stands_in("RESULTS.md", ["turned into", *AFTER], rows)


def test_full_size() -> None:
    found = losses(prefix="full-")
    rows = [[f"`{name}`", *(mean_ppl(of, step) for step in ("510", "1020", "1530"))] for name, of in found.items()]
    assert_stands_in("RESULTS.md", ["full size", "33 M tokens", "67 M", "100 M"], rows)


def test_phase_1() -> None:
    rows = []
    for run in TRAINING:
        if "iterations" in run:
            rank, width = run["held_out_rank"], run["context_dim"]
            figures = [f"{run['seed']}", f"{run['iterations']}", f"{run['converged']:.1%}"]
            rows.append([f"`{run['run']}`", *figures, f"{rank:.1f}/{width} = {rank / width:.1%}"])
    assert_stands_in("RESULTS.md", ["phase 1", "seed", "iterations", "converged", "held-out effective rank"], rows)


def test_everything_that_is_measured() -> None:
    rows = []
    for name, config in CONFIGS.items():
        cells = shown(config, SCORED)
        rows.append([f"`{name}`", cells[0], *against_the_baseline(config), *cells[1:]])
    header = ["run", "PPL", "against `pythia`", "p", *[*SCORED][1:]]
    assert_stands_in("RESULTS.md", header, rows)


def test_all_results_are_of_one_state_on_one_set_and_small() -> None:
    commits = {run["commit"][:7] for file in FILES for run in file["runs"]}
    assert commits == {"6e1b03b", "fb2ff55"}  # which train alike, to the bit
    assert len({(file["data"], file["block_size"]) for file in FILES}) == 1
    assert sum(file.stat().st_size for file in (ROOT / "assets").glob("*.json")) < 200_000
