"""Exercise 2: ALiBi with a slope for each head."""

from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes (H,) of the paper, a geometric sequence: 2^-1, 2^-2 ... 2^-8 for 8 heads."""
    raise NotImplementedError


class HeadwiseALiBi:
    """ALiBiPositionEncoding of model_mla.py with slopes (H,), one for each head."""

    def __init__(self, slopes: Tensor) -> None:
        self.slopes = slopes

    def apply_to_scores(self, scores: Tensor, seq_len: int) -> Tensor:
        """scores - m_h (i - j) for j <= i, else -inf. scores (B, H, T, P) of the last seq_len = T of P positions."""
        raise NotImplementedError


def reach(slope: float) -> int:
    """Predicted: the first distance at which a key weighs under a thousandth of an equal key at distance 0."""
    raise NotImplementedError
