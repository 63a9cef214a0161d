"""The cascade against plain loops; its tables, its two phases, and what they refuse."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import checkpoint_of
from torch import Tensor

import model_cascade
import train
from configurator import baseline_config, load_source
from eval import evaluate_cache
from kit.contexts import context_cache
from kit.files import InputError
from kit.runs import model_args
from kit.tokens import Windows, load_tokens, window_batch
from model_cascade import CascadeConfig, CascadeContextLLM, read_gpt2_table
from model_context import effective_rank
from prep import PrepSettings
from pythia_base import PythiaConfig, PythiaModel

ROOT = Path(__file__).parents[1]
SMALL = CascadeConfig(vocab_size=61, hidden_size=10, context_dim=7, num_context_blocks=3)
CONFIGS = {
    "plain": SMALL,
    "one block": replace(SMALL, num_context_blocks=1),
    "two layers": replace(SMALL, num_layers_per_block=2),
    "trained copy": replace(SMALL, freeze_embedding=False),
    "untied": replace(SMALL, tie_weights=False),
    "both": replace(SMALL, freeze_embedding=False, tie_weights=False),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make_model(config: CascadeConfig) -> CascadeContextLLM:
    torch.manual_seed(0)
    model = CascadeContextLLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval()


def make_tokens(*shape: int) -> Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------- the equations


def layer_norm(x: Tensor, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * scale + shift


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def plain_logits(model: CascadeContextLLM, tokens: list[int]) -> Tensor:
    """The equations of the specification, one token and one block at a time, on (T,) tokens -> (T, V)."""
    w, config = model.state_dict(), model.config
    token_table = w["embed_in.weight"] if config.freeze_embedding else w["embed_token.weight"]
    output = token_table if config.tie_weights else w["embed_out.weight"]
    states = [torch.zeros(config.context_dim).double() for _ in range(config.num_context_blocks)]
    logits = []
    for token in tokens:
        e = layer_norm(w["embed_in.weight"][token])
        for i, layer in itertools.product(range(config.num_context_blocks), range(config.num_layers_per_block)):
            linear, norm = f"context_blocks.{i}.linears.{layer}.", f"context_blocks.{i}.norms.{layer}."
            delta = gelu(w[linear + "weight"] @ torch.cat([states[i], e]) + w[linear + "bias"])
            states[i] = layer_norm(states[i] + delta, w[norm + "weight"], w[norm + "bias"])
        e = layer_norm(token_table[token])
        delta = gelu(w["token_block.linear.weight"] @ torch.cat([*states, e]) + w["token_block.linear.bias"])
        logits.append(output @ layer_norm(e + delta, w["token_block.norm.weight"], w["token_block.norm.bias"]))
    return torch.stack(logits)


@every_config
def test_it_is_the_plain_loop(config: CascadeConfig) -> None:
    model, idx = make_model(config).double(), make_tokens(2, 23)
    expected = torch.stack([plain_logits(model, row.tolist()) for row in idx])
    torch.testing.assert_close(model(idx)[0], expected, atol=1e-10, rtol=0)


@every_config
def test_all_blocks_at_once_are_each_block_alone(config: CascadeConfig) -> None:
    model, idx = make_model(config).double(), make_tokens(2, 23)
    together, halfway = model.recurrences(idx, None), model.recurrences(idx[:, :9], None)[:, -1]
    alone = [block.recurrence(model.embed_in(idx), None) for block in model.context_blocks]
    torch.testing.assert_close(together, torch.cat(alone, dim=-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(model.recurrences(idx[:, 9:], halfway), together[:, 9:], atol=1e-12, rtol=0)


def test_positions_are_independent_given_their_contexts() -> None:
    model, idx = make_model(SMALL), make_tokens(1, 23)
    contexts = model.recurrences(idx, None)
    alone = model(idx.T, contexts=contexts.transpose(0, 1))[0]  # each position a row of its own
    torch.testing.assert_close(alone.transpose(0, 1), model(idx)[0])


# ------------------------------------------------------------------------------------------------- what it holds


def test_parameters_by_hand() -> None:
    def count(**changes: Any) -> int:
        return sum(p.numel() for p in CascadeContextLLM(replace(SMALL, **changes)).parameters())

    V, C, E, N = 61, 10, 7, 3
    block = E * (E + C) + E + 2 * E
    token_block = C * (N * E + C) + C + 2 * C
    table = V * C
    assert count() == table + N * block + token_block
    assert count(tie_weights=False) - count() == table
    assert count(freeze_embedding=False) - count() == table


def test_the_state_is_n_contexts_however_long_the_text() -> None:
    model = CascadeContextLLM(SMALL)
    for max_len in (1, 100, 10_000):
        assert model.init_cache(batch_size=5, max_len=max_len).nbytes == 5 * 3 * 7 * 4


def test_its_cache_is_held_against_a_pythia_of_its_width() -> None:
    assert baseline_config(CascadeConfig(hidden_size=512)).hidden_size == 512
    results = evaluate_cache(CascadeContextLLM(SMALL))
    assert results["baseline_cache_bytes_per_token"]["2048"] == 6 * 2 * 10 * 4
    assert results["cache_bytes"] == {"256": 84, "2048": 84, "8192": 84}


def test_initialisation() -> None:
    model = CascadeContextLLM(CascadeConfig(vocab_size=99))
    for linear in (model.token_block.linear, *(block.linears[0] for block in model.context_blocks)):
        assert linear.weight.std().item() == pytest.approx(0.1, rel=0.01)
        assert linear.bias.std().item() == pytest.approx(0.01, rel=0.1)
    first, second = model.context_blocks
    assert not torch.equal(first.linears[0].weight, second.linears[0].weight)


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (CONFIGS["plain"], set()),
        (CONFIGS["trained copy"], {"embed_token.weight"}),
        (CONFIGS["untied"], {"embed_out.weight"}),
        (CONFIGS["both"], {"embed_token.weight", "embed_out.weight"}),
    ],
)
def test_what_phase_2_trains(config: CascadeConfig, trained: set[str]) -> None:
    model, idx = make_model(config), make_tokens(2, 9)
    model.freeze_for_phase2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    contexts = model.recurrences(idx, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(idx, idx.roll(-1, dims=1), return_logits=False, contexts=contexts)[1].backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if not name.startswith("token_block.")} == trained
    assert {"token_block.linear.weight", "token_block.norm.bias"} <= changed
    assert torch.equal(model.recurrences(idx, None), contexts), "the cached contexts went stale"


def test_a_trained_copy_starts_as_the_table_of_phase_1() -> None:
    phase1, phase2 = make_model(SMALL), make_model(CONFIGS["trained copy"])
    report = phase2.start_from(phase1)
    assert torch.equal(phase2.embed_token.weight, phase1.embed_in.weight)
    assert report["embed_token.weight"] == "converted"
    phase2.embed_token.weight.data.add_(1)
    later = make_model(CONFIGS["trained copy"])
    assert later.start_from(phase2)["embed_token.weight"] == "copied"
    assert torch.equal(later.embed_token.weight, phase2.embed_token.weight)


def test_models_of_other_kinds_do_not_start_from_one_another_s_layers() -> None:
    baseline = PythiaModel(PythiaConfig(vocab_size=61, hidden_size=10, num_heads=1, intermediate_size=8, rotary_pct=0))
    cascade: Any = make_model(SMALL)
    report = cascade.start_from(baseline)
    assert [name for name, how in report.items() if how != "new"] == ["embed_in.weight"]
    with pytest.raises(ValueError, match="num_heads=None, this model 1"):
        baseline.start_from(cascade)


# ---------------------------------------------------------------------------------------------- embedding tables


def save_gpt2(folder: Path, with_head: bool = True) -> Tensor:
    """A small GPT-2 in Hugging Face's layout; returns its token table."""
    config = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=12, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config) if with_head else transformers.GPT2Model(config)
    model.save_pretrained(folder)
    return model.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("with_head", [True, False])
