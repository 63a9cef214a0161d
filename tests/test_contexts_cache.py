"""The context cache: exact by either method, never half, never of other weights or tokens."""

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
from conftest import checkpoint_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import prep
from configurator import MODELS
from kit.contexts import BlockRun, ContextFile, ContextReader, context_cache
from kit.files import InputError
from kit.tokens import TokenFile
from model_context import ContextBlock, ContextKVConfig, ContextPythiaConfig, ContextPythiaModel
from prep import PrepSettings

VOCAB, WIDTH = 300, 64
LANES = {"lanes": 8, "overlap": 50, "chunk_tokens": 800}  # 8 lanes of 100 tokens
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 1, "num_heads": 2}

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


def make_tokens(folder: Path, num_tokens: int, seed: int = 2) -> TokenFile:
    return token_file(folder, np.random.default_rng(seed).integers(VOCAB, size=num_tokens, dtype=np.uint16))


def token_file(folder: Path, tokens: np.ndarray) -> TokenFile:
    path = folder / "train.bin"
    tokens.tofile(path)
    meta = {"files": {path.name: {"sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}}, "max_id": VOCAB - 1}
    return TokenFile(path, meta, tokens)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """build(model, num_tokens, key=value, ...) makes, or reads, the cache of random tokens in the test's own folder."""

    def make_cache(model: Any, num_tokens: int, seed: int = 2, **keys: Any) -> ContextFile:
        settings = PrepSettings(**{"init_from": "out/phase1", **LANES, **keys})
        return context_cache(model, make_tokens(tmp_path, num_tokens, seed), settings)

    return make_cache


@torch.no_grad()
def plain_loop(block: ContextBlock, model: Any, tokens: np.ndarray) -> np.ndarray:
    """The contexts by calls of the module, token by token from zero."""
    c, contexts = model.embed_in.weight.new_zeros(1, block.context_dim), []
    for token in tokens.tolist():
        c = block(c, model.embed_in.weight[token : token + 1])
        contexts.append(c[0])
    return torch.stack(contexts).numpy()


def tokens_of(file: ContextFile) -> np.ndarray:
    return np.fromfile(file.path.with_name("train.bin"), dtype=np.uint16)


def error(model: Any, file: ContextFile) -> float:
    expected = np.concatenate([plain_loop(block, model, tokens_of(file)) for block in model.context_blocks], axis=1)
    assert file.contexts.shape == expected.shape
    return float(np.abs(file.contexts - expected).max())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"train.bin", ".contexts.lock"}


# ------------------------------------------------------------------------------------------------------- exactness


STREAM = np.random.default_rng(4).integers(VOCAB, size=2500, dtype=np.uint16)


@functools.cache
def plain_contexts() -> tuple[Any, np.ndarray]:
    """A model of two blocks, one that forgets slowly and one of two layers; their contexts of STREAM, plainly."""
    torch.manual_seed(3)
    deep = ContextBlock(WIDTH, 40, 2, 1e-5, "normal", embed_norm=True).requires_grad_(False)
    for linear in deep.linears:
        linear.weight[:, 40:] *= 4  # it forgets, so that rounding stays small
    model = make_model(slow_block(), deep)
    return model, np.concatenate([plain_loop(block, model, STREAM) for block in model.context_blocks], axis=1)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, len(STREAM)) | st.integers(790, 810),
    cut=st.fixed_dictionaries({"lanes": st.integers(1, 800), "overlap": st.integers(1, 800)}),
    chunk_tokens=st.integers(20, 2600) | st.just(800),
    stride=st.just(1) | st.integers(1, 300),
    method=st.sampled_from(["lanes", "lanes", "sequential"]),
    wanted=st.lists(st.integers(0, len(STREAM) - 1), min_size=1, max_size=60),
)
@example(1, {"lanes": 8, "overlap": 50}, 800, 1, "lanes", [0])
@example(99, {"lanes": 8, "overlap": 50}, 800, 99, "lanes", [0, 98, 0])  # less than two overlaps
@example(801, {"lanes": 8, "overlap": 50}, 800, 7, "lanes", [800, 799, 6, 7])  # a last chunk of one token
@example(1203, {"lanes": 1, "overlap": 1}, 800, 1, "lanes", [1202])
@example(1203, {"lanes": 8, "overlap": 799}, 800, 400, "lanes", [399, 400, 401])
@example(70, {"lanes": 8, "overlap": 1}, 1, 1, "lanes", [69])
def test_any_cut_gives_the_plain_loop(
    num_tokens: int, cut: dict[str, Any], chunk_tokens: int, stride: int, method: Any, wanted: list[int]
) -> None:
    """Whatever the lanes, overlaps, chunks and stride, and whichever positions are read: windows, one by one, twice."""
    model, expected = plain_contexts()
    stride = min(stride, chunk_tokens, num_tokens)
    positions = np.array(wanted) % num_tokens
    making = PrepSettings(chunk_tokens=chunk_tokens, context_stride=stride, method=method, init_from="run", **cut)
    with tempfile.TemporaryDirectory() as folder:
        file = token_file(Path(folder), STREAM[:num_tokens])
        cache = context_cache(model, file, making)
        assert cache.contexts.shape == (num_tokens // stride, WIDTH + 40)
        assert np.abs(cache.contexts - expected[:num_tokens][stride - 1 :: stride]).max() < 1e-5
        given_back = ContextReader(model, file, cache).at(positions)
    assert not given_back.requires_grad
    assert np.abs(given_back.numpy() - expected[positions]).max() < 1e-5


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
    file = build(model, 6000, overlap=overlap, chunk_tokens=3000)
    block, tokens = model.context_blocks[0], tokens_of(file)
    loop = plain_loop(block, model, tokens)
    exact = plain_loop(copy.deepcopy(block).double(), SimpleNamespace(embed_in=model.embed_in.double()), tokens)
    ours, theirs = (np.linalg.norm((contexts - exact).ravel(), order) for contexts in (file.contexts, loop))
    assert 0 < ours <= 2 * theirs


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


def seam_left(out: str) -> float:
    found = re.search(r"at a seam ([\d.e+-]+),", out)
    assert found
    return float(found[1])


def test_the_difference_that_is_left_is_told(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the one that was there before lanes were run again."""
    model = make_model(slow_block())
    build(model, 2000, overlap=1)
    assert 0 < seam_left(capsys.readouterr().out) <= 1e-6
    build(model, 2000, overlap=1, tolerance=1e-2)
    assert 1e-4 < seam_left(capsys.readouterr().out) <= 1e-2


def test_lanes_of_a_forgetful_block_are_not_run_again(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(make_block())
    assert error(model, build(model, 4000, overlap=100)) < 1e-5
    assert " 0 of 40 lanes run again" in capsys.readouterr().out


def test_a_slow_block_has_its_lanes_run_again(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """Each lane is several times shorter than what the block remembers, so that one round does not do."""
    model = make_model(slow_block())
    assert error(model, build(model, 6000, chunk_tokens=3000)) < 1e-5
    out = capsys.readouterr().out
    again = int(out.split(" of 16 lanes run again")[0].split()[-1])
    assert again > 14, "the seven seams of each chunk need more than one round"
    assert "one token after the other" not in out


def test_an_expansive_block_goes_on_in_order(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """Two loops that round differently drift apart, so the reference is the same loop: equal to the last bit."""
    model = make_model(expansive_block())
    by_lanes = build(model, 1700)
    out = capsys.readouterr().out
    assert out.count("one token after the other") == 1, "it is not tried again with every chunk"
    contexts = np.array(by_lanes.contexts)
    by_lanes.path.unlink()
    assert np.array_equal(contexts, build(model, 1700, method="sequential").contexts)
    assert "lanes" not in capsys.readouterr().out


def test_two_blocks_stand_side_by_side(build: Build) -> None:
    """Of other widths; one of them expansive over a stretch in which the other goes by lanes."""
    model = make_model(make_block(), make_block(seed=3, width=40))
    assert error(model, build(model, 1703)) < 1e-5
    mixed = make_model(make_block(), expansive_block())
    file = build(mixed, 1703)
    alone = build(make_model(expansive_block()), 1703, method="sequential", init_from="out/other")
    assert np.abs(file.contexts[:, :WIDTH] - plain_loop(mixed.context_blocks[0], mixed, tokens_of(file))).max() < 1e-5
    assert np.array_equal(file.contexts[:, WIDTH:], alone.contexts)


@pytest.mark.parametrize("config_class", [ContextPythiaConfig, ContextKVConfig])
def test_the_models_read_what_the_cache_holds(build: Build, config_class: type[ContextPythiaConfig]) -> None:
    model_class = next(model for config, model in MODELS.values() if config is config_class)
    model = model_class(config_class(**SHAPE, context_dim=WIDTH))
    file = build(model, 200)
    idx = torch.from_numpy(tokens_of(file).astype(np.int64))[None]
    with torch.no_grad():
        expected, _ = model(idx)
        given, _ = model(idx, contexts=torch.from_numpy(np.array(file.contexts))[None])
    assert (given - expected).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------ one in so many


def reader(model: Any, file: ContextFile) -> ContextReader:
    return ContextReader(model, TokenFile(file.path, {}, tokens_of(file)), file)


def test_a_segment_is_run_no_further_than_wanted(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a batch: a lane per segment, each to its last position. Segments of 64."""
    model = make_model(make_block())
    contexts = reader(model, build(model, 2345, context_stride=64))
    step, lanes = ContextBlock.step, []

    def counted(self: ContextBlock, c: torch.Tensor, token_half: torch.Tensor) -> torch.Tensor:
        lanes.append(len(c))
        return step(self, c, token_half)

    monkeypatch.setattr(ContextBlock, "step", counted)
    contexts.at(np.array([[130], [129], [64]]) + np.arange(2))  # two lanes, to offsets 3 and 1
    assert lanes == [2, 2, 1, 1]


def test_each_stride_has_a_cache_of_its_own(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They lie side by side while they are of the same weights and tokens; then all of them are stale."""
    model = make_model(make_block())
    files = [build(model, 900, context_stride=stride) for stride in (1, 400, 450)]  # the last two: as many rows
    out = capsys.readouterr().out
    assert (out.count("building"), out.count("stale")) == (3, 0)
    for stride, file in zip((1, 400, 450), files, strict=True):
        again = build(model, 900, context_stride=stride)
        assert (again.path, again.stride) == (file.path, stride)
        assert capsys.readouterr().out == f"reading {file.path}\n"
    change_block(model)
    new = build(model, 900, context_stride=400)
    assert capsys.readouterr().out.count("stale") == 3
    assert names(tmp_path) == {new.path.name, new.path.with_suffix(".json").name}


def test_a_block_that_magnifies_rounding_needs_all_contexts(build: Build, tmp_path: Path) -> None:
    model = make_model(make_block(), expansive_block())
    for method in ("lanes", "sequential"):
        with pytest.raises(InputError, match=r"out/phase1: its ContextBlock magnifies rounding, .*--context_stride=1"):
            build(model, 900, context_stride=256, method=method)
        assert not list(tmp_path.glob("contexts_*.bin"))


def test_a_stride_that_keeps_nothing_is_refused(build: Build) -> None:
    with pytest.raises(InputError, match="context_stride=301 is above the 300 tokens of "):
        build(make_model(make_block()), 300, context_stride=301)


# ---------------------------------------------------------------------------------------- interrupted, stale, half


@pytest.mark.parametrize(("chunks_before", "stride"), [(0, 1), (1, 1), (2, 1), (3, 1), (1, 80), (3, 80)])
def test_an_interrupted_build_goes_on(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks_before: int, stride: int
) -> None:
    """With the second of two blocks undone in the chunk of the interruption, and half a chunk in the file."""
    model = make_model(make_block(), slow_block())
    whole = build(model, 3000, context_stride=stride)
    expected = whole.path.read_bytes()
    whole.path.unlink()

    fill, calls = BlockRun.fill, []

    def counted(self: BlockRun, ids: torch.Tensor) -> None:
        calls.append(len(ids))
        if len(calls) == 2 * chunks_before + 2:
            raise KeyboardInterrupt
        fill(self, ids)

    monkeypatch.setattr(BlockRun, "fill", counted)
    with pytest.raises(KeyboardInterrupt):
        build(model, 3000, context_stride=stride)
    with whole.path.with_suffix(".partial").open("ab") as file:
        file.write(b"\1" * 1001)
    assert not whole.path.exists()
    again = build(model, 3000, context_stride=stride)
    assert again.path.read_bytes() == expected
    first = [800, 800] * (chunks_before > 0)  # shows again which block forgets
    assert calls[2 * chunks_before + 2 :] == first + [800, 800, 800, 800, 800, 800, 600, 600][2 * chunks_before :]
    assert names(tmp_path) == {again.path.name, again.path.with_suffix(".json").name}


def test_a_complete_cache_is_read(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(make_block())
    first = build(model, 900)
    assert f"building {first.path}" in capsys.readouterr().out
    changed = first.path.stat().st_mtime_ns
    second = build(model, 900, init_from="out/copy", method="sequential", lanes=3)
    assert capsys.readouterr().out == f"reading {first.path}\n"
    assert (second.path, second.fingerprint) == (first.path, first.fingerprint)
    assert second.path.stat().st_mtime_ns == changed


def change_block(model: Any) -> None:
    model.context_blocks[0].linears[0].bias[0] += 0.01


def change_norm(model: Any) -> None:
    model.context_blocks[0].norms[0].weight[0] += 0.01


def change_table(model: Any) -> None:
    model.embed_in.weight.data[7, 0] += 0.01


def switch_off_embed_norm(model: Any) -> None:
    model.context_blocks[0].embed_norm = nn.Identity()


def change_eps(model: Any) -> None:
    model.context_blocks[0].norms[0].eps = 0.1


@pytest.mark.parametrize("change", [change_block, change_norm, change_table, switch_off_embed_norm, change_eps])
def test_other_weights_make_a_cache_stale(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], None]
) -> None:
    model = make_model(make_block())
    old = build(model, 300)
    change(model)
    new = build(model, 300)
    assert f"stale: {old.path} is of other weights\nbuilding {new.path}" in capsys.readouterr().out
    assert error(model, new) < 1e-5
    assert names(tmp_path) == {new.path.name, new.path.with_suffix(".json").name}


def test_other_tokens_make_a_cache_stale(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(make_block())
    old, new = build(model, 300), build(model, 300, seed=5)
    assert f"stale: {old.path} is of other tokens" in capsys.readouterr().out
    assert error(model, new) < 1e-5
    assert names(tmp_path) == {new.path.name, new.path.with_suffix(".json").name}


def test_another_run_keeps_its_cache(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make_model(make_block()), make_model(make_block(seed=3))
    kept = build(one, 300)
    build(other, 300, init_from="out/other")
    assert "stale" not in capsys.readouterr().out
    build(one, 300)
    assert capsys.readouterr().out == f"reading {kept.path}\n"


def test_a_build_that_nothing_will_go_on_with_is_cleared(build: Build, tmp_path: Path) -> None:
    left, of_val = tmp_path / "contexts_00000000_train.partial", tmp_path / "contexts_00000000_val.partial"
    left.touch()
    of_val.touch()
    build(make_model(make_block()), 300)
    assert not left.exists()
    assert of_val.exists()


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def lose_record(path: Path) -> None:
    path.with_suffix(".json").unlink()


def cut_record(path: Path) -> None:
    path.with_suffix(".json").write_text(path.with_suffix(".json").read_text()[:-9])


def lose_file(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [cut_file, lose_record, cut_record, lose_file])
def test_half_a_cache_is_not_taken_for_whole(
    build: Build, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
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


def write_run(folder: Path, name: str, model: Any) -> Path:
    folder.mkdir()
    torch.save(checkpoint_of(name, model), folder / "ckpt.pt")
    return folder


def write_set(folder: Path) -> Path:
    folder.mkdir(parents=True)
    meta: dict[str, Any] = {"files": {}, "max_id": VOCAB - 1, "tokenizer": "neox"}
    for split, num_tokens in (("train", 500), ("val", 130)):
        np.random.default_rng(0).integers(VOCAB, size=num_tokens, dtype=np.uint16).tofile(folder / f"{split}.bin")
        (folder / f"{split}_doc_index.npy").touch()
        meta["files"] |= {name: prep.describe(folder / name) for name in (f"{split}.bin", f"{split}_doc_index.npy")}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """stage('--key=value', ...) runs the command on a data folder of its own."""
    write_set(tmp_path / "data" / "own")

    def main(*options: str) -> None:
        data = f"--data_dir={tmp_path / 'data'}"
        monkeypatch.setattr(sys, "argv", ["prep.py", "--stage=contexts", "--device=cpu", data, *options])
        prep.main()

    return main


def test_the_command_makes_both_splits_of_the_runs_dataset(
    stage: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", "context", ContextPythiaModel(ContextPythiaConfig(**SHAPE, context_dim=24)))
    stage(f"--init_from={run}")
    files = (tmp_path / "data" / "own").glob("contexts_*.bin")
    sizes = {path.stem.rpartition("_")[2]: path.stat().st_size for path in files}
    assert sizes == {"train": 500 * 24 * 4, "val": 130 * 24 * 4}
    capsys.readouterr()
    stage(f"--init_from={run}", "--dataset=own")
    assert capsys.readouterr().out.count("reading") == 2


def test_a_full_disk_is_told_before_the_work(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match=r"needs another 1.02 GB, and 0.00 GB of the disk are free"):
        build(make_model(make_block()), 4_000_000)
    with pytest.raises(InputError, match=r"needs another 0.51 GB"):
        build(make_model(make_block()), 4_000_000, context_stride=2)
    assert not list(tmp_path.glob("contexts_*.bin"))


def test_ids_outside_the_table_are_refused(build: Build) -> None:
    model = make_model(make_block())
    model.embed_in = nn.Embedding(VOCAB - 1, WIDTH)
    with pytest.raises(InputError, match="holds token id 299, which the model's embedding does not have"):
        build(model, 10)


@pytest.mark.parametrize("method", ["lanes", "sequential"])
def test_contexts_that_are_no_numbers_are_refused(build: Build, tmp_path: Path, method: str) -> None:
    block = make_block()
    block.linears[0].weight[3, 3] = float("nan")
    with pytest.raises(InputError, match="out/phase1: the contexts are not finite"):
        build(make_model(block), 900, method=method)
    assert not list(tmp_path.glob("contexts_*.bin"))
