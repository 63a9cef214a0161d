"""train.py: the order of the data, exact resuming, the run's folder, several processes, what a user types."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import train
from kit import runs
from kit.files import InputError
from kit.text import get_reversal_pairs, load_tokenizer
from kit.tokens import INDEX_DTYPE, Stretches, TokenFile, Windows, load_tokens, window_batch
from train import LMSettings

ROOT = Path(__file__).parents[1]
TINY = ["--hidden_size=16", "--num_layers=2", "--num_heads=2", "--intermediate_size=32", "--block_size=32"]
SHORT = ["--gradient_accumulation_steps=1", "--max_iters=12", "--eval_interval=4", "--eval_iters=2", "--warmup_iters=2"]


@pytest.fixture
def arguments(data_dir: Path, tmp_path: Path) -> list[str]:
    """A command line that trains a tiny model into tmp_path/run on the CPU."""
    data = [f"--data_dir={data_dir}", "--dataset=own", "--device=cpu", "--dtype=float32"]
    return [str(ROOT / "config/pythia.py"), *TINY, *SHORT, *data, f"--out_dir={tmp_path / 'run'}"]


def run_training(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [loss for entry in read_log(folder) for loss in entry.get("losses", [])]


def weights(folder: Path, name: str = "ckpt.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model"]


# ------------------------------------------------------------------------------------------- the order of the data


few = settings(max_examples=40, deadline=None)


@few
@given(st.integers(1, 64), st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 10**6))
def test_windows_lie_anywhere_in_the_file(block_size: int, places: int, seed: int, step: int) -> None:
    """Every place with a target for each of its tokens can be drawn, and no other."""
    windows = Windows(block_size + places, block_size, 1000, seed)
    assert set(windows.starts(step)) <= set(range(places))
    assert len(set(windows.starts(step))) > 0.9 * places
    assert (windows.starts(step) == windows.starts(step)).all()


def test_no_seed_sees_what_another_saw() -> None:
    """Neither windows nor the order of documents: seed 1337's second epoch was once seed 1338's first."""
    draws = [tuple(Windows(10**6, 8, 4, seed).starts(step)) for seed in range(1337, 1341) for step in range(100)]
    assert len(set(draws)) == len(draws)
    data = TokenFile(Path("train.bin"), {}, np.zeros(1000, dtype=np.uint16))
    data.__dict__["doc_index"] = np.array([(begin, 0) for begin in range(0, 1000, 10)], dtype=INDEX_DTYPE)
    orders = [tuple(Stretches(data, 8, 8, 1, seed).order(epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)


@few
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_processes_share_a_step_s_windows(size: int, each: int, batch_size: int, step: int) -> None:
    """Each window of a step goes to one process, in one micro-batch; the shares of a process add up to 1."""
    total = size * each
    given_out: list[Any] = []
    lasts = []
    windows = SimpleNamespace(starts=lambda step: step * total + np.arange(total))
    for rank in range(size):
        one = SimpleNamespace(step=step, windows_per_step=total, world=SimpleNamespace(size=size, rank=rank))
        one.settings, one.training_batch, one.windows = SimpleNamespace(batch_size=batch_size), list, windows
        batches = list(train.LMTrainer.micro_batches(one))  # type: ignore[arg-type]
        assert sum(share for _, share, _ in batches) == pytest.approx(1)
        lasts.append([is_last for _, _, is_last in batches])
        given_out += [number for numbers, _, _ in batches for number in numbers]
    assert given_out == list(range(step * total, (step + 1) * total))
    assert all(last == [False] * (len(last) - 1) + [True] for last in lasts)


def test_a_window_s_targets_are_the_next_tokens() -> None:
    starts = Windows(1000, block_size=32, rows=5, seed=0).starts(0)
    batch = window_batch(np.arange(1000, dtype=np.uint16), starts, 32, torch.device("cpu"))
    assert torch.equal(batch["idx"] + 1, batch["targets"])
    assert batch["idx"].shape == (5, 32)


def test_a_token_file_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(InputError, match="32 tokens in the training file: too few for block_size=32"):
        Windows(32, block_size=32, rows=1, seed=0)


def test_learning_rate_warms_up_and_decays() -> None:
    settings = LMSettings(learning_rate=1.0, min_lr=0.1, warmup_iters=9, max_iters=110, lr_decay_iters=109)
    rates = [train.learning_rate_at(step, settings) for step in range(130)]
    assert rates[:9] == pytest.approx([0.1 * (i + 1) for i in range(9)])
    assert rates[9] == pytest.approx(1.0)
    assert rates[59] == pytest.approx(0.55)
    assert rates[109:] == pytest.approx([0.1] * 21)


# ----------------------------------------------------------------------------------------------- resuming, exactly


class PowerCut(BaseException):
    """Ends a run at a moment that nothing in it expects."""


def test_a_run_cut_off_at_any_step_ends_as_if_it_had_not_been(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_training(monkeypatch, *arguments, f"--out_dir={whole}")
    step = train.LMTrainer.train_step
    for last in (2, 4, 5, 11):

        def interrupted(self: train.LMTrainer, last: int = last) -> torch.Tensor:
            if self.step == last:
                raise PowerCut
            return step(self)

        monkeypatch.setattr(train.LMTrainer, "train_step", interrupted)
        with pytest.raises(PowerCut):
            run_training(monkeypatch, *arguments, f"--out_dir={cut}")
    monkeypatch.setattr(train.LMTrainer, "train_step", step)
    run_training(monkeypatch, *arguments, f"--out_dir={cut}")
    assert losses(cut) == losses(whole)
    assert len(losses(cut)) == 12
    assert [e["val_loss"] for e in read_log(cut) if "val_loss" in e] == [
        e["val_loss"] for e in read_log(whole) if "val_loss" in e
    ]
    for name in ("ckpt.pt", "best.pt"):
        torch.testing.assert_close(weights(cut, name), weights(whole, name), atol=0, rtol=0)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, cut)]
    assert {k for k in summaries[0] if summaries[0][k] != summaries[1][k]} <= {"train_seconds", "checkpoint"}


def test_a_run_cut_off_between_its_two_checkpoints_ends_with_both(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut, save = tmp_path / "whole", tmp_path / "cut", runs.RunFolder.save
    run_training(monkeypatch, *arguments, f"--out_dir={whole}")
    for last in (4, 8, 12):

        def interrupted(self: runs.RunFolder, checkpoint: dict[str, Any], *names: str, last: int = last) -> None:
            save(self, checkpoint, *names[: 1 if checkpoint["iter_num"] == last else None])
            if checkpoint["iter_num"] == last:
                raise PowerCut

        monkeypatch.setattr(runs.RunFolder, "save", interrupted)
        with pytest.raises(PowerCut):
            run_training(monkeypatch, *arguments, f"--out_dir={cut}")
    monkeypatch.setattr(runs.RunFolder, "save", save)
    run_training(monkeypatch, *arguments, f"--out_dir={cut}")
    for name in ("ckpt.pt", "best.pt"):
        torch.testing.assert_close(weights(cut, name), weights(whole, name), atol=0, rtol=0)


def test_sigkill_and_sigterm_lose_nothing_that_was_saved(arguments: list[str], tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "--max_iters=60", "--eval_interval=10"]
    subprocess.run([*command, f"--out_dir={whole}"], check=True, capture_output=True)
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 128 + 15)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(r"step [1-9]\d*0 \| val", line):  # one checkpoint at least, and more steps on their way
                break
        process.send_signal(number)
        process.communicate()
        assert process.returncode == status
    subprocess.run(command, check=True, capture_output=True)
    assert losses(folder) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(folder)[name], tensor)
    assert not list(folder.glob("*.tmp"))


def test_the_same_command_says_that_a_finished_run_is_finished(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_training(monkeypatch, *arguments)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir() if path.name != "config.json"}
    capsys.readouterr()
    run_training(monkeypatch, *arguments)
    assert "is finished, 12 steps" in capsys.readouterr().out
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}.items()
    run_training(monkeypatch, *arguments, "--init_from=resume", "--max_iters=14")
    assert len(losses(tmp_path / "run")) == 14


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = train.LMTrainer.train_step
    monkeypatch.setattr(train.LMTrainer, "train_step", lambda self: step(self) * (math.nan if self.step == 6 else 1.0))
    with pytest.raises(InputError, match="loss of step 7 is nan"):
        run_training(monkeypatch, *arguments, "--log_interval=5")
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["iter_num"] == 4


def test_early_stopping(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.LMTrainer, "validate", lambda self: 5.0 + 0.1 * self.step)
    run_training(monkeypatch, *arguments, "--patience=2")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 8


# ------------------------------------------------------------------------------------------------- the run's folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--learning_rate=0.5"], r"holds another run \(learning_rate 0.001 there, 0.5 here\)"),
        (["--hidden_size=32"], "holds another run"),
        (["--init_from=resume", "--hidden_size=32"], "holds another run"),
        (["--dataset=other"], "holds no token files; make them with: python prep.py"),
        (["--batch_size=3", "--overwrite=True", "--block_size=4096"], "above the model's limit of 2048"),
        (["--overwrite=True", "--vocab_size=100"], "outside the model's 100 rows"),
        (["--overwrite=True", "--init_from=nowhere"], "'nowhere' is no local folder"),
    ],
)
def test_another_run_s_folder_is_refused_and_left_alone(
    arguments: list[str], changed: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run_training(monkeypatch, *arguments)
    before = weights(tmp_path / "run") if "--overwrite=True" not in changed else {}
    with pytest.raises(InputError, match=message):
        run_training(monkeypatch, *arguments, *changed)
    for name, tensor in before.items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name])


def test_a_run_is_not_given_up_before_the_one_that_replaces_it_can_start(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(monkeypatch, *arguments)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    with pytest.raises(InputError, match="holds neither a checkpoint"):
        run_training(monkeypatch, *arguments, "--overwrite=True", f"--init_from={tmp_path}")
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    run_training(monkeypatch, *arguments, "--overwrite=True", "--max_iters=4")
    assert len(losses(tmp_path / "run")) == 4


def test_resuming_needs_a_checkpoint(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="holds no checkpoint"):
        run_training(monkeypatch, *arguments, "--init_from=resume")


HOLD = "import filelock, sys, time; a = filelock.FileLock(sys.argv[1]); a.acquire(); print(flush=True); time.sleep(600)"


def test_two_runs_cannot_share_a_folder(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a process that is killed leaves no lock behind."""
    lock = runs.RunFolder(tmp_path / "run").lock.lock_file
    (tmp_path / "run").mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is training in"):
            run_training(monkeypatch, *arguments)
    finally:
        other.kill()
        other.communicate()
    run_training(monkeypatch, *arguments)
    assert len(losses(tmp_path / "run")) == 12


