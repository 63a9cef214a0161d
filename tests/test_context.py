"""The context family: the recurrence, Phase 1, the shared contexts of Context-Pythia, the intervals of Context-KV."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pythia_base
from configurator import MODELS, parse_train
from kit.files import InputError
from kit.runs import model_args
from model_context import (
    ContextAttention,
    ContextBlock,
    ContextKVConfig,
    ContextKVPythiaModel,
    ContextPythiaConfig,
    ContextPythiaModel,
    IntervalAttention,
    compute_convergence_rate,
    effective_rank,
    first_contexts,
    interval_columns,
    oacd_iteration,
    oacd_loss,
)
from pythia_base import PythiaConfig, make_optimizer
from train import PHASES

EPS = 1e-5
SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48
}  # fmt: skip
SETTINGS: Any = PHASES["phase1"]()  # Phase 1's defaults
PASS = {
    name: getattr(SETTINGS, name)
    for name in ("batch_size", "context_noise", "centroid_weight", "gradient_clip", "convergence_threshold")
}


def make_block(num_layers: int = 1, embed_norm: bool = True) -> ContextBlock:
    torch.manual_seed(0)
    return ContextBlock(6, 5, num_layers, EPS, "normal", embed_norm).double()


def make_model(config: Any) -> Any:
    """A model with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = dict(MODELS.values())[type(config)](config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model.eval()


def make_tokens(B: int, T: int) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------- the recurrence


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + EPS).sqrt()


