"""What holds for every model: causal, streamable, row-independent, and a cache that counts what it allocates.

A new model joins by one line in CONFIGS.
"""

import random
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import MODELS
from model_cascade import CascadeConfig
from model_context import ContextKVConfig, ContextPythiaConfig
from model_infini import InfiniConfig
from model_mla import MLAConfig
from pythia_base import Cache, PythiaConfig, compile_step

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48
}  # fmt: skip
CONFIGS = {
    "pythia": PythiaConfig(**SMALL, rotary_pct=0.5),
    "mla": MLAConfig(**SMALL, kv_dim=12),
    "mla-steep": MLAConfig(**SMALL, kv_dim=12, alibi_slope=0.7),
    "context": ContextPythiaConfig(**SMALL, context_dim=12),
    "context_kv": ContextKVConfig(**SMALL, context_dim=12, context_layers=(0, 2), context_interval=4, max_contexts=3),
    "infini": InfiniConfig(**SMALL, segment_len=8),
    "infini-plain": InfiniConfig(**SMALL, segment_len=5, use_delta_rule=False),
    "infini-alibi": InfiniConfig(**SMALL, segment_len=5, use_alibi=True, alibi_scale=2.0),
    "infini-banks": InfiniConfig(**SMALL, segment_len=3, num_memory_banks=2, segments_per_bank=2, use_alibi=True),
    "infini-multi": InfiniConfig(**SMALL, segment_len=4, num_memories=3),
    "infini-multi-sums": InfiniConfig(**SMALL, segment_len=4, num_memories=3, normalize_relevance=False),
    "cascade": CascadeConfig(vocab_size=97, hidden_size=32, context_dim=12, num_context_blocks=3),
}
B, T = 3, 41
every_model = pytest.mark.parametrize("name", CONFIGS)


