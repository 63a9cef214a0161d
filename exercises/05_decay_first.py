"""Exercise 5: a memory whose decay acts before it is read."""

from typing import Any

from torch import Tensor


def decay_first(a: Any, x: Tensor) -> Tensor:
    """reference_memory of model_infini.py, but a segment that will be written fades the memories before it reads them.

    x (T, C) -> (T, C). The decay belongs to the write: an open segment (fewer than segment_len tokens) does neither.
    """
    raise NotImplementedError


def changed_by_another_token(t: int, segment_len: int) -> list[int]:
    """Predicted: the positions before t whose logits change when the token at t is another one."""
    raise NotImplementedError


def changed_by_one_more_token(num_tokens: int, segment_len: int) -> list[int]:
    """Predicted: the positions whose logits change when a text of num_tokens tokens gets one more.

    With two memories, which are written in turn. Mind what a softmax over one memory gives.
    """
    raise NotImplementedError
