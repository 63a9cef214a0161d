"""Contexts over a token file: as exact as float32 is, never half, never of other weights, tokens or settings."""

import copy
import functools
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import prep
from kit.contexts import (
    ContextFile,
    ContextSettings,
    Recurrence,
    context_cache,
    plain_loop,
    window_contexts,
    window_error,
)
from kit.files import InputError
from kit.tokens import TokenFile
from model_context import ContextBlock, ContextPythiaConfig, ContextPythiaModel, first_contexts, oacd_iteration

VOCAB, WIDTH = 300, 64
LANES = {"overlap": 50, "chunk_tokens": 800}  # 16 lanes of 50 tokens
LONGER = {"overlap": 150, "chunk_tokens": 3000}  # 20 of 150

Build = Callable[..., ContextFile]


def make_block(seed: int = 0, recurrent: float = 1.0, token: float = 4.0, width: int = WIDTH) -> ContextBlock:
    """A block whose recurrent and token weights are scaled; as it is, it forgets in about 50 tokens."""
    torch.manual_seed(seed)
    block = ContextBlock(WIDTH, width, 1, 1e-5, "normal", embed_norm=True).requires_grad_(False)
    block.linears[0].weight[:, :width] *= recurrent
    block.linears[0].weight[:, width:] *= token
    return block


def slow_block() -> ContextBlock:
    """Forgets in about 500 tokens."""
    return make_block(recurrent=0.5, token=1.0)


def expansive_block() -> ContextBlock:
    """Never forgets: the smallest difference grows to the size of the contexts."""
    return make_block(recurrent=4.0, token=1.0, width=2 * WIDTH)


def make_model(*blocks: ContextBlock) -> Any:
    torch.manual_seed(1)
    return SimpleNamespace(context_blocks=list(blocks), embed_in=nn.Embedding(VOCAB, WIDTH))


