"""make compare: the commands, what waits for what, what a failure and an interruption leave."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY_LAYER, Command, plain, status_of

from configurator import parse_train
from kit.runs import read_checkpoint
from tools.compare import MORE, RECIPES, CompareSettings, Runs, plan, train_all
from train import PHASES, LMSettings


@pytest.mark.parametrize("seed", [1337, 1338])
@pytest.mark.parametrize(("size", "max_iters"), [("laptop", None), ("laptop", 77), ("full", None)])
def test_all_are_trained_on_as_many_tokens_each_after_what_it_needs(
    size: Any, max_iters: int | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    runs, report = plan(CompareSettings(size=size, max_iters=max_iters, seed=seed, rows=",".join(RECIPES | MORE)))
    assert len({*runs, report}) == len(RECIPES | MORE) + 1
    tokens = set()
    for i, (folder, (words, needs)) in enumerate(runs.items()):
        s = parse_train(words[1:], PHASES).settings
        assert (s.dataset, s.seed, Path(s.out_dir or "")) == ("mini", seed, folder)
        assert needs is None or needs in list(runs)[:i]
        assert s.phase != "phase2" or Path(s.init_from) == needs
        assert ("1338" in folder.name) == ("1338" in report.name) == (seed == 1338)
        if isinstance(s, LMSettings):
            assert max_iters in (None, s.max_iters)
            assert not s.final_eval  # eval.py measures them all
            tokens.add(s.max_iters * s.batch_size * s.gradient_accumulation_steps * s.block_size)
    assert len(tokens) == 1


def test_rows_bring_what_they_start_from() -> None:
    assert not {folder.name.removesuffix("-laptop") for folder in plan(CompareSettings())[0]} & MORE.keys()
    runs, _ = plan(CompareSettings(rows="infini_long,cascade_phase2_table"))
    names = [folder.name.removesuffix("-laptop") for folder in runs]
    assert names == ["pythia", "cascade_phase1_table", "cascade_phase2_table", "infini_long"]


def figures() -> list[dict[str, Any]]:
    rows = json.loads(Path("out/compare-laptop/results.json").read_text())["runs"]
    return [{key: value for key, value in plain(row).items() if key != "commit"} for row in rows]


FEWER = """
import runpy, sys
sys.argv.append("--tasks=val,cache")
runpy.run_path("{}", run_name="__main__")
"""  # eval.py of what takes a second


def test_interrupted_in_the_middle_and_started_again_it_reports(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """By SIGTERM; with --kills above 1 then by SIGKILL at random moments, all processes at once as in a power cut.

    The figures are then compared with those of a comparison that is left alone.
    """
    rng, kills = random.Random(0), request.config.getoption("--kills")
    configs = ["pythia", "infini"] if kills > 1 else ["pythia"]
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "config" / "laptop.py").write_text(TINY_LAYER.format(max_iters=60))
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    (tmp_path / "eval.py").write_text(FEWER.format(ROOT / "eval.py"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mini").symlink_to(data_dir / "few")
    (tmp_path / "data" / "cache").symlink_to(data_dir / "cache")
    monkeypatch.chdir(tmp_path)
    words = ["-m", "tools.compare", f"--rows={','.join(configs)}"]
    start = functools.partial(Command, words, tmp_path, os.setsid)
    started, command = time.monotonic(), start()
    log = tmp_path / "out" / "pythia-laptop" / "log.jsonl"
    while command.process.is_alive() and not (log.exists() and "tokens_per_s" in log.read_text()):
        time.sleep(0.1)
    seconds = time.monotonic() - started
    command.process.terminate()
    command.process.join()
    assert command.process.exitcode == 130, command.end()
    with pytest.raises(ProcessLookupError):  # no training outlives it
        os.killpg(command.process.pid, 0)
    assert 0 < (steps := read_checkpoint("out/pythia-laptop")["iter_num"]) < 60
    for _ in range(kills if kills > 1 else 0):
        command = start()
        command.process.join(rng.uniform(0, 2 * seconds))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.process.pid, signal.SIGKILL)
        command.end(0)
        assert read_checkpoint("out/pythia-laptop")["iter_num"] >= steps
    assert f"{len(configs)}/{len(configs)}" in start().succeed()
    page = Path("out/compare-laptop/report.md").read_text()
    assert all(f"| {name}-laptop " in page for name in configs)
    if kills > 1:
        interrupted = figures()
        shutil.rmtree("out")
        start().succeed()
        assert figures() == interrupted


def test_contexts_blocks_alone_are_trained_and_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tools.compare.train_all", lambda runs, *_: [*runs])
    assert status_of("tools.compare", "--rows=phase1") == 0


def test_a_run_that_fails_is_named_and_the_rest_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad, after, good = (Path("out", name) for name in ("bad", "after", "good"))
    runs: Runs = {bad: (["-c", "import sys; print('error: no'); sys.exit(2)"], None)}
    runs |= {after: (["-c", "print('never')"], bad), good: (["-c", "print('trained')"], None)}
    assert train_all(runs, 1, tmp_path) == [good]
    said = capfd.readouterr()
    assert f"FAILED: out/bad, exit status 2, see {tmp_path / 'bad.txt'}: error: no\n" in said.err
    assert "FAILED: out/after, not started" in said.err
    assert (tmp_path / "good.txt").read_text() == "trained\n"
