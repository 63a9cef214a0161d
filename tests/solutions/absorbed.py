"""Exercise 4, solved."""

import math

from torch import Tensor

from model_mla import ALiBiPositionEncoding, LatentAttention, MLAConfig


def fold(a: LatentAttention) -> tuple[Tensor, Tensor]:
    H, D = a.config.num_heads, a.config.head_size
    W_Q, W_UK, W_UV = (W.weight.unflatten(0, (H, D)) for W in (a.W_Q, a.W_UK, a.W_UV))  # (H, D, C), (H, D, L) twice
    W_O = a.W_O.weight.unflatten(1, (H, D)).transpose(0, 1)  # (H, C, D)
    return W_Q.mT @ W_UK, (W_O @ W_UV).mT


def absorbed(x: Tensor, c_kv: Tensor, W_QK: Tensor, W_VO: Tensor, config: MLAConfig) -> Tensor:
    x, c_kv = x[:, None], c_kv[:, None]  # (B, 1, T, C), (B, 1, P, L)
    scores = (x @ W_QK) @ c_kv.mT / math.sqrt(config.head_size)  # (B, H, T, P)
    weights = ALiBiPositionEncoding(config.alibi_slope).apply_to_scores(scores, x.size(2)).softmax(dim=-1)
    return ((weights @ c_kv) @ W_VO).sum(dim=1)


def products(P: int, config: MLAConfig) -> int:
    return 2 * config.num_heads * config.kv_dim * (config.hidden_size + P)
