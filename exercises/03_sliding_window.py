"""Exercise 3: a sliding window with sinks (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453)."""

from dataclasses import dataclass

from torch import Tensor

from pythia_base import PythiaConfig, PythiaModel, SelfAttention

# Bytes of the cache of Pythia-70M's shape with the window and the sinks below, float32, after 2,048 tokens.
PREDICTED_BYTES = 0


@dataclass(frozen=True)
class WindowConfig(PythiaConfig):
    """Pythia's shape, with attention that sees the first tokens and the last ones."""

    window: int = 256  # a query sees so many tokens up to itself
    sinks: int = 4  # and so many from the beginning of the text


def visible(queries: Tensor, keys: Tensor, config: WindowConfig) -> Tensor:
    """Which keys a query sees: positions (T,) and (P,) -> (T, P) bool, a mask of causal_attention."""
    raise NotImplementedError


class WindowCache:
    """One layer's keys and values of the sinks and the window, (B, H, sinks + window, D) each, whatever max_len."""

    def __init__(self, batch_size: int, config: WindowConfig, like: Tensor) -> None:
        raise NotImplementedError


class WindowAttention(SelfAttention):
    """Pythia's attention through `visible`."""

    config: WindowConfig

    def init_cache(self, batch_size: int, max_len: int) -> WindowCache:
        return WindowCache(batch_size, self.config, like=self.dense.weight)

    def forward(self, x: Tensor, start: int, cache: WindowCache | None) -> Tensor:
        """x (B, T, C), its first token at position start -> (B, T, C)."""
        raise NotImplementedError


class WindowPythiaModel(PythiaModel):
    """Pythia with a window in all layers."""

    config: WindowConfig

    def make_attention(self, layer: int) -> WindowAttention:
        return WindowAttention(self.config)
