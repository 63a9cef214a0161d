"""Exercise 1: ALiBi whose distance matrix is turned round."""

from typing import Any

from torch import Tensor

# How the perplexity of the turned model compares with the right one's: "lower", "equal" or "higher". Before you run!
PREDICTED_IN_ONE_PASS = ""
PREDICTED_TOKEN_BY_TOKEN = ""


class TurnedALiBi:
    """ALiBiPositionEncoding of model_mla.py, its distance j - i in place of i - j."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def apply_to_scores(self, scores: Tensor, seq_len: int) -> Tensor:
        """scores - m (j - i) for j >= i, else -inf. scores (..., T, P) of the last seq_len = T of P positions."""
        raise NotImplementedError


def perplexity_token_by_token(model: Any, windows: Tensor) -> float:
    """exp of the mean cross entropy of windows (B, T + 1), fed through model.init_cache one token at a time."""
    raise NotImplementedError
