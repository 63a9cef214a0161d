"""eval.py --tasks=wikitext,...: the harness's figures against plain loops, and what is said where it cannot measure."""

import importlib.metadata
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, randomise, status_of, type_in

import eval as evaluation
from kit.files import InputError
from kit.harness import INSTALL, Harness, find_tasks
from kit.text import load_tokenizer, write_tokenizer
from pythia_base import PythiaConfig, PythiaModel

LENGTH = 32  # tokens of a window
PAGES = (
    ' = Game = \n \n The game ( 2010 ) , a role @-@ playing one , sold 1 @,@ 000 copies . It \'s known as " it " . \n',
    " = Cache = \n = = Size = = \n A key and a value of every token are kept ; "
    + "the longer the text , the more . " * 9,
)
PASSAGES = (
    "The cache holds a key and a value for every token and the text grows",
    "A reader who comes back to the first page knows what the last one was about: the cache",
)


@pytest.fixture
def command(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """eval.py's words for a small model, in a folder where the files that tasks/*.yaml name lie."""
    config = PythiaConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_position_embeddings=64)
    randomise(PythiaModel(config), 0.5).save_pretrained(tmp_path / "hf")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in PAGES))
    (tmp_path / "data" / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = [f"--data_dir={data_dir}", "--dataset=own", f"--block_size={LENGTH}", "--device=cpu", "--batch_size=3"]
    return ["eval.py", "hf", *options, f"--include_path={ROOT / 'tasks'}"]


def find(names: list[str]) -> Harness:
    return find_tasks(names, evaluation.TASKS, str(ROOT / "tasks"))


def losses(model: PythiaModel, ids: list[int], scored: int) -> torch.Tensor:
    """Of the last of the ids, each read after as many of the others as a window holds where the harness cuts it."""
    log_p = model(torch.tensor([ids[:-1]]))[0][0].double().log_softmax(-1)
    return -log_p.gather(1, torch.tensor(ids[1:])[:, None])[-scored:, 0]


@torch.no_grad()
def test_figures_equal_plain_loops_on_local_files(
    command: list[str], data_dir: Path, is_long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """And, asked for at length, those of the harness's own command line."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    type_in(*command, "--tasks=cache,wikitext,lambada_openai")
    found = json.loads(Path("out/compare/results.json").read_text())["runs"][0]["harness"]
    assert re.search(r"wikitext word_perplexity .*lambada_openai acc ", capsys.readouterr().out)
    model, tokenizer = PythiaModel.from_pretrained("hf").eval(), load_tokenizer("neox", data_dir)
    total, words = 0.0, 0
    for page in PAGES:
        ids = [0, *tokenizer.encode(wikitext_detokenizer({"page": page}))]
        for start in range(0, len(ids) - 1, LENGTH):
            end = min(start + LENGTH, len(ids) - 1)
            total += losses(model, ids[max(0, end - LENGTH) : end + 1], end - start).sum().item()
        words += len(re.split(r"\s+", page))
    assert found["wikitext word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
    last_words = []
    for text in PASSAGES:
        context, ids = text.rpartition(" ")[0], tokenizer.encode(text)
        last_words.append(losses(model, ids, len(ids) - len(tokenizer.encode(context))).sum().item())
    assert found["lambada_openai perplexity"] == pytest.approx(math.exp(sum(last_words) / len(PASSAGES)), rel=1e-4)
    if is_long:
        model.save_pretrained("exported")
        write_tokenizer("neox", str(data_dir), Path("exported"), model.config.max_position_embeddings)
        options = f"--model_args pretrained=exported,max_length={LENGTH} --include_path {ROOT / 'tasks'}"
        options += " --model hf --device cpu --output_path theirs --tasks wikitext,lambada_openai"
        subprocess.run([sys.executable, "-m", "lm_eval", "run", *options.split()], check=True, capture_output=True)
        theirs = json.loads(next(Path("theirs").rglob("*.json")).read_text())["results"]
        for name, value in found.items():
            task, metric = name.split()
            assert theirs[task][f"{metric},none"] == pytest.approx(value, rel=1e-4)


def test_without_the_harness_the_rest_is_measured(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And logiqa is not taken for 'long'."""
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    type_in(*command, "--tasks=cache,wikitext,logiqa")
    said = capsys.readouterr().out
    assert all(re.search(f"^{name}: not measured: .*{INSTALL}$", said, re.MULTILINE) for name in ("wikitext", "logiqa"))
    assert json.loads(Path("out/compare/results.json").read_text())["runs"][0]["cache_bytes"]


def test_a_mistyped_task_is_refused_with_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the harness: tests/damage/test_bad_input.py."""
    tasks = pytest.importorskip("lm_eval.tasks")
    known = SimpleNamespace(all_tasks=["logiqa", "wikitext"], load=lambda names: None)
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: known)  # the real one lists 15,000
    assert find(["logiqa", "wikitext"]).names == ["logiqa", "wikitext"]
    for typed, meant in (("reversel", "reversal"), ("wikitexts", "wikitext")):
        with pytest.raises(InputError, match=f"no task '{typed}', did you mean '{meant}'"):
            find([typed])


def test_without_the_hub_the_rest_is_measured_and_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = pytest.importorskip("lm_eval.tasks").TaskManager

    def no_hub(self: object, names: list[str]) -> None:
        if names == ["wikitext"]:
            raise ConnectionError("Couldn't reach 'EleutherAI/wikitext_document_level' on the Hub")

    monkeypatch.setattr(manager, "load", no_hub)
    harness = find(["wikitext", "lambada_openai"])
    assert harness.names == ["lambada_openai"]
    assert "Couldn't reach" in harness.not_measured["wikitext"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.1")
    with pytest.raises(InputError, match="lm-evaluation-harness is 0"):
        find(["wikitext"])


LAMBADA = (ROOT / "tasks" / "lambada_openai.yaml").read_text().replace("lambada_openai", "own")
BROKEN = {  # a task file: what is said
    "task: [own": r"own\.yaml cannot be read \(\w+Error: ",
    "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files: gone.jsonl\n": "'own' cannot .*gone.jsonl",
    "task: own\ndataset_path: json\ndoc_to_text: !function gone.f\n": "'own' cannot be read",
    LAMBADA.replace("join", "jion"): "'own' cannot be read",
    LAMBADA.replace("' ' + text.split(' ')[-1]", f"1 // (text != '{PASSAGES[1]}')"): "own cannot be scored",  # the 2nd
}  # fmt: skip


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_task_file_is_one_line(text: str, command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=BROKEN[text]) as error:
        type_in(*command[:-1], f"--include_path={tmp_path}", "--tasks=own")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.009, 0), (1.02, 2), (None, 2)])
def test_verify_holds_figures_against_published_ones(
    factor: float | None, status: int, command: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A figure that is 2% off is one too many, and so is one that was not measured."""
    found = {} if factor is None else {"harness": {"wikitext word_perplexity": 100.0 * factor}}
    monkeypatch.setattr(evaluation, "PUBLISHED", {"wikitext word_perplexity": 100.0})
    monkeypatch.setattr(evaluation, "find_tasks", lambda *_: SimpleNamespace(score=lambda *_: found))
    assert status_of(*command, "--verify") == status
    assert ("is not as published, to 1.0%" in capsys.readouterr().err) == (status != 0)