def plain_step(block: Any, c: Tensor, embedding: Tensor) -> Tensor:
    """context.md's three equations for one token, without a batch."""
    e = embedding if isinstance(block.embed_norm, torch.nn.Identity) else layer_norm(embedding)
    for linear, norm in zip(block.linears, block.norms, strict=True):
        x = linear.weight @ torch.cat([c, e]) + linear.bias
        delta = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        c = layer_norm(c + delta) * norm.weight + norm.bias
    return c


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("embed_norm", [True, False])
def test_the_recurrence_is_the_plain_loop(num_layers: int, embed_norm: bool) -> None:
    block, embeddings = make_block(num_layers, embed_norm), torch.randn(2, 9, 6, dtype=torch.float64)
    expected = torch.zeros(2, 9, 5, dtype=torch.float64)
    for b in range(2):
        c = torch.zeros(5, dtype=torch.float64)
        for t in range(9):
            c = expected[b, t] = plain_step(block, c, embeddings[b, t])
    contexts = block.recurrence(embeddings, None)
    torch.testing.assert_close(contexts, expected, atol=1e-12, rtol=0)
    rest = block.recurrence(embeddings[:, 4:], contexts[:, 3])
    torch.testing.assert_close(rest, expected[:, 4:], atol=1e-12, rtol=0)
    torch.testing.assert_close(block(contexts[:, 3], embeddings[:, 4]), expected[:, 4], atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------------------------- Phase 1


def test_the_init_and_the_phase_1_table_are_context_mds() -> None:
    """These were once lost in an edit, and Phase 1 stopped converging."""
    torch.manual_seed(0)
    context = ContextPythiaModel(ContextPythiaConfig(vocab_size=97))
    assert context.W_in.weight.std().item() == pytest.approx(0.02, rel=0.02)
    models: list[Any] = [context, ContextKVPythiaModel(ContextKVConfig(vocab_size=97))]
    for model in models:
        block = model.context_block
        linear = block.linears[0]
        assert linear.weight.shape == (256, 256 + 512)
        assert linear.weight.std().item() == pytest.approx(0.1, rel=0.02)
        assert linear.bias.std().item() == pytest.approx(0.01, rel=0.2)
        assert abs(linear.weight.mean().item()) < 0.001
        assert len(block.linears) == 1
        embeddings = torch.randn(3, 512)
        torch.testing.assert_close(block.embed_norm(embeddings), torch.nn.functional.layer_norm(embeddings, (512,)))
        assert not list(block.embed_norm.parameters()), "embed_norm's scale and shift stay at 1 and 0"
        attention = model.layers[0].attention
        assert attention.dense.weight.std().item() == pytest.approx(0.02 / math.sqrt(12), rel=0.02)
    assert first_contexts(1000, 256).std().item() == pytest.approx(0.01, rel=0.02)
    table = {
        "num_tokens": 100_000,
        "max_iterations": 100,
        "convergence_threshold": 0.03,
        "learning_rate": 0.003,
        "batch_size": 5_000,
        "gradient_clip": 2.0,
        "context_noise": 0.05,
        "early_stopping_threshold": 0.9,
        "centroid_weight": 0.1,
    }
    assert {name: getattr(SETTINGS, name) for name in table} == table


@pytest.mark.parametrize(("init", "std"), [("xavier", (2 / (256 + 768)) ** 0.5), ("kaiming", (2 / 768) ** 0.5)])
def test_the_other_inits_are_the_usual_ones(init: Any, std: float) -> None:
    linear = ContextBlock(512, 256, 1, EPS, init, True).linears[0]
    assert linear.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not linear.bias.any()


def test_oacd_loss_convergence_and_rank_by_hand() -> None:
    contexts = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 3.0]])  # centroid (2, 1), deviations 2 + 2 + 4 squared
    assert oacd_loss(contexts, centroid_weight=0.1).item() == pytest.approx(-math.sqrt(8) / 3 + 0.1 * 5)
    moved = contexts + torch.tensor([[0.0, 0.1], [0.0, 0.3], [0.2, 0.1]])  # mean squares 0.005, 0.045, 0.025
    assert compute_convergence_rate(moved, contexts, threshold=0.03) == pytest.approx(2 / 3)
    assert effective_rank(torch.eye(7)[:, :5]) == pytest.approx(5)
    assert effective_rank(torch.ones(9, 5)) == pytest.approx(1, abs=1e-3)
    contexts = torch.randn(25_000, 8) @ torch.randn(8, 8)
    p = torch.linalg.svdvals(contexts.double())
    p = p / p.sum()
    assert effective_rank(contexts) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_one_iteration_is_the_plain_loop(num_layers: int) -> None:
    """Shifted contexts, noise, batches, loss / number of batches, one clipped step: 23 tokens in batches of 10."""
    block, reference = make_block(num_layers), make_block(num_layers)
    table = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(11, (23,))
    before = torch.randn(23, 5, dtype=torch.float64)
    contexts = before.clone()
    optimizer = torch.optim.SGD(block.parameters(), lr=1.0)
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)  # left over from the iteration before
    torch.manual_seed(7)
    numbers = {**PASS, "batch_size": 10, "gradient_clip": 0.01, "convergence_threshold": 1.0}
    loss, rate = oacd_iteration(block, table, tokens, contexts, optimizer, **numbers)

    torch.manual_seed(7)
    losses, new = torch.zeros(3, dtype=torch.float64), []
    for i, (start, size) in enumerate([(0, 10), (10, 10), (20, 3)]):
        noise = 0.05 * torch.randn(size, 5, dtype=torch.float64)
        batch = []
        for t in range(start, start + size):
            c = before[t - 1] if t > 0 else torch.zeros(5, dtype=torch.float64)
            batch.append(plain_step(reference, c + noise[t - start], table[tokens[t]].detach()))
        losses[i] = oacd_loss(torch.stack(batch), centroid_weight=0.1) / 3
        new += batch
    expected = torch.stack(new)
    torch.testing.assert_close(contexts, expected.detach(), atol=1e-12, rtol=0)
    assert loss == pytest.approx(losses.sum().item())
    assert 0 < rate < 1
    assert rate == pytest.approx(compute_convergence_rate(expected, before, threshold=1.0))
    parameters = list(reference.parameters())
    grads = torch.autograd.grad(losses.sum(), parameters)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    assert norm > 0.01
    for mine, theirs, grad in zip(block.parameters(), parameters, grads, strict=True):
        torch.testing.assert_close(mine, theirs - grad * 0.01 / norm, atol=1e-7, rtol=0)
    assert table.grad is None, "Phase 1 trains the ContextBlock alone"


def test_phase_1_settles_on_diverse_contexts() -> None:
    """On real text, the bytes of a file of this project: 90% within the 100 iterations."""
    torch.manual_seed(0)
    tokens = torch.tensor(list(Path(pythia_base.__file__).read_bytes()))[:20_000]
    table, block = 0.02 * torch.randn(256, 96), ContextBlock(96, 64, 1, EPS, "normal", True)
    optimizer = torch.optim.Adam(block.parameters(), lr=SETTINGS.learning_rate)
    contexts, rates = first_contexts(len(tokens), 64), [0.0]
    while rates[-1] < SETTINGS.early_stopping_threshold and len(rates) <= SETTINGS.max_iterations:
        rates.append(oacd_iteration(block, table, tokens, contexts, optimizer, **PASS)[1])
    assert rates[1] < 0.1
    assert rates[-1] >= 0.9
    assert effective_rank(contexts) > 0.6 * 64


