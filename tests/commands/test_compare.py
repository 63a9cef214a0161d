"""make compare: the commands, what waits for what, what a failure and an interruption leave."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY_LAYER, plain

from configurator import parse_train
from kit.runs import read_checkpoint
from prep import PrepSettings, prepare
from tools.compare import RECIPES, CompareSettings, Runs, plan, train_all
from train import PHASES, LMSettings


@pytest.fixture
def here(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the repository's, whose config/laptop.py is of a tiny model."""
    for path in [*ROOT.glob("*.py"), ROOT / "kit", ROOT / "tools"]:
        (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cache").symlink_to(data_dir / "cache")
    (tmp_path / "few.jsonl").write_text("".join(list((data_dir / "own.jsonl").open())[:80]))
    few = prepare(PrepSettings(dataset="few", files=f"{tmp_path}/few.jsonl", data_dir=f"{tmp_path}/data"))
    few.rename(tmp_path / "data" / "mini")
    (tmp_path / "config" / "laptop.py").write_text(TINY_LAYER.format(max_iters=4))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(configs: list[str], folder: Path) -> subprocess.Popen[str]:
    """compare.py with only these of its recipes, in a process group of its own."""
    code = f"from tools import compare as c; c.RECIPES = {{k: c.RECIPES[k] for k in {configs}}}; c.run(c.main)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def test_all_are_trained_on_as_many_tokens_each_after_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for settings in (CompareSettings(seeds=2), CompareSettings(size="full")):
        runs = plan(settings)
        assert len(runs) == settings.seeds * len(RECIPES)
        tokens = set()
        for i, (folder, (words, needs)) in enumerate(runs.items()):
            s = parse_train(words[1:], PHASES).settings
            assert (s.dataset, s.seed, Path(s.out_dir)) == ("mini", 1337 + (i >= len(RECIPES)), folder)
            assert needs is None or needs in list(runs)[:i]
            assert s.phase != "phase2" or Path(s.init_from) == needs
            if isinstance(s, LMSettings):
                tokens.add(s.max_iters * s.batch_size * s.gradient_accumulation_steps * s.block_size)
        assert len(tokens) == 1


def figures() -> list[dict[str, Any]]:
    rows = json.loads(Path("out/compare-laptop/results.json").read_text())["runs"]
    return [{k: v for k, v in plain(row).items() if "tokens_per_s" not in k and k != "commit"} for row in rows]


def test_killed_in_the_middle_and_started_again_it_reports(here: Path, request: pytest.FixtureRequest) -> None:
    """By SIGTERM, then by SIGKILL at random moments, all processes at once as in a power cut.

    With --kills above 1 the figures are compared with those of a comparison that is left alone.
    """
    configs, rng, kills = ["pythia", "infini"], random.Random(0), request.config.getoption("--kills")
    (here / "config" / "laptop.py").write_text(TINY_LAYER.format(max_iters=60) + "final_eval = False\n")
    started = time.monotonic()
    process = start(configs, here)
    log = here / "out" / "pythia-laptop" / "log.jsonl"
    while process.poll() is None and not (log.exists() and "tokens_per_s" in log.read_text()):
        time.sleep(0.1)
    seconds = time.monotonic() - started
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):  # no training outlives it
        os.killpg(process.pid, 0)
    assert 0 < (steps := read_checkpoint("out/pythia-laptop")["iter_num"]) < 60
    for _ in range(kills):
        process = start(configs, here)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0, 2 * seconds))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        assert read_checkpoint("out/pythia-laptop")["iter_num"] >= steps
    process = start(configs, here)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "2/2" in output
    page = Path("out/compare-laptop/report.md").read_text()
    assert all(f"| {name}-laptop " in page for name in configs)
    if kills > 1:
        interrupted = figures()
        shutil.rmtree("out")
        assert start(configs, here).wait() == 0
        assert figures() == interrupted


def test_a_run_that_fails_is_named_and_the_rest_goes_on(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad, after, good = (Path("out", name) for name in ("bad", "after", "good"))
    words = ["train.py", "config/pythia.py", "config/laptop.py", "--final_eval=False"]
    runs: Runs = {folder: ([*words, f"--out_dir={folder}"], None) for folder in (bad, after, good)}
    runs |= {bad: ([*runs[bad][0], "--num_heads=3"], None), after: (words, bad)}
    assert train_all(runs, 1, here) == [good]
    said = capfd.readouterr()
    assert "FAILED: out/bad, exit status 2, " in said.err
    assert "error: num_heads=3 does not divide hidden_size=16" in said.err
    assert "FAILED: out/after, not started" in said.err
    assert "pythia: " in (here / "good.txt").read_text()
