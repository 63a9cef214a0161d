"""make compare: the commands, what waits for what, what a failure and an interruption leave."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY_LAYER
from filelock import FileLock
from test_crash import plain

from configurator import parse_train
from kit.runs import read_checkpoint
from tools.compare import RECIPES, CompareSettings, Comparison, Training, plan
from train import PHASES


@pytest.fixture
def here(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the repository's, whose config/laptop.py is of a tiny model."""
    for path in [*ROOT.glob("*.py"), ROOT / "kit", ROOT / "tools"]:
        (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cache").symlink_to(data_dir / "cache")
    shutil.copytree(data_dir / "own", tmp_path / "data" / "mini")
    (tmp_path / "config" / "laptop.py").write_text(TINY_LAYER.format(max_iters=4))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(configs: list[str], folder: Path) -> subprocess.Popen[str]:
    """compare.py with only these of its recipes, in a process group of its own."""
    code = f"from tools import compare as c; c.RECIPES = [r for r in c.RECIPES if r.config in {configs}]; c.main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def test_all_are_trained_on_as_many_tokens_each_after_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for settings in (CompareSettings(seeds=2), CompareSettings(size="full")):
        trainings = plan(settings)
        assert len({t.tokens for t in trainings if t.max_iters}) == 1
        assert len({t.folder for t in trainings}) == len(trainings) == settings.seeds * len(RECIPES)
        for i, training in enumerate(trainings):
            job = parse_train(list(training.words[1:]), PHASES)
            assert job.settings.dataset == "mini"
            assert str(training.folder) == (job.settings.out_dir or f"out/{job.name}")
            assert job.settings.seed == 1337 + (i >= len(RECIPES))
            assert training.needs is None or training.needs in [t.folder for t in trainings[:i]]
            if job.settings.phase == "phase2":
                assert Path(job.settings.init_from) == training.needs


def figures() -> list[dict[str, Any]]:
    rows = json.loads(Path("out/compare-laptop/results.json").read_text())["runs"]
    return [{k: v for k, v in plain(row).items() if "tokens_per_s" not in k and k != "commit"} for row in rows]


def test_killed_in_the_middle_and_started_again_it_reports(here: Path, request: pytest.FixtureRequest) -> None:
    """By SIGTERM, then by SIGKILL at random moments, all processes at once as in a power cut.

    With --kills above 1 the figures are compared with those of a comparison that is left alone.
    """
    configs, rng, kills = ["pythia", "mla_kv64"], random.Random(0), request.config.getoption("--kills")
    (here / "config" / "laptop.py").write_text(TINY_LAYER.format(max_iters=120))
    started = time.monotonic()
    process = start(configs, here)
    log = here / "out" / "pythia-laptop" / "log.jsonl"
    while process.poll() is None and not (log.exists() and "tokens_per_s" in log.read_text()):
        time.sleep(0.1)
    seconds = time.monotonic() - started
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    steps = read_checkpoint("out/pythia-laptop")["iter_num"]
    assert 0 < steps < 120
    for _ in range(kills):
        process = start(configs, here)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0, 2 * seconds))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        assert read_checkpoint("out/pythia-laptop")["iter_num"] >= steps
    output = start(configs, here).communicate()[0]
    assert re.search("[012] of 2 runs are to be trained, 2 at a time", output)
    page = Path("out/compare-laptop/report.md").read_text()
    assert "| pythia | " in page
    assert "| mla_kv64 | " in page
    again = start(configs, here)
    assert "0 of 2 runs are to be trained" in (output := again.communicate()[0])
    assert "nothing new to score" in output
    assert again.returncode == 0
    if kills > 1:
        interrupted = figures()
        shutil.rmtree("out")
        assert start(configs, here).wait() == 0
        assert figures() == interrupted


def test_no_training_outlives_a_comparison_that_fails(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train.py", "config/pythia.py", "config/laptop.py", "--max_iters=100000")
    trainings = [Training(Path("out", name), (*words, f"--out_dir=out/{name}"), None, 10**5, 100) for name in "ab"]
    comparison = Comparison(trainings, CompareSettings(), here)
    begin = comparison.start
    begun: list[subprocess.Popen[bytes]] = []

    def start_one(training: Training) -> None:
        if begun:
            raise OSError(errno.ENOSPC, "No space left on device")
        begin(training)
        begun.append(comparison.running[training])

    monkeypatch.setattr(comparison, "start", start_one)
    with pytest.raises(OSError, match="No space left"):
        comparison.train()
    status = begun[0].poll()
    begun[0].kill()
    assert status == -signal.SIGTERM


def test_a_training_that_outlived_a_comparison_is_waited_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train.py", "config/pythia.py", "config/laptop.py", "--out_dir=out/good")
    training = Training(Path("out/good"), words, None, 4, 100)
    assert not training.is_taken()
    training.folder.mkdir(parents=True)  # not there, not made by asking
    lock = FileLock(training.folder / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(1, lock.release).start()
    comparison = Comparison([training], CompareSettings(), here)
    begin, was_taken = comparison.start, []

    def start_it(training: Training) -> None:
        was_taken.append(lock.is_locked)
        begin(training)

    monkeypatch.setattr(comparison, "start", start_it)
    comparison.train()
    assert comparison.done == {training.folder}
    assert was_taken == [False]


def test_a_run_that_fails_is_named_and_the_rest_goes_on(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("train.py", "config/pythia.py", "config/laptop.py")
    good = Training(Path("out/good"), (*words, "--out_dir=out/good"), None, 4, 100)
    bad = Training(Path("out/bad"), (*words, "--out_dir=out/bad", "--num_heads=3"), Path("out/good"), 4, 100)
    after = Training(Path("out/after"), words, Path("out/bad"), 4, 100)
    comparison = Comparison([after, bad, good], CompareSettings(), here)
    comparison.train()
    assert comparison.done == {good.folder}
    assert comparison.failed == {bad.folder, after.folder}
    said = capfd.readouterr()
    assert "num_heads=3 does not divide hidden_size=16" in said.err
    assert "FAILED: after, not started, because out/bad failed" in said.err
    assert said.out.index("good is finished") < said.out.index(" ".join(bad.words))