def make_model(name: str) -> Any:
    """A model with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = dict(MODELS.values())[type(CONFIGS[name])](CONFIGS[name])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model.eval()


def make_tokens() -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(1))


@every_model
def test_causal(name: str) -> None:
    """Changing token t changes no logit before t, and does change the one at t."""
    model, idx = make_model(name), make_tokens()
    before = model(idx)[0]
    for t in (0, 1, T // 2, T - 1):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % SMALL["vocab_size"]
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@every_model
@pytest.mark.parametrize("seed", range(4))
def test_streamable(name: str, seed: int) -> None:
    """The logits of chunks of any sizes, fed through the cache, are those of one full pass."""
    model, idx, rng = make_model(name), make_tokens(), random.Random(seed)
    full = model(idx)[0]
    cache = model.init_cache(batch_size=B, max_len=T)
    while cache.length < T:
        start, size = cache.length, rng.choice([1, 1, 2, 3, 7, 16])
        logits = model(idx[:, start : start + size], cache=cache)[0]
        torch.testing.assert_close(logits, full[:, start : start + size], atol=1e-4, rtol=0)
    assert cache.length == T


@every_model
@pytest.mark.parametrize("num_rows", [1, 2])
@torch.no_grad()
def test_compiled_steps_are_the_model_s(name: str, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few programs for all 34 positions; a layer that is not compiled parts them in two."""
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options, **keys: compiled(function, backend=counter, **keys))
    torch._dynamo.reset()
    model, idx = make_model(name), make_tokens()[:num_rows]
    full, step = model(idx)[0], compile_step(model)
    cache = model.init_cache(num_rows, T)
    model(idx[:, :7], cache=cache)
    logits = torch.cat([step(token, cache=cache)[0] for token in idx[:, 7:].split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, full[:, 7:], atol=1e-4, rtol=1e-4)
    assert counter.frame_count <= 4


@torch.no_grad()
def test_a_step_that_is_compiled_for_the_machine() -> None:
    model, idx = make_model("mla"), make_tokens()[:1]
    full, step, cache = model(idx)[0], compile_step(model), model.init_cache(1, T)
    logits = torch.cat([step(token, cache=cache)[0] for token in idx.split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)


@every_model
def test_row_independent(name: str) -> None:
    """A row's logits do not depend on the other rows of the batch."""
    model, idx = make_model(name), make_tokens()
    together = model(idx)[0]
    for row in range(B):
        torch.testing.assert_close(model(idx[row : row + 1])[0], together[row : row + 1], atol=1e-5, rtol=0)


@every_model
def test_loss_is_the_mean_cross_entropy_of_the_logits(name: str) -> None:
    model, idx = make_model(name), make_tokens()
    targets = idx.roll(-1, dims=1)
    targets[:, -5:] = -100
    logits, loss = model(idx, targets)
    log_probs = logits.double().log_softmax(dim=-1)
    expected = -torch.stack([log_probs[b, t, targets[b, t]] for b in range(B) for t in range(T - 5)]).mean()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    assert model(idx, targets, return_logits=False)[0] is None


@every_model
def test_loss_without_logits_has_the_same_value_and_gradients(name: str) -> None:
    model, idx = make_model(name), make_tokens()
    targets = idx.roll(-1, dims=1)
    targets[0, :7] = -100
    results = []
    for return_logits in (True, False):
        model.zero_grad()
        loss = model(idx, targets, return_logits=return_logits)[1]
        (3 * loss).backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    assert len(results[0][1]) > 0


@every_model
def test_greedy_generation_follows_the_full_pass(name: str) -> None:
    model, prompt = make_model(name), make_tokens()[:, :9]
    out = model.generate(prompt, max_new_tokens=12, temperature=0.0, top_k=None)
    for end in range(9, 21):
        assert torch.equal(model(out[:, :end])[0][:, -1].argmax(-1), out[:, end])


@every_model
def test_the_cache_counts_its_tensors_and_refuses_to_overflow(name: str) -> None:
    model, idx = make_model(name), make_tokens()
    cache = model.init_cache(batch_size=B, max_len=T)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors()}
    assert cache.nbytes == sum(storages.values())
    model(idx, cache=cache)
    assert {t.untyped_storage().data_ptr() for t in cache.tensors()} == storages.keys(), "decoding allocated anew"
    with pytest.raises(ValueError, match="cache holds 41 tokens"):
        model(idx[:, :1], cache=cache)


class Allocations(TorchDispatchMode):
    """Follows the storage of every tensor that an operation returns, but for the given ones, while any refers to it."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.given = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in given}
        self.storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, torch.Tensor):
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
    with Allocations([*model.parameters(), *model.buffers()]) as allocations:
        cache = model.init_cache(batch_size=B, max_len=T)
        model(make_tokens()[:, :9], cache=cache)
        for t in range(9, T):
            model(make_tokens()[:, t : t + 1], cache=cache)
        return cache.nbytes, allocations.nbytes()


@every_model
def test_decoding_keeps_what_the_cache_counts_and_no_more(name: str) -> None:
    counted, kept = bytes_kept_by_decoding(make_model(name))
    assert counted == kept


class HiddenCache(Cache):
    """Counts the first of its layers alone."""

    def tensors(self) -> list[torch.Tensor]:
        return list(vars(self.layers[0]).values())


def test_what_a_cache_does_not_count_is_seen() -> None:
    """Keys and values that the count leaves out, and a model that remembers in a place of its own."""
    model = make_model("pythia")
    model.init_cache = lambda batch_size, max_len: HiddenCache(
        [attention.init_cache(batch_size, max_len) for attention in model.attentions()], max_len
    )
    counted, kept = bytes_kept_by_decoding(model)
    assert kept == SMALL["num_layers"] * counted
    model, remembered = make_model("pythia"), []
    model.final_layer_norm.register_forward_hook(lambda *call: remembered.append(call[-1]))
    counted, kept = bytes_kept_by_decoding(model)
    assert kept == counted + 4 * B * T * SMALL["hidden_size"]


@every_model
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model, idx = make_model(name), make_tokens()
    model(idx, idx.roll(-1, dims=1))[1].backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@every_model
def test_starting_from_a_baseline_reports_every_tensor(name: str) -> None:
    """What is copied equals the baseline's; every tensor is accounted for."""
    torch.manual_seed(3)
    baseline = MODELS["pythia"][1](PythiaConfig(**SMALL))
    model = make_model(name)
    report = model.start_from(baseline)
    theirs, mine = baseline.state_dict(), model.state_dict()
    assert set(report) == set(mine)
    assert set(report.values()) <= {"copied", "converted", "new"}
    assert all(torch.equal(mine[k], theirs[k]) for k, how in report.items() if how == "copied")
    assert report["embed_in.weight"] == "copied"


@every_model
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1.2e-3)])
def test_autocast_stays_near_float32(name: str, dtype: torch.dtype, bound: float) -> None:
    """Relative difference of all logits; the loss, a mean, is ten times nearer."""
    model, idx = make_model(name), make_tokens()
    targets = idx.roll(-1, dims=1)
    exact, exact_loss = model(idx, targets)
    with torch.autocast("cpu", dtype):
        rough, loss = model(idx, targets)
    assert 0 < (rough.float() - exact).norm() / exact.norm() < bound
    assert abs(loss / exact_loss - 1) < bound / 10


@torch.no_grad()
@pytest.mark.parametrize("name", ["context", "cascade"])
def test_autocast_leaves_recurrences_in_float32(name: str) -> None:
    """Rounding would add up from token to token; the loop has to be the one that a context cache is made with."""
    model, idx = make_model(name), make_tokens()

    def contexts() -> torch.Tensor:
        if name == "cascade":
            return model.recurrences(idx, None)
        return model.context_blocks[0].recurrence(model.embed_in(idx), None)

    exact = contexts()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contexts(), exact)


@torch.no_grad()
def test_a_long_decode_with_a_constant_state_equals_the_full_pass(is_long: bool) -> None:
    """Token by token through the cascade's cache: 1,000 tokens, 100,000 with --long."""
    model, length = make_model("cascade"), 100_000 if is_long else 1_000
    idx = torch.randint(SMALL["vocab_size"], (1, length), generator=torch.Generator().manual_seed(2))
    cache = model.init_cache(1, length)
    decoded = torch.cat([model(token, cache=cache)[0] for token in idx.split(1, dim=1)], dim=1)
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded, model(idx)[0], atol=1e-4, rtol=0)
