"""What befalls a command from outside: a read-only folder, processes that are killed, a hub that hangs up.

Each ends it with a message, and leaves nothing that is half. A full disk is in test_crash.py.
"""

import contextlib
import hashlib
import http.server
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from conftest import ROOT, SHORT, TINY, losses, run_training

import eval as evaluation
import prep
import sample
import train
from kit.files import InputError, run
from kit.text import Archive, fetch
from prep import PrepSettings
from tools import bench, compare

SCRIPTS = {"train.py": train, "eval.py": evaluation, "sample.py": sample, "bench.py": bench, "prep.py": prep}
SCRIPTS |= {"compare.py": compare}
PYTHIA = shlex.join(["config/pythia.py", *TINY, *SHORT, "--dtype=float32", "--device=cpu", "--max_iters=1"])
PHASE_1 = shlex.join(["config/phase1.py", *TINY[:4], "--device=cpu", "--context_dim=8", "--num_tokens=500"])


def type_in(monkeypatch: pytest.MonkeyPatch, line: str) -> Any:
    """Run a command line in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as end:
        run(SCRIPTS[sys.argv[0]].main)
    return end.value.code


# ------------------------------------------------------------------------------------------------ a read-only folder


@pytest.fixture(scope="module")
def workshop(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose part `fixed`, with a data set and two runs, cannot be written to, whoever tries."""
    folder = tmp_path_factory.mktemp("workshop")
    fixed = folder / "fixed"
    fixed.mkdir()
    for name in ("config", "notes.jsonl"):
        (folder / name).symlink_to({"config": ROOT / "config", "notes.jsonl": data_dir / "own.jsonl"}[name])
    with contextlib.ExitStack() as at_the_end:
        if os.getuid() == 0:  # whom no mode keeps out
            mount = subprocess.run(["mount", "-t", "tmpfs", "none", fixed], capture_output=True, check=False)
            if mount.returncode:
                pytest.skip("root may write everywhere, and nothing can be mounted here")
            at_the_end.callback(lambda: subprocess.run(["umount", "-l", fixed], check=True))
        shutil.copytree(data_dir / "own", fixed / "own")
        (fixed / "cache").symlink_to(data_dir / "cache")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for line, name in ((PYTHIA, "run"), (PHASE_1, "phase1")):
                options = ["--data_dir=fixed", "--dataset=own", f"--out_dir=fixed/{name}"]
                run_training(*shlex.split(line), *options)
        if os.getuid() == 0:
            subprocess.run(["mount", "-o", "remount,ro", fixed], check=True)
        else:
            for path in [fixed, *(path for path in fixed.rglob("*") if not path.is_symlink())]:
                path.chmod(0o555 if path.is_dir() else 0o444)
                at_the_end.callback(path.chmod, 0o755)
        yield folder


@pytest.mark.parametrize(
    "line",
    [
        f"train.py {PYTHIA} --data_dir=fixed --dataset=own --out_dir=fixed/new",
        f"train.py {PYTHIA} --data_dir=fixed --dataset=own --out_dir=fixed/run --init_from=resume --max_iters=2",
        f"train.py {PHASE_1} --data_dir=fixed --dataset=own --out_dir=fixed",
        "prep.py --dataset=notes --files=notes.jsonl --data_dir=fixed",
        "prep.py --dataset=notes --files=notes.jsonl --data_dir=fixed/new",
        "prep.py --stage=contexts --init_from=fixed/phase1 --data_dir=fixed --device=cpu",
        "eval.py fixed/run --data_dir=fixed --tasks=cache --out_dir=fixed/compare",
        "eval.py fixed/run --data_dir=fixed --tasks=cache --out_dir=fixed",
        "bench.py --what=decode --quick=True --device=cpu --data_dir=fixed --dataset=own --out_dir=fixed/bench",
    ],
)
def test_a_read_only_folder_is_one_line(
    line: str, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    assert type_in(monkeypatch, line) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search("Read-only file system: |Permission denied: ", errors[0])
    assert "fixed" in errors[0]


def test_read_only_data_can_be_trained_on(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)
    run_training(*shlex.split(PYTHIA), "--data_dir=fixed", "--dataset=own", f"--out_dir={tmp_path}")
    assert len(losses(tmp_path)) == 1


# ---------------------------------------------------------------------------------------------- a process is killed


def test_a_killed_tokenising_process_ends_prep(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does it for want of memory; more documents than are handed out before a result is waited for."""
    (tmp_path / "cache").symlink_to(data_dir / "cache")

    def rows() -> Iterator[prep.Row]:
        for i in range(100 * prep.BATCH_DOCUMENTS):
            if i == 2 * prep.BATCH_DOCUMENTS:
                multiprocessing.active_children()[0].kill()
            yield {"text": f"Note {i}"}

    monkeypatch.setattr(prep, "open_source", lambda settings, cache_dir: prep.Source(rows(), 100, {}))
    making = PrepSettings(dataset="notes", files=str(data_dir / "own.jsonl"), data_dir=str(tmp_path), num_workers=2)
    with pytest.raises(InputError, match="a tokenising process was killed, for want of memory"):
        prep.prepare(making)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", ".notes.lock"}
    assert not multiprocessing.active_children()


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


def test_a_killed_process_of_torchrun_ends_them_all(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    options = [*TINY, *SHORT, "--dtype=float32", "--device=cpu", f"--data_dir={data_dir}", "--dataset=own"]
    arguments = [str(ROOT / "config/pythia.py"), *options, f"--out_dir={tmp_path / 'run'}", "--batch_size=4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, str(tmp_path / "dies.py"), *arguments],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert re.search(r"Signal 9 \(SIGKILL\) received by PID", ended.stderr)
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["iter_num"] == 4
    run_training(*arguments)
    assert len(losses(tmp_path / "run")) == 12


# ---------------------------------------------------------------------------------------------- the hub hangs up


class Server(http.server.BaseHTTPRequestHandler):
    """One that may end the connection in the middle of a file."""

    protocol_version = "HTTP/1.1"
    content: bytes  # of its one file
    times_cut: int

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, is_cut: bool = False) -> None:
        """The whole body, or half of it and the end of the connection."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
            self.close_connection = is_cut
            type(self).times_cut += is_cut


@contextlib.contextmanager
def serving(server: type[Server], content: bytes) -> Iterator[str]:
    """Serve a file, or what is left of it, on this machine; gives the URL."""
    server.content, server.times_cut = content, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class Hub(Server):
    """As much of the Hugging Face hub as prep.py asks for: a repository with one file."""

    def do_GET(self) -> None:
        path, file = self.path.split("?")[0], {"type": "file", "path": "train/00.jsonl.zst", "oid": "0" * 40}
        if path.endswith("/resolve/" + "0" * 40 + "/train/00.jsonl.zst"):
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
            assert match is not None
            start, end = int(match[1]), min(int(match[2] or len(self.content)) + 1, len(self.content))
            sent = {"Content-Range": f"bytes {start}-{end - 1}/{len(self.content)}", "X-Repo-Commit": "0" * 40}
            self.answer(206, self.content[start:end], sent, is_cut=True)
        elif re.search(r"/tree/0+/train$", path):
            self.answer(200, json.dumps([{**file, "size": len(self.content)}]).encode())
        elif re.search(r"/tree/0+$", path):
            self.answer(200, json.dumps([{"type": "directory", "path": "train", "oid": "0" * 40, "size": 0}]).encode())
        elif re.fullmatch(r"/api/datasets/\w+/[\w-]+(/revision/0+)?", path):
            siblings = [{"rfilename": file["path"]}]
            self.answer(200, json.dumps({"id": path.split("/", 3)[3], "sha": "0" * 40, "siblings": siblings}).encode())
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})