def test_a_gpt2_folder_is_read(tmp_path: Path, with_head: bool) -> None:
    table = save_gpt2(tmp_path, with_head)
    assert torch.equal(read_gpt2_table(str(tmp_path)), table)
    loaded = train.load_embeddings(str(tmp_path))
    assert loaded is not None
    assert loaded.tokenizer == "gpt2"


def test_an_older_gpt2_folder_is_read(tmp_path: Path) -> None:
    table = save_gpt2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"wte.weight": table}, tmp_path / "pytorch_model.bin")
    assert torch.equal(read_gpt2_table(str(tmp_path)), table)


def test_what_is_no_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PythiaModel(PythiaConfig(vocab_size=9, hidden_size=8, num_heads=1)).save_pretrained(tmp_path / "pythia")
    (tmp_path / "empty").mkdir()
    save_gpt2(tmp_path / "alike")  # MPT has a wte too, of another tokenizer
    (tmp_path / "alike" / "config.json").write_text('{"model_type": "mpt"}')
    messages = {"pythia": "no GPT-2, but model_type='gpt_neox'", "alike": "'mpt'", "empty": "No such file"}
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            train.load_embeddings(str(tmp_path / name))

    def no_hub(name: str) -> Path:
        raise FileNotFoundError(f"{name!r} could not be had from the hub")

    monkeypatch.setattr(model_cascade, "download_checkpoint", no_hub)
    with pytest.raises(InputError, match=r"'gpt2' could not be had from the hub.*out/pythia.*--embeddings=random"):
        train.load_embeddings("gpt2")


