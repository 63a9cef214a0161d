"""The baseline against transformers, against plain loops in float64, and against bad input."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import pythia_base
from model_mla import MLAConfig, MLAPythiaModel
from pythia_base import (
    LOSS_ROWS,
    Cache,
    PythiaConfig,
    PythiaModel,
    RotaryEmbedding,
    causal_attention,
    config_from_huggingface,
    draw_token,
    head_loss,
    make_optimizer,
    next_token_loss,
    stream_tokens,
)

RELEASED: dict[str, Any] = {  # config.json of EleutherAI/pythia-70m
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
TINY = RELEASED | {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "quarter-rotary": TINY,
    "half-rotary": TINY | {"hidden_size": 48, "num_hidden_layers": 3, "rotary_pct": 0.5, "rotary_emb_base": 500},
    "full-rotary": TINY | {"num_attention_heads": 2, "num_hidden_layers": 2, "rotary_pct": 1.0, "layer_norm_eps": 1e-3},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
M = TypeVar("M", bound=nn.Module)


def randomize(model: M) -> M:
    """Weights large enough that attention is far from uniform, and exact in float16."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
        parameter.data = parameter.data.half().float()
    return model.eval()


def make_tokens(vocab_size: int, batch_size: int = 2, length: int = 40) -> Tensor:
    return torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(1))


def make_pythia(shape: dict[str, Any]) -> PythiaModel:
    return randomize(PythiaModel(config_from_huggingface(shape)))


def make_transformers(shape: dict[str, Any]) -> Any:
    return randomize(GPTNeoXForCausalLM(GPTNeoXConfig(**shape)))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, slope: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) - slope x distance) v in float64, row by row, head by head, query by query."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    before = k.size(2) - q.size(2)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = range(before + i + 1)
        scores = [float(q[b, h, i] @ k[b, h, j]) / math.sqrt(q.size(3)) - slope * (before + i - j) for j in seen]
        weights = torch.tensor(scores, dtype=torch.float64).softmax(dim=0)
        out[b, h, i] = sum(weights[j] * v[b, h, j] for j in seen)
    return out


# ------------------------------------------------------------------------------------------------------ transformers


@torch.no_grad()
def assert_same_model(ours: PythiaModel, theirs: Any) -> None:
    """The same logits, and the same tokens from greedy decoding."""
    idx = make_tokens(ours.config.vocab_size)
    torch.testing.assert_close(ours(idx)[0], theirs.eval()(idx).logits, atol=1e-4, rtol=0)
    theirs.generation_config.eos_token_id = None  # ours decodes to the end
    expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False)
    assert torch.equal(ours.generate(idx, max_new_tokens=20, temperature=0.0), expected)


@every_shape
def test_the_first_token_matters_for_the_last(shape: dict[str, Any]) -> None:
    """Otherwise the agreement below would say nothing about attention."""
    model, idx = make_pythia(shape), make_tokens(shape["vocab_size"])
    changed = idx.index_fill(1, torch.tensor(0), 7)
    assert (model(idx)[0] - model(changed)[0])[:, -1].abs().max() > 0.05


@every_shape
def test_transformers_reads_what_is_saved_here(shape: dict[str, Any], tmp_path: Path) -> None:
    ours = make_pythia(shape)
    ours.save_pretrained(tmp_path)
    assert_same_model(ours, AutoModelForCausalLM.from_pretrained(tmp_path))


@every_shape
def test_what_is_saved_here_is_read_back_exactly(shape: dict[str, Any], tmp_path: Path) -> None:
    ours = make_pythia(shape)
    ours.save_pretrained(tmp_path)
    again = PythiaModel.from_pretrained(str(tmp_path))
    assert again.config == ours.config
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), atol=0, rtol=0)


def released_state(theirs: Any) -> dict[str, Tensor]:
    """The tensors of a released checkpoint: float16, the head's old name, and each layer's old buffers."""
    state = {name.replace("lm_head", "embed_out"): tensor.half() for name, tensor in theirs.state_dict().items()}
    for i in range(theirs.config.num_hidden_layers):
        attention = f"gpt_neox.layers.{i}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e4).half()
        state[f"{attention}.rotary_emb.inv_freq"] = torch.full((2,), 123.0).half()
    return state


