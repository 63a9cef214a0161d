"""Trains every architecture on the same tokens, then compares them: make compare.

    python -m tools.compare --seed=1338 --max_iters=4688      # without options seed 1337, as long as its configs say
    python -m tools.compare --rows=pythia,infini_banks2       # only these, and what they start from

Each run is the train.py command that is printed; what it prints goes to out/compare-laptop/RUN.txt. eval.py's report of
them all comes last. Ctrl-C saves what is being trained, and the same command goes on from there.
"""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from tqdm import tqdm

from configurator import parse_settings
from kit.files import InputError, run
from train import TrainSettings

TABLES = Path(__file__).with_name("compare.txt").read_text().partition("\n\n")[::2]  # a line: run, config, options
LINES = ([line.split(maxsplit=1) for line in table.splitlines() if line and line[0] != "#"] for table in TABLES)
RECIPES, MORE = ({name: recipe.strip() for name, recipe in lines} for lines in LINES)
Runs = dict[Path, tuple[list[str], Path | None]]  # folder -> words of its command, and the run before it that it needs


@dataclass(frozen=True)
class CompareSettings:
    """compare.py"""

    size: Literal["laptop", "full"] = "laptop"  # with config/laptop.py on top, or at Pythia-70M's size
    rows: str | None = None  # which runs, separated by commas: pythia,infini_long; None: the architectures
    seed: NonNegativeInt = TrainSettings.seed  # of all runs; another than this one is in the names of the folders
    max_iters: PositiveInt | None = None  # steps of every language model, also in the names; None: what its configs say
    processes: PositiveInt | None = None  # trainings at a time; None: two, on a GPU one a core, at full size one


def plan(settings: CompareSettings) -> tuple[Runs, Path]:
    """The runs, each after what it needs, and where the report goes."""
    every = RECIPES | MORE
    needs = {name: next(iter(re.findall(r"{(\w+)}", recipe)), None) for name, recipe in every.items()}
    chosen = settings.rows.split(",") if settings.rows is not None else [*RECIPES]
    for name in chosen:  # which grows meanwhile
        if name not in every:
            raise InputError(f"rows={name!r} is no run: choose from {', '.join(every)}")
        chosen += [other] if (other := needs[name]) and other not in chosen else []
    layers = ["laptop"] if settings.size == "laptop" else []
    steps = [] if settings.max_iters is None else [str(settings.max_iters)]
    endings = [*layers, *steps, *([] if settings.seed == TrainSettings.seed else [str(settings.seed)])]
    folders = {name: Path("out", "-".join([name, *endings])) for name in every}
    runs: Runs = {}
    for name in (name for name in every if name in chosen):
        config, *options = every[name].format(**folders).split()
        words = ["train.py", *(f"config/{file}.py" for file in (config, *layers)), f"--seed={settings.seed}"]
        words += [] if "phase1" in config else ["--final_eval=False", *(f"--max_iters={n}" for n in steps)]
        runs[folders[name]] = [*words, f"--out_dir={folders[name]}", *options], folders.get(needs[name] or "")
    return runs, Path("out", "-".join(["compare", settings.size, *endings[len(layers) :]]))


def train_all(runs: Runs, processes: int, folder: Path) -> list[Path]:
    """Train so many at a time, each after what it needs; what they print goes to folder. Those that succeeded."""
    running, ended = dict[Path, subprocess.Popen[bytes]](), dict[Path | None, int]({None: 0})  # with which exit status
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}
    bar = tqdm(total=len(runs), unit="run")
    try:
        while len(ended) <= len(runs):
            for path, (words, needs) in runs.items():
                said = folder / f"{path.name}.txt"
                if path in ended or needs not in ended:
                    continue
                if path in running:
                    if (status := running[path].poll()) is not None:
                        ended[path] = status
                        del running[path]
                    if status:
                        last = said.read_text(errors="replace").rstrip().rpartition("\n")[2]
                        tqdm.write(f"FAILED: {path}, exit status {status}, see {said}: {last}", sys.stderr)
                elif ended[needs]:
                    ended[path] = 1
                    tqdm.write(f"FAILED: {path}, not started, because what it needs failed", sys.stderr)
                elif len(running) < processes:
                    tqdm.write(f"python {' '.join(words)}")
                    with said.open("wb") as file:
                        command = [sys.executable, *words]
                        running[path] = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            bar.update(len(ended) - 1 - bar.n)
            time.sleep(0.2)
    finally:  # after Ctrl-C too: nothing outlives it
        bar.close()
        for process in running.values():
            process.terminate()
            process.wait()
    return [path for path in runs if not ended[path]]


def main() -> None:
    settings, _ = parse_settings(CompareSettings, sys.argv[1:])
    runs, folder = plan(settings)
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = 1 if settings.size == "full" else os.cpu_count() or 1  # a small step leaves a GPU idle, not its core
    processes = settings.processes or (on_gpu if torch.cuda.is_available() else 2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being killed is like Ctrl-C
    finished = train_all(runs, processes, folder)
    scored = [str(path) for path in finished if "phase1" not in path.name]
    status = subprocess.run([sys.executable, "eval.py", *scored, f"--out_dir={folder}"]).returncode if scored else 0
    sys.exit(status if len(finished) == len(runs) else 1)


if __name__ == "__main__":
    run(main)
