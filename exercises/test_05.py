"""Check of exercise 5: the decay before the read."""

import math
from typing import Any

import torch
from torch import Tensor

import pythia_base
from exercises.check import SMALL, assert_same, build, rows
from model_infini import InfiniAttention, InfiniConfig, InfiniPythiaModel, reference, reference_memory

S = 4
NUM_TOKENS = 5 * S


def make_model(num_memories: int) -> Any:
    config = InfiniConfig(**SMALL, segment_len=S, num_memories=num_memories, use_alibi=True, alibi_scale=4.0)
    return build(InfiniPythiaModel, config).double()


def logits(attempt: Any, model: Any, idx: Tensor) -> Tensor:
    """With the attempt in layer 0, and with the other layers as they are."""

    def attend(a: Any, x: Tensor) -> Tensor:
        return (attempt.decay_first if isinstance(a, InfiniAttention) else pythia_base.reference_attention)(a, x)

    return pythia_base.reference(model, idx, attend)


@torch.no_grad()
def test_with_one_memory_nothing_changes(attempt: Any) -> None:
    model, idx = make_model(num_memories=1), rows(1, NUM_TOKENS)
    what = (
        "with one memory the decay cancels in (q M) / (q z): where it acts cannot be seen, only that it does; against "
        "model_infini.reference"
    )
    assert_same(logits(attempt, model, idx), reference(model, idx), what)


@torch.no_grad()
def test_the_third_segment_reads_faded_memories(attempt: Any) -> None:
    """Two memories, three complete segments: the first two wrote a memory each, into nothing."""
    model = make_model(num_memories=2)
    a, x = model.layers[0].attention, model.embed_in(rows(1, 3 * S))[0]
    H, expected = a.config.num_heads, []
    q, k, v = ((x @ W.weight.T).view(3 * S, H, -1) for W in (a.W_Q, a.W_K, a.W_V))
    q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))
    for h in range(H):
        fade = math.exp(-a.config.alibi_scale * 2 ** (-8 * (h + 1) / H))
        first, second = (q[2 * S :, h] @ k[begin : begin + S, h].T for begin in (0, S))  # (S, S) each
        relevance = torch.stack([first.sum(dim=1) * fade**2, second.sum(dim=1) * fade]) / S
        readings = torch.stack(
            [w / w.sum(dim=1, keepdim=True) @ v[i * S :][:S, h] for i, w in enumerate((first, second))]
        )
        expected.append((relevance.softmax(dim=0)[..., None] * readings).sum(dim=0))
    out = attempt.decay_first(a, x)[2 * S :]
    what = "layer 0 in the third of three complete segments: when it reads, memory 0 has faded twice and memory 1 once"
    assert_same(out, torch.cat(expected, dim=-1) @ a.W_O.weight.T, what)


@torch.no_grad()
def test_an_open_segment_fades_nothing(attempt: Any) -> None:
    model = make_model(num_memories=2)
    a, x = model.layers[0].attention, model.embed_in(rows(1, 4 * S - 1))[0]
    what = (
        "layer 0 in an open segment, against model_infini.reference_memory: only a segment that will be written fades "
        "what is there (to fade whenever a segment opens is another model)"
    )
    assert_same(attempt.decay_first(a, x)[3 * S :], reference_memory(a, x)[3 * S :], what)


@torch.no_grad()
def test_what_another_token_changes(attempt: Any) -> None:
    model, idx = make_model(num_memories=2), rows(1, NUM_TOKENS)
    before = logits(attempt, model, idx)[0]
    for t in (S + 1, 3 * S - 1, 4 * S):
        changed = idx.clone()
        changed[:, t] += 1
        measured = moved(logits(attempt, model, changed)[0, :t], before[:t])
        predicted = list(attempt.changed_by_another_token(t, S))
        assert predicted == measured, (
            f"another token at {t} changes the logits before it at {measured}, not {predicted}"
        )


@torch.no_grad()
def test_what_one_more_token_changes(attempt: Any) -> None:
    model, idx = make_model(num_memories=2), rows(1, NUM_TOKENS)
    prefixes = [logits(attempt, model, idx[:, :n])[0] for n in range(1, NUM_TOKENS + 1)]
    for n in range(1, NUM_TOKENS):
        measured = moved(prefixes[n][:n], prefixes[n - 1])
        predicted = list(attempt.changed_by_one_more_token(n, S))
        assert predicted == measured, (
            f"segments of {S}: when {n} tokens get one more, the logits at {measured} change; predicted are {predicted}"
        )


def moved(after: Tensor, before: Tensor) -> list[int]:
    """The positions of logits (T, V) that are not what they were."""
    return ((after - before).abs().amax(dim=-1) > 1e-8).nonzero().flatten().tolist()
