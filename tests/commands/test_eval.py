"""eval.py: each of its metrics against a plain computation, and which weights a row stands for."""

import json
import math
import re
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint_of, randomise, type_in

import eval as evaluation
from configurator import MODELS
from eval import EvalSettings
from kit import recall
from kit.text import get_reversal_pairs, load_tokenizer
from kit.tokens import TokenFile, load_tokens
from model_cascade import CascadeConfig, CascadeContextLLM
from model_context import ContextBlock, effective_rank, settled_share
from pythia_base import PythiaConfig, PythiaModel
from train import LMSettings

CONFIG = PythiaConfig(hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, rotary_pct=0.5)
CONFIG = replace(CONFIG, max_position_embeddings=64)


@pytest.fixture
def model() -> PythiaModel:
    torch.manual_seed(0)
    return PythiaModel(CONFIG).eval()


def save_run(folder: Path, model: PythiaModel, seed: int, **changes: Any) -> str:
    """A run's folder, as train.py leaves it."""
    config = asdict(LMSettings(dataset="few", block_size=32, seed=seed))
    data = {"tokenizer": "neox", "train_sha256": "d1" * 32}
    folder.mkdir()
    torch.save(checkpoint_of("pythia", model, config=config, data=data, **changes), folder / "ckpt.pt")
    return str(folder)


def test_a_report_says_which_weights_were_scored_and_compares_those_of_a_seed(
    model: PythiaModel, data_dir: Path, tmp_path: Path
) -> None:
    """A run, a checkpoint file or Hugging Face's weights; each against the first run of its seed, or of all."""
    first, second, same = (save_run(tmp_path / name, model, seed) for name, seed in (("a", 1), ("b", 2), ("c", 2)))
    model.save_pretrained(tmp_path / "hf")
    with torch.no_grad():
        model.embed_in.weight[:, 0] += 1
    file = save_run(tmp_path / "other", model, 1, tokens_seen=768) + "/ckpt.pt"
    options = ["--tasks=val,reversal", f"--data_dir={data_dir}", "--device=cpu", f"--out_dir={tmp_path / 'to'}"]
    type_in("eval.py", first, second, same, tmp_path / "hf", file, *options)
    results, page = json.loads((tmp_path / "to/results.json").read_text()), (tmp_path / "to/report.md").read_text()
    rows = results["runs"]
    assert [row["checkpoint"] for row in rows[2:]] == [f"{same}/ckpt.pt", str(tmp_path / "hf"), file]
    assert [row.get("steps") for row in rows] == [3, 3, 3, None, 3]
    assert rows[0]["reversal_gap"] == rows[3]["reversal_gap"] != rows[4]["reversal_gap"]
    assert results["block_size"] == 32
    assert f"{file} on 768 tokens" in page
    assert [row.get("against", {}).get("run") for row in rows] == [None, first, second, first, first]
    assert f"| {same} | {second} | +0.0% |    +0.0% | +0.0% | 1.0000 |" in re.sub(r"/c +\|", "/c |", page)
    settings = EvalSettings(data_dir=str(data_dir), dataset="own")
    assert evaluation.open_runs(settings, [str(tmp_path / "hf")])[2] == 64, "no run beside it: the longest windows"


