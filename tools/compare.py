"""Trains every architecture on the same tokens, then compares them: make compare.

    python -m tools.compare --seeds=2 --size=full      # without options: laptop size, one seed

Each run is the train.py command that is printed; what it prints goes to out/compare-SIZE/RUN.txt. eval.py's report of
them all comes last. Ctrl-C saves what is being trained, and the same command goes on from there.
"""

import os
import signal
import subprocess
import sys
import time
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

RECIPES = {  # config -> its options; {NAME} is the folder of another config's run, which has to be trained before
    "pythia": "",
    "phase1": "",
    "context_kv_phase1": "",
    "phase2": "--init_from={phase1}",
    # the baseline's tokens and table in the place of GPT-2's, and no early end: all see the same tokens
    "cascade_phase1": "--dataset=mini --embeddings={pythia}",
    "context_kv_phase2": "--init_from={context_kv_phase1}",
    "context_kv_50": "--init_from={context_kv_phase1}",
    "cascade_phase2": "--dataset=mini --patience=None --init_from={cascade_phase1}",
    **{f"mla_kv{width}": "" for width in (64, 128, 256)},
    **{f"infini{mode}": "" for mode in ("", "_banks2", "_alibi", "_alibi2", "_multi4", "_multi8", "_long")},
}
Runs = dict[Path, tuple[list[str], Path | None]]  # folder -> words of its command, and the run before it that it needs


@dataclass(frozen=True)
class CompareSettings:
    """compare.py"""

    size: Literal["laptop", "full"] = "laptop"  # with config/laptop.py on top, or at Pythia-70M's size
    seeds: PositiveInt = 1  # how often everything is trained, with seeds 1337, 1338, ...
    processes: PositiveInt | None = None  # trainings at a time; None: one on a GPU, else two that share the cores


def plan(settings: CompareSettings) -> Runs:
    """All runs; the folders of further seeds have the seed in their names."""
    runs: Runs = {}
    layers = ["laptop"] if settings.size == "laptop" else []
    for seed in range(TrainSettings.seed, TrainSettings.seed + settings.seeds):
        endings = layers + [str(seed)] * (seed != TrainSettings.seed)
        folders = {config: Path("out", "-".join([config, *endings])) for config in RECIPES}
        for config, options in RECIPES.items():
            words = ["train.py", *(f"config/{name}.py" for name in (config, *layers)), f"--seed={seed}"]
            words += [f"--out_dir={folders[config]}", *options.format(**folders).split()]
            runs[folders[config]] = words, next((folders[name] for name in RECIPES if f"{{{name}}}" in options), None)
    return runs


def train_all(runs: Runs, processes: int, folder: Path) -> list[Path]:
    """Train so many at a time, each after what it needs; what they print goes to folder. Those that succeeded."""
    waiting, running, failed = dict(runs), dict[Path, subprocess.Popen[bytes]](), set[Path | None]()
    outputs = {run_folder: folder / f"{run_folder.name}.txt" for run_folder in runs}
    bar = tqdm(total=len(runs), unit="run")
    try:
        while waiting or running:
            for run_folder, (words, needs) in list(waiting.items()):
                if needs in failed:
                    tqdm.write(f"FAILED: {run_folder}, not started, because what it needs failed", sys.stderr)
                    failed.add(run_folder)
                    del waiting[run_folder]
                elif len(running) < processes and needs not in {*waiting, *running}:
                    tqdm.write(f"python {' '.join(words)}")
                    del waiting[run_folder]
                    with outputs[run_folder].open("wb") as file:
                        running[run_folder] = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file)
            for run_folder, process in list(running.items()):
                if (status := process.poll()) is not None:
                    del running[run_folder]
                if status:
                    last = outputs[run_folder].read_text(errors="replace").rstrip().rpartition("\n")[2]
                    tqdm.write(
                        f"FAILED: {run_folder}, exit status {status}, see {outputs[run_folder]}: {last}", sys.stderr
                    )
                    failed.add(run_folder)
            bar.update(len(runs) - len(waiting) - len(running) - bar.n)
            time.sleep(0.2)
    finally:  # after Ctrl-C too: nothing outlives it
        bar.close()
        for process in running.values():
            process.terminate()
            process.wait()
    return [run_folder for run_folder in runs if run_folder not in failed]


def main() -> None:
    settings, _ = parse_settings(CompareSettings, sys.argv[1:])
    runs, folder = plan(settings), Path(f"out/compare-{settings.size}")
    if not Path("data/mini/meta.json").exists():
        prepare(PrepSettings())  # once, not by two trainings at a time
    make_folder(folder)
    processes = settings.processes or (1 if torch.cuda.is_available() else 2)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being killed is like Ctrl-C
    finished = train_all(runs, processes, folder)
    scored = [str(run_folder) for run_folder in finished if "phase1" not in run_folder.name]
    status = subprocess.run([sys.executable, "eval.py", *scored, f"--out_dir={folder}"]).returncode if scored else 1
    sys.exit(status if len(finished) == len(runs) else 1)


if __name__ == "__main__":
    run(main)