# ------------------------------------------------------------------------------------- what both models share

CONFIGS = {
    "context": ContextPythiaConfig(**SMALL, context_dim=12),
    "context_kv": ContextKVConfig(**SMALL, context_dim=12, context_layers=(0, 2), context_interval=4, max_contexts=3),
}
both_models = pytest.mark.parametrize("name", CONFIGS)


@both_models
def test_known_contexts_take_the_place_of_the_recurrence(name: str) -> None:
    model, idx = make_model(CONFIGS[name]), make_tokens(2, 30)
    contexts = model.context_block.recurrence(model.embed_in(idx), None)
    full = model(idx)[0]
    torch.testing.assert_close(model(idx, contexts=contexts)[0], full, atol=1e-6, rtol=0)
    assert (model(idx, contexts=contexts.flip(1))[0] - full).abs().max() > 1e-2
    cache = model.init_cache(batch_size=2, max_len=30)
    model(idx[:, :17], cache=cache, contexts=contexts[:, :17])
    continued = model(idx[:, 17:], cache=cache)[0]  # the recurrence goes on from the last context that was given
    torch.testing.assert_close(continued, full[:, 17:], atol=1e-4, rtol=0)


def test_context_pythia_reads_the_embedding_through_the_context_block_only() -> None:
    model, idx = make_model(CONFIGS["context"]), make_tokens(2, 9)
    contexts = torch.randn(2, 9, 12)
    torch.testing.assert_close(model(idx, contexts=contexts)[0], model(idx.flip(1), contexts=contexts)[0])


@both_models
def test_frozen_means_frozen(name: str) -> None:
    """A phase 2 step with weight decay changes every parameter but those the contexts were computed with."""
    model, idx = make_model(CONFIGS[name]), make_tokens(2, 9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.freeze_for_phase2()
    optimizer = make_optimizer(model, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95))
    model(idx, idx.roll(-1, dims=1))[1].backward()
    optimizer.step()
    unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    block = {"linears.0.weight", "linears.0.bias", "norms.0.weight", "norms.0.bias"}
    assert unchanged == {"embed_in.weight", *(f"context_block.{k}" for k in block)}


@both_models
def test_starting_from_a_baseline_takes_over_what_reads_the_stream(name: str) -> None:
    baseline, model = make_model(PythiaConfig(**SMALL)), make_model(CONFIGS[name])
    report = model.start_from(baseline)
    x = torch.randn(2, 5, 32)
    q = baseline.layers[2].attention.query_key_value(x).unflatten(-1, (4, 3, 8))[:, :, :, 0].flatten(2)
    torch.testing.assert_close(model.layers[2].attention.W_Q(x), q)
    new = {k.split("attention.")[-1] for k, how in report.items() if how == "new"}
    block = {f"context_block.{k}" for k in ("linears.0.weight", "linears.0.bias", "norms.0.weight", "norms.0.bias")}
    assert new == {"W_K.weight", "W_V.weight", *block} | ({"W_in.weight"} if name == "context" else set())


@both_models
def test_starting_from_a_phase_1_run_copies_everything(name: str) -> None:
    parent, model = make_model(CONFIGS[name]), MODELS[name][1](CONFIGS[name])
    assert set(model.start_from(parent).values()) == {"copied"}
    idx = make_tokens(2, 9)
    assert torch.equal(model(idx)[0], parent(idx)[0])


# ------------------------------------------------------------------------------------------------- Context-Pythia


@pytest.mark.parametrize("rotary_pct", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("T", "P"), [(1, 2), (1, 30), (7, 30), (29, 30)])
def test_the_absorbed_form_equals_the_expanded_one(rotary_pct: float, T: int, P: int) -> None:
    torch.manual_seed(0)
    attention = ContextAttention(ContextPythiaConfig(**SMALL, context_dim=12, rotary_pct=rotary_pct)).double()
    q = 3 * torch.randn(2, 4, T, 8, dtype=torch.float64)
    contexts = torch.randn(2, P, 12, dtype=torch.float64)
    torch.testing.assert_close(attention.absorbed(q, contexts), attention.expanded(q, contexts), atol=1e-12, rtol=0)