def test_speed_is_measured_at_every_length_also_beyond_the_window(
    model: PythiaModel, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "CACHE_LENGTHS", (8, 100))
    monkeypatch.setattr(evaluation, "DECODE_TOKENS", 3)
    lengths: list[int] = []
    model.embed_in.register_forward_hook(lambda module, given, out: lengths.append(given[0].size(1)))
    speeds = evaluation.evaluate_speed(model, load_tokens(data_dir / "own", "val").tokens[:50])
    assert list(speeds) == ["prefill_tokens_per_s", "decode_tokens_per_s"]
    assert all(0 < speed[n] < math.inf for speed in speeds.values() for n in ("8", "100"))
    repeats = 1 + evaluation.SPEED_REPEATS
    assert lengths == repeats * [8, 1, 1, 1] + repeats * [100, 1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_of_a_generation_holds_weights_and_cache(model: PythiaModel, data_dir: Path) -> None:
    tokens, device = load_tokens(data_dir / "own", "val").tokens, torch.device("cuda")
    weights = sum(p.nbytes for p in model.to(device).parameters())
    for n, peak in evaluation.evaluate_speed(model, tokens)["cuda_peak_bytes"].items():
        assert peak >= weights + model.init_cache(1, int(n)).nbytes


def test_a_parameter_may_be_a_scalar_and_a_long_bias_is_no_table(model: PythiaModel) -> None:
    counts = evaluation.count_parameters(model)
    model.scale, model.shift = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.zeros(CONFIG.vocab_size))
    assert evaluation.count_parameters(model) == {
        "parameters": counts["parameters"] + 1 + CONFIG.vocab_size,
        "trainable_parameters": counts["trainable_parameters"] + 1 + CONFIG.vocab_size,
        "embedding_parameters": 2 * CONFIG.vocab_size * CONFIG.hidden_size,
    }


class Bigrams(torch.nn.Module):
    """A model whose logits for the next token depend on the current one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head_weight, self.table = torch.randn(2, 50304, 16, generator=torch.Generator().manual_seed(0))

    def hidden_states(self, idx: torch.Tensor) -> torch.Tensor:
        return self.table[idx]

    def losses(self, ids: list[int]) -> np.ndarray:
        """Of all tokens but the first, in float64."""
        log_p = (self.table[ids[:-1]].double() @ self.head_weight.T.double()).log_softmax(-1)
        return -log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("num_tokens", [1000, 1001, 90])  # the last window is short, full, the only one
def test_validation_counts_every_token_once(num_tokens: int, data_dir: Path) -> None:
    val, model = load_tokens(data_dir / "own", "val"), Bigrams()
    tokens = val.tokens[:num_tokens]
    scores = evaluation.evaluate_val(model, replace(val, tokens=tokens), 100, 3)
    losses = model.losses(tokens.tolist())
    best = (model.table[tokens[:-1].astype(int)] @ model.head_weight.T).argmax(-1).numpy()
    assert scores["val_tokens"] == num_tokens - 1
    assert scores["val_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert scores["val_accuracy"] == pytest.approx((best == tokens[1:]).mean())
    second = np.concatenate([losses[s + 16 : s + 64] for s in range(0, num_tokens - 1, 100)])
    assert scores["position_ppl"]["16-64"] == pytest.approx(np.exp(second.mean()), rel=1e-4)
    assert list(scores["position_ppl"]) == ["0-16", "16-64", "64-100"]
    begins = [start for start in val.doc_index["start"] if start < num_tokens - 1]
    documents = [losses[start:end].sum() for start, end in pairwise([*begins, None])]
    np.testing.assert_allclose(scores["document_losses"], documents, rtol=1e-5)
    model.table[tokens[-2]] = math.nan
    broken = evaluation.evaluate_val(model, replace(val, tokens=tokens), 100, 3)
    assert broken["val_loss"] == broken["val_ppl"] == math.inf, "no number is not left out"


def test_a_difference_between_models_is_one_that_other_documents_would_show_too() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(50, 400, size=300)
    others = lengths * rng.normal(5, 1, size=300)  # documents differ far more than models do
    shifts = lengths * rng.normal(0.01, 0.1, size=300)
    found = evaluation.compare_documents(others + shifts, others, lengths)
    means, weights = shifts / lengths, lengths / lengths.sum()
    assert found["loss"] == pytest.approx(weights @ means)
    spread = np.sqrt(weights**2 @ (means - found["loss"]) ** 2)  # of a ratio of two sums
    for end, side in (("low", -1.96), ("high", 1.96)):
        assert found[end] - found["loss"] == pytest.approx(side * spread, rel=0.1)
    z = found["loss"] / spread
    assert 0.01 < found["p"] == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.3)
    swapped = evaluation.compare_documents(others, others + shifts, lengths)
    assert [swapped[key] for key in ("loss", "p")] == pytest.approx([-found["loss"], found["p"]], rel=0.1)
    assert evaluation.compare_documents(others, others, lengths)["p"] == 1
    flipped = others + shifts * rng.choice([-1, 1], size=300)  # no difference but the documents'
    assert evaluation.compare_documents(flipped, others, lengths)["p"] > 0.05
    for few in (1, 4):
        assert evaluation.compare_documents(others[:few] + 1, others[:few], lengths[:few])["p"] == 2 ** (1 - few)


def test_recall_groups_equal_a_search_of_the_windows(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each bigram in what its window has shown, and with a count of all those of the training text."""
    whole, train_tokens = load_tokens(data_dir / "own", "val"), load_tokens(data_dir / "own", "train").tokens.tolist()
    val = replace(whole, tokens=whole.tokens[:3000])
    bigrams, counts = list(pairwise(val.tokens.tolist())), Counter(pairwise(train_tokens))
    found = [counts[pair] if pair in bigrams[i - i % 128 : i] else -1 for i, pair in enumerate(bigrams)]
    kinds = {"0": [0], "1-10": range(1, 11), "0-10": range(11), "more": range(11, 10**9), "others": [-1]}
    expected = {name: [i for i, count in enumerate(found) if count in kind] for name, kind in kinds.items()}
    monkeypatch.setattr(recall, "CHUNK", 1000)
    assert recall.training_counts(val).tolist() == [counts[pair] for pair in bigrams]
    for _ in range(2):  # counted, and read from the file that keeps the counts
        groups = recall.recall_groups(val, 128)
        assert {name: places.tolist() for name, places in groups.items()} == expected
    assert all(expected.values())


