"""What holds for every model, in every mode of it. A new model joins by one line in CONFIGS."""

import functools
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, in_chunks, make_tokens, randomise
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import MODELS
from model_cascade import CascadeConfig
from model_context import ContextBlock, ContextKVConfig, ContextPythiaConfig
from model_infini import InfiniConfig
from model_mla import MLAConfig
from pythia_base import Attention, PythiaConfig, PythiaModel, SelfAttention, causal_attention

CASCADE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "context_dim": 12}
CONFIGS: dict[str, Any] = {
    "pythia": PythiaConfig(**SMALL, rotary_pct=0.5),
    "pythia-full-rotary": PythiaConfig(**SMALL, rotary_pct=1.0, rotary_base=100.0),
    "mla": MLAConfig(**SMALL, kv_dim=12),
    "mla-steep": MLAConfig(**SMALL, kv_dim=12, alibi_slope=0.7),
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


def make_model(name: str) -> Any:
    return randomise(build(CONFIGS[name]))


@functools.cache
def reference_logits(name: str) -> Tensor:
    """By the plain loops in the model's file."""
    model = make_model(name)
    with torch.no_grad():
        return sys.modules[type(model).__module__].reference(model, make_tokens(B, T))


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
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_streamable(name: str, seed: int) -> None:
    """The logits of chunks of any sizes, fed through the cache, are those of one full pass."""
    model, idx = make_model(name), make_tokens(B, T)
    torch.testing.assert_close(in_chunks(model, idx, *chunk_sizes(seed)), model(idx)[0], atol=1e-4, rtol=0)


@every_model
@torch.no_grad()
def test_row_independent(name: str) -> None:
    """A row's logits do not depend on the other rows of the batch."""
    model, idx = make_model(name), make_tokens(B, T)
    together = model(idx)[0]
    for row in range(B):
        torch.testing.assert_close(model(idx[row : row + 1])[0], together[row : row + 1], atol=1e-5, rtol=0)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_equal_to_its_reference(name: str, dtype: torch.dtype) -> None:
    """In one pass and through the cache. RoPE's angles and Infini's memory are float32 in a float64 model too."""
    model, idx = make_model(name).to(dtype), make_tokens(B, T)
    bound = 1e-4 if dtype == torch.float32 else 1e-5
    for logits in (model(idx)[0], in_chunks(model, idx, *chunk_sizes(5))):
        torch.testing.assert_close(logits.double(), reference_logits(name), atol=bound, rtol=0)


@every_model
def test_the_loss_and_its_gradients_are_those_of_the_logits(name: str) -> None:
    """The mean cross entropy, -100 left out, though no logits are held."""
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


@every_model
@torch.no_grad()
def test_greedy_generation_follows_the_full_pass(name: str) -> None:
    model, prompt = make_model(name), make_tokens(B, 9)
    out = model.generate(prompt, max_new_tokens=T - 9, temperature=0.0)
    assert torch.equal(out[:, :9], prompt)
    assert torch.equal(model(out)[0][:, 8:-1].argmax(-1), out[:, 9:])


@every_model
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model, idx = make_model(name), make_tokens(B, T)
    model(idx, idx.roll(-1, dims=1))[1].backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@every_model
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1.2e-3)])
@torch.no_grad()
def test_autocast_stays_near_float32(name: str, dtype: torch.dtype, bound: float) -> None:
    """Relative difference of all logits; the loss, a mean, is ten times nearer."""
    model, idx = make_model(name), make_tokens(B, T)
    targets = idx.roll(-1, dims=1)
    exact, exact_loss = model(idx)[0], model(idx, targets)[1]
    with torch.autocast("cpu", dtype):
        rough, loss = model(idx)[0], model(idx, targets)[1]
    assert 0 < (rough.float() - exact).norm() / exact.norm() < bound
    assert abs(loss / exact_loss - 1) < bound / 10


# --------------------------------------------------------------------------------------------------- how it starts


def writers(model: Any) -> set[nn.Module]:
    """The matrices that write to the residual stream: of attention and MLP of every block, the last that is called."""
    parts = {part for block in model.layers for part in (block.attention, block.mlp)}
    calls, found = list[nn.Module](), set[nn.Module]()

    def called(module: nn.Module, *_: Any) -> None:
        if type(module) is nn.Linear:
            calls.append(module)
        if module in parts:
            found.add(calls[-1])

    with nn.modules.module.register_module_forward_hook(called):
        model(make_tokens(1, 5))
    return found


