"""train.py: what a step sees, what it does, exact resuming of every phase, the run's folder, several processes."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, SHORT, TINY, Command, checkpoint_of, losses, plain, type_in
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import eval as evaluation
import kit.runs
import train
from configurator import MODELS, load_source
from kit.contexts import context_cache, window_contexts
from kit.files import InputError
from kit.runs import World, read_checkpoint
from kit.text import get_reversal_pairs
from kit.tokens import INDEX_DTYPE, Documents, TokenFile, Windows, load_tokens, window_batch
from kit.weights import model_args
from model_context import effective_rank
from model_infini import InfiniConfig, InfiniPythiaModel
from prep import PrepSettings
from pythia_base import PythiaConfig, PythiaModel
from train import LMSettings, Phase1Settings

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
LM = [*TINY, *SHORT, "--dtype=float32", "--final_eval=False"]
LONG = ["--segment_len=8", "--tokens_per_doc=128", "--batch_size=2", "--gradient_accumulation_steps=2"]
OFTEN = ["--eval_interval=3", "--eval_iters=1", "--log_interval=1"]
PHASE_1 = ["--context_dim=8", "--num_tokens=600", "--batch_size=300", "--early_stopping_threshold=1.1"]
PHASE_1 += ["--max_iterations=1", "--hidden_size=96"]  # so wide that 8 numbers forget, and magnify rounding little
CASCADE = ["--context_dim=8", "--block_size=16", "--gradient_accumulation_steps=8", *SHORT[1:], *LM[-2:]]
RUNS = {  # name -> config and options
    "language model": ["pythia.py", *LM],
    "mla": ["mla_kv128.py", *LM, "--kv_dim=4"],
    "muon": ["pythia.py", *LM, "--optimizer=muon"],
    "documents": ["infini_long.py", *LM, *LONG, *OFTEN],
    "phase 1": ["phase1.py", *TINY[:4], *PHASE_1],
    "kv phase 1": ["context_kv_phase1.py", *TINY[:4], *PHASE_1],
    "cascade phase 1": ["cascade_phase1.py", *PHASE_1, "--embeddings=random"],
    "phase 2": ["phase2.py", *LM, "--context_dim=8"],
    "kv phase 2": ["context_kv_phase2.py", *LM, "--context_dim=8", "--context_interval=4"],
    "cascade phase 2": ["cascade_phase2.py", *CASCADE],
}
Words = Callable[[str], list[str]]
Start = Callable[..., Path]


@pytest.fixture(scope="module")
def stream(data_dir: Path) -> TokenFile:
    return load_tokens(data_dir / "few", "train")


@pytest.fixture(scope="module")
def words(stream: TokenFile, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """The command line of a run of RUNS; phase 2 starts from a phase 1, which is trained when it is first asked for."""

    @functools.cache
    def line(name: str) -> list[str]:
        config, *options = RUNS[name]
        options += [f"--data_dir={stream.path.parents[1]}", "--dataset=few", "--device=cpu"]
        if "phase 2" in name:
            options.append(f"--init_from={tmp_path_factory.mktemp('phase1')}")
            type_in("train.py", *line(name.replace("2", "1")), options[-1].replace("init_from", "out_dir"))
        return [str(ROOT / "config" / config), *options]

    return line


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = get_reversal_pairs()[:5]
    monkeypatch.setattr(evaluation, "get_reversal_pairs", lambda: pairs)


@pytest.fixture
def start(words: Words, tmp_path: Path) -> Start:
    """Trains a run of RUNS, with changes to its options, into tmp_path; returns its folder."""

    def run(name: str, *changes: str, out: str = "run") -> Path:
        type_in("train.py", *words(name), f"--out_dir={tmp_path / out}", *changes)
        return tmp_path / out

    return run


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


# --------------------------------------------------------------------------------------------- what a step sees


def tokens_of(lengths: list[int]) -> TokenFile:
    """Documents of ones, a zero before and behind each."""
    data = TokenFile(Path("train.bin"), {}, np.array([0, *(t for n in lengths for t in [1] * n + [0])], np.uint16))
    begins = np.cumsum([0, *(n + 1 for n in lengths[:-1])])
    data.__dict__["doc_index"] = np.array([(begin, 0) for begin in begins], dtype=INDEX_DTYPE)
    return data


def documents(data: TokenFile, tokens_per_doc: int, block_size: int, rows: int, seed: int) -> Documents:
    windows = data, block_size, rows, rows, seed, ALONE
    return Documents(*windows, tokens_per_doc=tokens_per_doc, init_memory=lambda rows: None)


few = settings(max_examples=20, deadline=None)


@few
@given(st.integers(1, 64), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 10**6))
def test_windows_lie_anywhere_in_the_file(block_size: int, places: int, seed: int, step: int) -> None:
    """Every place with a target for each of its tokens can be drawn, and no other."""
    windows = Windows(tokens_of([block_size + places - 2]), block_size, 1000, 1, seed, ALONE)
    assert set(windows.starts(step)) <= set(range(places))
    assert len(set(windows.starts(step))) > 0.9 * places
    assert (windows.starts(step) == windows.starts(step)).all()
    with pytest.raises(InputError, match=f"too few for block_size={block_size + places}"):
        Windows(tokens_of([block_size + places - 2]), block_size + places, 1000, 1, seed, ALONE)


def test_no_seed_sees_what_another_saw() -> None:
    """Neither windows nor the order of documents: seed 1337's second epoch was once seed 1338's first."""
    long, many = tokens_of([10**6]), tokens_of([9] * 100)
    draws = [tuple(Windows(long, 8, 4, 1, s, ALONE).starts(step)) for s in range(1337, 1341) for step in range(100)]
    orders = [tuple(documents(many, 8, 8, 100, seed).starts(epoch)) for seed in range(4) for epoch in range(4)]
    assert (len(set(draws)), len(set(orders))) == (len(draws), len(orders))


@few
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_processes_share_a_step_s_windows(size: int, each: int, batch_size: int, step: int) -> None:
    """Each window of a step goes to one process, in one micro-batch; the shares of a process add up to 1."""
    data, given_out = TokenFile(Path("train.bin"), {}, np.arange(1000, dtype=np.uint16)), []
    for rank in range(size):
        windows = Windows(data, 32, size * each, batch_size, 7, World(rank, size, CPU))
        batches = [windows.batch(step, micro) for micro in range(windows.micro_steps)]
        assert sum(share for _, share in batches) == pytest.approx(1)
        for batch, share in batches:
            assert len(batch["idx"]) == pytest.approx(share * each)
            assert torch.equal(batch["idx"] + 1, batch["targets"])
            given_out += batch["idx"][:, 0].tolist()
    assert given_out == windows.starts(step).tolist()


@few
@given(st.lists(st.integers(0, 90), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 5), st.integers(1, 7))
def test_a_row_walks_through_one_stretch_of_one_document(
    lengths: list[int], block_size: int, windows: int, rows: int
) -> None:
    """Every stretch that lies whole in a document comes once an epoch, in another order each."""
    stretch, data = block_size * windows, tokens_of(lengths)
    per_epoch = sum((length + 1) // stretch for length in lengths)
    if not per_epoch:
        with pytest.raises(InputError, match=f"no training document has tokens_per_doc={stretch}|too few"):
            documents(data, stretch, block_size, rows, seed=0)
        return
    batches, turns = documents(data, stretch, block_size, rows, seed=0), math.ceil(2 * per_epoch / rows)
    starts = np.stack([batches.starts(step) for step in range(turns * windows)]).reshape(turns, windows, rows)
    assert (np.diff(starts, axis=1) == block_size).all()
    walked = starts[:, 0].ravel()
    assert all(data.tokens[begin + 1 : begin + stretch].all() for begin in walked)
    assert all(walked + stretch < len(data.tokens))
    epochs = walked[:per_epoch], walked[per_epoch : 2 * per_epoch]
    assert len(set(epochs[0])) == len(set(epochs[1])) == per_epoch
    assert per_epoch <= 20 or list(epochs[0]) != list(epochs[1])


def test_a_row_reads_its_own_stretch_from_the_start_and_nothing_else(
    start: Start, stream: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against each row alone, by a model whose memory shows in the loss and which no learning rate changes."""

    def with_large_weights(*arguments: Any) -> Any:
        model = InfiniPythiaModel(*arguments)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.6)
        return model

    monkeypatch.setitem(MODELS, "infini", (InfiniConfig, with_large_weights))
    run = start("documents", "--learning_rate=0", "--min_lr=0", "--max_iters=8")
    model, batches = load_source(str(run))[0], documents(stream, 128, 32, rows=4, seed=1337)

    def window_losses(begin: int, carried: bool) -> list[float]:
        inputs = {"cache": model.init_memory(1)} if carried else {}
        found = [window_batch(stream.tokens, np.array([begin + w]), 32, CPU) for w in range(0, 128, 32)]
        return [model(**batch, **inputs)[1].item() for batch in found]

    for carried in (True, False):
        each = [[window_losses(begin, carried) for begin in batches.starts(step)] for step in (0, 4)]
        assert np.allclose(losses(run), np.array(each).mean(axis=1).ravel(), rtol=0, atol=1e-4) == carried