class Recall(torch.nn.Module):
    """A model that repeats what followed the last time it saw a token, if that is among the last tokens it keeps."""

    def __init__(self, keeps: int) -> None:
        super().__init__()
        self.head_weight, self.keeps = torch.randn(50304, 64, generator=torch.Generator().manual_seed(0)), keeps

    def hidden_states(self, idx: torch.Tensor) -> torch.Tensor:
        h, rows = torch.zeros(*idx.shape, 64), idx.tolist()
        for b, t in np.ndindex(*idx.shape):
            before = [i for i in range(max(0, t - self.keeps), t) if rows[b][i] == rows[b][t]]
            h[b, t] = self.head_weight[rows[b][before[-1] + 1]] / 8 if before else 0
        return h


def test_a_cache_of_the_last_16_tokens_loses_more_on_hits_than_on_the_others(data_dir: Path) -> None:
    val = load_tokens(data_dir / "own", "val")
    val = replace(val, tokens=val.tokens[:1025])
    full, cut = (evaluation.evaluate_val(Recall(keeps), val, 256, 4)["recall_loss"] for keeps in (256, 16))
    lost = {name: cut[name] - full[name] for name in full}
    assert lost["0-10"] > 1
    assert lost["0-10"] > lost["others"] + 1
    assert full["0-10"] < full["others"]


