"""Exercise 7, solved. Two layers share an entry of the cache; without a cache there is one for the call."""

import math

from torch import Tensor

from model_mla import ALiBiPositionEncoding, LatentAttention, LatentCache, MLAConfig, MLAPythiaModel
from pythia_base import Cache, merge_heads, split_heads

PREDICTED_BYTES = 3 * 128 * 4
PREDICTED_PARAMETERS_LESS = 3 * 512 * 128


class SharedLatentAttention(LatentAttention):
    def __init__(self, config: MLAConfig, writes: bool) -> None:
        super().__init__(config)
        self.writes = writes
        if not writes:
            del self.W_DKV

    def forward(self, x: Tensor, start: int, cache: LatentCache) -> Tensor:  # type: ignore[override]
        H, D = self.config.num_heads, self.config.head_size
        c_kv = cache.append(self.W_DKV(x), start) if self.writes else cache.c_kv[:, : start + x.size(1)]
        q, k, v = split_heads(self.W_Q(x), H), split_heads(self.W_UK(c_kv), H), split_heads(self.W_UV(c_kv), H)
        scores = q @ k.mT / math.sqrt(D)
        weights = ALiBiPositionEncoding(self.config.alibi_slope).apply_to_scores(scores, x.size(1)).softmax(dim=-1)
        return self.W_O(merge_heads(weights @ v))


class SharedMLAModel(MLAPythiaModel):
    def make_attention(self, layer: int) -> SharedLatentAttention:
        return SharedLatentAttention(self.config, writes=layer % 2 == 0)

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        attentions = self.attentions()
        entries = [a.init_cache(batch_size, max_len) for a in attentions if a.writes]
        return Cache([entries[layer // 2] for layer in range(len(attentions))], max_len)

    def hidden_states(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        return super().hidden_states(idx, self.init_cache(*idx.shape) if cache is None else cache)
