"""A model leaves the project: a folder that transformers loads where this project is not."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, checkpoint_of, randomise, status_of, type_in

from configurator import MODELS
from kit.text import write_tokenizer

WIDTHS: dict[str, Any] = {"vocab_size": 50_304, "hidden_size": 32, "num_layers": 3, "num_heads": 4}
WIDTHS |= {"intermediate_size": 48, "context_dim": 12, "kv_dim": 12, "segment_len": 8, "num_memory_banks": 2}
WIDTHS |= {"context_interval": 4, "max_contexts": 3}

# runs in an environment of its own: prints what it found, for the test to judge
LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
found = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    expected = torch.load(folder + "/expected.pt")
    idx, mask = expected["idx"], torch.ones_like(expected["idx"])
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        figures = {"class": type(model).__name__, "ids": tokenizer("Hello world").input_ids}
        figures["off"] = (model(idx).logits - expected["logits"]).abs().max().item()
        figures["greedy"] = torch.equal(model.generate(idx, max_new_tokens=24, **options), expected["text"])
        options |= {"max_new_tokens": 5, "num_beams": 3}
        figures["beams"] = torch.equal(model.generate(idx, **options), model.generate(idx, use_cache=False, **options))
        figures["loss"] = model(idx, labels=idx).loss.item()
        model(idx, attention_mask=mask.tril(idx.size(1) - 3).bool())  # padded on the right
        for name, inputs in {"padded": {"attention_mask": 1 - mask.tril()}, "unknown": {"inputs_embeds": mask}}.items():
            try:
                model(idx, **inputs)
                figures[name] = ""
            except ValueError as error:
                figures[name] = str(error)
    found[folder] = figures
print(json.dumps(found))
"""


def narrow(name: str) -> Any:
    config_class, model_class = MODELS[name]
    widths = {field.name: WIDTHS[field.name] for field in fields(config_class) if field.name in WIDTHS}
    return randomise(model_class(config_class(**widths)))


def test_a_model_is_the_same_where_the_project_is_not(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    version, packages = request.config.getoption("--transformers"), tmp_path / "packages"
    if version:
        install = ["-m", "pip", "install", "--quiet", f"--target={packages}", f"transformers=={version}"]
        subprocess.run([sys.executable, *install], check=True)
    idx, given = torch.randint(50_277, (2, 40), generator=torch.Generator().manual_seed(1)), {}
    for name in MODELS:
        model, folder = narrow(name), tmp_path / name
        model.save_pretrained(folder)
        write_tokenizer("neox", str(ROOT / "data"), folder, model.config.max_position_embeddings)
        with torch.no_grad():
            given[name] = {"idx": idx, "logits": model(idx)[0], "text": model.generate(idx, 24, temperature=0.0)}
        torch.save(given[name], folder / "expected.pt")
    command = [sys.executable, "-P", "-c", LOAD, *MODELS]
    environment = {**os.environ, "PYTHONPATH": str(packages), "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    for name, figures in json.loads(ended.stdout.splitlines()[-1]).items():
        assert figures["class"] == ("GPTNeoXForCausalLM" if name == "pythia" else "ExportedModel")
        assert figures["off"] < 1e-5
        assert figures["ids"] == [12092, 1533]
        assert figures["greedy"]
        assert figures["beams"]
        loss = torch.nn.functional.cross_entropy(given[name]["logits"][:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        assert figures["loss"] == pytest.approx(loss.item(), abs=1e-5)
        if name != "pythia":
            assert "padding" in figures["padded"]
            assert "inputs_embeds" in figures["unknown"]


def test_a_run_becomes_a_folder_with_a_card_also_if_its_push_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    run, folder, options = tmp_path / "run", tmp_path / "new" / "mla", f"--data_dir={ROOT / 'data'}"
    run.mkdir()
    torch.save(checkpoint_of("mla", narrow("mla"), commit="0123abcd"), run / "ckpt.pt")
    (run / "summary.json").write_text(json.dumps({"val_ppl": 123.4, "val_accuracy": 0.256, "checkpoint": str(run)}))
    assert status_of("tools.export", run, folder, "--push_to_hub=me/mla", options) == 2
    assert f"{folder} is whole, but me/mla cannot be pushed" in capsys.readouterr().err
    card = (folder / "README.md").read_text()
    for fact in ("123.4", "25.6%", "0123abcd", "96 tokens of own", '"me/mla", trust_remote_code=True', "cache B/token"):
        assert fact in card
    assert str(tmp_path) not in card, "a path of this machine"
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["mla"]
    torch.save(checkpoint_of("pythia", narrow("pythia")), run / "ckpt.pt")
    type_in("tools.export", run, tmp_path / "pythia", options)
    card = (tmp_path / "pythia" / "README.md").read_text()
    assert f'from_pretrained("{tmp_path / "pythia"}")' in card
    assert not re.search("trust_remote_code|its code|padding", card), "the baseline has no code of its own"
