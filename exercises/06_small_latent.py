"""Exercise 6: MLA's latent in bfloat16, and in int8 with a scale for each token."""

from torch import Tensor

# Bytes of cache a token of MLAConfig(): 6 layers, a latent of 128. In float32 they are 3,072.
PREDICTED_BYTES = {"bfloat16": 0, "int8": 0}
# How much the perplexity rises: "below 1%", "1% to 10%" or "above 10%".
PREDICTED_COST = {"bfloat16": "", "int8": ""}


class BFloat16Latents:
    """LatentCache of model_mla.py in bfloat16: one layer's latents, (B, max_len, L)."""

    def __init__(self, batch_size: int, max_len: int, kv_dim: int, like: Tensor) -> None:
        raise NotImplementedError

    def append(self, c_kv: Tensor, start: int) -> Tensor:
        """Write c_kv (B, T, L) at position start; returns all latents so far, (B, P, L), in c_kv's dtype."""
        raise NotImplementedError


class Int8Latents:
    """The same in int8, (B, max_len, L), with a float32 scale for each token, (B, max_len, 1)."""

    def __init__(self, batch_size: int, max_len: int, kv_dim: int, like: Tensor) -> None:
        raise NotImplementedError

    def append(self, c_kv: Tensor, start: int) -> Tensor:
        """Write c_kv (B, T, L) at position start; returns all latents so far, (B, P, L), in c_kv's dtype.

        The number of the largest magnitude of a token becomes 127 or -127.
        """
        raise NotImplementedError
