"""What holds for every model, in every mode of it. A new model joins by one line in CONFIGS."""

import gc
import math
import random
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, in_chunks, make_tokens, randomise
from torch import Tensor, nn

from configurator import MODELS
from model_cascade import CascadeConfig
from model_context import ContextBlock, ContextKVConfig, ContextPythiaConfig
from model_infini import InfiniConfig
from model_mla import MLAConfig
from pythia_base import Attention, PythiaConfig, PythiaModel, SelfAttention

CASCADE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "context_dim": 12}
CONFIGS: dict[str, Any] = {
    "pythia": PythiaConfig(**SMALL, rotary_pct=0.5),
    "pythia-full-rotary": PythiaConfig(**SMALL, rotary_pct=1.0, rotary_base=100.0),
    "mla": MLAConfig(**SMALL, kv_dim=12),
    "mla-steep": MLAConfig(**SMALL, kv_dim=12, alibi_slope=0.7),
    "mla-rope": MLAConfig(**SMALL, kv_dim=12, use_rope=True),
    "context": ContextPythiaConfig(**SMALL, context_dim=12),
    "context-half-rotary": ContextPythiaConfig(**SMALL, context_dim=12, rotary_pct=0.5, embed_norm=False),
    "context_kv": ContextKVConfig(**SMALL, context_dim=12, context_layers=(0, 2), context_interval=4, max_contexts=3),
    "context_kv-all": ContextKVConfig(
        **SMALL, context_dim=12, context_layers=(0, 1, 2), context_interval=1, max_contexts=5
    ),
    "infini": InfiniConfig(**SMALL, segment_len=8),
    "infini-plain": InfiniConfig(**SMALL, segment_len=5, use_delta_rule=False),
    "infini-alibi": InfiniConfig(**SMALL, segment_len=5, use_alibi=True),
    "infini-alibi2": InfiniConfig(**SMALL, segment_len=5, use_alibi=True, alibi_scale=2.0, use_delta_rule=False),
    "infini-banks": InfiniConfig(**SMALL, segment_len=3, num_memory_banks=3, segments_per_bank=2),
    "infini-banks-alibi": InfiniConfig(**SMALL, segment_len=3, num_memory_banks=2, segments_per_bank=1, use_alibi=True),
    "infini-multi": InfiniConfig(**SMALL, segment_len=4, num_memories=3),
    "infini-multi-sums": InfiniConfig(
        **SMALL, segment_len=4, num_memories=3, normalize_relevance=False, use_delta_rule=False
    ),
    "infini-multi-alibi": InfiniConfig(**SMALL, segment_len=4, num_memories=2, use_alibi=True, alibi_scale=2.0),
    "cascade": CascadeConfig(**CASCADE, num_context_blocks=3),
    "cascade-one-block": CascadeConfig(**CASCADE, num_context_blocks=1),
    "cascade-two-layers": CascadeConfig(**CASCADE, num_layers_per_block=2),
    "cascade-trained-copy": CascadeConfig(**CASCADE, freeze_embedding=False),
    "cascade-untied": CascadeConfig(**CASCADE, tie_weights=False, freeze_embedding=False),
}
B, T = 3, 41  # past every window, ring and segment above, several times
every_model = pytest.mark.parametrize("name", CONFIGS)


def build(config: Any) -> Any:
    """A model as it starts."""
    torch.manual_seed(0)
    return dict(MODELS.values())[type(config)](config)


def make_model(name: str, std: float = 0.2, **changes: Any) -> Any:
    """A model of CONFIGS with some fields changed, its weights at random."""
    return randomise(build(replace(CONFIGS[name], **changes)), std)


def make_baseline(**changes: Any) -> Any:
    """A Pythia whose RoPE turns what PythiaConfig says by itself."""
    return make_model("pythia", **{"rotary_pct": 0.25} | changes)


def chunk_sizes(seed: int) -> list[int]:
    """Of T tokens, at random."""
    rng, sizes = random.Random(seed), list[int]()
    while sum(sizes) < T:
        sizes.append(min(rng.choice([1, 1, 2, 3, 7, 16]), T - sum(sizes)))
    return sizes


