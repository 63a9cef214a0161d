"""Infini-Pythia against its equations, and against what implementations of it get wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configurator import parse_train
from model_infini import InfiniAttention, InfiniConfig, InfiniPythiaModel, Memory, MemoryCache, phi, retrieve
from pythia_base import PythiaConfig, PythiaModel
from train import PHASES

S = 4  # segment_len
SMALL: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 12, "num_layers": 2, "num_heads": 2, "intermediate_size": 16, "rotary_pct": 0.34,
    "segment_len": S,
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "delta": {},
    "plain": {"use_delta_rule": False},
    "alibi": {"use_alibi": True},
    "alibi2": {"use_alibi": True, "alibi_scale": 2.0, "use_delta_rule": False},
    "banks": {"num_memory_banks": 3, "segments_per_bank": 2},
    "banks-alibi": {"num_memory_banks": 2, "segments_per_bank": 1, "use_alibi": True},
    "multi": {"num_memories": 3},
    "multi-sums": {"num_memories": 3, "normalize_relevance": False, "use_delta_rule": False},
    "multi-alibi": {"num_memories": 2, "use_alibi": True, "alibi_scale": 2.0},
}
every_mode = pytest.mark.parametrize("mode", MODES)


def make_config(mode: str, **changes: Any) -> InfiniConfig:
    return InfiniConfig(**{**SMALL, **MODES[mode], **changes})


def randomise(module: torch.nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def make_attention(mode: str) -> InfiniAttention:
    return randomise(InfiniAttention(make_config(mode)))


def make_input(B: int, T: int) -> Tensor:
    return torch.randn(B, T, SMALL["hidden_size"], generator=torch.Generator().manual_seed(T))


def make_tokens(B: int, T: int) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(T))


def plain_loop(attention: InfiniAttention, x: Tensor) -> Tensor:
    """The equations for one sequence x (T, C) in float64, token by token within segment by segment."""
    c, T = attention.config, x.size(0)
    H, D, G = c.num_heads, c.head_size, max(c.num_memory_banks, c.num_memories)
    q, k, v = ((x.double() @ W.weight.double().T).view(T, H, D) for W in (attention.W_Q, attention.W_K, attention.W_V))
    q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))
    heads = []
    for h in range(H):
        fade = math.exp(-c.alibi_scale * 2 ** (-8 * (h + 1) / H)) if c.use_alibi else 1.0
        M = [torch.zeros(D, D, dtype=torch.double) for _ in range(G)]
        z = [torch.zeros(D, dtype=torch.double) for _ in range(G)]
        written = [0] * G
        out = []
        for segment, begin in enumerate(range(0, T, S)):
            tokens = range(begin, min(begin + S, T))
            for t in tokens:
                readings, scores = [torch.zeros(D, dtype=torch.double)], [torch.tensor(-math.inf).double()]
                for g in range(G):
                    if written[g]:
                        relevance = q[t, h] @ z[g] / (written[g] if c.normalize_relevance else 1)
                        scores.append(attention.bank_scores[g, h].double() if c.num_memory_banks > 1 else relevance)
                        readings.append(q[t, h] @ M[g] / (q[t, h] @ z[g]))
                out.append(torch.stack(scores).softmax(0) @ torch.stack(readings) if any(written) else readings[0])
            if len(tokens) < S:
                break
            g = segment // (c.segments_per_bank if c.num_memory_banks > 1 else 1) % G
            M_before, z_before = M[g], z[g]
            M, z = [m * fade for m in M], [n * fade for n in z]
            for t in tokens:
                known = k[t, h] @ M_before / (k[t, h] @ z_before) if c.use_delta_rule and written[g] else 0
                M[g] = M[g] + torch.outer(k[t, h], v[t, h] - known)
                z[g] = z[g] + k[t, h]
            written[g] += S
        heads.append(torch.stack(out))
    return torch.stack(heads, dim=1).flatten(1) @ attention.W_O.weight.double().T


# ---------------------------------------------------------------------------------------------------- the equations


@every_mode
@pytest.mark.parametrize("T", [1, S - 1, S, S + 1, 2 * S - 1, 2 * S, 2 * S + 1, 7 * S + 2])
def test_equals_the_plain_loop(mode: str, T: int) -> None:
    attention, x = make_attention(mode), make_input(2, T)
    expected = torch.stack([plain_loop(attention, row) for row in x])
    torch.testing.assert_close(attention(x, 0, None).double(), expected, atol=1e-4, rtol=0)


@every_mode
def test_gradients_equal_those_of_the_plain_loop(mode: str) -> None:
    """Through reads, writes and what the delta rule reads before it writes: nothing is detached within a pass."""
    attention, x = make_attention(mode), make_input(1, 7 * S + 2).requires_grad_()
    direction = torch.randn(x.shape)
    leaves = [x, *attention.parameters()]
    expected = torch.autograd.grad((plain_loop(attention, x[0]) * direction[0]).sum(), leaves)
    actual = torch.autograd.grad((attention(x, 0, None) * direction).sum(), leaves)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@every_mode
def test_two_chunks_equal_one_wherever_the_cut_is(mode: str) -> None:
    attention, T = make_attention(mode), 4 * S + 1
    x = make_input(2, T)
    full = attention(x, 0, None)
    for cut in range(1, T):
        cache = attention.init_cache(batch_size=2, max_len=T)
        chunks = [attention(x[:, :cut], 0, cache), attention(x[:, cut:], cut, cache)]
        torch.testing.assert_close(torch.cat(chunks, dim=1), full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["delta", "banks", "multi"])
def test_weights_of_layer_0_learn_from_two_segments_on(mode: str) -> None:
    attention = make_attention(mode)
    attention(make_input(2, 2 * S), 0, None).square().sum().backward()
    for W in (attention.W_Q, attention.W_K, attention.W_V, attention.W_O):
        assert W.weight.grad is not None
        assert W.weight.grad.abs().max() > 1e-3


@every_mode
def test_an_empty_memory_reads_0_and_its_gradient_is_finite(mode: str) -> None:
    attention, x = make_attention(mode), make_input(2, S).requires_grad_()
    out = attention(x, 0, None)
    assert not out.any()
    out.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in (x, attention.W_Q.weight))


def test_features_that_underflow_read_0_and_have_a_finite_gradient() -> None:
    """phi(-100) is 0 in float32: a full memory's normaliser is 0 for such a query too."""
    x = torch.full((1, 1, 3), -100.0, requires_grad=True)
    A, _ = retrieve(phi(x), torch.ones(1, 3, 4))
    assert not A.any()
    assert torch.autograd.grad(A.sum(), x)[0].isfinite().all()


