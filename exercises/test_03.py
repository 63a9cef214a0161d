"""Check of exercise 3: a sliding window with sinks."""

import math
from typing import Any

import torch
from torch import Tensor

import pythia_base
from exercises.check import LENGTH, SMALL, assert_causal, assert_same, assert_streams, build, rows
from pythia_base import PythiaModel, reference_rope


def small_model(attempt: Any, **fields: int) -> Any:
    return build(attempt.WindowPythiaModel, attempt.WindowConfig(**SMALL | {"window": 6, "sinks": 2} | fields))


def reference_window(a: Any, x: Tensor) -> Tensor:
    """x (T, C) -> (T, C), each query over the list of the keys that it sees."""
    c, D, heads = a.config, a.config.head_size, []
    qkv = x @ a.query_key_value.weight.T + a.query_key_value.bias
    for head in qkv.split(3 * D, dim=-1):
        q, k, v = head.split(D, dim=-1)
        q, k = (torch.stack([reference_rope(y[t], t, c) for t in range(len(x))]) for y in (q, k))
        seen = [[j for j in range(i + 1) if j < c.sinks or i - j < c.window] for i in range(len(x))]
        heads.append(torch.stack([(k[s] @ q[i] / math.sqrt(D)).softmax(0) @ v[s] for i, s in enumerate(seen)]))
    return torch.cat(heads, dim=-1) @ a.dense.weight.T + a.dense.bias


def test_visible(attempt: Any) -> None:
    positions, config = torch.arange(9), attempt.WindowConfig(**SMALL, window=3, sinks=2)
    mask = attempt.visible(positions, positions, config)
    assert mask.dtype == torch.bool, f"the mask is {mask.dtype}: causal_attention wants True where a query sees a key"
    for i, expected in ((0, [0]), (1, [0, 1]), (4, [0, 1, 2, 3, 4]), (5, [0, 1, 3, 4, 5]), (8, [0, 1, 6, 7, 8])):
        seen = mask[i].nonzero().flatten().tolist()
        assert seen == expected, f"window 3, sinks 2: query {i} sees the keys {seen}, it has to see {expected}"
    some = torch.tensor([0, 1, 6, 8])
    assert torch.equal(attempt.visible(positions[7:], some, config), mask[7:, some]), (
        "the mask has to follow from the positions given: a cache holds keys 0, 1, 6, 8 and nothing between"
    )


@torch.no_grad()
def test_equal_to_the_loops(attempt: Any) -> None:
    model, idx = small_model(attempt), rows(2, LENGTH)
    expected = pythia_base.reference(model, idx, reference_window)
    assert_same(model(idx)[0], expected, "logits of one full pass against plain loops over the keys that are seen")


@torch.no_grad()
def test_a_window_as_long_as_the_text_is_pythia(attempt: Any) -> None:
    model, idx = small_model(attempt, window=LENGTH), rows(2, LENGTH)
    baseline = PythiaModel(model.config)
    baseline.load_state_dict(model.state_dict())
    assert_same(model(idx)[0], baseline(idx)[0], "logits with a window as long as the text against the baseline's")


def test_causal_and_streamable(attempt: Any) -> None:
    model = small_model(attempt)
    assert_causal(model)
    assert_streams(model)  # the longest chunk is longer than the window


@torch.no_grad()
def test_bytes(attempt: Any) -> None:
    """Numbers of keys and values, and at most a position (int64) for each; before and after more tokens than fit."""
    model = small_model(attempt)
    allowed = (
        model.config.num_layers * (model.config.window + model.config.sinks) * (2 * model.config.hidden_size * 4 + 8)
    )
    for max_len in (100, 10_000):
        cache = model.init_cache(1, max_len)
        for chunk in (rows(1, 0), rows(1, LENGTH), rows(1, 1)):
            if chunk.numel():
                model(chunk, cache=cache)
            used, tokens = cache.nbytes, f"{cache.length} of {max_len:,}"
            assert used <= allowed, (
                f"after {tokens} tokens the cache takes {used:,} bytes: 6 + 2 positions in 2 layers take {allowed:,}"
            )
    config = attempt.WindowConfig()
    attention = attempt.WindowAttention(config)
    tensors = [tensor for tensor in vars(attention.init_cache(1, 2048)).values() if isinstance(tensor, Tensor)]
    measured = config.num_layers * sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
    predicted = attempt.PREDICTED_BYTES
    assert predicted, "write down PREDICTED_BYTES first"
    assert predicted == measured, f"PREDICTED_BYTES is {predicted:,}, measured {measured:,}"