def test_a_variant_starts_from_a_trained_run(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(monkeypatch, *arguments)
    child = [str(ROOT / "config/mla_kv128.py"), *arguments[1:], "--kv_dim=8", f"--out_dir={tmp_path / 'child'}"]
    run_training(monkeypatch, *child, f"--init_from={tmp_path / 'run'}", "--max_iters=1")
    assert "converted: 12 tensors" in capsys.readouterr().out
    state = torch.load(tmp_path / "child" / "ckpt.pt", weights_only=True)
    assert state["parents"] == [str(tmp_path / "run")]
    assert state["tokens_seen"] == 13 * 4 * 32


# ------------------------------------------------------------------------------------------------ several processes


def test_two_processes_train_as_one_with_the_same_windows(arguments: list[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for launcher, batch, name in ((torchrun, 2, "two"), ([sys.executable], 4, "one")):
        steps = [f"--batch_size={batch}", f"--gradient_accumulation_steps={8 // batch}"]
        command = [*launcher, str(ROOT / "train.py"), *arguments, *steps, f"--out_dir={tmp_path / name}"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("one", "two"))
    for mine, theirs in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):  # of the gradients, whose size does not show in AdamW's steps
            largest = mine[moment].abs().max().item()
            torch.testing.assert_close(theirs[moment], mine[moment], atol=1e-5 * largest, rtol=0)
    # single weights may differ by more: AdamW makes a whole step even of a gradient that is rounding error
    both = [torch.nn.utils.parameters_to_vector(state["model"].values()) for state in (one, two)]
    assert (both[0] - both[1]).norm() < 1e-5 * both[0].norm()


# ------------------------------------------------------------------------------------------------------- evaluation


class Table(torch.nn.Module):
    """A model whose logits for the next token depend on the current one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head_weight = torch.eye(50304)[:, :64]
        self.table = torch.randn(50304, 64, generator=torch.Generator().manual_seed(0))

    def hidden_states(self, idx: torch.Tensor) -> torch.Tensor:
        return self.table[idx]


def test_validation_counts_every_token_once(data_dir: Path) -> None:
    tokens, model = load_tokens(data_dir / "own", "val").tokens[:997], Table()
    scores = evaluation.evaluate_val(model, tokens, 100, 3, torch.device("cpu"))
    ids = torch.from_numpy(tokens.astype(np.int64))
    log_p = (model.table[ids[:-1]].double() @ model.head_weight.T.double()).log_softmax(-1)
    expected = -log_p.gather(1, ids[1:, None])[:, 0]
    assert scores["val_tokens"] == 996
    assert scores["val_loss"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert scores["val_accuracy"] == pytest.approx((log_p.argmax(-1) == ids[1:]).double().mean().item())
    first = torch.cat([expected[s : s + 16] for s in range(0, 996, 100)]).mean().exp().item()
    assert scores["position_ppl"]["0-16"] == pytest.approx(first, rel=1e-4)
    assert list(scores["position_ppl"]) == ["0-16", "16-32", "32-64", "64-96", "96-100"]


def test_reversal_ppl_of_sentences_and_of_answers() -> None:
    tokenizer, model, pairs = load_tokenizer("neox", ROOT / "data"), Table(), get_reversal_pairs()[:5]
    scores = evaluation.evaluate_reversal_curse(model, tokenizer, pairs, torch.device("cpu"))

    def log_p(a: int, b: int) -> float:
        return (model.table[a].double() @ model.head_weight.T.double()).log_softmax(-1)[b].item()

    sentence, answer = [], []
    for pair in pairs:
        ids = tokenizer.encode(pair.backward)
        each = [-log_p(a, b) for a, b in zip([0, *ids[:-1]], ids, strict=True)]
        start = len(tokenizer.encode(pair.backward[: -len(pair.backward_answer) - 2]))
        sentence.append(np.mean(each))
        answer.append(np.mean(each[start:]))
    assert scores["reversal_backward_ppl"] == pytest.approx(math.exp(np.mean(sentence)), rel=1e-5)
    assert scores["reversal_backward_answer_ppl"] == pytest.approx(math.exp(np.mean(answer)), rel=1e-5)
    assert scores["reversal_gap"] == scores["reversal_backward_ppl"] - scores["reversal_forward_ppl"]
    assert scores["reversal_ratio"] == scores["reversal_forward_ppl"] / scores["reversal_backward_ppl"]


@pytest.mark.parametrize(
    ("ppl", "word"),
    [(4, "abnormal"), (5, "suspicious"), (99, "normal at large"), (171, "normal from scratch"), (math.inf, "under")],
)
def test_what_a_ppl_means(ppl: float, word: str) -> None:
    assert word in evaluation.ppl_meaning(ppl)


# ------------------------------------------------------------------------------------------------ what a user types


def test_the_commands_of_the_readme(arguments: list[str], data_dir: Path, tmp_path: Path) -> None:
    def type_in(*words: str) -> str:
        command = [sys.executable, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout

    folder = str(tmp_path / "run")
    assert f"python sample.py {folder}" in type_in("train.py", "config/mla_kv128.py", *arguments[1:], "--kv_dim=4")
    options = ["--tasks=val,reversal,cache", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'compare'}"]
    table = type_in("eval.py", folder, *options)
    assert re.search(r"cache B/token", table)
    results = json.loads((tmp_path / "compare" / "results.json").read_text())
    assert results["runs"][0]["cache_saved"]["2048"] == 0.875
    summary = json.loads(Path(folder, "summary.json").read_text())
    assert results["runs"][0]["val_loss"] == pytest.approx(summary["val_loss"], abs=1e-6)
    text = type_in("sample.py", folder, "--prompt=The cache", f"--data_dir={data_dir}", "--max_new_tokens=8")
    assert text.startswith("The cache")
    assert "(87.5% saved)" in text
    assert "--kv_dim=128 (int)" in type_in("train.py", "--help")


def test_a_full_disk_keeps_the_old_checkpoint(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(monkeypatch, *arguments)
    folder = runs.RunFolder(tmp_path / "run")
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # writing more fails as it does on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            folder.save({"model": torch.zeros(1_000_000)}, "ckpt.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.tmp"))
