"""Long documents: rows that walk through stretches with their memory, exact resuming of it, PPL per window."""

import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import ROOT, TINY, PowerCut, losses, run_training, weights

import eval as evaluation
import train
from configurator import MODELS, build_model, rebuild_model
from kit.files import InputError
from kit.report import format_comparison
from kit.runs import read_checkpoint
from kit.tokens import INDEX_DTYPE, Stretches, TokenFile, load_tokens

BLOCK, STRETCH = 32, 128
CPU = torch.device("cpu")


def randomise(model: Any) -> Any:
    """Weights large enough for a memory to show in the loss."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def arguments(data_dir: Path, tmp_path: Path) -> list[str]:
    """A command line that trains a tiny model on stretches of 4 windows, 4 rows in 2 micro-batches."""
    steps = ["--batch_size=2", "--gradient_accumulation_steps=2", "--max_iters=12", "--warmup_iters=2"]
    often = ["--eval_interval=3", "--eval_iters=1", "--log_interval=1"]
    data = [f"--data_dir={data_dir}", "--dataset=own", "--device=cpu", "--dtype=float32"]
    config = [str(ROOT / "config/infini_long.py"), *TINY, "--segment_len=8", f"--tokens_per_doc={STRETCH}"]
    return [*config, *steps, *often, *data, f"--out_dir={tmp_path / 'run'}"]


@pytest.fixture
def large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models begin with weights large enough for a memory to show in the loss."""
    monkeypatch.setattr(train, "build_model", lambda *args: randomise(build_model(*args)))


def split_documents(data: TokenFile) -> list[np.ndarray]:
    """Every document with the end-of-text tokens before and behind it, found in the stream itself."""
    edges = np.flatnonzero(data.tokens == 0)
    return [np.array(data.tokens[a : b + 1], dtype=np.int64) for a, b in pairwise(edges)]


# ------------------------------------------------------------------------------------------- the order of the data


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=30),
    block_size=st.integers(1, 8),
    windows=st.integers(1, 5),
    rows=st.integers(1, 7),
    seed=st.integers(0, 2**40),
)
def test_a_row_walks_through_one_stretch_of_one_document(
    lengths: list[int], block_size: int, windows: int, rows: int, seed: int
) -> None:
    """Documents are runs of 1, after and before a 0; every stretch that lies whole in one comes once an epoch."""
    stretch = block_size * windows
    tokens = np.array([0, *(token for length in lengths for token in [1] * length + [0])], dtype=np.uint16)
    data = TokenFile(Path("train.bin"), {}, tokens)
    begins = np.cumsum([0, *(length + 1 for length in lengths[:-1])])
    data.__dict__["doc_index"] = np.array([(begin, 0) for begin in begins], dtype=INDEX_DTYPE)
    per_epoch = sum((length + 1) // stretch for length in lengths)
    if not per_epoch:
        with pytest.raises(InputError, match="no training document has"):
            Stretches(data, stretch, block_size, rows, seed)
        return
    stretches = Stretches(data, stretch, block_size, rows, seed)
    turns = math.ceil(2 * per_epoch / rows)
    starts = np.stack([stretches.starts(step) for step in range(turns * windows)]).reshape(turns, windows, rows)
    assert (np.diff(starts, axis=1) == block_size).all()
    walked = starts[:, 0].ravel()
    assert all(tokens[begin + 1 : begin + stretch].all() for begin in walked)
    assert all(walked + stretch < len(tokens))
    assert len(set(walked[:per_epoch])) == len(set(walked[per_epoch : 2 * per_epoch])) == per_epoch
    if per_epoch > 20:
        assert list(walked[:per_epoch]) != list(walked[per_epoch : 2 * per_epoch])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--tokens_per_doc=100"], "tokens_per_doc=100 is no multiple of block_size=32"),
        (["--segment_len=5"], "block_size=32 is no multiple of segment_len=5"),
        (["--tokens_per_doc=1600000"], "no training document has tokens_per_doc=1600000 tokens"),
        (["--phase=phase2"], "tokens_per_doc is for phase='lm'"),
        (["--batch_size=4", "--init_from=resume"], "going on within documents needs batch_size=2"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], changed: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--init_from=resume" in changed:
        run_training(monkeypatch, *arguments, "--max_iters=1")
    with pytest.raises(InputError, match=message):
        run_training(monkeypatch, *arguments, *changed)


def test_a_model_without_memory_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(ROOT / "config/pythia.py"), *(a for a in arguments[1:] if "segment_len" not in a)]
    with pytest.raises(InputError, match="model='pythia' has no memory to carry"):
        run_training(monkeypatch, *arguments, "--block_size=32")


