"""Exercise 3, solved: the sinks in the first slots, position p behind them in the ring's slot (p - sinks) % window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pythia_base import (
    KeyValueCache,
    PythiaConfig,
    PythiaModel,
    SelfAttention,
    causal_attention,
    merge_heads,
    rotate,
    split_heads,
)

PREDICTED_BYTES = 6 * 2 * 512 * (4 + 256) * 4


@dataclass(frozen=True)
class WindowConfig(PythiaConfig):
    window: int = 256
    sinks: int = 4


def visible(queries: Tensor, keys: Tensor, config: WindowConfig) -> Tensor:
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) & ((distance < config.window) | (keys < config.sinks))


class WindowCache(KeyValueCache):
    def __init__(self, batch_size: int, config: WindowConfig, like: Tensor) -> None:
        super().__init__(batch_size, config.num_heads, config.sinks + config.window, config.head_size, like)
        self.config = config

    def kept(self, end: int) -> Tensor:
        """The positions that are held after end tokens."""
        positions = torch.arange(end, device=self.k.device)
        return positions[(positions < self.config.sinks) | (positions >= end - self.config.window)]

    def slots(self, positions: Tensor) -> Tensor:
        sinks, window = self.config.sinks, self.config.window
        return torch.where(positions < sinks, positions, sinks + (positions - sinks) % window)

    def read(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and their positions after start tokens."""
        positions = self.kept(start)
        slots = self.slots(positions)
        return self.k[:, :, slots], self.v[:, :, slots], positions

    def write(self, k: Tensor, v: Tensor, start: int) -> None:
        positions = self.kept(start + k.size(2))
        positions = positions[positions >= start]
        slots = self.slots(positions)
        self.k[:, :, slots], self.v[:, :, slots] = k[:, :, positions - start], v[:, :, positions - start]


class WindowAttention(SelfAttention):
    config: WindowConfig

    def init_cache(self, batch_size: int, max_len: int) -> WindowCache:
        return WindowCache(batch_size, self.config, like=self.dense.weight)

    def forward(self, x: Tensor, start: int, cache: WindowCache | None) -> Tensor:  # type: ignore[override]
        q, k, v = split_heads(self.query_key_value(x), self.config.num_heads).chunk(3, dim=-1)
        queries = keys = torch.arange(start, start + x.size(1), device=x.device)
        q, k = rotate(q, queries, self.config), rotate(k, queries, self.config)
        if cache is not None:
            old_k, old_v, old = cache.read(start)
            cache.write(k, v, start)
            k, v, keys = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2), torch.cat([old, queries])
        return self.dense(merge_heads(causal_attention(q, k, v, visible(queries, keys, self.config))))


class WindowPythiaModel(PythiaModel):
    config: WindowConfig

    def make_attention(self, layer: int) -> WindowAttention:
        return WindowAttention(self.config)