def test_reversal_ppl_of_sentences_and_of_answers(data_dir: Path) -> None:
    """An answer lies between the verb and the full stop, which is a token of its own and no part of it."""
    tokenizer, model, pairs = load_tokenizer("neox", data_dir), Bigrams(), get_reversal_pairs()
    scores = evaluation.evaluate_reversal_curse(model, tokenizer, pairs, torch.device("cpu"))
    for way in ("forward", "backward"):
        whole, answers = [], []
        for pair in pairs:
            text, answer = getattr(pair, way), getattr(pair, f"{way}_answer")
            ids, start = tokenizer.encode(text), len(tokenizer.encode(text[: -len(answer) - 2]))
            assert [tokenizer.decode(part) for part in (ids[start:-1], ids[-1:])] == [f" {answer}", "."]
            losses = model.losses([0, *ids])
            whole.append(losses.mean())
            answers.append(losses[start:-1].mean())
        assert scores[f"reversal_{way}_ppl"] == pytest.approx(np.exp(np.mean(whole)), rel=1e-4)
        assert scores[f"reversal_{way}_answer_ppl"] == pytest.approx(np.exp(np.mean(answers)), rel=1e-4)
    for part in ("", "answer_"):
        forward, backward = scores[f"reversal_forward_{part}ppl"], scores[f"reversal_backward_{part}ppl"]
        assert scores[f"reversal_{part}gap"] == backward - forward
        assert scores[f"reversal_{part}ratio"] == forward / backward


BLOCK = 32  # of a long document


def split_documents(data: TokenFile) -> list[np.ndarray]:
    """Every document with the end-of-text tokens before and behind it, found in the stream itself."""
    edges = np.flatnonzero(data.tokens == 0)
    return [np.array(data.tokens[a : b + 1], dtype=np.int64) for a, b in pairwise(edges)]


def make_long_model(name: str) -> Any:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    config_class, model_class = MODELS[name]
    return randomise(model_class(config_class(**sizes, **({"segment_len": 8} if name == "infini" else {}))), 0.6)


@torch.no_grad()
def plain_ppl(model: Any, documents: list[np.ndarray], carried: bool) -> list[float]:
    """PPL of each window, and of all after the first: one document, one window after the other."""
    scored: list[list[torch.Tensor]] = [[] for _ in range(evaluation.LONG_WINDOWS)]
    for document in documents:
        memory = {"cache": model.init_memory(1)} if carried else {}
        tokens = torch.from_numpy(document)[None, : evaluation.LONG_WINDOWS * BLOCK + 1]
        for window, targets in enumerate(tokens[:, 1:].split(BLOCK, dim=1)):
            idx = tokens[:, window * BLOCK :][:, : targets.size(1)]
            padded = torch.nn.functional.pad(idx, (0, BLOCK - targets.size(1)), value=1)
            log_p = model(padded, **memory)[0].double().log_softmax(-1)[:, : targets.size(1)]
            scored[window].append(-log_p.gather(2, targets[..., None]).ravel())
    parts = [*scored, [losses for window in scored[1:] for losses in window]]
    return [torch.cat(part).mean().exp().item() for part in parts]


@pytest.mark.parametrize("name", ["infini", "pythia"])
def test_ppl_per_window_equals_a_loop_over_the_documents(name: str, data_dir: Path) -> None:
    data, model = load_tokens(data_dir / "few", "val"), make_long_model(name)
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


