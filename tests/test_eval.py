"""eval.py's command line: which weights a row stands for, what they were trained on, --verify; speed and memory."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import checkpoint_of

import eval as evaluation
from benchmarks import Document, evaluate_lambada
from eval import EvalSettings
from kit.files import InputError
from kit.text import load_tokenizer
from kit.tokens import load_tokens
from model_cascade import CascadeConfig, CascadeContextLLM
from model_context import effective_rank
from pythia_base import PythiaConfig, PythiaModel
from train import LMSettings

CPU = torch.device("cpu")
TEXT = "The cache holds a key and a value for every token, and the longer the text is, the larger grows the cache"
CONFIG = PythiaConfig(hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, rotary_pct=0.5)
CONFIG = replace(CONFIG, max_position_embeddings=64)


@pytest.fixture
def model() -> PythiaModel:
    torch.manual_seed(0)
    return PythiaModel(CONFIG).eval()


@pytest.fixture
def options(data_dir: Path, tmp_path: Path) -> list[str]:
    """A command line on local files."""
    (tmp_path / "lambada.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    files = [f"--lambada={tmp_path / 'lambada.jsonl'}", f"--out_dir={tmp_path / 'compare'}"]
    return [*files, "--tasks=lambada", f"--data_dir={data_dir}", "--device=cpu"]


def save_run(folder: Path, model: PythiaModel, data_dir: Path, **changes: Any) -> str:
    """A run's folder, as train.py leaves it."""
    files = {split: load_tokens(data_dir / "own", split).digest for split in ("train", "val")}
    checkpoint = checkpoint_of(
        "pythia",
        model,
        config=asdict(LMSettings(dataset="own", block_size=32)),
        data={"tokenizer": "neox", "train_sha256": files["train"], "val_sha256": files["val"]},
        tokens_seen=384,
    )
    folder.mkdir()
    torch.save({**checkpoint, **changes}, folder / "ckpt.pt")
    return str(folder)


