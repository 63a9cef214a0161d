"""The report: seeds of a config together, the best front, every figure and picture where it belongs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from kit.report import best_front, comparison_table, group_runs, notices, ppl_meaning, write_report

WINDOWS = {"1": 100.0, "2": 110.0, "after 1": 110.0}


def make_run(name: str, model: str, val_ppl: float, bytes_per_token: float, seed: int = 1337) -> dict[str, Any]:
    lengths = (256, 2048, 8192)
    return {
        "run": f"out/{name}", "model": model, "checkpoint": f"out/{name}/ckpt.pt",
        "settings": {"model": model, "seed": seed, "init_from": "scratch", "out_dir": name},
        "seed": seed, "tokens_seen": 2048, "steps": 4, "parents": [], "commit": "c0ffee00" * 5 + "+",
        "data": {"train_sha256": "d1" * 32}, "parameters": 100, "val_ppl": val_ppl,
        "position_ppl": {"0-16": val_ppl, "16-64": val_ppl}, "harness": {"wikitext word_perplexity": 400.0},
        "recall_ppl": {"0-10": 90.0, "others": val_ppl}, "recall_tokens": {"0-10": 7, "others": 93},
        "long_ppl": WINDOWS,
        "long_documents": 5, "long_tokens": {"1": 50, "2": 40, "after 1": 40},
        "cache_bytes": {str(n): n * bytes_per_token for n in lengths},
        "cache_bytes_per_token": {str(n): bytes_per_token for n in lengths},
    }  # fmt: skip


def make_runs() -> list[dict[str, Any]]:
    return [
        make_run("pythia", "pythia", 240.0, 6144),
        make_run("pythia-1338", "pythia", 250.0, 6144, seed=1338),
        make_run("mla_a", "mla", 260.0, 768),
        {**make_run("infini", "infini", 250.0, 5000), "long_ppl_reset": WINDOWS},
        {**make_run("cascade", "cascade", 400.0, 900), "context_convergence_rates": [0.25, 0.975]},
    ]


def results_of(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"block_size": 512, "data": "data/own", "runs": [*runs]}


def test_seeds_of_a_config_are_one_row_and_other_checkpoints_of_a_run_are_not() -> None:
    """And nothing on the best front is beaten in both."""
    runs = make_runs()
    configs = group_runs([*runs, {**runs[0], "run": "out/pythia/best.pt"}])
    names = ["pythia", "mla_a", "infini", "cascade", "pythia/best.pt"]
    assert [(c.name, len(c.runs)) for c in configs] == [(name, 1 + (name == "pythia")) for name in names]
    assert [c.name for c in best_front(configs[:-1])] == ["mla_a", "infini", "pythia"]


RUNS = [("scratch", 2048, True), ("scratch", 4096, False), ("out/pythia", 2048, False), ("out/phase1-2", 2048, True)]


@pytest.mark.parametrize(("source", "seen", "is_one"), RUNS)
def test_runs_of_one_config_differ_in_the_seed_and_what_is_named_after_it(source: str, seen: int, is_one: bool) -> None:
    first, second = make_run("a", "mla", 1.0, 1.0), make_run("a", "mla", 1.0, 1.0, seed=2)
    first["settings"]["init_from"] = source.removesuffix("-2") if is_one else "scratch"
    second["settings"] |= {"init_from": source, "final_eval": False}
    second["tokens_seen"] = seen
    assert len(group_runs([first, second])) == 2 - is_one
    second["data"] = {"train_sha256": "e2" * 32}
    assert len(group_runs([first, second])) == 2


def test_runs_that_were_not_trained_on_the_same_tokens_are_flagged() -> None:
    run = make_run("a", "mla", 1.0, 1.0)
    assert not notices([run, {**run, "run": "out/b"}])
    longer, elsewhere = {**run, "tokens_seen": 9}, {**run, "data": {"train_sha256": "abcdefghij"}}
    for other in (longer, elsewhere, {"run": "hub/id"}):
        assert "not trained on the same tokens: out/a on 2,048 tokens" in notices([run, other])[0]


def test_convergence_rates_ranks_and_cuda_s_peak_are_columns_also_of_several_seeds() -> None:
    runs = [make_run("c", "cascade", 400.0, 900), make_run("c", "cascade", 400.0, 900, seed=2), make_runs()[0]]
    for run, rate in zip(runs, (0.25, 0.75), strict=False):
        run |= {"context_convergence_rates": [rate, 1.0], "context_effective_rank": 8 * rate, "context_dim": 10}
    for run, peak in zip(runs, (4_000_000, 6_000_000, 5_000_000), strict=True):
        run["cuda_peak_bytes"] = {"256": 0, "2048": peak, "8192": 0}
    header, rows = comparison_table(group_runs(runs))
    cells = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    assert cells["contexts settled"] == ["50.0%, 100.0% ± 35.4%, 0.0%", "-"]
    assert cells["contexts' rank"] == ["4.0 ± 2.8", "-"]
    assert cells["CUDA peak B"] == ["5,000,000 ± 1,414,214", "5,000,000"]
    assert "CUDA peak B" not in comparison_table(group_runs(make_runs()))[0]


def test_what_a_ppl_means() -> None:
    words = {4: "abnormal", 5: "suspicious", 99: "normal at large", 171: "normal from scratch", math.inf: "under"}
    assert all(word in ppl_meaning(ppl) for ppl, word in words.items())


def test_the_report_has_every_run_figure_notice_and_picture(tmp_path: Path) -> None:
    runs = make_runs()
    runs[4]["checkpoint"] = str(tmp_path / "ckpt.pt")
    log = [{"step": s, "val_loss": 9.0 - s, "tokens_seen": 512 * s} for s in range(3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 1, "losses": [1]}, *log]))
    runs[0] |= {"not_measured": {"pile_10k": "no hub"}}
    runs[2] |= {"tokens_seen": 4096}
    results = results_of(*runs)
    (tmp_path / "compare").mkdir()
    write_report(results, tmp_path / "compare")
    assert json.loads((tmp_path / "compare" / "results.json").read_text()) == results
    page = re.sub(" +", " ", (tmp_path / "compare" / "report.md").read_text())
    for part in (
        "| pythia | 2 | 245.0 ± 7.1 | 90.0 | 245.0 ± 7.1 | - | 110.0 | - | 6,144.0 | 100 | 2,048 | 400.0000 |",
        "| cascade | 1 | 400.0 | 90.0 | 400.0 | 25.0%, 97.5% | 110.0 | - | 900.0 |",
        "| mla_a | 90.0 | 260.0 |",
        "| tokens | 7 | 93 |",
        "not trained on the same tokens: out/pythia, out/pythia-1338, out/infini, out/cascade on 2,048 tokens",
        "standard deviation over seeds",
        "| out/pythia-1338 | 2,048 | 4 | 1338 | c0ffee00+ | d1d1d1d1 | scratch |",
        "pile_10k: not measured: no hub",
        "| mla_a | 260.0 | 260.0 |",
        "| infini, memory reset | 100.0 | 110.0 | 110.0 |",
        "| tokens | 50 | 40 | 40 |",
    ):
        assert part in page
    for name in ("tradeoff", "cache", "positions", "training", "long"):
        assert f"![{name}.png]({name}.png)" in page
        assert (tmp_path / "compare" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_failed_has_its_row_and_its_picture(tmp_path: Path) -> None:
    baseline, _, other, *_ = make_runs()
    baseline["val_ppl"] = math.inf
    write_report(results_of(baseline, other), tmp_path)
    assert re.search(r"pythia \| +inf \|", (tmp_path / "report.md").read_text())
    assert (tmp_path / "tradeoff.png").exists()


@pytest.mark.parametrize("part", ["draw_pictures", "format_table"])
def test_results_are_written_once_the_report_is_whole(part: str, tmp_path: Path, monkeypatch: Any) -> None:
    """compare.py takes them for a sign of it."""
    monkeypatch.setattr(f"kit.report.{part}", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(results_of(make_runs()[0]), tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_a_report_of_one_model_without_training_has_what_there_is(tmp_path: Path) -> None:
    name = "EleutherAI/pythia-70m"
    write_report(results_of({"run": name, "model": "PythiaModel", "checkpoint": name, "val_ppl": 50.0}), tmp_path)
    assert "| pythia-70m |    50.0 |" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))