def test_context_attention_is_the_plain_loop() -> None:
    """q from the stream, k and v from the contexts, RoPE on the first quarter of each head."""
    torch.manual_seed(0)
    attention = ContextAttention(ContextPythiaConfig(**SMALL, context_dim=12, rotary_pct=0.5)).double()
    x, c = torch.randn(1, 6, 32, dtype=torch.float64), torch.randn(1, 6, 12, dtype=torch.float64)
    expected = torch.zeros(6, 4, 8, dtype=torch.float64)
    for h in range(4):
        head = slice(8 * h, 8 * h + 8)
        q = attention.W_Q(x)[0, :, head]
        k, v = attention.W_K(c)[0, :, head], attention.W_V(c)[0, :, head]
        for t in range(6):
            scores = torch.stack([rotate(q[t], t) @ rotate(k[j], j) for j in range(t + 1)]) / math.sqrt(8)
            expected[t, h] = scores.softmax(0) @ v[: t + 1]
    expected = attention.dense(expected.flatten(1))
    torch.testing.assert_close(attention(x, c)[0], expected, atol=1e-6, rtol=0)


def rotate(x: Tensor, position: int) -> Tensor:
    """RoPE on the first 4 of 8 dimensions, in halves: pairs (0, 2) and (1, 3), wavelengths 1 and 100."""
    x = x.clone()
    for i, frequency in enumerate((1.0, 0.01)):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        x[i], x[i + 2] = x[i] * cos - x[i + 2] * sin, x[i + 2] * cos + x[i] * sin
    return x


@pytest.mark.parametrize("cut", [1, 19, 20, 21, 22, 40])
def test_long_chunks_are_expanded_and_short_ones_absorbed(cut: int) -> None:
    model, idx = make_model(CONFIGS["context"]), make_tokens(2, 62)
    assert model.layers[0].attention.absorbing_is_cheaper(20)
    assert not model.layers[0].attention.absorbing_is_cheaper(21)
    full = model(idx)[0]
    cache = model.init_cache(batch_size=2, max_len=62)
    chunks = [model(idx[:, :5], cache=cache)[0], *(model(x, cache=cache)[0] for x in idx[:, 5:].split(cut, dim=1))]
    torch.testing.assert_close(torch.cat(chunks, dim=1), full, atol=1e-4, rtol=0)


def test_context_pythia_caches_1024_bytes_per_token_for_all_layers() -> None:
    model = ContextPythiaModel(ContextPythiaConfig(vocab_size=97))
    assert model.init_cache(batch_size=3, max_len=2048).nbytes == 3 * 2048 * 1024


# ----------------------------------------------------------------------------------------------------- Context-KV


def plain_interval_attention(attention: IntervalAttention, x: Tensor, contexts: Tensor, t: int) -> Tensor:
    """One position: at most max_contexts contexts, every context_interval-th back from the current one."""
    config = attention.config
    attended = range(t, -1, -config.context_interval)[: config.max_contexts]
    q = attention.W_Q(x[:, t]).unflatten(-1, (4, 8))  # (B, H, D)
    k = attention.W_K(contexts[:, list(attended)]).unflatten(-1, (4, 8))  # (B, attended, H, D)
    v = attention.W_V(contexts[:, list(attended)]).unflatten(-1, (4, 8))
    weights = (torch.einsum("bhd,bjhd->bhj", q, k) / math.sqrt(8)).softmax(dim=-1)
    return attention.dense(torch.einsum("bhj,bjhd->bhd", weights, v).flatten(1))


EDGES = (0, 30, 31, 32, 33, 63, 64, 350, 960, 991, 992, 993, 1000, 1022, 1023, 1024, 1056)
SHORT = [(4, 3, T) for T in (1, 3, 4, 5, 8, 9, 11, 12, 13, 30)]
LONG = [(32, 32, T) for T in (31, 32, 33, 351, 1001, 1024, 1057)]