def token_file(folder: Path, tokens: np.ndarray) -> TokenFile:
    path = folder / "train.bin"
    tokens.tofile(path)
    meta = {"files": {path.name: {"sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}}, "max_id": VOCAB - 1}
    return TokenFile(path, meta, tokens)


def random_tokens(num_tokens: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCAB, size=num_tokens, dtype=np.uint16)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(model, tokens or how many, key=value, ...) makes, or reads, the cache in the test's own folder."""

    def make_cache(model: Any, tokens: np.ndarray | int, **keys: Any) -> ContextFile:
        file = token_file(tmp_path, random_tokens(tokens) if isinstance(tokens, int) else tokens)
        return context_cache(model, file, ContextSettings(**{"init_from": "out/phase1", **LANES, **keys}))

    return make_cache


@torch.no_grad()
def module_calls(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The contexts by calls of the modules, token by token from zero, the blocks side by side."""
    states = [model.embed_in.weight.new_zeros(1, block.context_dim) for block in model.context_blocks]
    contexts = []
    for token in torch.from_numpy(tokens.astype(np.int64)):
        states = [block(c, model.embed_in(token)[None]) for block, c in zip(model.context_blocks, states, strict=True)]
        contexts.append(torch.cat(states, dim=1))
    return torch.cat(contexts).numpy()


def tokens_of(file: ContextFile) -> np.ndarray:
    return np.fromfile(file.path.with_name("train.bin"), dtype=np.uint16)


def error(model: Any, file: ContextFile) -> float:
    return float(np.abs(file.contexts - module_calls(model, tokens_of(file))).max())


def times_float32(model: Any, file: ContextFile, order: float) -> float:
    """How many times as far from a loop in float64 the contexts are as a loop in float32, in this norm."""
    in_float64 = copy.deepcopy(model)
    for module in (*in_float64.context_blocks, in_float64.embed_in):
        module.double()
    exact, loop = (module_calls(each, tokens_of(file)) for each in (in_float64, model))
    ours, theirs = (np.linalg.norm((contexts - exact).ravel(), order) for contexts in (file.contexts, loop))
    assert ours > 0
    return float(ours / theirs)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"train.bin", ".contexts.lock"}


# ------------------------------------------------------------------------------------------------------- exactness


STREAM = random_tokens(1500, seed=4)


@functools.cache
def slow_and_deep() -> tuple[Any, np.ndarray]:
    """A model of two blocks, one that forgets slowly and one of two layers; their contexts of STREAM."""
    torch.manual_seed(3)
    deep = ContextBlock(WIDTH, 40, 2, 1e-5, "normal", embed_norm=True).requires_grad_(False)
    for linear in deep.linears:
        linear.weight[:, 40:] *= 4  # it forgets, so that rounding stays small
    model = make_model(slow_block(), deep)
    return model, module_calls(model, STREAM)


@settings(max_examples=15, deadline=None)
@given(
    num_tokens=st.integers(1, len(STREAM)) | st.integers(790, 810),
    overlap=st.integers(1, 800) | st.integers(1, 50),
    chunk_tokens=st.integers(20, 1600) | st.just(800),
)
@example(1, 50, 800)
@example(99, 50, 800)  # less than two overlaps
@example(801, 100, 800)  # a last chunk of one token
@example(1203, 1, 800)
@example(1203, 399, 800)
@example(70, 1, 1)
def test_any_cut_gives_the_plain_loop(num_tokens: int, overlap: int, chunk_tokens: int) -> None:
    model, expected = slow_and_deep()
    with tempfile.TemporaryDirectory() as folder:
        file = token_file(Path(folder), STREAM[:num_tokens])
        cache = context_cache(model, file, ContextSettings("run", overlap=overlap, chunk_tokens=chunk_tokens))
        assert cache.contexts.shape == (num_tokens, WIDTH + 40)
        assert np.abs(cache.contexts - expected[:num_tokens]).max() < 1e-5


@pytest.mark.parametrize("overlap", [1, 25, 100])
@pytest.mark.parametrize(("recurrent", "token", "order"), [(1.0, 4.0, np.inf), (0.5, 1.0, 2), (0.7, 1.0, 2)])
def test_lanes_are_as_exact_as_float32_is(
    build: Build, recurrent: float, token: float, order: float, overlap: int
) -> None:
    """The promise: no more than twice as far from a loop in float64 as the loop in float32 is.

    Of a block that magnifies rounding for a while, the largest error is a matter of chance: two float32 loops, of
    other batch sizes, differ twofold in it, and not in the mean square.
    """
    model = make_model(make_block(recurrent=recurrent, token=token))
    assert times_float32(model, build(model, 2500, overlap=overlap, chunk_tokens=1500), order) <= 2


@pytest.mark.parametrize("loose", [{"tolerance": 100.0, "overlap": 1}, {"tolerance": 100.0}, {"overlap": 1}])
def test_loose_settings_are_not_taken_for_exact_ones(
    build: Build, capsys: pytest.CaptureFixture[str], loose: dict[str, Any]
) -> None:
    """Each has a file of its own, that the same settings read again."""
    model = make_model(slow_block())
    first = build(model, 2000, **loose)
    assert (error(model, first) > 0.1) == ("tolerance" in loose), "with this tolerance it is far off"
    second = build(model, 2000)
    assert error(model, second) < 1e-5
    assert first.path != second.path
    assert "stale" not in capsys.readouterr().out
    assert build(model, 2000, **loose).path == first.path
    assert capsys.readouterr().out == f"reading {first.path}\n"


@pytest.mark.parametrize(
    ("block", "keys", "seams", "again"),
    [
        (make_block(), LONGER, (0, 1e-6), (0, 0)),
        (slow_block(), LONGER, (0, 1e-6), (39, 99)),  # the 19 seams of each chunk need more than one round
        (slow_block(), {**LONGER, "tolerance": 1e-2}, (1e-4, 1e-2), (1, 38)),
    ],
)
def test_what_is_told_of_the_lanes(
    build: Build, capsys: pytest.CaptureFixture[str], block: Any, keys: Any, seams: Any, again: Any
) -> None:
    """The difference that is left, not the one that was there before lanes were run again; and how many were."""
    build(make_model(block), 6000, **keys)
    found = re.search(r"left at a seam ([\d.e+-]+), (\d+) of \d+ lanes run again, 0 chunks", capsys.readouterr().out)
    assert found
    assert seams[0] < float(found[1]) <= seams[1]
    assert again[0] <= int(found[2]) <= again[1]


def test_an_expansive_block_goes_on_in_order(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """Two loops that round differently drift apart, so the reference is the same loop: equal to the last bit.

    The other block still goes by lanes.
    """
    model = make_model(make_block(), expansive_block())
    file = build(model, 1640)
    out = capsys.readouterr().out
    assert out.count("one token after the other") == 1, "it is said once"
    assert re.findall(r"(\d+) chunks without lanes", out) == ["0", "2"]
    block, ids = model.context_blocks[1], torch.from_numpy(tokens_of(file).astype(np.int64))[None]
    contexts = torch.empty(1, 1640, 2 * WIDTH)
    with torch.no_grad():
        plain_loop(block, block.token_half(model.embed_in.weight), ids, torch.zeros(1, 2 * WIDTH), contexts)
    assert np.array_equal(file.contexts[:, WIDTH:], contexts[0])
    assert np.abs(file.contexts[:, :WIDTH] - module_calls(make_model(make_block()), tokens_of(file))).max() < 1e-5


# ---------------------------------------------------------------------------------------------------- without a cache


@pytest.fixture
def trained() -> tuple[Any, np.ndarray]:
    """A small block as phase 1 leaves it, trained on the bytes of the README; and later ones, never seen."""
    text = np.frombuffer((ROOT / "README.md").read_bytes(), dtype=np.uint8).astype(np.uint16)
    torch.manual_seed(0)
    block, table = ContextBlock(256, WIDTH, 1, 1e-5, "normal", embed_norm=True), nn.Embedding(VOCAB, 256)
    ids, contexts, rate = torch.from_numpy(text[:4000].astype(np.int64)), first_contexts(4000, WIDTH), 0.0
    optimizer = torch.optim.Adam(block.parameters(), lr=0.003)
    for _ in range(50):
        if rate >= 0.9:
            break
        _, rate = oacd_iteration(
            block, table.weight, ids, contexts, optimizer,
            batch_size=4000, context_noise=0.05, centroid_weight=0.1, gradient_clip=2.0, convergence_threshold=0.03,
        )  # fmt: skip
    assert rate >= 0.9
    return SimpleNamespace(context_blocks=[block], embed_in=table), text[4000:8000]


def test_windows_of_a_trained_block_are_those_of_the_cache(build: Build, trained: tuple[Any, np.ndarray]) -> None:
    """The block forgets within the overlap; with one of 5 tokens it has not. Lanes are as exact as float32 is."""
    model, tokens = trained
    cache = build(model, tokens, overlap=100, chunk_tokens=2500)
    assert times_float32(model, cache, np.inf) <= 2
    starts = np.array([0, 1, 99, 100, 101, 2456, 2460, len(tokens) - 60])
    expected = torch.from_numpy(cache.contexts[starts[:, None] + np.arange(60)])
    windows = window_contexts(model, tokens, starts, 60, overlap=100)
    assert not windows.requires_grad
    torch.testing.assert_close(windows, expected, atol=1e-5, rtol=0)
    single = window_contexts(model, tokens, starts + 59, 1, overlap=100)
    torch.testing.assert_close(single, expected[:, 59:], atol=1e-5, rtol=0)
    assert (window_contexts(model, tokens, starts, 60, overlap=5) - expected).abs().max() > 0.1
    assert 0 < window_error(model, tokens, overlap=100) < 1e-5
    assert window_error(model, tokens, overlap=5) > 0.1


def test_windows_near_the_start_are_exact() -> None:
    """Of blocks that have not forgotten yet, side by side; the token before the stream's first is no token."""
    model, expected = slow_and_deep()
    starts, width = np.array([50, 0, 7, 49]), 40
    windows = window_contexts(model, STREAM, starts, width, overlap=50).numpy()
    assert np.abs(windows - expected[starts[:, None] + np.arange(width)]).max() < 1e-5
    late = window_contexts(model, STREAM, np.array([1000]), width, overlap=50).numpy()
    assert np.abs(late - expected[1000:1040]).max() > 0.1, "the slow one remembers longer"


# ---------------------------------------------------------------------------------------- interrupted, stale, half


@pytest.mark.parametrize("chunks_before", [0, 1, 3])
def test_an_interrupted_build_goes_on(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks_before: int
) -> None:
    """With the second of two blocks undone in the chunk of the interruption, and half a chunk in the file."""
    making = functools.partial(build, make_model(slow_block(), expansive_block()), 1500, chunk_tokens=400)
    path = making().path
    expected = path.read_bytes()
    path.unlink()
    contexts, calls = Recurrence.contexts, []

    def counted(self: Recurrence, ids: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        if len(calls) == 2 * chunks_before + 2:
            raise KeyboardInterrupt
        return contexts(self, ids)

    monkeypatch.setattr(Recurrence, "contexts", counted)
    with pytest.raises(KeyboardInterrupt):
        making()
    with path.with_suffix(".partial").open("ab") as file:
        file.write(b"\1" * 1001)
    assert not path.exists()
    assert making().path.read_bytes() == expected
    assert calls[2 * chunks_before + 2 :] == [400, 400, 400, 400, 400, 400, 300, 300][2 * chunks_before :]
    assert names(tmp_path) == {path.name, path.with_suffix(".json").name}


def test_a_complete_cache_is_read(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """By another run of the same weights, too, and wherever its chunks would be cut."""
    model = make_model(make_block())
    first = build(model, 900)
    assert f"building {first.path}" in capsys.readouterr().out
    changed = first.path.stat().st_mtime_ns
    second = build(model, 900, init_from="out/copy", chunk_tokens=300)
    assert capsys.readouterr().out == f"reading {first.path}\n"
    assert (second.path, second.path.stat().st_mtime_ns) == (first.path, changed)


@pytest.mark.parametrize(
    ("change", "seed", "changed"),
    [
        (lambda model: model.context_blocks[0].linears[0].bias.add_(0.01), 2, "weights"),
        (lambda model: model.context_blocks[0].norms[0].weight.add_(0.01), 2, "weights"),
        (lambda model: setattr(model.context_blocks[0].norms[0], "eps", 0.1), 2, "weights"),
        (lambda model: setattr(model.context_blocks[0], "embed_norm", nn.Identity()), 2, "weights"),
        (lambda model: model.embed_in.weight.data[7].add_(0.01), 2, "weights"),
        (lambda model: None, 5, "tokens"),
        (lambda model: model.context_blocks[0].linears[0].bias.add_(0.01), 5, "weights and tokens"),
    ],
)
def test_other_weights_or_tokens_make_caches_stale(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, seed: int, changed: str
) -> None:
    """Those of all settings, and none of another run."""
    model, other = make_model(make_block()), make_model(make_block(seed=3))
    old, loose, kept = build(model, 300), build(model, 300, tolerance=1.0), build(other, 300, init_from="out/other")
    assert "stale" not in capsys.readouterr().out
    change(model)
    new = build(model, random_tokens(300, seed))
    out = capsys.readouterr().out
    assert all(f"stale: {each.path} is of other {changed}\n" in out for each in (old, loose))
    assert error(model, new) < 1e-5
    assert names(tmp_path) == {
        path.name for file in (new, kept) for path in (file.path, file.path.with_suffix(".json"))
    }


def test_a_build_that_nothing_will_go_on_with_is_cleared(build: Build, tmp_path: Path) -> None:
    left, of_val = tmp_path / "contexts_00000000_train.partial", tmp_path / "contexts_00000000_val.partial"
    left.touch()
    of_val.touch()
    build(make_model(make_block()), 300)
    assert (left.exists(), of_val.exists()) == (False, True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text(path.with_suffix(".json").read_text()[:-9]),
    ],
)
def test_half_a_cache_is_not_taken_for_whole(
    build: Build, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    model = make_model(make_block())
    path = build(model, 900).path
    expected = path.read_bytes()
    damage(path)
    capsys.readouterr()
    assert build(model, 900).path.read_bytes() == expected
    assert f"building {path}" in capsys.readouterr().out


def test_of_two_builders_the_second_reads(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model(make_block())
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: build(model, 2000), range(2))
    assert np.array_equal(one.contexts, other.contexts)
    out = capfd.readouterr().out
    assert (out.count("building"), out.count("reading")) == (1, 1)


# ------------------------------------------------------------------------------------------- the command, bad input


def test_the_command_makes_both_splits_of_the_runs_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run, sizes = tmp_path / "data" / "own", tmp_path / "run", {"train": 500, "val": 130}
    folder.mkdir(parents=True)
    meta: dict[str, Any] = {"files": {}, "max_id": VOCAB - 1, "tokenizer": "neox"}
    for split, num_tokens in sizes.items():
        random_tokens(num_tokens).tofile(folder / f"{split}.bin")
        (folder / f"{split}_doc_index.npy").touch()
        meta["files"] |= {name: prep.describe(folder / name) for name in (f"{split}.bin", f"{split}_doc_index.npy")}
    (folder / "meta.json").write_text(json.dumps(meta))
    run.mkdir()
    model = ContextPythiaModel(ContextPythiaConfig(VOCAB, 32, num_layers=1, num_heads=2, context_dim=24))
    torch.save(checkpoint_of("context", model), run / "ckpt.pt")
    words = ["prep.py", "--stage=contexts", "--device=cpu", f"--data_dir={tmp_path / 'data'}", f"--init_from={run}"]
    monkeypatch.setattr(sys, "argv", words)
    prep.main()
    files = {path.stem.rpartition("_")[2]: path.stat().st_size for path in folder.glob("contexts_*.bin")}
    assert files == {split: num_tokens * 24 * 4 for split, num_tokens in sizes.items()}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*words, "--dataset=own"])
    prep.main()
    assert capsys.readouterr().out.count("reading") == 2


def test_a_full_disk_is_told_before_the_work(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match=r"needs another 1.02 GB, and 0.00 GB of the disk are free"):
        build(make_model(make_block()), 4_000_000)
    assert not list(tmp_path.glob("contexts_*.bin"))


def test_ids_outside_the_table_are_refused(build: Build) -> None:
    model = make_model(make_block())
    model.embed_in = nn.Embedding(VOCAB - 1, WIDTH)
    with pytest.raises(InputError, match="holds token id 299, which the model's embedding does not have"):
        build(model, 10)


@pytest.mark.parametrize("overlap", [50, 800])  # in lanes, token after token
def test_contexts_that_are_no_numbers_are_refused(build: Build, tmp_path: Path, overlap: int) -> None:
    block = make_block()
    block.linears[0].weight[3, 3] = float("nan")
    with pytest.raises(InputError, match="out/phase1: the contexts are not finite"):
        build(make_model(block), 900, overlap=overlap)
    assert not list(tmp_path.glob("contexts_*.bin"))