# ------------------------------------------------------------------------------------------------- the two phases


@pytest.mark.parametrize(
    ("data", "num_tokens", "expected"),
    [
        ("split", 1000, [[*range(33)], [*range(33, 66)], [*range(66, 99)]]),
        ("split", 3, [[0, 1, 2], [33, 34, 35], [66, 67, 68]]),
        ("all", 1000, [[*range(99)]] * 3),
        ("all", 3, [[0, 1, 2, 33, 34, 35, 66, 67, 68]] * 3),
    ],
)
def test_block_i_is_trained_on_the_i_th_part_or_all_on_the_union(
    data: str, num_tokens: int, expected: list[list[int]]
) -> None:
    trainer: Any = object.__new__(train.Phase1Trainer)
    trainer.settings = SimpleNamespace(cascade_data=data, num_tokens=num_tokens)
    trainer.train_data = SimpleNamespace(tokens=np.arange(100, dtype=np.uint16))
    trainer.model = SimpleNamespace(context_blocks=range(3))
    assert [trainer.part(number).tolist() for number in range(3)] == expected


def test_batches_of_positions_read_the_contexts_of_their_positions() -> None:
    trainer: Any = object.__new__(train.Phase2Trainer)
    trainer.world = SimpleNamespace(device=torch.device("cpu"))
    trainer.train_data = SimpleNamespace(tokens=np.arange(61, dtype=np.uint16))
    trainer.contexts = SimpleNamespace(at=lambda positions: torch.from_numpy(positions)[..., None].float())
    trainer.windows = Windows(61, 1, 12, seed=0)
    batch = trainer.training_batch(trainer.windows.starts(3))
    assert batch["idx"].shape == batch["targets"].shape == (12, 1)
    assert torch.equal(batch["targets"], batch["idx"] + 1)
    assert torch.equal(batch["contexts"][..., 0], batch["idx"].float())


def write_run(folder: Path, tokenizer: str = "neox") -> PythiaModel:
    """What a trained baseline, 12 wide, leaves behind."""
    model = PythiaModel(PythiaConfig(hidden_size=12, num_layers=1, num_heads=1, intermediate_size=8, rotary_pct=0.5))
    folder.mkdir()
    torch.save(checkpoint_of("pythia", model, data={"tokenizer": tokenizer}, tokens_seen=1234), folder / "ckpt.pt")
    return model


def run_training(monkeypatch: pytest.MonkeyPatch, data_dir: Path, config: str, *arguments: str) -> None:
    data = [f"--data_dir={data_dir}", "--dataset=own", "--device=cpu", "--context_dim=8"]
    monkeypatch.setattr(sys, "argv", ["train.py", str(ROOT / "config" / config), *data, *arguments])
    train.main()


