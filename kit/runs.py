"""What every run has, whatever it trains: its processes, its folder, and a signal that asks it to stop."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor

from kit.files import InputError, refusing, replacing

FREE = {"out_dir", "overwrite", "device", "context_cache", "final_eval", "log_to"}  # may change when a run goes on
FIXED = {"model", "phase", "dataset", "model_args", "data", "optimizer"}  # may not, even where it is resumed
FIXED |= {"embeddings", "num_tokens", "cascade_data"}  # of phase 1
ROWS = {"tokens_per_doc", "block_size", "batch_size", "gradient_accumulation_steps", "seed"}  # nor these in documents
LAYOUT = {"model", "model_args", "iter_num", "tokens_seen", "train_seconds", "config", "data", "commit", "parents"}
LAYOUT |= {"context_blocks"}
STATE = {"optimizer", "scaler", "rng", "best_val_loss", "evaluations_without_gain"}  # of a language model


class World(NamedTuple):
    """The processes that train together: one, or those that torchrun started."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def agree(self, signals: list[int]) -> int:
        """The signal that any of the processes has received, 0 if none has."""
        mine = max(signals, default=0)
        return mine if self.size == 1 else int(self.gather(torch.tensor([mine], device=self.device)).max())


@contextlib.contextmanager
def open_world(device_name: str) -> Iterator[World]:
    """Join torchrun's process group, NCCL on GPUs and gloo elsewhere, and leave it in the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and torch.cuda.is_available() and device_name.startswith(("auto", "cuda")):
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"  # nothing is put on another process's GPU
    device = pick_device(device_name)
    if size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield World(int(os.environ.get("RANK", "0")), size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """'auto' takes CUDA, then Apple MPS, then the CPU. Raises InputError if a named device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with refusing(f"device={name!r} cannot be used here"):
        return torch.empty(0, device=name).device