# ------------------------------------------------------------------------------------------------- what it computes
@every_model
@torch.no_grad()
def test_causal(name: str) -> None:
    """Changing token t changes no logit before t, and does change the one at t."""
    model, idx = make_model(name), make_tokens(B, T)
    before = model(idx)[0]
    for t in (0, 1, T // 2, T - 1):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % SMALL["vocab_size"]
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@every_model
@torch.no_grad()
def test_streamable(name: str) -> None:
    """Chunks of any sizes, fed through the cache, have the logits of one full pass, which greedy text follows."""
    model, idx = make_model(name), make_tokens(B, T)
    full = model(idx)[0]
    for seed in range(4):
        torch.testing.assert_close(in_chunks(model, idx, *chunk_sizes(seed)), full, atol=1e-4, rtol=0)
    text = model.generate(idx[:, :9], max_new_tokens=T - 9, temperature=0.0)
    assert torch.equal(text[:, :9], idx[:, :9])
    assert torch.equal(model(text)[0][:, 8:-1].argmax(-1), text[:, 9:])


@every_model
@torch.no_grad()
def test_equal_to_its_reference(name: str) -> None:
    """Row by row, in one pass and through the cache. RoPE and Infini's memory are float32 in a float64 model too."""
    model, idx = make_model(name), make_tokens(B, T)
    rows = torch.cat([model(row)[0] for row in idx.split(1)])
    torch.testing.assert_close(rows, model(idx)[0], atol=1e-5, rtol=0)
    expected = sys.modules[type(model).__module__].reference(model, idx)
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-5)):
        for logits in (model.to(dtype)(idx)[0], in_chunks(model, idx, *chunk_sizes(5))):
            torch.testing.assert_close(logits.double(), expected, atol=bound, rtol=0)


@every_model
def test_the_loss_and_its_gradients_are_those_of_the_logits(name: str) -> None:
    """The mean cross entropy, -100 left out, though no logits are held; every trained parameter gets a gradient."""
    model, idx = make_model(name), make_tokens(B, T)
    targets = idx.roll(-1, dims=1)
    targets[:, -5:] = targets[0, :7] = -100
    logits, nothing = model(idx)
    assert nothing is None
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    nothing, loss = model(idx, targets)
    assert nothing is None
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(3 * value, trained) for value in (loss, expected)]
    torch.testing.assert_close((loss.double(), gradients[0]), (expected, gradients[1]), atol=1e-5, rtol=1e-4)
    assert all(gradient.any() for gradient in gradients[0])


@every_model
@torch.no_grad()
def test_autocast_stays_near_float32(name: str) -> None:
    """Relative difference of all logits; the loss, a mean, is ten times nearer."""
    model, idx = make_model(name), make_tokens(B, T)
    targets = idx.roll(-1, dims=1)
    exact, exact_loss = model(idx)[0], model(idx, targets)[1]
    for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float16, 1.2e-3)):
        with torch.autocast("cpu", dtype):
            rough, loss = model(idx)[0], model(idx, targets)[1]
        assert 0 < (rough.float() - exact).norm() / exact.norm() < bound
        assert abs(loss / exact_loss - 1) < bound / 10


# --------------------------------------------------------------------------------------------------- how it starts
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if isinstance(config, PythiaConfig)])
def test_initialised_alike(name: str) -> None:
    """wang_init for what writes to the residual stream, small_init for the rest, whatever a class derives from.

    The last matrix of every attention and every MLP writes.
    """
    config, C, num_layers = CONFIGS[name], 64, 10
    widths = {field: 48 for field in ("kv_dim", "context_dim") if hasattr(config, field)}
    model = build(replace(config, hidden_size=C, num_layers=num_layers, intermediate_size=80, **widths))
    parts: list[Any] = [part for block in model.layers for part in (block.attention, block.mlp)]
    outputs = [[m for m in part.modules() if isinstance(m, nn.Linear)][-1] for part in parts]
    own = {m for block in model.modules() if isinstance(block, ContextBlock) for m in block.modules()}
    for where, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module not in own:
            std = 2 / (num_layers * C**0.5) if module in outputs else (2 / (5 * C)) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=0.06), where
            assert abs(module.weight.mean().item()) < 0.1 * std, where
            bias: Any = getattr(module, "bias", None)
            assert bias is None or not bias.any(), where


