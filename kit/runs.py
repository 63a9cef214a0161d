"""What every run has, whatever it trains: its processes, its folder, and a signal that asks it to stop."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor

from kit.files import InputError, make_folder, one_line, replacing

# settings that may differ when a run goes on
NOT_COMPARED = ("out_dir", "overwrite", "device", "context_cache", "final_eval")


# ----------------------------------------------------------------------------------------- processes and precision


@dataclass(frozen=True)
class World:
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
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()

    def reduce(self, value: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """The sum (or another op) of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(value, op)
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


@contextlib.contextmanager
def open_world(device_name: str) -> Iterator[World]:
    """Join torchrun's process group, NCCL on GPUs and gloo elsewhere, and leave it in the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(device_name)
    if size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
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
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name!r} cannot be used here: {one_line(error)[:120]}") from None


# ---------------------------------------------------------------------------------------------------- the run's folder


class RunFolder:
    """What a run leaves behind. Files are written beside the old ones, flushed and renamed, so none is ever half."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FileLock(path / ".lock")

    def claim(self, job: Any, world: World) -> dict[str, Any] | None:
        """Take the folder for this run; returns the checkpoint to go on from, None for a new run.

        Raises InputError if it holds another run, or one that is being trained right now.
        """
        if world.is_main and not getattr(job.settings, "eval_only", False):
            self.open(job)
        world.barrier()  # nobody reads the folder before it is claimed
        if (self.path / "ckpt.pt").exists() and not job.settings.overwrite:
            return read_checkpoint(self.path)
        if job.settings.init_from == "resume":
            raise InputError(f"init_from='resume': {self.path} holds no checkpoint")
        return None

    def open(self, job: Any) -> None:
        """Make the folder, lock it, refuse another run's."""
        make_folder(self.path)
        self.take_lock()
        if (self.path / "ckpt.pt").exists() and not job.settings.overwrite:
            self.compare(job)

    def leave(self) -> None:
        """Give up the lock; a folder that nothing was written to goes with it."""
        if self.lock.is_locked:
            if [path.name for path in self.path.iterdir()] == [".lock"]:
                shutil.rmtree(self.path)
            self.lock.release()

    def begin(self, job: Any, goes_on_from: int | None) -> None:
        """Write the settings; a new run takes the place of what is there, one that goes on drops what it does again."""
        if goes_on_from is not None:
            self.trim_log(goes_on_from)
        else:
            for name in ("ckpt.pt", "best.pt", "summary.json") if job.settings.overwrite else ():
                (self.path / name).unlink(missing_ok=True)
            (self.path / "log.jsonl").unlink(missing_ok=True)
        self.write_json("config.json", {**asdict(job.settings), "model_args": model_args(job.model_config)})

    def is_finished(self, checkpoint: dict[str, Any], settings: Any) -> bool:
        """Whether the run has its summary; one that is resumed with more steps than it has taken is not finished."""
        is_longer = settings.init_from == "resume" and checkpoint["iter_num"] < settings.max_iters
        return (self.path / "summary.json").exists() and not is_longer and not settings.eval_only

    def take_lock(self) -> None:
        """Held until the process ends, however it ends."""
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"another process is training in {self.path}") from None

    def compare(self, job: Any) -> None:
        """Raises InputError unless the folder's run has the settings of this job (resuming: its model settings)."""
        theirs = json.loads((self.path / "config.json").read_text())
        mine = json.loads(json.dumps({**asdict(job.settings), "model_args": model_args(job.model_config)}))
        keys = mine.keys() | theirs.keys()
        if job.settings.init_from == "resume":
            keys = {"model", "phase", "dataset", "model_args"}
        differing = sorted(k for k in keys if k not in NOT_COMPARED and mine.get(k) != theirs.get(k))
        if differing:
            shown = ", ".join(f"{k} {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in differing[:3])
            raise InputError(
                f"{self.path} holds another run ({shown}): choose another --out_dir, go on with it by "
                "--init_from=resume, or replace it by --overwrite=True"
            )

    def save(self, checkpoint: dict[str, Any], *names: str) -> None:
        """Write a checkpoint under each of the names. Raises OSError if the disk is full."""
        for name in names:
            try:
                with replacing(self.path / name) as file:
                    torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's writer stumbles over a failed write once more
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        with replacing(self.path / name) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())

    def log(self, entry: dict[str, Any]) -> None:
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def trim_log(self, step: int) -> None:
        """Drop what was logged after the checkpoint that a run goes on from; those steps are done again."""
        path = self.path / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        with replacing(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())


def git_commit() -> str:
    """The commit of the code, with + if it was changed since; empty outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, stderr=subprocess.DEVNULL, text=True)
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=here, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.strip() + ("+" if changed else "")


class StopRequest:
    """Within it, SIGINT and SIGTERM ask the run to save and stop after the step it is in."""

    def __enter__(self) -> "StopRequest":
        self.signal = 0
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def agreed(self, world: World) -> int:
        """The signal that any of the processes has received, 0 if none has."""
        if world.size == 1:
            return self.signal
        return int(world.reduce(torch.tensor(self.signal, device=world.device), dist.ReduceOp.MAX))


def model_args(model_config: Any) -> dict[str, Any]:
    """A model config as plain values, from which its class builds it again."""
    settable = [field.name for field in fields(model_config) if field.init]
    return {key: value for key, value in asdict(model_config).items() if key in settable}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A run folder (its ckpt.pt) or a checkpoint file -> its contents, on the CPU, nothing executed.

    Raises InputError if there is none, or if it is damaged or of another layout.
    """
    file = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"{path} holds no checkpoint: train one with train.py, or name a run folder")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # zip and pickle readers each have errors of their own
        raise InputError(f"{file} cannot be read ({type(error).__name__}): truncated, or no checkpoint") from None
    layout = {"model": dict, "model_args": dict, "iter_num": int, "config": dict, "data": dict}
    layout |= {"parents": list, "tokens_seen": int, "commit": str, "context_blocks": list}
    fits = isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(k), kind) for k, kind in layout.items())
    if (
        not fits
        or not {"phase", "dataset", "seed"} <= checkpoint["config"].keys()
        or "tokenizer" not in checkpoint["data"]
    ):
        raise InputError(f"{file} is no checkpoint of this version of the project: train it again")
    return checkpoint
