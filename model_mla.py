"""MLA-Pythia: multi-head latent attention with ALiBi.

DeepSeek-V2 (arXiv 2405.04434, section 2.1) without its decoupled RoPE key. Keys and values are two linear maps of one
narrow latent, so the latent is all that has to be remembered; positions come from ALiBi (arXiv 2108.12409), so no
rotated key has to be stored beside it.

    x --> W_DKV --> c_kv --> W_UK --> k ---.                     cached: c_kv alone, L numbers per layer and token
                      '----> W_UV --> v -. |
    x --> W_Q  -------------------> q --> softmax(q k^T / sqrt(D) - m (i - j)) v --> W_O

With L = kv_dim = 128 and 6 layers a token costs 768 numbers (3,072 bytes in float32) instead of 6,144: 87.5% less.
What it costs in PPL, and that at full size the one slope m costs more than the latent, is measured in RESULTS.md.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import pythia_base
from kit.fast import attend_latents
from kit.show import largest, say, show, text_ids
from kit.weights import bias_free_attention
from pythia_base import Attention, PythiaConfig, PythiaModel, merge_heads, reference_rope, rotate, split_heads


def reference(model: "MLAPythiaModel", idx: Tensor) -> Tensor:
    """The equations as plain loops in float64: idx (B, T) -> logits (B, T, V)."""
    return pythia_base.reference(model, idx, reference_attention)


def reference_attention(a: "LatentAttention", x: Tensor) -> Tensor:
    """x (T, C) -> (T, C), head by head and query by query. Numbers of equations are DeepSeek-V2's."""
    D, m, heads = a.config.head_size, a.config.alibi_slope, []
    c_kv = x @ a.W_DKV.weight.T  # (9)
    for W_Q, W_UK, W_UV in zip(*(W.weight.split(D) for W in (a.W_Q, a.W_UK, a.W_UV)), strict=True):
        q, k, v = x @ W_Q.T, c_kv @ W_UK.T, c_kv @ W_UV.T  # (10), (11)
        q, k = (torch.stack([reference_rope(y[t], t, a.config) for t in range(len(x))]) for y in (q, k))
        outputs = []
        for i in range(len(x)):
            scores = [q[i] @ k[j] / math.sqrt(D) - m * (i - j) for j in range(i + 1)]
            outputs.append(torch.stack(scores).softmax(0) @ v[: i + 1])
        heads.append(torch.stack(outputs))
    return torch.cat(heads, dim=-1) @ a.W_O.weight.T


