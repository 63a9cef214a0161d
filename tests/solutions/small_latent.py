"""Exercise 6, solved."""

import torch
from torch import Tensor

PREDICTED_BYTES = {"bfloat16": 6 * 128 * 2, "int8": 6 * (128 + 4)}
PREDICTED_COST = {"bfloat16": "below 1%", "int8": "below 1%"}


class BFloat16Latents:
    def __init__(self, batch_size: int, max_len: int, kv_dim: int, like: Tensor) -> None:
        self.c_kv = like.new_zeros(batch_size, max_len, kv_dim, dtype=torch.bfloat16)

    def append(self, c_kv: Tensor, start: int) -> Tensor:
        end = start + c_kv.size(1)
        self.c_kv[:, start:end] = c_kv
        return self.c_kv[:, :end].to(c_kv.dtype)


class Int8Latents:
    def __init__(self, batch_size: int, max_len: int, kv_dim: int, like: Tensor) -> None:
        self.c_kv = like.new_zeros(batch_size, max_len, kv_dim, dtype=torch.int8)
        self.scale = like.new_zeros(batch_size, max_len, 1, dtype=torch.float32)

    def append(self, c_kv: Tensor, start: int) -> Tensor:
        end = start + c_kv.size(1)
        scale = c_kv.abs().amax(dim=-1, keepdim=True).float() / 127
        self.scale[:, start:end] = scale
        self.c_kv[:, start:end] = (c_kv / scale.where(scale > 0, 1)).round()
        return (self.c_kv[:, :end] * self.scale[:, :end]).to(c_kv.dtype)
