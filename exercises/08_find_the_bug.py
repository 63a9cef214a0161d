"""Exercise 8: the memory of model_infini.py in its simplest mode, written down again, and three bugs in it.

One memory, the delta rule, no decay. Equal to its reference for a batch of one in a full pass, and yet.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import model_infini
from model_infini import InfiniConfig, InfiniPythiaModel
from pythia_base import Attention, merge_heads, split_heads


class Memory:
    """What layer 0 remembers of B sequences: M and z, and what the open segment will add to them."""

    def __init__(self, batch_size: int, config: InfiniConfig, like: Tensor) -> None:
        B, H, D = batch_size, config.num_heads, config.head_size
        self.M, self.z = like.new_zeros(B, H, D, D), like.new_zeros(B, H, D, 1)
        self.pending_M, self.pending_z = torch.zeros_like(self.M), torch.zeros_like(self.z)

    def close_segment(self) -> None:
        """M_s = M_{s-1} + pending, z alike."""
        self.M, self.z = self.M + self.pending_M, self.z + self.pending_z
        self.pending_M, self.pending_z = torch.zeros_like(self.M), torch.zeros_like(self.z)


def phi(x: Tensor) -> Tensor:
    """ELU(x) + 1."""
    return F.elu(x) + 1


def retrieve(x: Tensor, memory: Memory) -> Tensor:
    """x M / (x z), equation (3), for features x (B, H, T, D) -> (B, H, T, D); an empty memory returns 0."""
    return (x @ memory.M / (x @ memory.z)).nan_to_num()


class InfiniAttention(model_infini.InfiniAttention):
    """Segment by segment: read, then remember; a segment is written where it ends."""

    def init_cache(self, batch_size: int, max_len: int) -> Memory:
        return Memory(batch_size, self.config, like=self.W_Q.weight)

    def forward(self, x: Tensor, start: int, cache: Memory | None) -> Tensor:
        S, T = self.config.segment_len, x.size(1)
        memory = Memory(x.size(0), self.config, like=x) if cache is None else cache
        q, k, v = (split_heads(W(x), self.config.num_heads) for W in (self.W_Q, self.W_K, self.W_V))  # (B, H, T, D)
        q, k, A = phi(q), phi(k), []
        for begin, end in pairwise([*range(0, T, S), T]):
            A.append(retrieve(q[:, :, begin:end], memory))
            remember(k[:, :, begin:end], v[:, :, begin:end], memory)
            if (start + end) % S == 0:
                memory.close_segment()
        return self.W_O(merge_heads(torch.cat(A, dim=2)))


def remember(k: Tensor, v: Tensor, memory: Memory) -> None:
    """Add features k and values v (B, H, T, D) to what is pending: phi(K)^T (V - what M returns to phi(K)), (5)."""
    v = v - retrieve(k, memory)
    memory.pending_M = memory.pending_M + k.mT @ v
    memory.pending_z = memory.pending_z + k.sum(dim=(0, 2))[..., None]


class RepairedModel(InfiniPythiaModel):
    """Infini-Pythia with this memory in layer 0."""

    def make_attention(self, layer: int) -> Attention:
        return InfiniAttention(self.config) if layer == 0 else super().make_attention(layer)
