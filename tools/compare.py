"""Trains every architecture on the same tokens, then compares them: make compare.

    python compare.py                            # laptop size, one seed
    python compare.py --seeds=2 --size=full

Each run is the train.py command that is printed, so it can be typed by hand as well: a finished run says so, one that
was cut off goes on. The report comes last. Ctrl-C saves what is being trained, and the same command continues.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from filelock import FileLock, Timeout

from configurator import check_range, parse_settings, parse_train
from kit.files import run
from kit.report import duration
from kit.tokens import load_tokens
from prep import PrepSettings, prepare
from train import PHASES, Phase1Settings, TrainSettings

STATUS_SECONDS = 60  # between two lines that say how far the runs are
LAPTOP_SPEED = 1_400  # tokens/s of a process on one core (a server's, AVX-512, bfloat16), until there is a measured one
TAIL_LINES = 8  # of a failed training's output that are shown
SCORING = 2 / 3  # work per validation token, each scored twice; that of a token to train on is 1


@dataclass(frozen=True)
class CompareSettings:
    """compare.py"""

    size: Literal["laptop", "full"] = "laptop"  # with config/laptop.py on top, or at Pythia-70M's size
    seeds: int = 1  # how often everything is trained, with seeds 1337, 1338, ...
    processes: int | None = None  # trainings at a time; None: one on a GPU, else two that share the cores

    def __post_init__(self) -> None:
        check_range(self, 1, "seeds", "processes")


@dataclass(frozen=True)
class Recipe:
    """A config of the comparison; {} in its options stands for the folder of the run that it needs."""

    config: str
    needs: str = ""
    options: tuple[str, ...] = ()


RECIPES = (
    Recipe("pythia"),
    Recipe("phase1"),
    Recipe("context_kv_phase1"),
    Recipe("phase2", needs="phase1"),
    Recipe("context_kv_phase2", needs="context_kv_phase1"),
    Recipe("context_kv_50", needs="context_kv_phase1"),
    # the baseline's tokens and table in the place of GPT-2's, and no early end: all see the same tokens
    Recipe("cascade_phase1", needs="pythia", options=("--dataset=mini", "--embeddings={}")),
    Recipe("cascade_phase2", needs="cascade_phase1", options=("--dataset=mini", "--patience=None")),
    *(Recipe(f"mla_kv{width}") for width in (64, 128, 256)),
    *(Recipe(f"infini{mode}") for mode in ("", "_banks2", "_alibi", "_alibi2", "_multi4", "_multi8", "_long")),
)


@dataclass(frozen=True)
class Training:
    """A run, by the command that trains it."""

    folder: Path
    words: tuple[str, ...]  # of the command
    needs: Path | None  # the folder of the run that has to be finished before
    max_iters: int  # 0 in phase 1
    tokens: int  # that it is trained on

    @property
    def name(self) -> str:
        return self.folder.name

    def progress(self) -> tuple[int, float]:
        """Steps taken and tokens/s, from the run's log; zeros where it has none."""
        log = self.folder / "log.jsonl"
        lines = [line for line in log.read_text().splitlines() if '"tokens_per_s"' in line] if log.is_file() else []
        for line in reversed([line for line in lines if line.endswith("}")]):  # the last may be half written
            entry = json.loads(line)
            return entry["step"], entry["tokens_per_s"]
        return 0, 0.0

    def is_finished(self) -> bool:
        return (self.folder / "summary.json").is_file()

    def is_taken(self) -> bool:
        """Whether a process trains it already: one that outlived a comparison which was killed."""
        if not (self.folder / ".lock").exists():  # locking would make the folder
            return False
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False

    def work_left(self, scoring: float) -> float:
        """In tokens to train on; scoring is the work of measuring the model at the end."""
        if self.is_finished():
            return 0.0
        return self.tokens * (1 - self.progress()[0] / max(self.max_iters, 1)) + (scoring if self.max_iters else 0)


def plan(settings: CompareSettings) -> list[Training]:
    """All runs, those that others need before them."""
    return [make_training(recipe, n, settings) for n in range(settings.seeds) for recipe in RECIPES]


def make_training(recipe: Recipe, number: int, settings: CompareSettings) -> Training:
    """The first seed is train.py's default in its default folder; further ones have theirs in the folder's name."""
    seed = TrainSettings.seed + number
    layer = "laptop" if settings.size == "laptop" else ""

    def folder(config: str) -> Path:
        return Path("out", "-".join(filter(None, (config, layer, str(seed) if number else ""))))

    words = ["train.py", *(f"config/{name}.py" for name in (recipe.config, layer) if name)]
    words += [option.format(folder(recipe.needs)) for option in recipe.options]
    if number:
        words += [f"--seed={seed}", f"--out_dir={folder(recipe.config)}"]
        if parse_train(words[1:], PHASES).settings.phase == "phase2":
            words.append(f"--init_from={folder(recipe.needs)}")
    s = parse_train(words[1:], PHASES).settings
    is_phase1 = isinstance(s, Phase1Settings)
    tokens = s.num_tokens if is_phase1 else s.max_iters * s.batch_size * s.gradient_accumulation_steps * s.block_size
    needs = folder(recipe.needs) if recipe.needs else None
    return Training(folder(recipe.config), tuple(words), needs, 0 if is_phase1 else s.max_iters, tokens)


