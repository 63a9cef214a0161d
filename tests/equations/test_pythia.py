"""The baseline: Hugging Face checkpoints in and out, RoPE, sampling, AdamW, and what is refused."""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from conftest import make_tokens, randomise
from test_models import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import pythia_base
from kit.files import InputError
from kit.muon import Muon, orthogonalise
from model_infini import InfiniConfig, InfiniPythiaModel
from model_mla import MLAConfig, MLAPythiaModel
from pythia_base import Cache, PythiaConfig, PythiaModel, draw_token, stream_tokens
from train import LMSettings, make_optimizers

RELEASED: dict[str, Any] = {  # config.json of EleutherAI/pythia-70m
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
TINY = RELEASED | {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "quarter-rotary": TINY,
    "half-rotary": TINY | {"hidden_size": 48, "num_hidden_layers": 3, "rotary_pct": 0.5, "rotary_emb_base": 500},
    "full-rotary": TINY | {"num_attention_heads": 2, "num_hidden_layers": 2, "rotary_pct": 1.0, "layer_norm_eps": 1e-3},
}


def config_of(shape: dict[str, Any]) -> PythiaConfig:
    """What a config.json in the released spelling says."""
    renamed = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "rotary_base": "rotary_emb_base"}
    names = [field.name for field in dataclasses.fields(PythiaConfig)]
    return PythiaConfig(**{name: shape[renamed.get(name, name)] for name in names})


# ------------------------------------------------------------------------------------------------------ transformers
@torch.no_grad()
def assert_same_model(ours: PythiaModel, theirs: Any) -> None:
    """The same logits, in which the first token matters for the last, and the same tokens from greedy decoding."""
    idx = make_tokens(2, 40)
    logits = ours(idx)[0]
    torch.testing.assert_close(logits, theirs.eval()(idx).logits, atol=1e-4, rtol=0)
    assert (logits - ours(idx.index_fill(1, torch.tensor(0), 7))[0])[:, -1].abs().max() > 0.05
    theirs.generation_config.eos_token_id = None  # ours decodes to the end
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False)
    assert torch.equal(ours.generate(idx, max_new_tokens=20, temperature=0.0), expected)


def save_released(theirs: Any, shape: dict[str, Any], folder: Path) -> None:
    """As Pythia was released: float16, the head's old name, and each layer's old buffers, in a pickle."""
    state = {name.replace("lm_head", "embed_out"): tensor.half() for name, tensor in theirs.state_dict().items()}
    for i in range(theirs.config.num_hidden_layers):
        attention = f"gpt_neox.layers.{i}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e4).half()
        state[f"{attention}.rotary_emb.inv_freq"] = torch.full((2,), 123.0).half()
    (folder / "config.json").write_text(json.dumps(shape))
    torch.save(state, folder / "pytorch_model.bin")


def save_new(theirs: Any, shape: dict[str, Any], folder: Path) -> None:
    """As transformers writes it now: another spelling of config.json, and safetensors, here in several files."""
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert len([*folder.glob("*.safetensors")]) > 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_layout_of_transformers_is_read_and_ours_there(shape: dict[str, Any], tmp_path: Path) -> None:
    theirs = randomise(GPTNeoXForCausalLM(GPTNeoXConfig(**shape)))
    for parameter in theirs.parameters():
        parameter.data = parameter.data.half().float()  # what is saved in float16 is exact
    for save in (save_released, save_new):
        folder = tmp_path / save.__name__
        folder.mkdir()
        save(theirs, shape, folder)
        ours = PythiaModel.from_pretrained(str(folder))
        assert ours.config == config_of(shape)
        assert_same_model(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_model(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    again = PythiaModel.from_pretrained(str(tmp_path / "ours"))
    assert again.config == ours.config
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), atol=0, rtol=0)


def test_another_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(InputError, match=r"transformers is 4\.57\.6, 5\.\* is needed"):
        PythiaModel.from_pretrained(str(tmp_path))


# -------------------------------------------------------------------------------------------------- size, precision
def test_parameters_and_layers() -> None:
    with torch.device("meta"):
        models = [PythiaModel(PythiaConfig()), MLAPythiaModel(MLAConfig())]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [70_426_624, 68_448_256]


