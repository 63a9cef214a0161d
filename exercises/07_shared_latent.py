"""Exercise 7: layers 0 and 1 share one latent, layers 2 and 3, and so on (Brandon et al. 2024, arXiv 2405.12981)."""

from torch import Tensor

from model_mla import LatentAttention, LatentCache, MLAPythiaModel
from pythia_base import Cache

# Of MLAConfig(), 6 layers and a latent of 128 in float32: bytes of cache a token, and parameters less than MLA has.
PREDICTED_BYTES = 0
PREDICTED_PARAMETERS_LESS = 0


class SharedLatentAttention(LatentAttention):
    """In an even layer MLA; in an odd one over the latents of the layer below, without a W_DKV of its own."""

    def forward(self, x: Tensor, start: int, cache: LatentCache | None) -> Tensor:
        """x (B, T, C), its first token at position start -> (B, T, C)."""
        raise NotImplementedError


class SharedMLAModel(MLAPythiaModel):
    """MLA-Pythia that stores a latent for every second layer: c_kv of layer 2i serves layer 2i + 1 too."""

    def make_attention(self, layer: int) -> SharedLatentAttention:
        raise NotImplementedError

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        raise NotImplementedError