class Comparison:
    """The trainings on their way."""

    def __init__(self, trainings: list[Training], settings: CompareSettings, folder: Path) -> None:
        self.trainings, self.folder = trainings, folder
        self.waiting = list(trainings)
        self.running: dict[Training, subprocess.Popen[bytes]] = {}
        self.done: set[Path] = set()
        self.failed: set[Path] = set()
        self.signal = 0
        self.size = settings.size
        self.processes = settings.processes or (1 if torch.cuda.is_available() else 2)
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        self.environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        self.scoring = SCORING * len(load_tokens(Path("data", "mini"), "val").tokens)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    # -- the trainings

    def train(self) -> None:
        """Train all, each as soon as there is room for it and what it needs is finished; returns early at a signal."""
        try:
            self.train_in_turn()
        finally:  # at a signal, or if this process fails
            for process in self.running.values():
                process.send_signal(signal.SIGTERM)  # a process that Ctrl-C has reached already takes it once more
            for process in self.running.values():
                process.wait()

    def train_in_turn(self) -> None:
        said = time.perf_counter()
        while (self.running or self.waiting) and not self.signal:
            for training in [t for t in self.waiting if t.needs in self.failed]:
                self.waiting.remove(training)
                self.fail(training, f"not started, because {training.needs} failed")
            ready = [t for t in self.waiting if (t.needs is None or t.needs in self.done) and not t.is_taken()]
            for training in ready[: self.processes - len(self.running)]:
                self.start(training)
            for training in [t for t, process in self.running.items() if process.poll() is not None]:
                self.finish(training)
            if time.perf_counter() - said > STATUS_SECONDS:
                said = time.perf_counter()
                self.say_progress()
            time.sleep(0.2)

    def start(self, training: Training) -> None:
        print(f"python {' '.join(training.words)}", flush=True)
        with self.output(training).open("wb") as output:
            self.running[training] = subprocess.Popen(
                [sys.executable, *training.words], stdout=output, stderr=subprocess.STDOUT, env=self.environment
            )
        self.waiting.remove(training)

    def output(self, training: Training) -> Path:
        """Where a training's output goes."""
        return self.folder / f"{training.name}.txt"

    def finish(self, training: Training) -> None:
        status = self.running.pop(training).returncode
        if status == 0:
            self.done.add(training.folder)
            print(f"{training.name} is finished, {len(self.done)} of {len(self.trainings)}", flush=True)
            return
        tail = self.output(training).read_text(errors="replace").splitlines()[-TAIL_LINES:]
        self.fail(training, f"exit status {status}; {self.output(training)} ends with", *tail)

    def fail(self, training: Training, *why: str) -> None:
        self.failed.add(training.folder)
        print(f"FAILED: {training.name}, " + "\n    ".join(why), file=sys.stderr, flush=True)

    # -- how long it takes

    def say_plan(self) -> None:
        """Before anything starts: how much there is to do, and how long it takes if that is known."""
        left = sum(t.work_left(self.scoring) > 0 for t in self.trainings)
        work = sum(t.work_left(self.scoring) for t in self.trainings)
        print(f"{left} of {len(self.trainings)} runs are to be trained, {self.processes} at a time", end="")
        print(f", work for {work / 1e6:.1f} M tokens: {self.estimate()}", flush=True)

    def say_progress(self) -> None:
        training = [*self.running, *(t for t in self.waiting if t.is_taken())]
        shown = [f"{t.name} {t.progress()[0]}/{t.max_iters}" if t.max_iters else t.name for t in training]
        print(f"training {', '.join(shown)}; {self.estimate()}", flush=True)

    def estimate(self) -> str:
        """The time left at the speed of the runs that have one, or at that of the machine that LAPTOP_SPEED is of."""
        speeds = [speed for t in (list(self.running) or self.trainings) if (speed := t.progress()[1])]
        if not speeds and self.size == "full":
            return "how long that takes is said once the first steps are measured"
        speed = sum(speeds) / len(speeds) if speeds else LAPTOP_SPEED
        seconds = sum(t.work_left(self.scoring) for t in self.trainings) / speed / self.processes
        source = "measured" if speeds else "on an idle server core; measured speeds follow"
        return f"about {duration(seconds)} left at {speed:,.0f} tokens/s a process ({source})"

    # -- the report

    def score(self) -> int:
        """Have eval.py score all runs that are finished, unless it has; returns its exit status."""
        finished = [t.folder for t in self.trainings if t.max_iters and t.folder in self.done]
        words = ["eval.py", *map(str, finished), f"--out_dir={self.folder}"]
        if not finished or is_reported(finished, self.folder):
            print(f"nothing new to score: {self.folder / 'report.md'}")
            return 0
        print(f"python {' '.join(words)}", flush=True)
        process = subprocess.Popen([sys.executable, *words])
        while process.poll() is None:
            if self.signal:
                process.terminate()
            time.sleep(0.2)
        return process.returncode


def is_reported(finished: list[Path], folder: Path) -> bool:
    """Whether the report is of these runs as they are now."""
    results, page = folder / "results.json", folder / "report.md"
    if not page.is_file():
        return False
    scored = [run["run"] for run in json.loads(results.read_text())["runs"]]
    newest = max((run / "ckpt.pt").stat().st_mtime for run in finished)
    return scored == list(map(str, finished)) and newest < results.stat().st_mtime


def main() -> None:
    settings, _ = parse_settings(CompareSettings, sys.argv[1:])
    trainings, folder = plan(settings), Path(f"out/compare-{settings.size}")
    if not Path("data/mini/meta.json").exists():
        prepare(PrepSettings())
    folder.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(trainings, settings, folder)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, comparison.receive)
    comparison.say_plan()
    comparison.train()
    status = 0 if comparison.signal else comparison.score()
    if comparison.signal:
        print("stopped; the same command goes on from here", flush=True)
        sys.exit(128 + comparison.signal)
    if comparison.failed:
        print(f"failed: {', '.join(sorted(folder.name for folder in comparison.failed))}", file=sys.stderr)
    sys.exit(1 if comparison.failed or status else 0)


if __name__ == "__main__":
    run(main)