class RunFolder(contextlib.AbstractContextManager["RunFolder"]):
    """What a run leaves behind, written by the first process alone; no file is ever half."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self.lock = FileLock(path / ".lock")  # held until the process ends, however it ends
        self.head: dict[str, Any] = {}  # what all its checkpoints have in common
        self.checkpoint: dict[str, Any] | None = None  # what it goes on from; None: it is new

    def __exit__(self, *exception: object) -> None:
        """Give up the lock; a folder that nothing was written to goes with it."""
        if self.lock.is_locked:
            if [path.name for path in self.path.iterdir()] == [".lock"]:
                shutil.rmtree(self.path)
            self.lock.release()

    def claim(self, head: dict[str, Any]) -> None:
        """Take the folder for a new run, or to go on with the one that it holds, which head has to fit."""
        self.head, settings, file = head, head["config"], self.path / "ckpt.pt"
        is_resumed = settings["init_from"] == "resume"
        if self.world.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(blocking=False)
            except Timeout:
                raise InputError(f"another process is training in {self.path}") from None
        self.world.barrier()  # nobody reads the folder before it is claimed
        if settings["overwrite"] or not file.exists():
            if is_resumed:
                raise InputError(f"init_from='resume': {self.path} holds no checkpoint")
            return
        checkpoint = read_checkpoint(file)
        theirs, mine = ({**h["config"], "model_args": h["model_args"], "data": h["data"]} for h in (checkpoint, head))
        keys = (theirs.keys() | mine.keys()) - FREE
        if is_resumed:
            keys = FIXED | (ROWS if settings.get("tokens_per_doc") else set())
        if differing := sorted(key for key in keys if theirs.get(key) != mine.get(key)):
            shown = ", ".join(f"{k} {theirs.get(k)!r:.80} there, {mine.get(k)!r:.80} here" for k in differing[:3])
            ways = "another --out_dir keeps both, --init_from=resume goes on with it, --overwrite=True replaces it"
            raise InputError(f"{self.path} holds another run ({shown}): {ways}")
        if settings["phase"] != "phase1" and (missing := STATE - checkpoint.keys()):
            raise InputError(f"{file} cannot be gone on from, it has no {', '.join(sorted(missing))}: train it again")
        self.checkpoint = checkpoint

    def begin(self) -> None:
        """Write the settings; a new run clears what is there, one that goes on unlogs the steps that it does again."""
        if not self.world.is_main:
            return
        log, settings = self.path / "log.jsonl", {**self.head["config"], "model_args": self.head["model_args"]}
        self.show = open_tracker(self.path, settings, 0 if self.checkpoint is None else self.head["iter_num"] + 1)
        (self.path / "summary.json").unlink(missing_ok=True)  # it is not finished, or no longer
        if self.checkpoint is None:
            for name in ("ckpt.pt", "best.pt", "log.jsonl"):
                (self.path / name).unlink(missing_ok=True)
        elif log.exists():
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]  # the last one may be half
            kept = [line for line in lines if json.loads(line)["step"] <= self.head["iter_num"]]
            self.write("log.jsonl", "".join(line + "\n" for line in kept).encode())
        self.write("config.json", f"{json.dumps(settings, indent=2)}\n".encode())

    def save(self, state: dict[str, Any], *names: str) -> None:
        if self.world.is_main:
            content = io.BytesIO()
            torch.save({**self.head, **state}, content)
            for name in names:
                self.write(name, content.getbuffer())

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Put a file in the place of the old one. Raises OSError if the disk is full, and the old one stays."""
        if self.world.is_main:
            with replacing(self.path / name) as file:
                file.write(content)

    def log(self, entry: dict[str, Any]) -> None:
        if self.world.is_main:
            with (self.path / "log.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            for key, value in entry.items():
                if isinstance(value, float):
                    self.show(key, value, entry["step"])

    def finish(self, train_seconds: float, figures: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, by which a run is known to be finished; returns it."""
        summary = {key: self.head["config"][key] for key in ("model", "phase", "seed")}
        summary |= {key: self.head[key] for key in ("parents", "commit")}
        summary |= {"checkpoint": str(self.path / "ckpt.pt"), "train_seconds": train_seconds, **figures}
        self.write("summary.json", f"{json.dumps(summary, indent=2)}\n".encode())
        return summary


def open_tracker(path: Path, settings: dict[str, Any], first_step: int) -> Callable[[str, float, int], Any]:
    """What shows a figure of a step where log_to says; a run that is resumed goes on where it was shown before."""
    name = settings["log_to"]
    needed = f"it takes pip install {name}, and for wandb an account and a network"
    with refusing(f"log_to={name!r} cannot be used", needed):
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(path / name, purge_step=first_step, flush_secs=10).add_scalar
        if name == "wandb":
            import wandb

            identity = path / "wandb_id"
            if first_step == 0 or not identity.exists():
                identity.write_text(uuid.uuid4().hex)
            options = {"project": "kv-cache", "name": path.name, "id": identity.read_text(), "resume": "allow"}
            run = wandb.init(dir=path, config=settings, **options)
            return lambda key, value, step: run.log({key: value}, step)
    return lambda key, value, step: None


def git_commit() -> str:
    """The commit of the code, with + if it was changed since; empty outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return ""


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it, SIGINT and SIGTERM are only noted, so that a run can save and stop after the step it is in."""
    received: list[int] = []
    numbers = signal.SIGINT, signal.SIGTERM
    before = {n: signal.signal(n, lambda number, frame: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A run folder (its ckpt.pt) or a checkpoint file -> its contents, nothing executed. Raises InputError."""
    file = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle readers each have errors of their own
        raise InputError(f"{file} cannot be read ({type(error).__name__}): damaged, or no checkpoint") from None
    if not (isinstance(checkpoint, dict) and checkpoint.keys() >= LAYOUT):
        raise InputError(f"{file} is no checkpoint of this version of the project: train it again")
    return checkpoint