@every_mode
def test_nothing_of_a_segment_is_seen_within_it(mode: str) -> None:
    attention, x = make_attention(mode), make_input(1, 3 * S)
    before, changed = attention(x, 0, None), x.clone()
    changed[:, S + 1] += 1  # the second token of the second segment
    difference = (attention(changed, 0, None) - before).abs().amax(dim=(0, 2))
    assert not difference[[*range(S + 1), *range(S + 2, 2 * S)]].any()
    assert (difference[2 * S :] > 1e-4).all()


# --------------------------------------------------------------------------------------------- mixing and forgetting


def one_hot_segments(num_segments: int, D: int) -> Tensor:
    """Values (1, 2, T, D) that name their segment, so that a reading shows each segment's weight."""
    return torch.eye(D)[:num_segments].repeat_interleave(S, dim=0).expand(1, 2, -1, -1)


def test_the_newest_segment_weighs_most_under_alibi() -> None:
    attention = make_attention("alibi2")  # plain rule: a reading of equal keys is the weighted mean of the values
    v = one_hot_segments(5, D=6)
    ones = torch.ones_like(v)
    A = attention.attend(ones, ones, v, 0, Memory(1, attention.config, like=v))[0, :, -1, :4]  # (H, segment)
    for weights, slope in zip(A, (2 * 2**-4, 2 * 2**-8), strict=True):
        expected = torch.exp(-slope * torch.tensor([3.0, 2.0, 1.0, 0.0]))
        torch.testing.assert_close(weights, expected / expected.sum())
        assert (weights.diff() > 0).all()


def test_relevance_is_each_querys_own() -> None:
    """Two memories with unlike keys, two unlike queries in one segment: each finds its own memory."""
    attention = make_attention("multi")
    q, k, v = torch.zeros(3, 1, 2, 3 * S, 6)
    k[:, :, :S, 0] = 5
    k[:, :, S:, 1] = 5
    q[:, :, 2 * S :: 2, 0] = 1
    q[:, :, 2 * S + 1 :: 2, 1] = 1
    v = one_hot_segments(3, D=6)
    A = attention.attend(q + 0.01, k, v, 0, Memory(1, attention.config, like=v))[0, 0, 2 * S :]  # (T, segment)
    scores = torch.stack([(q + 0.01) @ k[0, 0, 0], (q + 0.01) @ k[0, 0, -1]], dim=-1)[0, 0, 2 * S :]
    torch.testing.assert_close(A[:, :2], scores.softmax(-1))
    assert (A[::2, 0] > 0.9).all()
    assert (A[1::2, 1] > 0.9).all()