@pytest.mark.parametrize(("interval", "max_contexts", "T"), [*SHORT, *LONG, (1, 5, 12), (4, 1, 9)])
def test_interval_attention_is_the_plain_loop(interval: int, max_contexts: int, T: int) -> None:
    torch.manual_seed(0)
    config = ContextKVConfig(**SMALL, context_dim=12, context_interval=interval, max_contexts=max_contexts)
    attention = IntervalAttention(config).double()
    x, contexts = torch.randn(2, T, 32, dtype=torch.float64), torch.randn(2, T, 12, dtype=torch.float64)
    out = attention(x, *interval_columns(contexts, 0, None, config))
    assert out.shape == x.shape
    for t in EDGES if T > 30 else range(T):
        if t < T:
            expected = plain_interval_attention(attention, x, contexts, t)
            torch.testing.assert_close(out[:, t], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("position", "oldest", "count"), [(350, 30, 11), (1000, 8, 32), (31, 31, 1), (32, 0, 2)])
@pytest.mark.parametrize("new", [1, 5, 32, 40])
def test_the_attended_positions_are_context_mds(position: int, oldest: int, count: int, new: int) -> None:
    """Contexts that hold their own position, the last `new` of them in a chunk of its own."""
    model = ContextKVPythiaModel(ContextKVConfig(**SMALL, context_dim=1))
    ring = model.init_cache(1, 2000).layers[0]
    contexts = torch.arange(position + 1.0).view(1, -1, 1)
    start = max(position + 1 - new, 0)
    ring.write(contexts[:, :start], 0)
    columns, seen = interval_columns(contexts[:, start:], start, ring, model.config)
    last = (position - start) % len(columns)  # the column of the last position, and its row below
    row = (position - start) // len(columns)
    attended = columns[last, seen[last, 0, row], 0].tolist()
    assert attended == list(range(oldest, position + 1, 32))
    assert len(attended) == count


@functools.cache
def full_pass_of_1100_tokens() -> tuple[Any, Tensor, Tensor, Tensor]:
    model, idx = make_model(ContextKVConfig(**SMALL, context_dim=12, context_layers=(0, 1))), make_tokens(1, 1100)
    with torch.no_grad():
        contexts = model.context_block.recurrence(model.embed_in(idx), None)
        return model, idx, contexts, model(idx, contexts=contexts)[0]


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 991, 992, 993, 994, 1023, 1024, 1025])
@torch.no_grad()
def test_decoding_past_the_wrap_of_the_ring_is_the_full_pass(cut: int) -> None:
    model, idx, contexts, full = full_pass_of_1100_tokens()
    cache = model.init_cache(batch_size=1, max_len=1100)
    assert cache.layers[0] is cache.layers[1]
    for size in (cut, 1, 1, 31, 1, 32, 1, 1100 - cut - 67):
        now = slice(cache.length, cache.length + size)
        logits = model(idx[:, now], cache=cache, contexts=contexts[:, now])[0]
        torch.testing.assert_close(logits, full[:, now], atol=1e-4, rtol=0)
    assert cache.length == 1100


@pytest.mark.parametrize(("context_layers", "saved"), [((0,), 0.146), ((0, 1, 2), 0.480), ((0, 1, 2, 3), 0.646)])
def test_context_kv_caches_993_contexts_once(context_layers: tuple[int, ...], saved: float) -> None:
    model = ContextKVPythiaModel(ContextKVConfig(vocab_size=97, context_layers=context_layers))
    key_value_layers = 6 - len(context_layers)
    for max_len in (256, 2048, 8192):
        expected = key_value_layers * max_len * 4096 + min(max_len, 993) * 1024
        assert model.init_cache(batch_size=1, max_len=max_len).nbytes == expected
    assert 1 - model.init_cache(batch_size=1, max_len=2048).nbytes / (2048 * 24_576) == pytest.approx(saved, abs=5e-4)


def test_context_layers_may_be_a_list_and_survive_a_checkpoint() -> None:
    config = parse_train(["--model=context_kv", "--context_layers=[2,0]"], PHASES).model_config
    assert config.context_layers == (2, 0)
    assert ContextKVConfig(**json.loads(json.dumps(model_args(config)))) == config
    for wrong in ("[]", "[6]", "[-1]"):
        with pytest.raises(InputError, match="context_layers"):
            parse_train(["--model=context_kv", f"--context_layers={wrong}"], PHASES)
