"""Contexts over a token file: as exact as float32 is, never half, never of other weights, tokens or settings."""

import copy
import functools
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint_of, type_in
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_context import settle
from torch import nn

import prep
from kit.contexts import ContextSettings, Recurrence, context_cache, window_contexts, window_error
from kit.files import InputError
from kit.tokens import TokenFile
from model_context import ContextBlock, ContextPythiaConfig, ContextPythiaModel, reference_contexts

VOCAB, WIDTH = 300, 64
LANES = {"overlap": 50, "chunk_tokens": 800}  # 16 lanes of 50 tokens

Build = Callable[..., np.memmap]


def make_block(seed: int = 0, recurrent: float = 1.0, token: float = 4.0, width: int = WIDTH) -> ContextBlock:
    """A block whose recurrent and token weights are scaled; as it is, it forgets in about 50 tokens."""
    torch.manual_seed(seed)
    block = ContextBlock(WIDTH, width, 1, 1e-5, "normal", embed_norm=True).requires_grad_(False)
    block.linears[0].weight[:, :width] *= recurrent
    block.linears[0].weight[:, width:] *= token
    return block


SLOW = make_block(recurrent=0.5, token=1.0)  # forgets in about 500 tokens
EXPANSIVE = make_block(recurrent=4.0, token=1.0, width=2 * WIDTH)  # the smallest difference grows


def make_model(*blocks: ContextBlock, width: int = WIDTH) -> Any:
    torch.manual_seed(1)
    return nn.ModuleDict({"context_blocks": nn.ModuleList(blocks), "embed_in": nn.Embedding(VOCAB, width)})