def test_banks_start_with_equal_shares() -> None:
    """After three segments bank 0 holds two, bank 1 one, bank 2 none: a half each, nothing for the empty one."""
    attention = InfiniAttention(make_config("banks", use_delta_rule=False))
    v = one_hot_segments(4, D=6)
    ones = torch.ones_like(v)
    A = attention.attend(ones, ones, v, 0, Memory(1, attention.config, like=v))[0, :, -1]  # (H, segment)
    torch.testing.assert_close(A, torch.tensor([0.25, 0.25, 0.5, 0, 0, 0]).expand(2, -1))


def test_each_sequence_has_its_own_memory() -> None:
    attention, x = make_attention("delta"), make_input(3, 3 * S + 1)
    together = attention.init_cache(batch_size=3, max_len=x.size(1))
    attention(x, 0, together)
    for row in range(3):
        alone = attention.init_cache(batch_size=1, max_len=x.size(1))
        attention(x[row : row + 1], 0, alone)
        torch.testing.assert_close(together.Mz[row], alone.Mz[0])
    assert (together.Mz[0] - together.Mz[1]).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------ precision and size


@pytest.mark.parametrize("mode", ["delta", "banks", "multi-alibi"])
def test_under_bf16_autocast_the_memory_is_float32(mode: str) -> None:
    """It is what float32 arithmetic makes of the bfloat16 queries, keys and values."""
    attention, x = make_attention(mode), make_input(2, 5 * S + 1)
    projected: list[Tensor] = []
    for W in (attention.W_Q, attention.W_K, attention.W_V):
        W.register_forward_hook(lambda module, inputs, output: projected.append(output))
    cache = attention.init_cache(batch_size=2, max_len=x.size(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(x, 0, cache)
    assert out.dtype == projected[0].dtype == torch.bfloat16
    q, k, v = (y.float().unflatten(-1, (2, -1)).transpose(1, 2) for y in projected)
    expected = Memory(2, attention.config, like=x)
    attention.attend(phi(q), phi(k), v, 0, expected)
    assert cache.Mz.dtype == cache.pending.dtype == torch.float32
    torch.testing.assert_close(vars(cache), vars(expected), atol=1e-6, rtol=1e-6)


def test_in_a_bf16_model_the_memory_is_float32() -> None:
    attention = make_attention("alibi").to(torch.bfloat16)
    cache = attention.init_cache(batch_size=1, max_len=2 * S)
    assert attention(make_input(1, 2 * S).bfloat16(), 0, cache).dtype == torch.bfloat16
    assert cache.Mz.dtype == torch.float32


@pytest.mark.parametrize(("changes", "G"), [({}, 1), ({"num_memory_banks": 2}, 2), ({"num_memories": 8}, 8)])
@pytest.mark.parametrize("max_len", [256, 8192])
def test_layer_0_takes_133120_bytes_a_memory_whatever_the_length(changes: dict[str, Any], G: int, max_len: int) -> None:
    cache = InfiniAttention(InfiniConfig(**changes)).init_cache(batch_size=3, max_len=max_len)
    assert cache.state_nbytes == 3 * G * 133_120
    assert cache.pending_nbytes == 3 * 133_120
    counters = 3 * G * 8
    assert sum(t.nbytes for t in vars(cache).values()) == cache.state_nbytes + cache.pending_nbytes + counters


# ------------------------------------------------------------------------------------- documents, window by window


def make_model(mode: str, **changes: Any) -> Any:
    return randomise(InfiniPythiaModel(make_config(mode, **changes)))


@every_mode
def test_windows_with_a_carried_memory_equal_one_pass_of_layer_0(mode: str) -> None:
    """With layer 0 alone: the layers above see their window only."""
    model, idx = make_model(mode, num_layers=1), make_tokens(2, 8 * S)
    memory = model.init_memory(batch_size=2)
    windows = [model(window, memory=memory)[0] for window in idx.split([2 * S, S, 3 * S, 2 * S], dim=1)]
    torch.testing.assert_close(torch.cat(windows, dim=1), model(idx)[0], atol=1e-4, rtol=0)


def test_the_layers_above_see_their_window_alone() -> None:
    model, idx = make_model("delta"), make_tokens(1, 2 * S)
    memory = model.init_memory(batch_size=1)
    model(idx, memory=memory)
    memory.reset(torch.tensor([True]))
    torch.testing.assert_close(model(idx, memory=memory)[0], model(idx)[0])


@every_mode
def test_rows_may_be_at_different_points_of_their_documents(mode: str) -> None:
    """Row 1 begins a new document after a window of 3 segments: another turn of banks and memories than row 0's."""
    model, idx = make_model(mode, num_layers=1), make_tokens(2, 9 * S)
    memory = model.init_memory(batch_size=2)
    first = model(idx[:, : 3 * S], memory=memory)[0]
    memory.reset(torch.tensor([False, True]))
    rest = [model(window, memory=memory)[0] for window in idx[:, 3 * S :].split(3 * S, dim=1)]
    logits = torch.cat([first, *rest], dim=1)
    torch.testing.assert_close(logits[0], model(idx[:1])[0][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1, 3 * S :], model(idx[1:, 3 * S :])[0][0], atol=1e-4, rtol=0)


@every_mode
def test_consecutive_windows_train_with_a_detached_memory_and_only_so(mode: str) -> None:
    model, idx = make_model(mode), make_tokens(2, 2 * S)
    memory, W_K = model.init_memory(batch_size=2), model.layers[0].attention.W_K.weight
    for _ in range(2):
        model.zero_grad()
        model(idx, idx, memory=memory, return_logits=False)[1].backward()
        assert W_K.grad.abs().max() > 1e-5
        memory.detach()
    model(idx, idx, memory=memory)[1].backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        model(idx, idx, memory=memory)[1].backward()


@every_mode
def test_a_carried_memory_is_resumed_exactly(mode: str, tmp_path: Path) -> None:
    model, idx = make_model(mode), make_tokens(2, 3 * S)
    memory, resumed = model.init_memory(batch_size=2), model.init_memory(batch_size=2)
    model(idx, memory=memory)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    resumed.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert torch.equal(model(idx, memory=memory)[0], model(idx, memory=resumed)[0])


def test_a_window_that_ends_within_a_segment_is_refused() -> None:
    model = make_model("delta")
    with pytest.raises(ValueError, match="multiple of segment_len=4"):
        model(make_tokens(1, S + 1), memory=model.init_memory(batch_size=1))


def test_cache_and_memory_together_are_refused() -> None:
    model = make_model("delta")
    with pytest.raises(ValueError, match="either cache or memory"):
        model(make_tokens(1, S), cache=model.init_cache(1, S), memory=model.init_memory(1))


# ------------------------------------------------------------------------------------------- settings and weights


def test_banks_and_multi_memory_together_are_refused() -> None:
    with pytest.raises(ValueError, match="banks and multi-memory exclude one another"):
        InfiniConfig(num_memory_banks=2, num_memories=2)


@pytest.mark.parametrize("name", ["segment_len", "num_memory_banks", "segments_per_bank", "num_memories"])
def test_counts_below_1_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        make_config("delta", **{name: 0})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("infini", {}),
        ("infini_banks2", {"num_memory_banks": 2, "segments_per_bank": 4}),
        ("infini_alibi", {"use_alibi": True}),
        ("infini_alibi2", {"use_alibi": True, "alibi_scale": 2.0}),
        ("infini_multi4", {"num_memories": 4}),
        ("infini_multi8", {"num_memories": 8}),
    ],
)
def test_configs(name: str, changes: dict[str, Any]) -> None:
    job = parse_train([str(Path(__file__).parents[1] / "config" / f"{name}.py")], PHASES)
    assert job.model_config == InfiniConfig(segment_len=32, **changes)