@pytest.fixture
def phase1(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short run of phase 1 on the output embedding of a baseline run."""
    write_run(tmp_path / "pythia")
    sizes = ["--num_tokens=600", "--max_iterations=2", f"--embeddings={tmp_path / 'pythia'}"]
    run_training(monkeypatch, data_dir, "cascade_phase1.py", *sizes, f"--out_dir={tmp_path / 'phase1'}")
    return tmp_path / "phase1"


def test_the_chain_of_both_phases(
    phase1: Path, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, (first, checkpoint) = load_source(str(tmp_path / "pythia"))[0], load_source(str(phase1))
    assert torch.equal(first.embed_in.weight, baseline.embed_out.weight)
    assert (first.config.vocab_size, first.config.hidden_size, first.config.context_dim) == (50304, 12, 8)
    assert checkpoint is not None
    assert checkpoint["parents"] == [str(tmp_path / "pythia")]
    assert checkpoint["tokens_seen"] == 1234

    summary = json.loads((phase1 / "summary.json").read_text())
    assert [report["block"] for report in summary["blocks"]] == [0, 1]
    heldout = torch.from_numpy(load_tokens(data_dir / "own", "val").tokens[:600].astype(np.int64))
    rank = effective_rank(first.recurrences(heldout[None], None)[0].detach())
    assert summary["all_blocks"]["context_dim"] == 16
    assert summary["all_blocks"]["heldout_effective_rank"] == pytest.approx(rank, rel=1e-3)

    widths, make_batch = [], window_batch

    def watched_batch(*arguments: Any) -> Any:
        widths.append(arguments[2])
        return make_batch(*arguments)

    monkeypatch.setattr(train, "window_batch", watched_batch)
    steps = ["--max_iters=2", "--gradient_accumulation_steps=8", "--block_size=16", "--eval_interval=2"]
    folders = [f"--init_from={phase1}", f"--out_dir={tmp_path / 'phase2'}"]
    run_training(monkeypatch, data_dir, "cascade_phase2.py", *steps, *folders, "--eval_iters=1")
    second, checkpoint = load_source(str(tmp_path / "phase2"))
    assert checkpoint is not None
    assert checkpoint["tokens_seen"] == 1234 + 2 * 4 * 8 * 16
    assert (widths.count(1), set(widths)) == (2 * 8, {1, 16}), "positions in training, windows in validation"
    for run, state in {phase1: first, tmp_path / "phase2": second}.items():
        assert json.loads((run / "config.json").read_text())["model_args"] == model_args(state.config)
    theirs, mine = first.state_dict(), second.state_dict()
    changed = {name.split(".")[0] for name in mine if not torch.equal(mine[name], theirs[name])}
    assert changed == {"token_block"}
    assert "validation accuracy" in capsys.readouterr().out

    data = load_tokens(data_dir / "own", "train")
    cached = context_cache(second, data, PrepSettings(init_from=str(phase1))).contexts
    assert "reading" in capsys.readouterr().out, "phase 2 has made them"
    ids = torch.from_numpy(data.tokens[:300].astype(np.int64))[None]
    assert len(cached) == len(data.tokens)
    exact = second.recurrences(ids, None)[0]
    # the loose tolerance is for young blocks, which magnify rounding
    torch.testing.assert_close(torch.from_numpy(cached[:300].copy()), exact, atol=1e-3, rtol=0)


def test_a_table_of_another_tokenizer_is_refused(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gpt2(tmp_path / "gpt2")
    monkeypatch.setattr(train, "open_tokens", lambda *_: [load_tokens(data_dir / "own", s) for s in ("train", "val")])
    for source in (tmp_path / "gpt2", tmp_path / "run"):
        if source.name == "run":
            write_run(source, tokenizer="gpt2")
        with pytest.raises(InputError, match=r"trained on gpt2 tokens, .*own/train.bin holds neox tokens"):
            run_training(
                monkeypatch, data_dir, "cascade_phase1.py", f"--embeddings={source}", f"--out_dir={tmp_path / 'out'}"
            )
    assert not (tmp_path / "out").exists()


def test_a_table_that_fits_no_head_is_refused(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "pythia")
    with pytest.raises(InputError, match="the embedding is 12 wide: num_heads=8 does not divide hidden_size=12"):
        run_training(monkeypatch, data_dir, "phase1.py", f"--embeddings={tmp_path / 'pythia'}")
