"""Exercise 4: MLA whose up-projections are folded into the queries and the output, DeepSeek-V2 section 2.1.2."""

from torch import Tensor

from model_mla import LatentAttention, MLAConfig


def fold(a: LatentAttention) -> tuple[Tensor, Tensor]:
    """Its weights, folded once and for all.

    W_QK (H, C, L): a query of head h in the latent space is x @ W_QK[h].
    W_VO (H, L, C): what head h adds to the output is its weighted sum of latents @ W_VO[h].
    """
    raise NotImplementedError


def absorbed(x: Tensor, c_kv: Tensor, W_QK: Tensor, W_VO: Tensor, config: MLAConfig) -> Tensor:
    """What LatentAttention gives, and no key or value is rebuilt.

    x (B, T, C) are the last T of P positions, c_kv (B, P, L) the latents of all -> (B, T, C).
    """
    raise NotImplementedError


def products(P: int, config: MLAConfig) -> int:
    """Predicted: multiplications in the matrix products of `absorbed` for one query (B = T = 1) and P latents."""
    raise NotImplementedError
