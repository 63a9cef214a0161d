"""What befalls a command from outside: a disk that is full or read-only, a process that is killed, a hub that hangs up.

Each ends it with a message, and leaves nothing that is half. Full disks for whole commands are in test_crash.py.
"""

import errno
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHORT, TINY, Command, losses, status_of, type_in

from kit.files import InputError
from kit.runs import RunFolder, World
from kit.text import Archive, fetch

SCRIPTS = ("train.py", "eval.py", "sample.py", "prep.py", "tools.bench", "tools.compare", "tools.export")
NARROW = shlex.join([*TINY, *SHORT, "--dtype=float32", "--device=cpu", "--final_eval=False", "--dataset=own"])
MINUTES, COUNTED = 30, 5  # the resident size swings within a step, so its largest over minutes is what counts


# -------------------------------------------------------------------------------------------- full and read-only disks


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, World(0, 1, torch.device("cpu")))
    folder.save({"iter_num": 1}, "ckpt.pt")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save({"iter_num": 2}, "ckpt.pt")
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True) == {"iter_num": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize(
    "line",
    [
        f"train.py config/pythia.py {NARROW} --data_dir=DATA --out_dir=/sys/run",
        f"train.py config/pythia.py {NARROW} --data_dir=DATA --out_dir=/sys",
        "prep.py --dataset=notes --files=DATA/own.jsonl --data_dir=/sys",
        "tools.bench --what=decode --quick=True --device=cpu --data_dir=DATA --dataset=own --out_dir=/sys/bench",
    ],
)
def test_a_folder_that_nobody_may_write_to_is_one_line(
    line: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/sys takes no files, not even root's."""
    monkeypatch.chdir(ROOT)
    assert status_of(*shlex.split(line.replace("DATA", str(data_dir)))) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search("(Read-only file system|Permission denied|Operation not permitted): /sys", errors[0])


# ---------------------------------------------------------------------------------------------- a process is killed


DIES = """
import os, signal
import train
from kit.files import run
from kit.tokens import Windows

batch = Windows.batch

def die(self, step, micro):
    if self.world.rank == 1 and step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, step, micro)

Windows.batch = die
run(train.main)
"""


def test_a_killed_process_of_torchrun_ends_them_all(data_dir: Path, tmp_path: Path) -> None:
    """And the run goes on from the last checkpoint."""
    (tmp_path / "dies.py").write_text(DIES)
    words = [str(ROOT / "config" / "pythia.py"), *shlex.split(NARROW), f"--data_dir={data_dir}"]
    words += [f"--out_dir={tmp_path / 'run'}", "--batch_size=4", "--max_iters=8"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "dies.py"]
    command = Command([*torchrun, *words], tmp_path)
    assert re.search(r"Signal 9 \(SIGKILL\) received by PID", command.end())
    assert command.process.exitcode == 1
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["iter_num"] == 4
    type_in("train.py", *words)
    assert len(losses(tmp_path / "run")) == 8


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


@pytest.mark.parametrize("script", SCRIPTS)
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


def test_a_disk_too_full_for_any_message_is_status_2() -> None:
    command = [sys.executable, "-c", "from kit.files import run; run(lambda: print('too much'))"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, env=environment, check=False).returncode == 2


def test_half_an_hour_of_training_keeps_its_memory(is_long: bool, data_dir: Path, tmp_path: Path) -> None:
    if not is_long:
        pytest.skip("takes half an hour: --long")
    words = [*TINY, f"--data_dir={data_dir}", "--dataset=own", "--device=cpu", f"--out_dir={tmp_path / 'run'}"]
    command = [sys.executable, "train.py", "config/pythia.py", *words, "--max_iters=1_000_000_000"]
    largest = []  # resident size in KiB, per minute
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(MINUTES):
                sizes, ends = [], time.monotonic() + 60
                while time.monotonic() < ends:
                    time.sleep(0.25)
                    sizes += re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                largest.append(max(map(int, sizes)))
        finally:
            process.kill()
    print(f"MiB in each minute: {[size // 1024 for size in largest]}")
    assert abs(max(largest[-COUNTED:]) / max(largest[COUNTED : 2 * COUNTED]) - 1) < 0.02