def save_released(theirs: Any, shape: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(shape))
    torch.save(released_state(theirs), folder / "pytorch_model.bin")


def save_released_shards(theirs: Any, shape: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(shape))
    state = released_state(theirs)
    for part in range(3):
        torch.save({k: state[k] for k in sorted(state)[part::3]}, folder / f"pytorch_model-{part + 1:05}-of-00003.bin")


def save_by_transformers(theirs: Any, shape: dict[str, Any], folder: Path) -> None:
    theirs.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()


def save_shards_by_transformers(theirs: Any, shape: dict[str, Any], folder: Path) -> None:
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def test_a_variant_does_not_pass_itself_off_as_gpt_neox(tmp_path: Path) -> None:
    variant = MLAPythiaModel(MLAConfig(vocab_size=9, hidden_size=8, num_heads=1, kv_dim=4))
    with pytest.raises(TypeError, match="MLAPythiaModel is not GPT-NeoX"):
        variant.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"), [({"hidden_size": 32}, "same widths"), ({"num_heads": 2}, "num_heads=4, this model 2")]
)
def test_another_shape_is_no_source(fields: dict[str, Any], message: str) -> None:
    source = make_pythia(TINY)
    with pytest.raises(ValueError, match=message):
        PythiaModel(replace(source.config, **fields)).start_from(source)


@every_shape
@pytest.mark.parametrize(
    "save", [save_released, save_released_shards, save_by_transformers, save_shards_by_transformers]
)
def test_every_layout_of_transformers_is_read_here(
    save: Callable[[Any, dict[str, Any], Path], None], shape: dict[str, Any], tmp_path: Path
) -> None:
    theirs = make_transformers(shape)
    save(theirs, shape, tmp_path)
    assert_same_model(PythiaModel.from_pretrained(str(tmp_path)), theirs)


@pytest.mark.parametrize(("rotary_pct", "rotary_base"), [(0.25, 10000), (0.5, 500)])
def test_the_released_and_the_new_config_json_are_the_same_model(rotary_pct: float, rotary_base: int) -> None:
    released = RELEASED | {"rotary_pct": rotary_pct, "rotary_emb_base": rotary_base}
    new = GPTNeoXConfig(**released).to_dict()
    assert "rotary_pct" not in new, "transformers writes the released layout again"
    expected = PythiaConfig(rotary_pct=rotary_pct, rotary_base=rotary_base)
    assert config_from_huggingface(released) == config_from_huggingface(new) == expected


# ------------------------------------------------------------------------------------------------- sizes and equations


def test_pythia_70m_has_its_parameters_and_its_cache() -> None:
    with torch.device("meta"):
        model = PythiaModel(PythiaConfig())
        assert sum(p.numel() for p in model.parameters()) == 70_426_624
        assert model.init_cache(batch_size=2, max_len=5).nbytes == 2 * 5 * 24_576


@pytest.mark.parametrize("rotary_pct", [0.0, 0.25, 1.0])
def test_rope_is_a_rotation_of_pairs(rotary_pct: float) -> None:
    """Dimensions i and i + R/2 of a head turn by position x base^(-2i / R), the rest stays."""
    config = PythiaConfig(hidden_size=32, num_heads=2, rotary_pct=rotary_pct, rotary_base=100.0)
    x, start, half = torch.randn(2, 2, 5, 16), 1000, config.rotary_size // 2
    expected = x.double()
    for t in range(x.size(2)):
        for i in range(half):
            angle = (start + t) * 100.0 ** (-i / half)
            x1, x2 = x[..., t, i].double(), x[..., t, i + half].double()
            expected[..., t, i] = x1 * math.cos(angle) - x2 * math.sin(angle)
            expected[..., t, i + half] = x2 * math.cos(angle) + x1 * math.sin(angle)
    torch.testing.assert_close(RotaryEmbedding(config)(x, start).double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("T", "P"), [(9, 9), (1, 9), (4, 9), (8, 9)])
