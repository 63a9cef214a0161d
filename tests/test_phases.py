"""Phase 1 and phase 2 as train.py runs them: exact resuming, what stays frozen, what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as evaluation
import train
from kit.files import InputError
from model_context import oacd_iteration

ROOT = Path(__file__).parents[1]
NARROW = ["--hidden_size=16", "--num_layers=2", "--num_heads=2", "--intermediate_size=32", "--context_dim=8"]
PHASE_1 = ["--num_tokens=2000", "--batch_size=500", "--max_iterations=9", "--checkpoint_interval=2"]
YOUNG = [*PHASE_1, "--max_iterations=1", "--seed=1"]  # magnifies rounding little, which one of 8 numbers need not
PHASE_2 = ["--block_size=32", "--gradient_accumulation_steps=1", "--max_iters=4", "--eval_interval=2", "--eval_iters=1"]


@pytest.fixture
def here(data_dir: Path) -> list[str]:
    return [*NARROW, f"--data_dir={data_dir}", "--dataset=own", "--device=cpu"]


def run(monkeypatch: pytest.MonkeyPatch, config: str, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", str(ROOT / "config" / config), *words])
    train.main()


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "ckpt.pt", weights_only=True)


class PowerCut(BaseException):
    """Ends a run at a moment that nothing in it expects."""


def test_phase_1_cut_off_ends_as_if_it_had_not_been(
    here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*here, *PHASE_1, "--early_stopping_threshold=1.1"]
    run(monkeypatch, "phase1.py", *words, f"--out_dir={tmp_path / 'whole'}")
    iteration, calls = oacd_iteration, [0]
    for last in (1, 4, 3):  # of the calls that this process makes
        calls[0] = 0

        def interrupted(*args: Any, last: int = last, **keys: Any) -> tuple[float, float]:
            calls[0] += 1
            if calls[0] > last:
                raise PowerCut
            return iteration(*args, **keys)

        monkeypatch.setattr(train, "oacd_iteration", interrupted)
        with pytest.raises(PowerCut):
            run(monkeypatch, "phase1.py", *words, f"--out_dir={tmp_path / 'cut'}")
    monkeypatch.setattr(train, "oacd_iteration", iteration)
    run(monkeypatch, "phase1.py", *words, f"--out_dir={tmp_path / 'cut'}")
    whole, cut = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut"))
    assert whole["blocks"] == cut["blocks"]
    assert whole["blocks"][0]["iterations"] == 9
    models = [checkpoint(tmp_path / name)["model"] for name in ("whole", "cut")]
    torch.testing.assert_close(*models, atol=0, rtol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))


@pytest.mark.parametrize(
    ("first", "second", "more"),
    [("phase1", "phase2", []), ("context_kv_phase1", "context_kv_phase2", ["--context_interval=4"])],
)
def test_phase_2_trains_all_but_what_the_contexts_depend_on(
    first: str, second: str, more: list[str], here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, f"{first}.py", *here, *PHASE_1, f"--out_dir={tmp_path / 'one'}")
    words = [*here, *PHASE_2, f"--init_from={tmp_path / 'one'}", "--weight_decay=0.5", "--dtype=float32"]
    run(monkeypatch, f"{second}.py", *words, *more, f"--out_dir={tmp_path / 'two'}")
    before, after = checkpoint(tmp_path / "one")["model"], checkpoint(tmp_path / "two")["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) - changed == {n for n in before if n.startswith(("context_block", "embed_in"))}
    assert checkpoint(tmp_path / "two")["parents"] == [str(tmp_path / "one")]
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert {"val_ppl", "reversal_ratio", "cache_bytes_per_token"} <= set(summary)


def test_a_run_of_phase_1_is_not_scored_as_a_language_model(
    here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "phase1.py", *here, *PHASE_1, f"--out_dir={tmp_path / 'one'}")
    with pytest.raises(InputError, match="was never trained on text"):
        evaluation.open_runs([str(tmp_path / "one")], allow_untrained=False)
    assert len(evaluation.open_runs([str(tmp_path / "one")], allow_untrained=True)) == 1


@pytest.mark.parametrize("stride", [1, 50])
def test_phase_2_reads_the_exact_contexts_of_its_windows(
    stride: int, here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "phase1.py", *here, *YOUNG, f"--out_dir={tmp_path / 'one'}")
    batches: list[tuple[train.Phase2Trainer, int, dict[str, torch.Tensor]]] = []
    training_batch = train.Phase2Trainer.training_batch

    def recorded(self: train.Phase2Trainer, starts: Any) -> dict[str, torch.Tensor]:
        batches.append((self, starts[0], training_batch(self, starts)))
        return batches[-1][-1]

    monkeypatch.setattr(train.Phase2Trainer, "training_batch", recorded)
    monkeypatch.setattr(train.LMTrainer, "finish", lambda self: None)
    words = [*here, *PHASE_2, f"--init_from={tmp_path / 'one'}", f"--out_dir={tmp_path / 'two'}"]
    run(monkeypatch, "phase2.py", *words, f"--context_stride={stride}")
    trainer, start, batch = batches[-1]
    stream = torch.from_numpy(trainer.train_data.tokens[: start + 32].astype("int64"))
    assert torch.equal(stream[start:], batch["idx"][0])
    exact = trainer.model.context_block.recurrence(trainer.model.embed_in(stream)[None], None)[0]
    torch.testing.assert_close(batch["contexts"][0], exact[-32:].detach(), atol=1e-5, rtol=0)


def test_phase_2_learns_the_same_from_one_context_in_so_many(
    here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 32 tokens, one context kept per 50. The run that is compared is cut off with the full cache."""
    run(monkeypatch, "context_kv_phase1.py", *here, *YOUNG, f"--out_dir={tmp_path / 'one'}")
    words = [*here, *PHASE_2, f"--init_from={tmp_path / 'one'}", "--dtype=float32", "--warmup_iters=0"]
    monkeypatch.setattr(train.LMTrainer, "finish", lambda self: None)
    run(monkeypatch, "context_kv_phase2.py", *words, f"--out_dir={tmp_path / 'full'}")
    train_step = train.LMTrainer.train_step
    steps: list[int] = []

    def interrupted(self: train.LMTrainer) -> torch.Tensor:
        if len(steps) == 3:
            raise PowerCut
        steps.append(self.step)
        return train_step(self)

    monkeypatch.setattr(train.LMTrainer, "train_step", interrupted)
    with pytest.raises(PowerCut):
        run(monkeypatch, "context_kv_phase2.py", *words, f"--out_dir={tmp_path / 'cut'}")
    steps.clear()
    run(monkeypatch, "context_kv_phase2.py", *words, "--context_stride=50", f"--out_dir={tmp_path / 'cut'}")
    assert steps == [2, 3], "it goes on from the checkpoint of step 2"
    torch.testing.assert_close(losses(tmp_path / "cut"), losses(tmp_path / "full"), atol=1e-5, rtol=0)


def losses(folder: Path) -> torch.Tensor:
    """The training loss of every step of a run of 4."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = torch.tensor([loss for entry in entries for loss in entry.get("losses", [])])
    assert found.shape == (4,)
    return found
