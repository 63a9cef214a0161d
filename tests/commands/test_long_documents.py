"""PPL per window of long documents: the memory carried, and reset before each window."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_training

import eval as evaluation
from configurator import MODELS
from kit.report import format_comparison
from kit.tokens import TokenFile, load_tokens

BLOCK = 32


def randomise(model: Any) -> Any:
    """Weights large enough for a memory to show in the loss."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    return model


def split_documents(data: TokenFile) -> list[np.ndarray]:
    """Every document with the end-of-text tokens before and behind it, found in the stream itself."""
    edges = np.flatnonzero(data.tokens == 0)
    return [np.array(data.tokens[a : b + 1], dtype=np.int64) for a, b in pairwise(edges)]


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
    results = evaluation.evaluate_long(model, data, BLOCK, 3)
    lengths = [min(len(document) - 1, evaluation.LONG_WINDOWS * BLOCK) for document in documents]
    assert results["long_documents"] == len(documents)
    assert results["long_tokens"]["8"] == sum(max(0, length - 7 * BLOCK) for length in lengths) < BLOCK * len(documents)
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
    results = evaluation.evaluate_long(make_model("pythia"), data, longest // 2, 3)
    assert results["long_documents"] == sum(length >= longest for length in lengths)


def test_where_nothing_fits_nothing_is_measured(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_tokens(data_dir / "own", "val")
    assert evaluation.evaluate_long(make_model("pythia"), data, len(data.tokens), 3) == {}
    assert evaluation.evaluate_long(make_model("infini"), data, 20, 3) == {}
    assert "windows of 20 end within a segment" in capsys.readouterr().err


def test_the_figures_reach_summary_and_comparison(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(ROOT / "config/infini_long.py"), *TINY, "--segment_len=8", "--tokens_per_doc=128", "--batch_size=2"]
    words += ["--gradient_accumulation_steps=1", "--max_iters=1", "--eval_iters=1", "--dataset=own", "--device=cpu"]
    run_training(*words, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert re.search(rf"memory reset +\| +{summary['long_ppl_reset']['after 1']:.1f} ", capsys.readouterr().out)
    run = {"run": "out/it", "data": {"train_sha256": ""}, **summary}
    page = format_comparison({"data": "own", "block_size": 32, "runs": [run]})
    lines = page.split("## Long documents")[1].splitlines()[4:7]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["it", "it, memory reset", "tokens"]
    assert [row[-1] for row in rows[:2]] == [f"{summary[key]['after 1']:.1f}" for key in ("long_ppl", "long_ppl_reset")]