# ------------------------------------------------------------------------------------------------ what a step does


def test_learning_rate_warms_up_and_decays() -> None:
    settings = LMSettings(learning_rate=1.0, min_lr=0.1, warmup_iters=9, max_iters=110, lr_decay_iters=109)
    rates = [train.learning_rate_at(step, settings) for step in range(130)]
    assert rates[:9] == pytest.approx([0.1 * (i + 1) for i in range(9)])
    assert rates[9] == pytest.approx(1.0)
    assert rates[59] == pytest.approx(0.55)
    assert rates[109:] == pytest.approx([0.1] * 21)
    assert train.learning_rate_at(59, LMSettings(learning_rate=1.0, decay_lr=False)) == pytest.approx(60 / 101)
    assert train.learning_rate_at(999, LMSettings(learning_rate=1.0, decay_lr=False)) == 1.0


def test_a_step_is_a_plain_step(start: Start, stream: TokenFile) -> None:
    """Micro-batches, the clipped gradient, the learning rate of the step: AdamW on the mean loss of all windows."""
    changes = ["--gradient_accumulation_steps=3", "--batch_size=2", "--weight_decay=0.5", "--grad_clip=0.87"]
    model = load_source(str(start("language model", *changes, "--max_iters=0", out="new")))[0]
    run = start("language model", *changes, "--max_iters=5", "--eval_interval=9")
    settings, windows = LMSettings(warmup_iters=2, max_iters=5), Windows(stream, 32, 6, 6, 1337, ALONE)
    groups = [[p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (True, False)]
    decaying = [{"params": params, "weight_decay": decay} for params, decay in zip(groups, (0.5, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(decaying, betas=(0.9, 0.95), foreach=False)
    found, norms = [], []
    for step in range(5):
        batch = windows.batch(step, 0)[0]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch["idx"])[0].flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
        for p in model.parameters():
            p.grad *= min(1, 0.87 / norm)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate_at(step, settings)
        optimizer.step()
        found.append(loss.item())
        norms.append(norm)
    assert min(norms) < 0.87 < max(norms), "some steps are clipped"
    assert losses(run) == pytest.approx(found, abs=1e-5)
    assert_same_training(read_checkpoint(run), {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def assert_same_training(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """But for rounding, of which AdamW makes a whole step where the gradient is nothing else."""
    both = [torch.nn.utils.parameters_to_vector(state["model"].values()) for state in (ours, theirs)]
    assert (both[0] - both[1]).norm() < 1e-4 * both[1].norm()
    for mine, other in zip(*(state["optimizer"]["state"].values() for state in (ours, theirs)), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):  # of the gradients, whose size does not show in AdamW's steps
            atol = 1e-4 * other[moment].abs().max().item()
            torch.testing.assert_close(mine[moment], other[moment], atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("val_losses", "changes", "steps", "best"),
    [
        ([5.0, 5.1, 5.2, 5.3], ["--patience=2"], 2, 0),
        ([5.0, 5.1, 4.9, 5.0], ["--patience=2"], 3, 2),
        ([5.0, 4.999, 4.998, 4.997], ["--patience=2", "--min_ppl_gain=0.4"], 2, 2),  # PPL 148.4 falls by 0.15 each
        ([5.0, 4.99, 4.98, 4.97], ["--patience=2", "--min_ppl_gain=0.4"], 3, 3),  # by 1.5
        ([5.0, math.nan, 5.2, 5.3], [], 3, 0),
        ([5.0, math.nan, 4.9, 5.0], [], 3, 2),
    ],
)
def test_early_stopping(
    val_losses: list[float], changes: list[str], steps: int, best: int, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that is cut off after the second evaluation."""
    values = iter(val_losses)
    monkeypatch.setattr(train, "validate", lambda *_: next(values))
    start("language model", *changes, "--eval_interval=1", "--max_iters=1")
    run = start("language model", *changes, "--eval_interval=1", "--max_iters=3", "--init_from=resume")
    assert summary_of(run)["steps"] == steps
    assert summary_of(run)["best_val_loss"] == min(x for x in val_losses[: steps + 1] if not math.isnan(x))
    assert read_checkpoint(run / "best.pt")["iter_num"] == best


@pytest.mark.parametrize(("name", "saved"), [("language model", [4]), ("phase 1", [])])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
    name: str, saved: list[int], start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Windows.batch
    shares = {6: math.nan}
    monkeypatch.setattr(Windows, "batch", lambda *where: (batch(*where)[0], shares.get(where[1], 1.0)))
    monkeypatch.setattr(train, "oacd_iteration", lambda *_, **__: (math.nan, 0.0))
    with pytest.raises(InputError, match=r"loss of (step 7|iteration 1) is no number"):
        start(name, *["--log_interval=5"] * len(saved))
    assert [read_checkpoint(path)["iter_num"] for path in tmp_path.glob("run/ckpt.pt")] == saved


# ----------------------------------------------------------------------------------------------- resuming, exactly


class PowerCut(BaseException):
    """Ends a run at a moment that nothing in it expects."""


MOMENTS = {  # what a run is cut off before
    "batch": (Windows, "batch"), "validate": (train, "validate"), "write": (kit.runs, "replacing"),
    "iteration": (train, "oacd_iteration"),
}  # fmt: skip
CUTS = {  # run -> one after the other, its moments, at which call since it was started, and whether a signal says so
    "language model": [
        ("write", 1, False), ("write", 2, False), ("write", 3, False),  # config.json, best.pt and ckpt.pt of step 0
        ("batch", 2, True), ("batch", 2, False), ("batch", 2, True),  # steps 2, 2 and 4, which is evaluated
        ("validate", 1, False), ("write", 4, False),  # of step 8; between its two checkpoints
        ("batch", 8, True), ("write", 3, False),  # the last step; before summary.json
    ],
    "muon": [("batch", 2, True), ("batch", 4, False)],
    # stretches end at steps 4 and 8, two micro-batches a step
    "documents": [("batch", 4, True), ("batch", 5, False), ("batch", 6, True), ("batch", 4, True), ("write", 3, False)],
    "phase 1": [("iteration", 2, False), ("iteration", 4, False), ("iteration", 1, True), ("iteration", 4, False)],
    "cascade phase 1": [("iteration", 3, True), ("iteration", 2, False), ("iteration", 3, False), ("write", 3, False)],
    "phase 2": [("batch", 2, True), ("batch", 4, False)],
    "cascade phase 2": [("batch", 2, True), ("batch", 4, False)],
}  # fmt: skip


@contextlib.contextmanager
def cut_off(moment: str, number: int, by_signal: bool) -> Iterator[None]:
    """The process is asked to stop, or the power goes, before something is done for the number-th time from now."""
    original, calls = getattr(*MOMENTS[moment]), itertools.count(1)

    def watched(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            if not by_signal:
                raise PowerCut
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*MOMENTS[moment], watched)
        with pytest.raises(SystemExit if by_signal else PowerCut) as end:
            yield
    assert not by_signal or end.match("^143$")


def outcome(folder: Path) -> list[Any]:
    """All that a run leaves behind, but times; the losses as the steps had them, however they were logged."""
    log = [plain(json.loads(line)) for line in (folder / "log.jsonl").open()]
    saved = {path.name: plain(torch.load(path, weights_only=True)) for path in sorted(folder.glob("*.pt"))}
    entries = [entry for entry in log if "losses" not in entry]
    return [losses(folder), entries, saved, *(plain(json.loads(p.read_text())) for p in sorted(folder.glob("*.json")))]


@pytest.mark.parametrize("name", CUTS)
def test_a_run_cut_off_at_any_moment_ends_as_if_it_had_not_been(name: str, start: Start, tmp_path: Path) -> None:
    changes = ["--max_iters=6"] if "phase 2" in name else []
    changes += [f"--max_iterations={3 if 'cascade' in name else 9}", "--checkpoint_interval=2"] if "1" in name else []
    whole = start(name, *changes).rename(tmp_path / "whole")
    for cut in CUTS[name]:
        with cut_off(*cut):
            start(name, *changes)
        assert not list(tmp_path.glob("run/.*.tmp"))
    run = start(name, *changes)
    assert outcome(run) == outcome(whole)
    assert len(losses(run) or outcome(run)[1]) == (9 if name == "phase 1" else 6 if "phase" in name else 12)


def test_a_finished_run_is_not_touched_but_goes_on_or_is_replaced_on_demand(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("language model", "--max_iters=4")
    before, summary = {path: path.stat().st_mtime_ns for path in run.iterdir()}, summary_of(run)
    assert f"{summary['best_val_loss']:.4f}" in capsys.readouterr().out
    assert "val_loss" not in summary, "nothing but training was asked for"
    start("language model", "--max_iters=4")
    assert capsys.readouterr().out == f"{run} is finished after 4 steps; --overwrite=True trains it again\n"
    with FileLock(run / ".lock"), pytest.raises(InputError, match="another process is training in"):
        start("language model", "--overwrite=True")
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}
    start("language model", "--init_from=resume", "--max_iters=6", "--dtype=float16")  # whose gradients are scaled
    assert len(losses(run)) == summary_of(run)["steps"] == 6
    with cut_off("batch", 2, by_signal=True):
        start("language model", "--init_from=resume", "--max_iters=9")
    assert not (run / "summary.json").exists(), "its figures are not those of the weights"
    start("language model", "--max_iters=2", "--overwrite=True")
    assert len(losses(run)) == summary_of(run)["steps"] == 2


def test_a_start_from_a_run_says_what_it_takes_and_what_it_leaves_out(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer of two, in the run's own class and in another; what another class converts is not left out."""
    run = start("language model", "--max_iters=2")
    for name in ("language model", "mla"):
        capsys.readouterr()
        child = read_checkpoint(start(name, f"--init_from={run}", "--num_layers=1", "--max_iters=1", out=name))
        said = capsys.readouterr().out
        assert f"{0 if name == 'language model' else 6} converted\nnew: none; left out: layers.1\n" in said
        assert (child["parents"], child["tokens_seen"]) == ([str(run)], 3 * 4 * 32)


def test_the_commands_of_the_readme(
    start: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(script: str, *words: object) -> str:
        type_in(script, *words, f"--data_dir={data_dir}", "--device=cpu")
        return capsys.readouterr().out

    run, out = start("mla", "--final_eval=True"), tmp_path / "compare"
    said, summary = capsys.readouterr().out, summary_of(run)
    assert f"next: python sample.py {run} " in said
    assert "cache B/token" in say("eval.py", run, "--tasks=val,reversal,cache", f"--out_dir={out}")
    results = json.loads((out / "results.json").read_text())["runs"][0]
    assert results["cache_saved"]["2048"] == summary["cache_saved"]["2048"] == 0.875
    assert results["val_loss"] == pytest.approx(summary["val_loss"], abs=1e-6)
    assert results["reversal_ratio"] == pytest.approx(summary["reversal_ratio"], abs=1e-6)
    text = say("sample.py", run, "--prompt=The cache", "--max_new_tokens=8")
    assert text.startswith("The cache")
    assert "(87.5% saved)" in text
    greedy = [say("sample.py", run, "--max_new_tokens=8", f"--temperature={t}") for t in ("0", "1e-320")]
    assert len({text.split("---")[0] for text in greedy}) == 1


def test_a_run_on_documents_ends_with_their_ppl(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """How a report shows it: test_report.py."""
    summary = summary_of(start("documents", "--max_iters=1", "--final_eval=True"))
    said = capsys.readouterr().out
    for name, key in (("long PPL", "long_ppl"), ("memory reset", "long_ppl_reset")):
        assert re.search(rf"{name} +\| +{summary[key]['after 1']:.1f} ", said)


# ------------------------------------------------------------------------------------------------- the run's folder


def test_the_log_is_shown_in_tensorboard_and_goes_on_there(start: Start) -> None:
    start("language model", "--max_iters=6", "--log_to=tensorboard")
    run = start("language model", "--max_iters=9", "--log_to=tensorboard", "--init_from=resume")
    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    log = [json.loads(line) for line in (run / "log.jsonl").open()]
    for key in ("val_loss", "lr"):
        expected = {entry["step"]: entry[key] for entry in log if key in entry}
        assert {event.step: event.value for event in shown.Scalars(key)} == pytest.approx(expected)
    assert shown.Scalars("loss")[0].value == pytest.approx(losses(run)[0])


# ------------------------------------------------------------------------------------------------ several processes


DIES = """
import os, signal, train
from kit.files import run
from kit.tokens import Documents

def die(self, step, micro, batch=Documents.batch):
    if self.world.rank == 1 and step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, step, micro)

Documents.batch = die
run(train.main)
"""
# its processes are forked from one that has imported everything
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--start-method=fork", "--run-path"]


def test_two_processes_train_as_one_and_end_together_when_one_is_killed(
    words: Words, start: Start, tmp_path: Path
) -> None:
    """Their memories come together in the checkpoint, and each gets its own back, or one process gets them all.

    Two micro-batches a process; the last checkpoint before the cut stands within a stretch.
    """
    fixed, steps = ["--learning_rate=0.01", "--lr_decay_iters=7"], "--gradient_accumulation_steps="
    alone = start("documents", *fixed, "--batch_size=4", f"{steps}1", "--max_iters=7", out="alone")
    line = [*words("documents"), *fixed, "--batch_size=1", "--eval_iters=4", f"{steps}4", f"--out_dir={tmp_path}/run"]
    (tmp_path / "dies.py").write_text(DIES)
    killed = Command([*TORCHRUN, str(tmp_path / "dies.py"), *line, "--max_iters=7"], tmp_path)
    assert re.search(r"Signal 9 \(SIGKILL\) received by PID", killed.end())
    assert killed.process.exitcode == 1
    assert read_checkpoint(tmp_path / "run")["iter_num"] == 6
    Command([*TORCHRUN, str(ROOT / "train.py"), *line, "--max_iters=7"], tmp_path).succeed()
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-5)
    ours, theirs = read_checkpoint(tmp_path / "run"), read_checkpoint(alone)
    assert ours["best_val_loss"] == pytest.approx(theirs["best_val_loss"], abs=1e-5)
    assert len(ours["batches"]) == 3
    torch.testing.assert_close(ours["batches"], theirs["batches"], atol=1e-4, rtol=0)
    assert_same_training(ours, theirs)
    type_in("train.py", *line, "--max_iters=8", "--init_from=resume")
    assert len(losses(tmp_path / "run")) == 8


# ---------------------------------------------------------------------------------------------------- both phases


@pytest.mark.parametrize("name", ["phase 2", "kv phase 2", "cascade phase 2"])
def test_phase_2_trains_what_the_exact_contexts_of_its_tokens_do_not_depend_on(
    name: str, start: Start, stream: TokenFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches, make = [], Windows.batch

    def recorded(self: Windows, step: int, micro: int) -> tuple[dict[str, torch.Tensor], float]:
        batch, share = make(self, step, micro)
        batches.append(batch)
        return batch, share

    monkeypatch.setattr(Windows, "batch", recorded)
    second, checkpoint = load_source(str(start(name, "--max_iters=4", "--weight_decay=0.5")))
    assert checkpoint is not None
    (parent,) = checkpoint["parents"]
    before, after = load_source(parent)[0].state_dict(), second.state_dict()
    frozen = {tensor for tensor in after if torch.equal(before[tensor], after[tensor])}
    assert frozen == {tensor for tensor in after if tensor.startswith(("context_block", "embed_in."))}

    # positions that are independent are drawn one by one, as many as the windows would hold
    rows, width = (64, 1) if name.startswith("cascade") else (4, 32)
    assert {tuple(batch["idx"].shape) for batch in batches} == {(rows, width)}
    assert checkpoint["tokens_seen"] == len(batches) * rows * width == (4 * 512 if width == 1 else 4 * 128)
    windows = Windows(stream, width, len(batches) // 4 * rows, rows, 1337, ALONE)
    starts = np.concatenate([windows.starts(step) for step in range(4)])
    nearest = int(starts.argmin())  # the fewest tokens to run the recurrence over
    batch, row = batches[nearest // rows], nearest % rows
    tokens = torch.from_numpy(stream.tokens[: starts[nearest] + width + 1].astype(np.int64))
    exact = [block.recurrence(second.embed_in(tokens[:-1])[None], None)[0] for block in second.context_blocks]
    assert torch.equal(torch.cat([batch["idx"][row], batch["targets"][row, -1:]]), tokens[-width - 1 :])
    contexts = torch.cat(exact, dim=-1)[-width:].detach()
    torch.testing.assert_close(batch["contexts"][row], contexts, atol=1e-4, rtol=0)
    capsys.readouterr()
    context_cache(second, stream, PrepSettings(init_from=parent))
    assert "reading" in capsys.readouterr().out, "phase 2 has made them"
    batches.clear()
    start(name, "--max_iters=1", "--context_cache=False", out="uncached")
    assert re.search(r"100 tokens before its windows; at most \de[+-]\d\d off", capsys.readouterr().out)
    expected = window_contexts(second, stream.tokens, windows.starts(0)[:rows], width, overlap=100)
    torch.testing.assert_close(batches[0]["contexts"], expected)


def test_block_i_is_trained_on_the_i_th_part_or_all_on_the_union() -> None:
    for data, num_tokens, expected in (
        ("split", 1000, [[*range(33)], [*range(33, 66)], [*range(66, 99)]]),
        ("split", 3, [[0, 1, 2], [33, 34, 35], [66, 67, 68]]),
        ("all", 3, [[0, 1, 2, 33, 34, 35, 66, 67, 68]] * 3),
    ):
        settings = Phase1Settings(cascade_data=data, num_tokens=num_tokens)  # type: ignore[arg-type]
        parts = train.block_parts(np.arange(100, dtype=np.uint16), 3, settings)
        assert [part.tolist() for part in parts] == expected


def test_phase_1_takes_its_tokens_until_enough_contexts_have_settled(
    start: Start, stream: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of Adam on each, which under one and the same gradient is as long as the learning rate."""
    rates, seen, biases = iter([0.95, 0.5, 0.9]), [], []

    def iteration(block: Any, table: Any, tokens: torch.Tensor, *_: Any, **__: Any) -> tuple[float, float]:
        seen.append(tokens.numpy())
        biases.append(block.linears[0].bias.detach().clone())
        block.linears[0].bias.grad = torch.ones(8)
        return 0.0, next(rates)

    monkeypatch.setattr(train, "oacd_iteration", iteration)
    run = start("cascade phase 1", "--early_stopping_threshold=0.9", "--max_iterations=9", "--learning_rate=0.25")
    assert [block["iterations"] for block in summary_of(run)["blocks"]] == [1, 2]
    for tokens, begin in zip(seen, (0, half := len(stream.tokens) // 2, half), strict=True):
        assert np.array_equal(tokens, stream.tokens[begin : begin + 600])
    trained = [block.linears[0].bias for block in load_source(str(run))[0].context_blocks]
    torch.testing.assert_close([trained[0], biases[2], trained[1]], [bias - 0.25 for bias in biases])
    two: Any = SimpleNamespace(world=World(0, 2, CPU), checkpoint=None)
    with pytest.raises(InputError, match="trains in one process"):
        train.train_phase1(Phase1Settings(), None, stream, stream, two)


def test_the_cascade_on_the_table_of_a_run(
    start: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PythiaConfig(hidden_size=96, num_layers=1, num_heads=1, intermediate_size=8)
    baseline = PythiaModel(config)
    (tmp_path / "pythia").mkdir()
    torch.save(checkpoint_of("pythia", baseline, tokens_seen=1234), tmp_path / "pythia" / "ckpt.pt")
    one = start("cascade phase 1", f"--embeddings={tmp_path / 'pythia'}", "--hidden_size=768", out="one")
    two = start("cascade phase 2", "--max_iters=1", f"--init_from={one}", "--final_eval=True", out="two")
    assert "accuracy" in capsys.readouterr().out
    (first, before), (second, after) = load_source(str(one)), load_source(str(two))
    assert before is not None
    assert after is not None
    assert torch.equal(first.embed_in.weight, baseline.embed_out.weight)
    assert (first.config.vocab_size, first.config.hidden_size, first.config.context_dim) == (50304, 96, 8)
    assert (before["parents"], before["tokens_seen"]) == ([str(tmp_path / "pythia")], 1234)
    assert (after["parents"], after["tokens_seen"]) == ([*before["parents"], str(one)], 1234 + 4 * 8 * 16)
    for run, model in {one: first, two: second}.items():
        assert json.loads((run / "config.json").read_text())["model_args"] == model_args(model.config)
    summary = summary_of(one)
    assert [report["block"] for report in summary["blocks"]] == [0, 1]
    heldout = torch.from_numpy(load_tokens(data_dir / "few", "val").tokens[:600].astype(np.int64))
    rank = effective_rank(first.recurrences(heldout[None], None)[0].detach())
    assert summary["context_dim"] == 16
    assert summary["context_effective_rank"] == pytest.approx(rank, rel=1e-3)
    assert summary_of(two)["context_effective_rank"] == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2Model"])
def test_the_table_of_a_gpt2_folder_is_read(kind: str, tmp_path: Path) -> None:
    """Of a model with its head, and of one without; older layouts: test_pythia.py."""
    config = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=12, n_layer=1, n_head=2)
    model = getattr(transformers, kind)(config)
    model.save_pretrained(tmp_path)
    table, source = train.load_table(str(tmp_path))
    assert torch.equal(table, model.get_input_embeddings().weight)
    assert source["data"] == {"tokenizer": "gpt2"}  # by which other tokens are refused