def token_file(folder: Path, tokens: np.ndarray) -> TokenFile:
    path = folder / "train.bin"
    tokens.tofile(path)
    meta = {"files": {path.name: {"sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}}, "n_vocab": VOCAB}
    return TokenFile(path, meta, tokens)


def random_tokens(num_tokens: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCAB, size=num_tokens, dtype=np.uint16)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(model, tokens or how many, key=value, ...) makes, or reads, the cache in the test's own folder."""

    def make_cache(model: Any, tokens: np.ndarray | int, **keys: Any) -> np.memmap:
        file = token_file(tmp_path, random_tokens(tokens) if isinstance(tokens, int) else tokens)
        return context_cache(model, file, ContextSettings(**{"init_from": "out/phase1", **LANES, **keys}))

    return make_cache


@torch.no_grad()
def exact_contexts(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The contexts token by token from zero, the blocks side by side."""
    embeddings = model.embed_in(torch.from_numpy(tokens.astype(np.int64)))
    return torch.cat([reference_contexts(block, embeddings) for block in model.context_blocks], dim=1).numpy()


def error(model: Any, cache: np.ndarray, tokens: np.ndarray) -> float:
    return float(np.abs(cache - exact_contexts(model, tokens)).max())


def times_float32(model: Any, cache: np.ndarray, tokens: np.ndarray, order: float) -> float:
    """How many times as far from a loop in float64 the contexts are as a loop in float32, in this norm."""
    loop, exact = exact_contexts(model, tokens), exact_contexts(copy.deepcopy(model).double(), tokens)
    ours, theirs = (np.linalg.norm((contexts - exact).ravel(), order) for contexts in (cache, loop))
    assert ours > 0
    return float(ours / theirs)


def path_of(cache: np.memmap) -> Path:
    return Path(str(cache.filename))


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
    model = make_model(SLOW, deep)
    return model, exact_contexts(model, STREAM)


@settings(max_examples=8, deadline=None)
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
        assert cache.shape == (num_tokens, WIDTH + 40)
        assert np.abs(cache - expected[:num_tokens]).max() < 1e-5


@pytest.mark.parametrize("overlap", [1, 25, 100])
@pytest.mark.parametrize(("scales", "order"), [((1.0, 4.0), np.inf), ((0.5, 1.0), 2), ((0.7, 1.0), 2)])
def test_lanes_are_as_exact_as_float32(build: Build, monkeypatch: Any, scales: Any, order: float, overlap: int) -> None:
    """The promise: no more than twice as far from a loop in float64 as the loop in float32 is.

    Of a block that magnifies rounding for a while, the largest error is a matter of chance: two float32 loops, of
    other batch sizes, differ twofold in it, and not in the mean square.
    """
    monkeypatch.setattr("kit.contexts.MAX_LANES", 4)  # long enough to meet
    model, tokens = make_model(make_block(0, *scales)), random_tokens(2000)
    assert times_float32(model, build(model, tokens, overlap=overlap, chunk_tokens=1200), tokens, order) <= 2


@pytest.mark.parametrize("loose", [{"tolerance": 100.0}, {"overlap": 1}])
def test_loose_settings_are_not_taken_for_exact_ones(build: Build, capsys: Any, loose: dict[str, Any]) -> None:
    """Each has a file of its own, that the same settings read again."""
    model, tokens = make_model(SLOW), random_tokens(1600)
    first = build(model, tokens, **loose)
    assert (error(model, first, tokens) > 0.1) == ("tolerance" in loose), "with this tolerance it is far off"
    second = build(model, tokens)
    assert error(model, second, tokens) < 1e-5
    assert path_of(first) != path_of(second)
    assert "stale" not in capsys.readouterr().out
    build(model, tokens, **loose)
    assert capsys.readouterr().out == f"reading {path_of(first)}\n"


@pytest.mark.parametrize(
    ("block", "tolerance", "seams", "again"),
    [(make_block(), 1e-6, (0, 1e-6), {0}), (SLOW, 1e-6, (0, 1e-6), {3}), (SLOW, 1e-2, (1e-4, 1e-2), {1, 2, 3})],
)
def test_what_is_told_of_the_lanes(
    build: Build, monkeypatch: Any, capsys: Any, block: Any, tolerance: float, seams: Any, again: set[int]
) -> None:
    """The difference that is left, not the one that was there before lanes were run again; and how many were."""
    monkeypatch.setattr("kit.contexts.MAX_LANES", 4)  # of 750 tokens
    model, tokens = make_model(block), random_tokens(3000)
    cache = build(model, tokens, overlap=150, chunk_tokens=3000, tolerance=tolerance)
    assert error(model, cache, tokens) < 10 * tolerance
    told = r"4 lanes, .* left at a seam ([\d.e+-]+), (\d+) times a lane was run again, 0 times to its end"
    found = re.search(told, capsys.readouterr().out)
    assert found
    assert seams[0] < float(found[1]) <= seams[1]
    assert int(found[2]) in again


def test_an_expansive_block_goes_on_in_order(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """Two loops that round differently drift apart, so that each context is held against the one before it.

    The other block still goes by lanes.
    """
    model, tokens = make_model(make_block(), EXPANSIVE), random_tokens(1640)
    cache = torch.tensor(build(model, tokens))
    told = r"33 lanes, .* (\d+) times a lane was run again, (\d+) times to its end"
    (again, whole), (again_expansive, whole_expansive) = re.findall(told, capsys.readouterr().out)
    assert again == whole == "0"
    assert int(again_expansive) >= int(whole_expansive) > 25
    contexts, ids = cache[:, WIDTH:], torch.from_numpy(tokens.astype(np.int64))
    before = torch.cat([torch.zeros(1, 2 * WIDTH), contexts[:-1]])
    with torch.no_grad():
        torch.testing.assert_close(EXPANSIVE(before, model.embed_in(ids)), contexts, atol=1e-5, rtol=0)
    assert error(make_model(make_block()), cache[:, :WIDTH].numpy(), tokens) < 1e-5


# ---------------------------------------------------------------------------------------------------- without a cache
def test_windows_of_a_trained_block_are_those_of_the_cache(build: Build) -> None:
    """It forgets within the overlap; with one of 5 tokens it has not. Its lanes are as exact as float32 is."""
    text = np.frombuffer((ROOT / "README.md").read_bytes(), dtype=np.uint8).astype(np.uint16)
    torch.manual_seed(0)
    block, tokens = ContextBlock(256, WIDTH, 1, 1e-5, "normal", embed_norm=True), text[4000:8000]
    model = make_model(block, width=256)
    settle(block, model.embed_in.weight, torch.from_numpy(text[:4000].astype(np.int64)))
    cache = build(model, tokens, overlap=100, chunk_tokens=2500)
    assert times_float32(model, cache, tokens, np.inf) <= 2
    starts = np.array([0, 1, 99, 100, 101, 2456, 2460, len(tokens) - 60])
    expected = torch.from_numpy(cache[starts[:, None] + np.arange(60)])
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
def test_an_interrupted_build_goes_on(build: Build, tmp_path: Path, monkeypatch: Any, chunks_before: int) -> None:
    """With the second of two blocks undone in the chunk of the interruption, and half a chunk in the file."""
    making = functools.partial(build, make_model(SLOW, EXPANSIVE), 1500, chunk_tokens=400)
    path = path_of(making())
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
    assert path_of(making()).read_bytes() == expected
    assert calls[2 * chunks_before + 2 :] == [400, 400, 400, 400, 400, 400, 300, 300][2 * chunks_before :]
    assert names(tmp_path) == {path.name, path.with_suffix(".json").name}


def test_a_whole_cache_is_read_and_half_of_one_is_made_again(build: Build, capfd: Any) -> None:
    """By the second of two builders; by another run of the same weights, too, and wherever its chunks would be cut."""
    model = make_model(make_block())
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: build(model, 2000), range(2))
    assert np.array_equal(one, other)
    out, path, expected = capfd.readouterr().out, path_of(one), one.tobytes()
    assert (out.count(f"building {path}\n"), out.count(f"reading {path}\n")) == (1, 1)
    build(model, 2000, init_from="out/copy", chunk_tokens=300)
    assert capfd.readouterr().out == f"reading {path}\n"
    for damage in (lambda: path.write_bytes(bytes(8)), path.unlink):
        damage()
        assert build(model, 2000).tobytes() == expected
        assert path.with_suffix(".json").exists()


@pytest.mark.parametrize(
    ("change", "seed"),
    [
        (lambda model: model.context_blocks[0].norms[0].weight.add_(0.01), 2),
        (lambda model: setattr(model.context_blocks[0].norms[0], "eps", 0.1), 2),
        (lambda model: setattr(model.context_blocks[0], "embed_norm", nn.Identity()), 2),
        (lambda model: model.embed_in.weight.data[7].add_(0.01), 2),
        (lambda model: None, 5),
        (lambda model: model.context_blocks[0].linears[0].bias.add_(0.01), 5),
    ],
)
def test_a_cache_of_other_weights_or_tokens_is_stale(
    build: Build, tmp_path: Path, capsys: Any, change: Any, seed: int
) -> None:
    """Those of all settings, whole or half, and none of another run."""
    model, other = make_model(make_block()), make_model(make_block(seed=3))
    old, loose, kept = build(model, 300), build(model, 300, tolerance=1.0), build(other, 300, init_from="out/other")
    assert "stale" not in capsys.readouterr().out
    path_of(loose).rename(path_of(loose).with_suffix(".partial"))
    damaged = {"contexts_11111111_train.json": "{", "contexts_22222222_train.json": "7"}
    for name, text in damaged.items():
        (tmp_path / name).write_text(text)
    change(model)
    tokens = random_tokens(300, seed)
    new = build(model, tokens)
    out = capsys.readouterr().out
    assert all(f"stale: {path_of(each)} is of other weights or tokens\n" in out for each in (old, loose))
    assert error(model, new, tokens) < 1e-5
    left = {path.name for cache in (new, kept) for path in (path_of(cache), path_of(cache).with_suffix(".json"))}
    assert names(tmp_path) == left | {*damaged}


# ------------------------------------------------------------------------------------------- the command, bad input
def test_the_command_makes_both_splits_of_the_runs_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run, sizes = tmp_path / "data" / "own", tmp_path / "run", {"train": 500, "val": 130}
    folder.mkdir(parents=True)
    for split, num_tokens in sizes.items():
        random_tokens(num_tokens).tofile(folder / f"{split}.bin")
        (folder / f"{split}_doc_index.npy").touch()
    files = {path.name: prep.describe(path) for path in folder.iterdir()}
    meta = {"files": files, "n_vocab": VOCAB, "tokenizer": "neox"}
    (folder / "meta.json").write_text(json.dumps(meta))
    run.mkdir()
    model = ContextPythiaModel(ContextPythiaConfig(VOCAB, 32, num_layers=1, num_heads=2, context_dim=24))
    torch.save(checkpoint_of("context", model), run / "ckpt.pt")
    words = ["prep.py", "--stage=contexts", "--device=cpu", f"--data_dir={tmp_path / 'data'}", f"--init_from={run}"]
    for more, said in (([], "building"), (["--dataset=own"], "reading")):
        type_in(*words, *more)
        assert capsys.readouterr().out.count(said) == 2
    made = {path.stem.rpartition("_")[2]: path.stat().st_size for path in folder.glob("contexts_*.bin")}
    assert made == {split: num_tokens * 24 * 4 for split, num_tokens in sizes.items()}


def test_what_cannot_be_made_is_refused(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts that are no numbers, of one token or all; and before the work a full disk and unknown ids."""
    model = make_model(make_block())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=7))
        with pytest.raises(InputError, match="the disk are free"):
            build(model, 900)
    tokens = random_tokens(900)
    tokens[tokens == 7], tokens[120] = 8, 7  # in one lane alone
    with torch.no_grad():
        model.embed_in.weight[7] = float("nan")
    with pytest.raises(InputError, match="out/phase1: the contexts are not finite"):
        build(model, tokens)
    model.context_blocks[0].linears[0].weight[3, 3] = float("nan")
    for overlap in (50, 800):
        with pytest.raises(InputError, match="out/phase1: the contexts are not finite"):
            build(model, 900, overlap=overlap)
    model.embed_in = nn.Embedding(VOCAB - 1, WIDTH)
    with pytest.raises(InputError, match=f"of {VOCAB} token ids, the model has {VOCAB - 1} rows"):
        build(model, 900)
    assert not [*tmp_path.glob("contexts_*.bin")]