def test_an_attention_whose_output_has_another_name_is_refused() -> None:
    """What writes to the residual stream would start like all other matrices."""
    makes = {"make_attention": lambda _, layer: nn.ModuleDict({"out_proj" if layer else "dense": nn.Linear(32, 32)})}
    with pytest.raises(ValueError, match="layer 1: what writes to the residual stream has to be called"):
        type("OwnModel", (PythiaModel,), makes)(PythiaConfig(**SMALL))


@pytest.mark.parametrize("config_class", [config_class for config_class, _ in MODELS.values()])
def test_numbers_out_of_range_are_refused(config_class: type) -> None:
    settable = {field.name for field in fields(config_class) if field.init}
    for name, hint in get_type_hints(config_class).items():
        for value in {int: (0, -1), float: (-0.1, math.nan, math.inf)}.get(hint, ()) if name in settable else ():
            with pytest.raises(ValueError, match=f"^{name}={value} has to be at least"):
                config_class(**{name: value})
    for name in {"layer_norm_eps", "rotary_base"} & settable if issubclass(config_class, PythiaConfig) else ():
        with pytest.raises(ValueError, match=f"^{name}=0.0 has to be above 0"):
            config_class(**{name: 0.0})


# ----------------------------------------------------------------------------------------- what it takes from others
class GroupedAttention(SelfAttention):
    """Names and shapes of the baseline's, but its fused projection is laid out as all q, all k, all v."""


class GQAPythiaModel(PythiaModel):
    def make_attention(self, layer: int) -> Attention:
        return GroupedAttention(self.config)


@every_model
@torch.no_grad()
def test_what_is_kept_of_a_baseline_is_equal(name: str) -> None:
    """Tensors that are copied are the baseline's; a layer whose attention is the baseline's computes the same."""
    config: Any = CONFIGS[name]
    has_rope = isinstance(config, PythiaConfig) and not isinstance(config, MLAConfig)
    baseline, model = (
        make_baseline(),
        build(replace(config, rotary_pct=0.25, rotary_base=10000.0) if has_rope else config),
    )
    report = model.start_from(baseline)
    theirs, mine = baseline.state_dict(), model.state_dict()
    assert report.keys() == mine.keys()
    assert set(report.values()) <= {"copied", "converted", "new"}
    assert all(torch.equal(mine[k], theirs[k]) for k, how in report.items() if how == "copied")
    assert report["embed_in.weight"] == "copied"
    x = torch.randn(2, 9, SMALL["hidden_size"])
    for ours, block in zip(getattr(model, "layers", []), baseline.layers, strict=False):
        assert torch.equal(ours.mlp.dense_h_to_4h.weight, block.mlp.dense_h_to_4h.weight)
        if type(ours.attention) is SelfAttention:
            assert torch.equal(ours(x, 0, None), block(x, 0, None))


@every_model
@torch.no_grad()
def test_its_own_class_is_a_source_and_another_is_none(name: str) -> None:
    """Refused in one line, and nothing is taken, though names and shapes may agree."""
    source, model, idx = make_model(name), build(CONFIGS[name]), make_tokens(1, 9)
    assert set(model.start_from(source).values()) == {"copied"}
    others = {type(build(config)): config for config in CONFIGS.values()} | {GQAPythiaModel: PythiaConfig(**SMALL)}
    for other in others.keys() - {type(model), PythiaModel}:
        with pytest.raises(ValueError, match=rf"^the source is a {other.__name__}: .*PythiaModel.*$"):
            model.start_from(other(others[other]))
    torch.testing.assert_close(model.state_dict(), source.state_dict(), atol=0, rtol=0)
    assert torch.equal(model(idx)[0], source(idx)[0])


def test_no_attention_tensor_of_a_baseline_is_taken_for_another_layout_s() -> None:
    report = GQAPythiaModel(PythiaConfig(**SMALL)).start_from(make_baseline())
    assert {name for name, how in report.items() if how == "new"} == {k for k in report if ".attention." in k}
    assert "converted" not in report.values()