def test_a_document_that_just_fills_two_windows_is_long(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And where none is, or a segment ends within a window, nothing is measured."""
    data, model = load_tokens(data_dir / "own", "val"), make_long_model("pythia")
    lengths = [len(document) - 1 for document in split_documents(data)]
    longest = max(length for length in lengths if length % 2 == 0)
    results = evaluation.evaluate_long(model, data, longest // 2, 3)
    assert results["long_documents"] == sum(length >= longest for length in lengths)
    assert evaluation.evaluate_long(model, data, len(data.tokens), 3) == {}
    assert evaluation.evaluate_long(make_long_model("infini"), data, 20, 3) == {}
    assert "windows of 20 end within a segment" in capsys.readouterr().err


def test_ranks_of_contexts_and_whether_they_settle_with_the_settings_of_the_run(data_dir: Path) -> None:
    torch.manual_seed(0)
    model = CascadeContextLLM(CascadeConfig(vocab_size=50304, hidden_size=8, context_dim=6, num_context_blocks=2))
    tokens = load_tokens(data_dir / "own", "val").tokens
    trained = [{"iterations": 22, "noise": noise, "threshold": 0.02, "num_tokens": 1000} for noise in (0.1, 0.2)]
    results = evaluation.evaluate_contexts(model, tokens, trained)
    ids, table = torch.from_numpy(tokens[:1000].astype("int64")), model.embed_in.weight
    with torch.no_grad():
        expected = [block.recurrence(table[ids][None], None)[0] for block in model.context_blocks]
        settled = partial(settled_share, table=table, tokens=ids, iterations=22, threshold=0.02)
        rates = [settled(block, noise=n) for block, n in zip(model.context_blocks, (0.1, 0.2), strict=True)]
    assert results["context_effective_ranks"] == pytest.approx([effective_rank(c) for c in expected], rel=1e-3)
    assert results["context_effective_rank"] == pytest.approx(effective_rank(torch.cat(expected, dim=1)), rel=1e-3)
    assert results["context_dim"] == 12
    assert results["context_rank_share"] == results["context_effective_rank"] / 12
    assert results["context_convergence_rates"] == rates
    assert "context_convergence_rates" not in evaluation.evaluate_contexts(model, tokens[:1000], [])


@torch.no_grad()
def test_convergence_is_that_of_the_last_shifted_pass_against_the_one_before(data_dir: Path) -> None:
    """Two blocks: one whose tokens outweigh the state settles, one whose state outweighs the tokens does not."""
    torch.manual_seed(0)
    ids = torch.from_numpy(load_tokens(data_dir / "own", "val").tokens[:300].astype("int64"))
    table, rates, trained = torch.randn(50304, 8), [], {"noise": 0.05, "threshold": 0.03}
    for scale in (30.0, 0.1):
        block = ContextBlock(8, 6, 1, 1e-5, "normal", embed_norm=True)
        block.linears[0].weight[:, 6:] *= scale
        torch.manual_seed(0)
        new = 0.01 * torch.randn(300, 6)
        for _ in range(30):
            old, noise = new, 0.05 * torch.randn(300, 6)
            new = block(torch.cat([torch.zeros(1, 6), old[:-1]]) + noise, table[ids])
        expected = ((new - old).square().mean(dim=1) < 0.03).double().mean().item()
        few, more, enough = (settled_share(block, table, ids, iterations=n, **trained) for n in (1, 20, 30))
        assert enough == pytest.approx(expected, abs=1 / 300)
        assert few == more
        rates.append(enough)
    assert rates[0] > 0.95
    assert rates[1] < 0.5


def test_a_block_that_failed_in_training_shows_it_from_phase_1_to_the_report(data_dir: Path, tmp_path: Path) -> None:
    words = ["--hidden_size=16", "--num_layers=1", "--num_heads=2", "--intermediate_size=32", "--context_dim=8"]
    words += [f"--data_dir={data_dir}", "--dataset=few", "--device=cpu"]
    settled = ["--num_tokens=2000", "--max_iterations=22", "--convergence_threshold=0.02", "--context_noise=0.1"]
    settled += ["--learning_rate=0.0"]
    steps = ["--max_iters=1", "--block_size=32", "--eval_iters=1", f"--init_from={tmp_path / 'one'}"]
    score = ["--tasks=val", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--device=cpu"]
    for config, folder, more in (("phase1", "one", settled), ("phase2", "two", steps)):
        type_in("train.py", ROOT / f"config/{config}.py", *words, *more, f"--out_dir={tmp_path / folder}")
    type_in("eval.py", tmp_path / "two", *score)
    found = [json.loads((tmp_path / n).read_text()) for n in ("one/summary.json", "two/summary.json", "results.json")]
    (rate,) = found[0]["context_convergence_rates"]
    assert rate < 0.9
    assert found[1]["trainable_parameters"] == found[2]["runs"][0]["trainable_parameters"] < found[1]["parameters"]
    assert found[1]["context_convergence_rates"] == found[2]["runs"][0]["context_convergence_rates"] == [rate]