def test_only_layer_0_is_replaced_and_its_output_projection_starts_small() -> None:
    model: Any = InfiniPythiaModel(InfiniConfig(vocab_size=53))
    assert [isinstance(attention, InfiniAttention) for attention in model.attentions()] == [True] + [False] * 5
    assert isinstance(model.init_cache(1, 8).layers[0], MemoryCache)
    assert model.layers[0].attention.W_O.weight.std().item() == pytest.approx(0.02 / math.sqrt(12), rel=0.02)


def test_layer_0_starts_from_a_baselines_projections() -> None:
    """While the memory is empty, layer 0 adds what the baseline's attention adds of zero-mean values: its constants."""
    baseline = randomise(PythiaModel(PythiaConfig(**{k: v for k, v in SMALL.items() if k != "segment_len"})))
    model: Any = InfiniPythiaModel(make_config("delta"))
    report = model.start_from(baseline)
    theirs, mine = baseline.layers[0], model.layers[0]
    q, k, v = theirs.attention.query_key_value.weight.unflatten(0, (2, 3, -1)).unbind(1)
    for W, rows in ((mine.attention.W_Q, q), (mine.attention.W_K, k), (mine.attention.W_V, v)):
        assert torch.equal(W.weight, rows.flatten(0, 1))
    assert {name for name, how in report.items() if how != "copied"} == {
        "layers.0.mlp.dense_4h_to_h.bias", *(f"layers.0.attention.W_{name}.weight" for name in "QKVO")
    }  # fmt: skip
    x = make_input(1, S)
    with torch.no_grad():  # a baseline whose weighted values are 0, but for their bias
        theirs.attention.query_key_value.weight.unflatten(0, (2, 3, -1))[:, 2] = 0
    torch.testing.assert_close(mine(x, 0, None), theirs(x, 0, None))
