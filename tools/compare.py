"""Trains every architecture on the same tokens, then compares them: make compare.

    python -m tools.compare                            # laptop size, one seed
    python -m tools.compare --seeds=2 --size=full

Each run is the train.py command that is printed, so it can be typed by hand as well: a finished run says so, one that
was cut off goes on. What a run prints goes to out/compare-SIZE/RUN.txt; eval.py's report of them all comes last. Ctrl-C
saves what is being trained, and the same command goes on from there.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from tqdm import tqdm

from configurator import parse_settings
from kit.files import make_folder, run
from prep import PrepSettings, prepare
from train import TrainSettings

RECIPES = {  # config -> the run that it needs, and options in which {} is that run's folder
    "pythia": ("", ""),
    "phase1": ("", ""),
    "context_kv_phase1": ("", ""),
    "phase2": ("phase1", "--init_from={}"),
    # the baseline's tokens and table in the place of GPT-2's, and no early end: all see the same tokens
    "cascade_phase1": ("pythia", "--dataset=mini --embeddings={}"),
    "context_kv_phase2": ("context_kv_phase1", "--init_from={}"),
    "context_kv_50": ("context_kv_phase1", "--init_from={}"),
    "cascade_phase2": ("cascade_phase1", "--dataset=mini --patience=None --init_from={}"),
    **{f"mla_kv{width}": ("", "") for width in (64, 128, 256)},
    **{f"infini{mode}": ("", "") for mode in ("", "_banks2", "_alibi", "_alibi2", "_multi4", "_multi8", "_long")},
}
TAIL_LINES = 8  # of a failed training's output that are shown


@dataclass(frozen=True)
class CompareSettings:
    """compare.py"""

    size: Literal["laptop", "full"] = "laptop"  # with config/laptop.py on top, or at Pythia-70M's size
    seeds: PositiveInt = 1  # how often everything is trained, with seeds 1337, 1338, ...
    processes: PositiveInt | None = None  # trainings at a time; None: one on a GPU, else two that share the cores


@dataclass(frozen=True)
class Training:
    """A run, by the command that trains it."""

    folder: Path
    words: tuple[str, ...]  # of the command
    needs: Path | None  # the folder of the run that has to be finished before


def plan(settings: CompareSettings) -> list[Training]:
    """All runs, each behind the one that it needs; those of further seeds have the seed in the folder's name."""
    trainings = []
    layers = ["laptop"] if settings.size == "laptop" else []
    for seed in range(TrainSettings.seed, TrainSettings.seed + settings.seeds):
        endings = [*layers, *([str(seed)] if seed != TrainSettings.seed else [])]
        folders = {config: Path("out", "-".join([config, *endings])) for config in RECIPES}
        for config, (needs, options) in RECIPES.items():
            words = ["train.py", *(f"config/{name}.py" for name in (config, *layers)), f"--seed={seed}"]
            words += [f"--out_dir={folders[config]}", *options.format(folders.get(needs)).split()]
            trainings.append(Training(folders[config], tuple(words), folders.get(needs)))
    return trainings


def train_all(trainings: list[Training], processes: int, folder: Path) -> list[Training]:
    """Train all, so many at a time, each after what it needs; what they print goes to folder. Those that succeeded."""
    running: list[subprocess.Popen[bytes]] = []

    def train(training: Training, needed: Future[bool] | None) -> bool:
        """Whether it succeeded."""
        if needed is not None and not needed.result():
            tqdm.write(f"FAILED: {training.folder}, not started, because {training.needs} failed", sys.stderr)
            return False
        tqdm.write(f"python {' '.join(training.words)}")
        output = folder / f"{training.folder.name}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen([sys.executable, *training.words], stdout=file, stderr=subprocess.STDOUT)
            running.append(process)
            status = process.wait()
        if status:
            tail = output.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            tqdm.write("\n    ".join([f"FAILED: {training.folder}, exit status {status}:", *tail]), sys.stderr)
        return status == 0

    futures: dict[Path | None, Future[bool]] = {}
    with ThreadPoolExecutor(processes) as pool:
        try:
            for training in trainings:
                futures[training.folder] = pool.submit(train, training, futures.get(training.needs))
            for _ in tqdm(as_completed(futures.values()), total=len(futures), unit="run"):
                pass
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures.values()):
                for process in running:
                    process.terminate()  # one that Ctrl-C has reached already takes it once more
                time.sleep(0.2)
            raise
    return [training for training in trainings if futures[training.folder].result()]


def main() -> None:
    settings, _ = parse_settings(CompareSettings, sys.argv[1:])
    trainings, folder = plan(settings), Path(f"out/compare-{settings.size}")
    if not Path("data/mini/meta.json").exists():
        prepare(PrepSettings())  # once, not by two trainings at a time
    make_folder(folder)
    processes = settings.processes or (1 if torch.cuda.is_available() else 2)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being killed is like Ctrl-C
    finished = train_all(trainings, processes, folder)
    scored = [str(training.folder) for training in finished if "phase1" not in training.folder.name]
    status = subprocess.run([sys.executable, "eval.py", *scored, f"--out_dir={folder}"]).returncode if scored else 1
    sys.exit(status if len(finished) == len(trainings) else 1)


if __name__ == "__main__":
    run(main)