def type_in(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    evaluation.main()


def test_a_report_says_which_weights_were_scored_and_on_what_they_were_trained(
    model: PythiaModel, options: list[str], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run", model, data_dir)
    model.save_pretrained(tmp_path / "hf")
    with torch.no_grad():
        model.embed_in.weight[:, 0] += 1
    other = save_run(tmp_path / "other", model, data_dir, tokens_seen=768)
    type_in(monkeypatch, run, str(tmp_path / "hf"), other, *options)
    results = json.loads((tmp_path / "compare" / "results.json").read_text())
    first, weights, second = results["runs"]
    assert first["checkpoint"] == str(tmp_path / "run" / "ckpt.pt")
    assert first["steps"] == 3
    assert first["weights_sha256"] == weights["weights_sha256"] != second["weights_sha256"]
    assert first["lambada_ppl"] == weights["lambada_ppl"] != second["lambada_ppl"]
    assert results["block_size"] == 32
    (warning,) = results["warnings"]
    assert f"{other} on 768 tokens" in warning
    documents = len(load_tokens(data_dir / "own", "val").doc_index)
    assert first["overlap"]["val"]["documents"] == documents
    assert first["overlap"]["lambada"] == {
        "documents": 1, "too_short": 0, "sharing_13_words": 0, "in_training_text": 0
    }  # fmt: skip
    assert weights["overlap"] == {"not_measured": "its training text is not known"}


def test_runs_on_the_same_tokens_are_not_flagged() -> None:
    row: dict[str, Any] = {"run": "out/a", "tokens_seen": 8, "data": {"train_sha256": "0123456789"}}
    assert evaluation.training_differences([row, {**row, "run": "out/b"}]) == []
    longer, elsewhere = {**row, "tokens_seen": 9}, {**row, "data": {"train_sha256": "abcdefghij"}}
    for other in (longer, elsewhere, {"run": "hub/id"}):
        assert len(evaluation.training_differences([row, other])) == 1


def test_whole_documents_in_the_training_text_are_flagged() -> None:
    counts = {"val": {"in_training_text": 0}, "lambada": {"in_training_text": 2}}
    rows = [{"run": "out/a", "overlap": counts}, {"run": "hub/id", "overlap": {"not_measured": "unknown"}}]
    assert evaluation.overlap_warnings(rows) == ["2 documents of lambada stand in the training text of out/a"]


def test_the_search_says_when_the_training_text_is_gone(model: PythiaModel, data_dir: Path) -> None:
    settings, val = EvalSettings(data_dir=str(data_dir)), load_tokens(data_dir / "own", "val")
    texts = {"lambada": [Document(TEXT, "")]}
    checkpoint = {"config": {"dataset": "own"}, "data": {"train_sha256": "of another day"}}
    (counts,) = evaluation.search_overlap(settings, [("out/a", model, checkpoint)], texts, val)
    assert counts == {"not_measured": f"{data_dir / 'own'} holds other text now"}


def test_hugging_face_weights_alone_are_scored_in_the_longest_windows(model: PythiaModel, data_dir: Path) -> None:
    settings = EvalSettings(data_dir=str(data_dir), dataset="own")
    assert evaluation.data_of(settings, [("hf", model, {})]) == (data_dir / "own", 64)
    run = {"config": {"block_size": 32, "dataset": "own"}, "data": {"tokenizer": "neox"}}
    assert evaluation.data_of(settings, [("hf", model, {}), ("out/a", model, run)])[1] == 32


# ------------------------------------------------------------------------------------------------------- --verify


@pytest.mark.parametrize(("factor", "status"), [(1.005, 0), (0.995, 0), (1.05, 1), (0.95, 1)])
def test_verify_holds_figures_against_published_ones(
    model: PythiaModel,
    options: list[str],
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    status: int,
) -> None:
    model.save_pretrained(tmp_path / "hf")
    tokenizer = load_tokenizer("neox", data_dir)
    measured = evaluate_lambada(model, [Document(TEXT, "")], tokenizer, 64, 8, CPU)["lambada_ppl"]
    monkeypatch.setattr(evaluation, "PUBLISHED", {"lambada_ppl": factor * measured})
    with pytest.raises(SystemExit) as end:
        type_in(monkeypatch, str(tmp_path / "hf"), "--verify", *options)
    assert end.value.code == status
    assert f"{1 / factor - 1:+.2%}" in capsys.readouterr().out


def test_verify_without_a_hub_is_one_line(
    model: PythiaModel, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub(*arguments: Any) -> Any:
        raise InputError("the hub cannot be reached")

    monkeypatch.setattr("benchmarks.hub_revision", no_hub)
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(InputError, match="nothing can be verified: the hub cannot be reached"):
        type_in(monkeypatch, str(tmp_path / "hf"), "--verify", *options, "--tasks=lambada,pile")
    with pytest.raises(InputError, match="could not be had from the hub"):
        type_in(monkeypatch, str(tmp_path / "none"), "--verify", *options)


# --------------------------------------------------------------------------------------------------- speed, memory


def test_speed_is_measured_at_every_length_also_beyond_the_window(
    model: PythiaModel, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "CACHE_LENGTHS", (8, 100))
    monkeypatch.setattr(evaluation, "DECODE_TOKENS", 3)
    lengths: list[int] = []
    model.embed_in.register_forward_hook(lambda module, given, out: lengths.append(given[0].size(1)))
    speeds = evaluation.evaluate_speed(model, load_tokens(data_dir / "own", "val").tokens[:50], CPU)
    assert list(speeds) == ["prefill_tokens_per_s", "decode_tokens_per_s"]
    assert all(0 < speed[n] < math.inf for speed in speeds.values() for n in ("8", "100"))
    warm_up, repeats = [8, 1, 1], evaluation.SPEED_REPEATS
    assert lengths == warm_up + repeats * [8, 1, 1, 1] + repeats * [100, 1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_of_a_generation_holds_weights_and_cache(model: PythiaModel, data_dir: Path) -> None:
    tokens, device = load_tokens(data_dir / "own", "val").tokens, torch.device("cuda")
    peaks = evaluation.generation_peak(model.to(device), tokens, device)
    assert peaks["cuda_bytes_before"] >= sum(p.nbytes for p in model.parameters())
    for n, peak in peaks["cuda_peak_bytes"].items():
        assert peak >= peaks["cuda_bytes_before"] + model.init_cache(1, int(n)).nbytes


# -------------------------------------------------------------------------------------------------------- contexts


def test_ranks_and_convergence_of_contexts(data_dir: Path) -> None:
    """Of blocks with the exact recurrence; without noise the exact contexts are at rest."""
    torch.manual_seed(0)
    model = CascadeContextLLM(CascadeConfig(vocab_size=50304, hidden_size=8, context_dim=6, num_context_blocks=2))
    tokens = load_tokens(data_dir / "own", "val").tokens[:3000]
    results = evaluation.evaluate_contexts(model, tokens)
    ids, table = torch.from_numpy(tokens.astype("int64")), model.embed_in.weight
    with torch.no_grad():
        expected = [block.recurrence(table[ids][None], None)[0] for block in model.context_blocks]
        _, rate = evaluation.heldout_contexts(model.context_blocks[0], table, ids, 1e-9, 0.0)
    assert results["context_effective_ranks"] == pytest.approx([effective_rank(c) for c in expected], rel=1e-3)
    assert results["context_effective_rank"] == pytest.approx(effective_rank(torch.cat(expected, dim=1)), rel=1e-3)
    assert results["context_dim"] == 12
    assert rate == 1
    assert all(0 <= rate <= 1 for rate in results["context_convergence_rates"])