def test_causal_attention_is_the_plain_loop(T: int, P: int) -> None:
    q, k, v = (torch.randn(2, 3, n, 8) * 2 for n in (T, P, P))
    torch.testing.assert_close(causal_attention(q, k, v).double(), plain_attention(q, k, v), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------- the loss

IGNORED: dict[str, slice] = {"none": slice(0), "some": slice(3, None, 2), "a-whole-chunk": slice(0, LOSS_ROWS + 3)}


def make_head(ignored: slice) -> tuple[Tensor, Tensor, Tensor]:
    """h (B, T, C), weight (V, C) and targets (B, T): two full chunks of the loss and a part of a third."""
    torch.manual_seed(0)
    targets = torch.randint(11, (2 * LOSS_ROWS + 90,))
    targets[ignored] = -100
    return torch.randn(2, len(targets) // 2, 6), torch.randn(11, 6), targets.view(2, -1)


def loss_and_gradients(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], h: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    h, weight = h.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(h, weight, targets)
    return value.detach(), *torch.autograd.grad(3 * value, [h, weight])


def plain_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((h.double() @ weight.double().T).flatten(0, 1), targets.flatten()).float()


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_head_loss_is_cross_entropy(ignored: slice) -> None:
    """In value and in both gradients."""
    head = make_head(ignored)
    torch.testing.assert_close(
        loss_and_gradients(head_loss, *head), loss_and_gradients(plain_loss, *head), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_loss_under_autocast_is_cross_entropy_of_rounded_inputs(dtype: torch.dtype) -> None:
    """The products are of the low precision, the logarithm and the sums are not."""
    h, weight, targets = make_head(IGNORED["some"])
    with torch.autocast("cpu", dtype=dtype):
        value, dh, dw = loss_and_gradients(head_loss, h, weight, targets)
    logits = (h.to(dtype) @ weight.to(dtype).T).flatten(0, 1)
    torch.testing.assert_close(value, next_token_loss(logits, targets), atol=1e-5, rtol=0)
    _, expected_dh, expected_dw = loss_and_gradients(plain_loss, h, weight, targets)
    for gradient, expected in ((dh, expected_dh), (dw, expected_dw)):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_without_a_target_loss_and_gradients_are_zero() -> None:
    h, weight, targets = make_head(slice(None))
    assert all(not result.any() for result in loss_and_gradients(head_loss, h, weight, targets))
    assert next_token_loss(h @ weight.T, targets) == 0


@pytest.mark.parametrize("target", [-1, 11])
def test_head_loss_refuses_targets_outside_the_vocabulary(target: int) -> None:
    h, weight, targets = make_head(IGNORED["none"])
    targets[0, 0] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        head_loss(h, weight, targets)


# ------------------------------------------------------------------------------------ initial weights, sampling, AdamW


def test_initial_weights() -> None:
    """Normal 0.02, what writes to the residual stream less by sqrt(2 x layers), biases 0, LayerNorms 1."""
    torch.manual_seed(0)
    config = PythiaConfig(vocab_size=900, hidden_size=128, num_layers=8, intermediate_size=256)
    for name, parameter in PythiaModel(config).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == ("layernorm" in name.replace("_", "") and name.endswith("weight"))).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * std, name


LOGITS = torch.tensor([[1.0, 3.0, -2.0, 2.5, 0.0, 2.0]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "kept"), [(None, range(6)), (99, range(6)), (3, (1, 3, 5)), (1, (1,))])
def test_tokens_are_drawn_by_temperature_from_the_top_k(
    temperature: float, top_k: int | None, kept: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    drawn = draw_token(LOGITS.expand(20_000, -1), temperature, top_k)
    expected = torch.zeros(6)
    expected[list(kept)] = (LOGITS[0, list(kept)] / temperature).softmax(dim=0)
    frequencies = drawn.flatten().bincount(minlength=6) / len(drawn)
    assert not frequencies[expected == 0].any()
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_padding_rows_of_the_vocabulary_are_never_drawn(temperature: float) -> None:
    def model(idx: Tensor, cache: Cache) -> tuple[Tensor, None]:
        return torch.arange(100.0).expand(*idx.shape, -1), None  # the padding rows are the likeliest

    prompt = torch.zeros(4, 2, dtype=torch.long)
    drawn = torch.cat(list(stream_tokens(model, prompt, Cache([], 0), 50, temperature, num_tokens=90)))
    assert drawn.shape == (200, 1)
    assert drawn.max() == 89


def test_a_prompt_longer_than_a_prefill_chunk_decodes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, idx = make_pythia(TINY), make_tokens(TINY["vocab_size"])
    expected = model.generate(idx, max_new_tokens=5, temperature=0.0)
    monkeypatch.setattr(pythia_base, "PREFILL_TOKENS", 7)
    assert torch.equal(model.generate(idx, max_new_tokens=5, temperature=0.0), expected)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        make_pythia(TINY).generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1, temperature=0.0)


def test_only_trained_matrices_decay() -> None:
    model = make_pythia(TINY)
    model.embed_in.requires_grad_(False)
    optimizer = make_optimizer(model, learning_rate=0.5, weight_decay=0.25, betas=(0.8, 0.9))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {p: 0.25 if p.dim() == 2 else 0.0 for p in model.parameters() if p.requires_grad}
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(0.5, (0.8, 0.9))}


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary_pct": 0.05}, "3 dimensions"),
        ({"rotary_pct": 1.5}, "not between 0 and 1"),
        ({"rotary_pct": math.nan}, "not between 0 and 1"),
        ({"num_heads": 7}, "num_heads=7 does not divide hidden_size=512"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps=nan"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps=-1e-05"),
        ({"rotary_base": math.inf}, "rotary_base=inf"),
        ({"rotary_base": 0.0}, "rotary_base=0.0"),
    ],
)
def test_a_shape_that_does_not_fit_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PythiaConfig(**fields)