@torch.no_grad()
def test_a_bfloat16_model_keeps_its_angles_and_slopes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """At positions above 256, which bfloat16 does not count; with rounded positions the logits are elsewhere."""
    model, idx = randomise(PythiaModel(config_of(SHAPES["full-rotary"]))), make_tokens(1, 600)
    exact = model(idx)[0]

    def error() -> float:
        return ((model(idx)[0].float() - exact).norm() / exact.norm()).item()

    model.bfloat16()
    kept, rotate = error(), pythia_base.rotate
    monkeypatch.setattr(pythia_base, "rotate", lambda x, p, config: rotate(x, p.to(x.dtype), config))
    assert kept < 0.02 < error()
    slopes = InfiniPythiaModel(InfiniConfig(alibi_scale=1 / 3, use_alibi=True)).layers[0].attention.bfloat16().slopes
    expected = torch.tensor([2.0 ** -(h + 1) / 3 for h in range(8)])
    torch.testing.assert_close(slopes(torch.device("cpu")).flatten(), expected, atol=0, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- sampling and AdamW
LOGITS = torch.tensor([[1.0, 3.0, -2.0, 2.5, 0.0, 2.0]])


@pytest.mark.parametrize(("top_k", "kept"), [(None, range(6)), (99, range(6)), (3, (1, 3, 5)), (1, (1,))])
def test_tokens_are_drawn_by_temperature_from_the_top_k(top_k: int | None, kept: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for temperature in (0.5, 2.0):
        drawn = draw_token(LOGITS.expand(20_000, -1), temperature, top_k)
        expected = torch.zeros(6)
        expected[list(kept)] = (LOGITS[0, list(kept)] / temperature).softmax(dim=0)
        frequencies = drawn.flatten().bincount(minlength=6) / len(drawn)
        assert not frequencies[expected == 0].any()
        torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_padding_rows_of_the_vocabulary_are_never_drawn(temperature: float) -> None:
    def hidden_states(idx: Tensor, cache: Cache) -> Tensor:
        return torch.arange(100.0).expand(*idx.shape, -1)  # the padding rows are the likeliest

    model, prompt = SimpleNamespace(hidden_states=hidden_states, head_weight=torch.eye(100)), torch.zeros(4, 2).long()
    drawn = torch.cat(list(stream_tokens(model, prompt, Cache([], 0), 50, temperature, num_tokens=90)))
    assert drawn.shape == (200, 1)
    assert drawn.max() == 89


def test_a_prompt_longer_than_a_prefill_chunk_decodes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, idx = make_model("pythia"), make_tokens(2, 40)
    expected = model.generate(idx, max_new_tokens=5, temperature=0.0)
    monkeypatch.setattr(pythia_base, "PREFILL_TOKENS", 7)
    assert torch.equal(model.generate(idx, max_new_tokens=5, temperature=0.0), expected)
    with pytest.raises(ValueError, match="empty prompt"):
        model.generate(idx[:, :0], max_new_tokens=1, temperature=0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["infini-banks", "cascade-untied"])
def test_which_optimizer_trains_what(name: str, optimizer: Any) -> None:
    """Only matrices decay: not biases, LayerNorms and the scores of banks, which have two dimensions as well.

    Muon takes those of the layers, neither embeddings nor the head. Nothing that is frozen is trained.
    """
    model = make_model(name)
    model.embed_in.requires_grad_(False)
    settings = LMSettings(optimizer=optimizer, learning_rate=0.5, weight_decay=0.25, beta1=0.8, beta2=0.9)
    groups = [(key, group) for key, each in make_optimizers(model, settings).items() for group in each.param_groups]
    found = {p: (key, group["weight_decay"]) for key, group in groups for p in group["params"]}
    expected = {}
    for where, p in model.named_parameters():
        is_matrix = p.dim() == 2 and not where.endswith("bank_scores")
        is_muon = optimizer == "muon" and is_matrix and not where.startswith("embed")
        expected[p] = "muon" if is_muon else "optimizer", 0.25 if is_matrix else 0.0
    del expected[model.embed_in.weight]
    assert found == expected
    assert {group["lr"] for _, group in groups} == {0.5}
    assert {group["betas"] for key, group in groups if key == "optimizer"} == {(0.8, 0.9)}


def test_muon_is_torchs_in_float32() -> None:
    """Of matrices that are wide, high and square, several of a shape; PyTorch's rounds to bfloat16 on its way."""
    torch.manual_seed(0)
    shapes = [(12, 40), (40, 12), (12, 40), (16, 16), (12, 12)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    mine = Muon([*ours, nn.Parameter(torch.ones(2, 2))], 0.1, 0.01)  # the last one has no gradient
    optimizers = [mine, torch.optim.Muon(theirs, 0.1, 0.01, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0.0)
    singular_values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 12, 40)))
    assert 0.65 < singular_values.min() < singular_values.max() < 1.25