class Index(Server):
    """A Python package index with one package."""

    is_cut: bool

    def do_GET(self) -> None:
        if self.path == "/simple/kettle/":
            page = b'<a href="/kettle-1.0-py3-none-any.whl">kettle-1.0-py3-none-any.whl</a>'
            self.answer(200, page, {"Content-Type": "text/html"})
        else:
            self.answer(200, self.content, is_cut=self.is_cut)


PATIENCE = """
import time

time.sleep = lambda seconds: None  # between one try and the next

import datasets.config
import prep
from kit.files import run

datasets.config.STREAMING_READ_MAX_RETRIES = 1
run(prep.main)
"""


def test_a_hub_that_hangs_up_in_a_file_is_one_line(data_dir: Path, tmp_path: Path) -> None:
    """The Pile's way through `datasets` and the hub's client, to a hub on this machine."""
    rows = [{"text": f"Note {i} " + os.urandom(500).hex(), "meta": {"pile_set_name": "A"}} for i in range(800)]
    content = zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "cache").symlink_to(data_dir / "cache")
    with serving(Hub, content) as url:
        hub = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        ended = subprocess.run(
            [sys.executable, "-c", PATIENCE, "--dataset=pile", f"--data_dir={tmp_path}", "--num_workers=1"],
            cwd=ROOT, env={**os.environ, **hub, "HF_HUB_OFFLINE": "0"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert Hub.times_cut > 1, ended.stderr  # it is tried again
    assert len(re.findall("^error: reading monology/pile-uncopyrighted .* failed: ", ended.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "home", ".pile.lock"}


@pytest.mark.parametrize("is_cut", [True, False])
def test_an_index_that_hangs_up_or_has_another_file_is_one_line(
    is_cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = b"the right file" * 10**5, b"another file"
    digest = hashlib.sha256(right).hexdigest()
    archive = Archive("kettle==1.0", "kettle-1.0-py3-none-any.whl", digest)
    monkeypatch.setattr(Index, "is_cut", is_cut, raising=False)
    with serving(Index, right if is_cut else wrong) as url:
        for name, value in (("CONFIG_FILE", os.devnull), ("INDEX_URL", f"{url}/simple/"), ("NO_CACHE_DIR", "1")):
            monkeypatch.setenv(f"PIP_{name}", value)
        with pytest.raises(InputError, match=r"kettle-1\.0-py3-none-any\.whl cannot be fetched with pip"):
            fetch(archive, tmp_path)
    assert (Index.times_cut > 0) == is_cut
    assert not list((tmp_path / "cache").iterdir())


# ------------------------------------------------------------------------------------- the reader of the output is gone


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_into_a_closed_pipe_says_nothing(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert type_in(monkeypatch, f"{script} --help") == 1
    monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_a_disk_too_full_for_any_message_is_status_2() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "sample.py"), "--help"]
        ended = subprocess.run(command, stdout=full, stderr=full, check=False)
    assert ended.returncode == 2