# ---------------------------------------------------------------------------------------------------- the memories


@pytest.mark.usefixtures("large_weights")
def test_a_row_reads_its_own_stretch_from_the_start_and_nothing_else(
    arguments: list[str], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against each row alone, by the model that a learning rate of 0 leaves as it was."""
    run_training(monkeypatch, *arguments, "--learning_rate=0", "--min_lr=0")
    model = rebuild_model(read_checkpoint(tmp_path / "run"), "run")
    data = load_tokens(data_dir / "own", "train")
    stretches = Stretches(data, STRETCH, BLOCK, rows=4, seed=1337)
    begins = np.stack([stretches.starts(step) for step in (0, 4, 8)])

    def window_losses(begin: int, carried: bool) -> list[float]:
        tokens = torch.from_numpy(data.tokens[begin : begin + STRETCH + 1].astype(np.int64))[None]
        memory, found = model.init_memory(1), []
        for start in range(0, STRETCH, BLOCK):
            inputs = {"memory": memory} if carried else {}
            targets = tokens[:, start + 1 : start + BLOCK + 1]
            found.append(model(tokens[:, start : start + BLOCK], targets, **inputs)[1].item())
        return found

    for carried in (True, False):
        expected = np.array([[window_losses(begin, carried) for begin in row] for row in begins]).mean(axis=1).ravel()
        assert np.allclose(losses(tmp_path / "run"), expected, rtol=0, atol=1e-4) == carried


def memories(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "ckpt.pt", weights_only=True)["memory"]


def assert_same_run(one: Path, other: Path, atol: float) -> None:
    assert losses(one) == pytest.approx(losses(other), abs=atol)
    torch.testing.assert_close(weights(one), weights(other), atol=atol, rtol=0)
    torch.testing.assert_close(memories(one), memories(other), atol=atol, rtol=0)


@pytest.mark.usefixtures("large_weights")
def test_a_run_cut_off_within_a_stretch_ends_as_if_it_had_not_been(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_training(monkeypatch, *arguments, f"--out_dir={whole}")
    step = train.DocumentTrainer.train_step
    for last in (3, 5, 8, 11):  # checkpoints stand at steps 3, 6 and 9, stretches end at 4 and 8

        def interrupted(self: train.DocumentTrainer, last: int = last) -> torch.Tensor:
            if self.step == last:
                raise PowerCut
            return step(self)

        monkeypatch.setattr(train.DocumentTrainer, "train_step", interrupted)
        with pytest.raises(PowerCut):
            run_training(monkeypatch, *arguments, f"--out_dir={cut}")
    monkeypatch.setattr(train.DocumentTrainer, "train_step", step)
    run_training(monkeypatch, *arguments, f"--out_dir={cut}")
    assert len(losses(cut)) == 12
    assert_same_run(cut, whole, atol=0)


def test_two_processes_bring_their_memories_together_and_each_gets_its_own_back(
    arguments: list[str], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    fixed = ["--learning_rate=0.01", "--lr_decay_iters=7"]
    for launcher, name, stops in (([sys.executable], "one", [7]), (torchrun, "two", [7]), (torchrun, "cut", [6, 7])):
        for stop in stops:  # the last checkpoint before the cut stands within a stretch
            words = [*arguments, *fixed, f"--out_dir={tmp_path / name}", f"--max_iters={stop}"]
            words += ["--init_from=resume"] if stop != stops[0] else []
            command, environment = [*launcher, str(ROOT / "train.py"), *words], {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, capture_output=True, env=environment)
    assert_same_run(tmp_path / "cut", tmp_path / "two", atol=0)
    assert_same_run(tmp_path / "one", tmp_path / "two", atol=1e-4)


# -------------------------------------------------------------------------------------------------- PPL per window


def make_model(name: str) -> Any:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    config_class, model_class = MODELS[name]
    return randomise(model_class(config_class(**sizes, **({"segment_len": 8} if name == "infini" else {}))))


@torch.no_grad()
def plain_ppl(model: Any, documents: list[np.ndarray], carried: bool) -> list[float]:
    """PPL of each window, and of all after the first: one document, one window after the other."""
    scored: list[list[torch.Tensor]] = [[] for _ in range(evaluation.LONG_WINDOWS)]
    for document in documents:
        memory = {"memory": model.init_memory(1)} if carried else {}
        tokens = torch.from_numpy(document)[None, : evaluation.LONG_WINDOWS * BLOCK + 1]
        for window, targets in enumerate(tokens[:, 1:].split(BLOCK, dim=1)):
            idx = tokens[:, window * BLOCK : (window + 1) * BLOCK]
            padded = torch.cat([idx[:, : targets.size(1)], idx.new_ones(1, BLOCK - targets.size(1))], dim=1)
            log_p = model(padded, **memory)[0].double().log_softmax(-1)[:, : targets.size(1)]
            scored[window].append(-log_p.gather(2, targets[..., None]).ravel())
    parts = [*scored, [losses for window in scored[1:] for losses in window]]
    return [torch.cat(part).mean().exp().item() for part in parts]


@pytest.mark.parametrize("name", ["infini", "pythia"])
def test_ppl_per_window_equals_a_loop_over_the_documents(name: str, data_dir: Path) -> None:
    data, model = load_tokens(data_dir / "own", "val"), make_model(name)
    documents = [document for document in split_documents(data) if len(document) > 2 * BLOCK]
    results = evaluation.evaluate_long(model, data, BLOCK, 3, CPU)
    lengths = [min(len(document) - 1, evaluation.LONG_WINDOWS * BLOCK) for document in documents]
    assert results["long_documents"]["1"] == results["long_documents"]["after 1"] == len(documents)
    assert results["long_documents"]["8"] == sum(length > 7 * BLOCK for length in lengths) < len(documents)
    assert results["long_tokens"]["after 1"] == sum(lengths) - len(documents) * BLOCK
    carried = list(results["long_ppl"].values())
    assert carried == pytest.approx(plain_ppl(model, documents, carried=name == "infini"), rel=1e-4)
    assert ("long_ppl_reset" in results) == (name == "infini")
    if name == "infini":
        reset = list(results["long_ppl_reset"].values())
        assert reset == pytest.approx(plain_ppl(model, documents, carried=False), rel=1e-4)
        assert reset[0] == carried[0]
        assert all(abs(a / b - 1) > 1e-2 for a, b in zip(reset[1:], carried[1:], strict=True))


def test_a_document_that_just_fills_two_windows_is_long(data_dir: Path) -> None:
    data = load_tokens(data_dir / "own", "val")
    lengths = [len(document) - 1 for document in split_documents(data)]
    longest = max(length for length in lengths if length % 2 == 0)
    documents = evaluation.long_documents(data, longest // 2)
    assert len(documents) == sum(length >= longest for length in lengths)


def test_a_memory_that_is_not_read_makes_no_difference(data_dir: Path) -> None:
    model = make_model("infini")
    torch.nn.init.zeros_(model.layers[0].attention.W_O.weight)
    results = evaluation.evaluate_long(model, load_tokens(data_dir / "own", "val"), BLOCK, 3, CPU)
    assert results["long_ppl"] == results["long_ppl_reset"]


def test_where_nothing_fits_nothing_is_measured(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_tokens(data_dir / "own", "val")
    assert evaluation.evaluate_long(make_model("pythia"), data, len(data.tokens), 3, CPU) == {}
    assert evaluation.evaluate_long(make_model("infini"), data, 20, 3, CPU) == {}
    assert "windows of 20 end within a segment" in capsys.readouterr().err


def test_the_figures_reach_summary_and_comparison(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(monkeypatch, *arguments, "--max_iters=1")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert re.search(rf"PPL after window 1 +{summary['long_ppl']['after 1']:.1f}\n", capsys.readouterr().out)
    lines = format_comparison([{"run": "out/it", **summary}]).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("long documents"))
    rows = [line.split("  ") for line in lines[header + 2 : header + 6]]
    assert [row[0] or row[1] for row in rows] == ["it", "memory reset before each window", "documents", "tokens"]
    assert [row[-1] for row in rows[:2]] == [f"{summary[key]['after 1']:.1f}" for key in ("long_ppl", "long_ppl_reset")]