def assert_initialised_alike(model: Any) -> None:
    """wang_init for what writes to the residual stream, small_init for the rest, whatever a class derives from."""
    C, layers = model.config.hidden_size, len(model.layers)
    outputs = writers(model)
    assert len(outputs) == 2 * layers
    own = {m for block in model.modules() if isinstance(block, ContextBlock) for m in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module not in own:
            std = 2 / (layers * C**0.5) if module in outputs else (2 / (5 * C)) ** 0.5
            assert module.weight.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(module.weight.mean().item()) < 0.1 * std, name
        if isinstance(module, nn.Linear) and module not in own and module.bias is not None:
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if isinstance(config, PythiaConfig)])
def test_initialised_alike(name: str) -> None:
    config: Any = CONFIGS[name]
    changes = {"hidden_size": 64, "num_layers": 10, "intermediate_size": 80}
    changes |= {field: 48 for field in ("kv_dim", "context_dim") if hasattr(config, field)}
    assert_initialised_alike(build(replace(config, **changes)))


class SlidingWindow(Attention):
    """No subclass of the baseline's, without biases and positions, its output under a name of choice."""

    def __init__(self, config: PythiaConfig, output: str) -> None:
        super().__init__()
        self.project, self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False), output
        self.add_module(output, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, x: Tensor, start: int, cache: Any) -> Tensor:
        q = self.project(x)[:, None]
        return self.get_submodule(self.output)(causal_attention(q, q, q)[:, 0])


def sliding_window_model(output: str) -> type[PythiaModel]:
    return type("SlidingWindowModel", (PythiaModel,), {"make_attention": lambda m, _: SlidingWindow(m.config, output)})