def test_another_shape_is_no_source() -> None:
    source = make_baseline()
    for name, value in {"hidden_size": 64, "num_heads": 2, "rotary_pct": 0.5, "rotary_base": 5.0}.items():
        with pytest.raises(ValueError, match=f"{name}={getattr(source.config, name)}, this model {value}"):
            make_baseline(**{name: value}).start_from(source)


# ----------------------------------------------------------------------------------------------- what it remembers
FULL_SIZE: dict[str, tuple[Any, Callable[[int], int]]] = {  # bytes of n tokens in float32, as the files' headers say
    "pythia": (PythiaConfig(), lambda n: 24_576 * n),
    "mla": (MLAConfig(), lambda n: 3_072 * n),
    "mla-64": (MLAConfig(kv_dim=64), lambda n: 1_536 * n),
    "context": (ContextPythiaConfig(), lambda n: 1_024 * n),
    "context_kv": (ContextKVConfig(), lambda n: 5_120 * 4 * n + min(n, 993) * 1_024),
    "context_kv-4": (ContextKVConfig(context_layers=(0, 1, 2, 3)), lambda n: 2_048 * 4 * n + min(n, 993) * 1_024),
    "infini": (InfiniConfig(), lambda n: 5_120 * 4 * n + 2 * 133_120 + 8),
    "infini-banks2": (InfiniConfig(num_memory_banks=2), lambda n: 5_120 * 4 * n + 3 * 133_120 + 2 * 8),
    "infini-multi8": (InfiniConfig(num_memories=8), lambda n: 5_120 * 4 * n + 9 * 133_120 + 8 * 8),
    "cascade": (CascadeConfig(), lambda n: 4_000),
    "cascade-4": (CascadeConfig(num_context_blocks=4), lambda n: 8_000),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_as_small_as_declared(name: str) -> None:
    config, declared = FULL_SIZE[name]
    with torch.device("meta"):
        model = build(config)
        for batch_size, max_len in [(1, 1), (1, 256), (3, 2048), (1, 8192)]:
            assert model.init_cache(batch_size, max_len).nbytes == batch_size * declared(max_len)


@pytest.mark.parametrize("name", ["context", "infini"])
def test_what_is_compiled_does_not_grow_with_the_text(name: str) -> None:
    """A recurrence that torch.compile unrolls takes minutes, and its gradients are no longer those of float32."""
    model, sizes = build(replace(CONFIGS[name], num_layers=1)), list[int]()

    def count(graph: Any, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for num_tokens in (8, 16):
        torch.compiler.reset()
        torch.compile(model, backend=count)(*2 * [make_tokens(B, num_tokens)])
    assert sizes
    assert sizes == 2 * sizes[: len(sizes) // 2]


def live_bytes() -> int:
    """Of all tensors that any object of this process refers to; those that a compiler leaves behind hold nothing."""
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@every_model
@torch.no_grad()
def test_decoding_keeps_what_the_cache_counts_and_no_more(name: str) -> None:
    """Neither in the cache nor anywhere else; and a cache that is full refuses a further token."""
    model, idx = make_model(name), make_tokens(B, T)
    before, cache = live_bytes(), model.init_cache(batch_size=B, max_len=T)
    for chunk in idx.split([9, *[1] * (T - 9)], dim=1):
        logits, _ = model(chunk, cache=cache)
    assert live_bytes() - before == cache.nbytes + logits.nbytes
    assert cache.length == T
    with pytest.raises(ValueError, match="cache holds 41 tokens"):
        model(idx[:, :1], cache=cache)


@torch.no_grad()
def test_a_long_decode_with_a_constant_state_equals_the_full_pass(is_long: bool) -> None:
    """Token by token through the cascade's cache: 1,000 tokens, 100,000 with --long."""
    model, length = make_model("cascade"), 100_000 if is_long else 1_000
    idx = make_tokens(1, length)
    torch.testing.assert_close(in_chunks(model, idx, *[1] * length), model(idx)[0], atol=1e-4, rtol=0)