class Malicious:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def swap_weights(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def swap(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(make(folder), folder / "pytorch_model.bin")

    return swap


def truncated_pickle(folder: Path) -> None:
    swap_weights(lambda _: {"embed_out.weight": torch.zeros(4000)})(folder)
    truncate(folder / "pytorch_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config-missing": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config-empty": (lambda folder: (folder / "config.json").write_text(""), "config.json"),
    "config-no-mapping": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "config-incomplete": (lambda folder: (folder / "config.json").write_text("{}"), "config.json.*vocab_size"),
    "config-mistyped": (edit_config(hidden_size="64"), "config.json"),
    "another-architecture": (edit_config(model_type="llama"), "model_type='llama'"),
    "another-activation": (edit_config(hidden_act="relu"), "hidden_act='relu'"),
    "sequential-residual": (edit_config(use_parallel_residual=False), "use_parallel_residual=False"),
    "tied": (edit_config(tie_word_embeddings=True), "tie_word_embeddings=True"),
    "no-biases": (edit_config(attention_bias=False), "attention_bias=False"),
    "old-scaled-rope": (edit_config(rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    "new-scaled-rope": (edit_config(rope_parameters={"rope_type": "linear", "factor": 2.0}), "linear"),
    "another-width": (edit_config(intermediate_size=95), "does not fit its config.json"),
    "another-depth": (edit_config(num_hidden_layers=7), "does not fit its config.json.*layers.6"),
    "weights-missing": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "safetensors-truncated": (lambda folder: truncate(folder / "model.safetensors"), "truncated"),
    "safetensors-empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "truncated"),
    "pickle-truncated": (truncated_pickle, "truncated"),
    "pickle-no-mapping": (swap_weights(lambda _: [torch.zeros(2)]), "no weight file"),
    "pickle-of-a-run": (swap_weights(lambda _: {"model": {"w": torch.zeros(2)}}), "no weight file"),
    "pickle-malicious": (swap_weights(lambda folder: Malicious(folder / "executed")), "no weight file"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    """With one of the two documented errors, and nothing is executed."""
    make_pythia(TINY).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PythiaModel.from_pretrained(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*is no local folder"):
        PythiaModel.from_pretrained(str(tmp_path / "nowhere"))