def test_an_attention_of_one_s_own_is_initialised_alike() -> None:
    config = PythiaConfig(**SMALL | {"hidden_size": 64, "num_layers": 10})
    for output in ("dense", "W_O"):
        assert_initialised_alike(sliding_window_model(output)(config))
    with pytest.raises(ValueError, match="layer 0: what writes to the residual stream has to be called dense or"):
        sliding_window_model("out_proj")(config)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (PythiaConfig, {"rotary_pct": 0.05}, "3 dimensions"), (PythiaConfig, {"rotary_pct": 1.5}, "between 0 and 1"),
        (PythiaConfig, {"rotary_pct": math.nan}, "between 0 and 1"), (PythiaConfig, {"num_layers": 0}, "num_layers=0"),
        (PythiaConfig, {"num_heads": 7}, "num_heads=7 does not divide hidden_size=512"),
        (PythiaConfig, {"vocab_size": -1}, "vocab_size=-1"), (PythiaConfig, {"rotary_base": 0.0}, "rotary_base=0.0"),
        (PythiaConfig, {"max_position_embeddings": 0}, "max_position_embeddings=0"),
        (PythiaConfig, {"layer_norm_eps": math.nan}, "layer_norm_eps=nan"),
        (PythiaConfig, {"layer_norm_eps": -1e-5}, "layer_norm_eps=-1e-05"),
        (PythiaConfig, {"rotary_base": math.inf}, "rotary_base=inf"),
        (MLAConfig, {"kv_dim": 0}, "kv_dim=0"), (MLAConfig, {"num_heads": 3}, "num_heads=3 does not divide"),
        (MLAConfig, {"kv_dim": 513}, "kv_dim=513 is above hidden_size=512"),
        (MLAConfig, {"alibi_slope": -0.1}, "alibi_slope=-0.1"),
        (MLAConfig, {"alibi_slope": math.nan}, "alibi_slope=nan"),
        (MLAConfig, {"alibi_slope": math.inf}, "alibi_slope=inf"),
        (ContextPythiaConfig, {"context_dim": 0}, "context_dim=0"),
        (ContextPythiaConfig, {"init": "zeros"}, "init='zeros' is not one of normal, xavier, kaiming"),
        (ContextKVConfig, {"context_interval": 0}, "context_interval=0"),
        (ContextKVConfig, {"max_contexts": 0}, "max_contexts=0"),
        (ContextKVConfig, {"context_layers": (6,)}, r"context_layers=\[6\]"),
        (InfiniConfig, {"num_memory_banks": 2, "num_memories": 2}, "banks and multi-memory exclude one another"),
        (InfiniConfig, {"segment_len": 0}, "segment_len=0"), (InfiniConfig, {"num_memories": 0}, "num_memories=0"),
        (InfiniConfig, {"num_memory_banks": 0}, "num_memory_banks=0"),
        (InfiniConfig, {"segments_per_bank": 0}, "segments_per_bank=0"),
        (InfiniConfig, {"alibi_scale": -1}, "alibi_scale=-1"), (CascadeConfig, {"vocab_size": 0}, "vocab_size=0"),
        (CascadeConfig, {"context_dim": 0}, "context_dim=0"),
        (CascadeConfig, {"num_context_blocks": 0}, "num_context_blocks=0"),
        (CascadeConfig, {"num_layers_per_block": 0}, "num_layers_per_block=0"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(config_class: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


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
    baseline, model = randomise(PythiaModel(PythiaConfig(**SMALL))), build(replace_rotary(CONFIGS[name]))
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


def replace_rotary(config: Any) -> Any:
    """The config with the baseline's RoPE where it has one to choose."""
    has_rope = isinstance(config, PythiaConfig) and not isinstance(config, MLAConfig)
    return replace(config, rotary_pct=0.25, rotary_base=10000.0) if has_rope else config


@every_model
@torch.no_grad()
def test_its_own_class_is_a_source(name: str) -> None:
    source, model, idx = make_model(name), build(CONFIGS[name]), make_tokens(1, 9)
    assert set(model.start_from(source).values()) == {"copied"}
    assert torch.equal(model(idx)[0], source(idx)[0])


@every_model
def test_other_classes_are_no_source(name: str) -> None:
    """Refused in one line, and nothing is taken, though names and shapes agree."""
    model = build(replace_rotary(CONFIGS[name]))
    others = {type(build(config)): config for config in CONFIGS.values()} | {GQAPythiaModel: PythiaConfig(**SMALL)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for source_class, config in others.items():
        if source_class not in (type(model), PythiaModel):
            with pytest.raises(ValueError, match=rf"^the source is a {source_class.__name__}: .*PythiaModel.*$"):
                model.start_from(source_class(config))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_attention_tensor_of_a_baseline_is_taken_for_another_layout_s() -> None:
    report = GQAPythiaModel(PythiaConfig(**SMALL)).start_from(PythiaModel(PythiaConfig(**SMALL)))
    assert {name for name, how in report.items() if how == "new"} == {k for k in report if ".attention." in k}
    assert "converted" not in report.values()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64}, "same widths"),
        ({"num_heads": 2}, "num_heads=4, this model 2"),
        ({"rotary_pct": 0.5}, "rotary_pct=0.25, this model 0.5"),
        ({"rotary_base": 5.0}, "rotary_base=10000.0, this model 5.0"),
    ],
)
def test_another_shape_is_no_source(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PythiaModel(PythiaConfig(**SMALL | fields)).start_from(PythiaModel(PythiaConfig(**SMALL)))


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


class Allocations(TorchDispatchMode):
    """Follows the storage of every tensor that an operation returns, but for the given ones, while any refers to it."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in given}
        self.storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata not in self.given:
                    self.storages[reference.cdata] = reference
        return returned

    def nbytes(self) -> int:
        """Bytes that are still allocated."""
        alive = (torch.UntypedStorage._new_with_weak_ptr(cdata) for cdata in self.storages)
        return sum(storage.nbytes() for storage in alive if storage is not None)


def bytes_kept_by_decoding(model: Any) -> tuple[int, int]:
    """What a cache says that it holds, and what a long generation through it leaves allocated beside the weights."""
    model.requires_grad_(False)
    chunks = make_tokens(B, T).split([9, *[1] * (T - 9)], dim=1)
    with Allocations([*model.parameters(), *model.buffers(), *chunks]) as allocations:
        cache = model.init_cache(batch_size=B, max_len=T)
        for chunk in chunks:
            model(chunk, cache=cache)
        return cache.nbytes, allocations.nbytes()


@every_model
def test_decoding_keeps_what_the_cache_counts_and_no_more(name: str) -> None:
    """And a cache that is full refuses a further token."""
    model = make_model(name)
    counted, kept = bytes_kept_by_decoding(model)
    assert counted == kept
    cache = model.init_cache(batch_size=B, max_len=T)
    model(make_tokens(B, T), cache=cache)
    assert cache.length == T
    with pytest.raises(ValueError, match="cache holds 41 tokens"):
        model(make_tokens(B, 1), cache=cache)


def test_what_a_cache_does_not_count_is_seen() -> None:
    """Of a model that remembers in a place of its own."""
    model, remembered = make_model("pythia"), []
    model.final_layer_norm.register_forward_hook(lambda *call: remembered.append(call[-1]))
    counted, kept = bytes_kept_by_decoding(model)
    assert kept == counted + 4 * B * T * SMALL["hidden_size"]


@torch.no_grad()
def test_a_long_decode_with_a_constant_state_equals_the_full_pass(is_long: bool) -> None:
    """Token by token through the cascade's cache: 1,000 tokens, 100,000 with --long."""
    model, length = make_model("cascade"), 100_000 if is_long else 1_000
    idx = make_tokens(1, length)
    torch.testing.assert_close(in_chunks(model, idx, *[1] * length), model(idx)[0], atol=1e-4, rtol=0)