@dataclass(frozen=True)
class MLAConfig(PythiaConfig):
    """Pythia's shape, with a latent in place of keys and values and ALiBi in place of RoPE."""

    kv_dim: int = 128  # width L of the latent, all that is cached of a token in a layer
    alibi_slope: float = 0.0625  # m, what a score loses per token of distance, the same for all heads
    use_rope: bool = False  # Pythia's RoPE besides, to tell it from ALiBi: every step then rebuilds and turns all keys
    rotary_pct: float = field(default=0.25, init=False)
    rotary_base: float = field(default=10000.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (L := self.kv_dim) > (C := self.hidden_size):
            raise ValueError(f"kv_dim={L} is above hidden_size={C}: the latent can hold no more than its {C} numbers")

    @property
    def rotary_size(self) -> int:
        return super().rotary_size if self.use_rope else 0


@dataclass(frozen=True)
class ALiBiPositionEncoding:
    """Attention with linear biases (Press et al. 2021): a key loses slope x its distance. Fast: alibi_attention."""

    slope: float

    def apply_to_scores(self, scores: Tensor, seq_len: int) -> Tensor:
        """scores - m (i - j) for j <= i, else -inf. scores (..., T, P) of the last seq_len = T of P positions."""
        positions = torch.arange(scores.size(-1), device=scores.device)
        distance = positions[len(positions) - seq_len :, None] - positions[None, :]  # i - j: the past is positive
        return (scores - self.slope * distance).masked_fill(distance < 0, -math.inf)


class LatentCache:
    """One layer's latents, (B, max_len, L)."""

    def __init__(self, batch_size: int, max_len: int, kv_dim: int, like: Tensor) -> None:
        self.c_kv = like.new_zeros(batch_size, max_len, kv_dim)

    def append(self, c_kv: Tensor, start: int) -> Tensor:
        """Write c_kv (B, T, L) at position start; returns all latents so far, (B, P, L)."""
        self.c_kv[:, start : start + c_kv.size(1)] = c_kv
        return self.c_kv[:, : start + c_kv.size(1)]


class LatentAttention(Attention):
    """MLA: expanded for several tokens, absorbed for one; the two are equal."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        C, L = config.hidden_size, config.kv_dim
        self.config = config
        self.W_DKV = nn.Linear(C, L, bias=False)
        self.W_Q = nn.Linear(C, C, bias=False)
        self.W_UK = nn.Linear(L, C, bias=False)
        self.W_UV = nn.Linear(L, C, bias=False)
        self.W_O = nn.Linear(C, C, bias=False)

    def init_cache(self, batch_size: int, max_len: int) -> LatentCache:
        return LatentCache(batch_size, max_len, self.config.kv_dim, like=self.W_DKV.weight)

    def forward(self, x: Tensor, start: int, cache: LatentCache | None) -> Tensor:
        q = split_heads(self.W_Q(x), self.config.num_heads)  # (B, H, T, D)
        c_kv = self.W_DKV(x)  # (B, T, L)
        if cache is not None:
            c_kv = cache.append(c_kv, start)  # (B, P, L)
        absorbs = x.size(1) == 1 and not self.config.rotary_size  # RoPE turns between W_Q and W_UK
        return self.W_O(merge_heads(self.absorbed(q, c_kv) if absorbs else self.expanded(q, c_kv)))

    def expanded(self, q: Tensor, c_kv: Tensor) -> Tensor:
        """Rebuild every key and value: k = c_kv W_UK, v = c_kv W_UV. q (B, H, T, D), c_kv (B, P, L) -> (B, H, T, D)."""
        k, v = (split_heads(W(c_kv.to(q.dtype)), self.config.num_heads) for W in (self.W_UK, self.W_UV))  # (B, H, P, D)
        if self.config.rotary_size:
            positions = torch.arange(k.size(2), device=q.device)
            q, k = rotate(q, positions[-q.size(2) :], self.config), rotate(k, positions, self.config)
        return alibi_attention(q, k, v, self.config.alibi_slope)

    def absorbed(self, q: Tensor, c_kv: Tensor) -> Tensor:
        """The same: q k^T = (q W_UK^T) c_kv^T, queries move into the latent space and no key or value is rebuilt."""
        (B, H, T, D), P = q.shape, c_kv.size(1)
        W_UK, W_UV = (W.weight.view(H, D, -1).to(q.dtype) for W in (self.W_UK, self.W_UV))  # (H, D, L)
        if T == 1:  # the fast form: no key lies behind the query
            bias = -self.config.alibi_slope * torch.arange(P - 1, -1, -1.0, device=q.device)
        else:
            bias = ALiBiPositionEncoding(self.config.alibi_slope).apply_to_scores(q.new_zeros(T, P), T)
        out_latent = attend_latents(q @ W_UK / math.sqrt(D), c_kv, bias.expand(B, H, T, P))  # (B, H, T, L)
        return out_latent @ W_UV.transpose(1, 2)


def alibi_attention(q: Tensor, k: Tensor, v: Tensor, slope: float) -> Tensor:
    """The fast form of apply_to_scores, softmax and v, (B, H, T, D): plain causal attention on the fused kernels.

    Softmax ignores what is constant in a row, so -m (i - j) and +m j are the same bias, and a product of one more
    dimension of q and k can carry it: (m sqrt(D)) j / sqrt(D). bfloat16 counts exactly to 256 only, hence two
    dimensions, j = 256 (j // 256) + j % 256, exact to 65,536. Keys, queries and values are padded alike, or SDPA leaves
    its fast path.
    """
    (B, H, _, D), P = q.shape, k.size(-2)
    j = torch.arange(P, device=q.device)
    extra = -(-(D + 2) // 8) * 8 - D  # up to the next multiple of 8, the width that the kernels want
    k_bias = F.pad(torch.stack([j // 256 * 256, j % 256], dim=-1), (0, extra - 2)).to(k.dtype)  # (P, extra)
    k = torch.cat([k, k_bias.expand(B, H, -1, -1)], dim=-1)
    q, v = F.pad(q, (0, extra), value=slope * math.sqrt(D)), F.pad(v, (0, extra))
    return pythia_base.causal_attention(q, k, v, scale=1 / math.sqrt(D))[..., :D]


class MLAPythiaModel(PythiaModel):
    """Pythia with latent attention in all layers."""

    config: MLAConfig

    def make_attention(self, layer: int) -> LatentAttention:
        return LatentAttention(self.config)

    def convert(self, source: PythiaModel) -> dict[str, Tensor]:
        """Keys and values of a baseline -> latents: truncated SVD of the stacked weights (TransMLA, arXiv 2502.07864).

        [W_K; W_V] = U S V^T  ~  [W_UK; W_UV] W_DKV,   [W_UK; W_UV] = U sqrt(S), W_DKV = sqrt(S) V^T, L columns of each.
        """
        mine, theirs = ((c.rotary_size, c.rotary_base) for c in (self.config, source.config))
        if self.config.use_rope and mine != theirs:
            raise ValueError(f"use_rope turns {mine} (dimensions, base), the source {theirs}")
        L, converted = self.config.kv_dim, dict[str, Tensor]()
        for layer in range(self.config.num_layers):
            prefix = f"layers.{layer}.attention"
            converted |= bias_free_attention(source, layer)
            W_K, W_V = converted.pop(f"{prefix}.W_K.weight"), converted.pop(f"{prefix}.W_V.weight")  # (C, C) each
            U, S, Vt = torch.linalg.svd(torch.cat([W_K, W_V]).cpu().double(), full_matrices=False)
            W_UK, W_UV = (U[:, :L] * S[:L].sqrt()).float().chunk(2)  # (C, L) each
            W_DKV = (S[:L].sqrt()[:, None] * Vt[:L]).float()
            converted |= {f"{prefix}.W_DKV.weight": W_DKV, f"{prefix}.W_UK.weight": W_UK, f"{prefix}.W_UV.weight": W_UV}
        return converted


if __name__ == "__main__":
    model, text = MLAPythiaModel(MLAConfig()), str(__doc__)
    show(model, reference, PythiaModel(PythiaConfig()), text)
    with torch.no_grad():
        attention, x = model.layers[0].attention, model.embed_in(text_ids(text, 256))
        q, c_kv = split_heads(attention.W_Q(x), 8), attention.W_DKV(x)
        apart = largest(attention.absorbed(q, c_kv), attention.expanded(q, c_kv))
    say("absorbed against expanded", f"{apart:.1e} apart at most, 256 queries and latents of layer 0")
