"""Infini-Pythia: layer 0 attends to a memory of fixed size, layers 1-5 are Pythia's.

Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143), the memory alone: no local attention and no positions in
layer 0. The sequence is cut into segments of S tokens. A segment reads what those before it have left in a matrix M
and a normaliser z per head, and only then is written itself; nothing of it is seen within it, which makes it causal.

                  segment 1              segment 2              segment 3, open
    tokens    [ t1 ........ tS ]     [ tS+1 ..... t2S ]     [ t2S+1  t2S+2
                ^           |          ^           |          ^        |
           read |     write |     read |     write |     read |        '--> pending, to be written
                |           v          |           v          |             when the segment closes
    memory      0 ------> M_1, z_1 ----'-----> M_2, z_2 ------'

There can be several such memories, G of them. A segment is written to the one whose turn it is; a query reads all.
    banks           segments_per_bank segments each, round and round; mixed by a learned share per head and bank
    multi-memory    one segment each, round and round; mixed by their relevance to the query
ALiBi decay: before a segment is written, what is there fades by exp(-slope).

Cached: in layer 0, whatever the length, 8 x (64 x 64 + 64) numbers = 133,120 bytes in float32 for each memory, 8 bytes
that count its tokens, and 133,120 for the open segment; in layers 1-5 keys and values, 5,120 numbers a token.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import pythia_base
from kit.show import say, show, text_ids
from kit.weights import bias_free_attention
from pythia_base import Attention, Cache, PythiaConfig, PythiaModel, merge_heads, split_heads


def reference(model: "InfiniPythiaModel", idx: Tensor) -> Tensor:
    """The equations as plain loops in float64: idx (B, T) -> logits (B, T, V)."""
    return pythia_base.reference(model, idx, reference_memory)


def reference_memory(a: Any, x: Tensor) -> Tensor:
    """x (T, C) -> (T, C), in layer 0 token by token within segment by segment, every mode of it."""
    if not isinstance(a, InfiniAttention):
        return pythia_base.reference_attention(a, x)
    c, T = a.config, len(x)
    H, D, G, S = c.num_heads, c.head_size, c.total_memories, c.segment_len
    q, k, v = ((x @ W.weight.T).view(T, H, D) for W in (a.W_Q, a.W_K, a.W_V))
    q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))  # phi(x) = ELU(x) + 1
    heads = []
    for h in range(H):
        fade = math.exp(-c.alibi_scale * 2 ** (-8 * (h + 1) / H)) if c.use_alibi else 1.0
        M, z, A = [x.new_zeros(D, D)] * G, [x.new_zeros(D)] * G, []
        written = [0] * G  # tokens in each memory
        for begin in range(0, T, S):
            tokens = range(begin, min(begin + S, T))
            for t in tokens:  # read: equation (3) for each memory that holds anything
                readings, scores = [], []
                for g in [g for g in range(G) if written[g]]:
                    readings.append(q[t, h] @ M[g] / (q[t, h] @ z[g]))
                    relevance = q[t, h] @ z[g] / (written[g] if c.normalize_relevance else 1)
                    scores.append(a.bank_scores[g, h] if c.num_memory_banks > 1 else relevance)
                A.append(torch.stack(scores).softmax(0) @ torch.stack(readings) if scores else x.new_zeros(D))
            if len(tokens) < S:
                break  # an open segment is not written
            g = begin // c.tokens_per_turn % G  # whose turn it is
            M_before, z_before = M[g], z[g]
            M, z = [m * fade for m in M], [n * fade for n in z]
            for t in tokens:  # write: equation (4), by the delta rule (5)
                known = k[t, h] @ M_before / (k[t, h] @ z_before) if c.use_delta_rule and written[g] else 0
                M[g] = M[g] + torch.outer(k[t, h], v[t, h] - known)
                z[g] = z[g] + k[t, h]
            written[g] += S
        heads.append(torch.stack(A))
    return torch.stack(heads, dim=1).flatten(1) @ a.W_O.weight.T


@dataclass(frozen=True)
class InfiniConfig(PythiaConfig):
    """Pythia's shape, with a memory in place of the attention of layer 0."""

    segment_len: int = 32  # tokens S of a segment: read together, written together
    use_delta_rule: bool = True  # write only what the memory does not yet return; False: plain sums
    num_memory_banks: int = 1  # memories filled one after the other, mixed by a learned share per head and bank
    segments_per_bank: int = 4  # segments in a row that go to the same bank
    num_memories: int = 1  # memories written in turn, mixed by their relevance to each query
    normalize_relevance: bool = True  # relevance per token written; False: sums over all of them
    use_alibi: bool = False  # older segments weigh less
    alibi_scale: float = 1.0  # times ALiBi's slopes, 2^-1 ... 2^-8 for 8 heads

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_memory_banks > 1 and self.num_memories > 1:
            raise ValueError("num_memory_banks and num_memories: banks and multi-memory exclude one another")

    @property
    def total_memories(self) -> int:
        """G, the banks or the memories."""
        return max(self.num_memory_banks, self.num_memories)

    @property
    def tokens_per_turn(self) -> int:
        """Tokens that go to one memory before it is the next one's turn."""
        return self.segment_len * (self.segments_per_bank if self.num_memory_banks > 1 else 1)


class Memory:
    """What layer 0 remembers of B sequences, each its own; float32 whatever the model's dtype.

    M and z stand side by side in one matrix [M z], D rows of D + 1: one product reads both, one product writes both.
    """

    def __init__(self, batch_size: int, config: InfiniConfig, like: Tensor) -> None:
        B, G, H, D = batch_size, config.total_memories, config.num_heads, config.head_size
        self.Mz = like.new_zeros(B, G, H, D, D + 1, dtype=torch.float32)
        self.pending = like.new_zeros(B, H, D, D + 1, dtype=torch.float32)  # what the open segment will add
        self.written = like.new_zeros(B, G, dtype=torch.int64)  # tokens in each memory


def phi(x: Tensor) -> Tensor:
    """The features of queries and keys, ELU(x) + 1: positive, so that no normaliser crosses zero."""
    return F.elu(x) + 1


def retrieve(x: Tensor, Mz: Tensor) -> tuple[Tensor, Tensor]:
    """A = x M / (x z), equation (3), and x z, for features x (..., T, D) and Mz (..., D, D + 1).

    An empty memory returns 0: its normaliser is replaced before the division, or the gradient would still be 0/0.
    """
    xM, xz = (x @ Mz).split([x.size(-1), 1], dim=-1)  # (..., T, D), (..., T, 1)
    return xM / xz.where(xz > 0, 1), xz


class InfiniAttention(Attention):
    """Infini-attention without its local half: all that a query sees is what closed segments wrote."""

    def __init__(self, config: InfiniConfig) -> None:
        super().__init__()
        C, G, H = config.hidden_size, config.total_memories, config.num_heads
        self.config = config
        self.W_Q, self.W_K, self.W_V, self.W_O = (nn.Linear(C, C, bias=False) for _ in range(4))
        if config.num_memory_banks > 1:
            self.bank_scores = nn.Parameter(torch.zeros(G, H))

    def init_cache(self, batch_size: int, max_len: int) -> Memory:
        return Memory(batch_size, self.config, like=self.W_Q.weight)

    def forward(self, x: Tensor, start: int, cache: Memory | None) -> Tensor:
        if torch.compiler.is_compiling():  # unrolled over its segments, attend would take minutes to compile
            return torch.compiler.disable(self.forward)(x, start, cache)
        q, k, v = (split_heads(W(x), self.config.num_heads) for W in (self.W_Q, self.W_K, self.W_V))  # (B, H, T, D)
        memory = Memory(x.size(0), self.config, like=x) if cache is None else cache
        with torch.autocast(x.device.type, enabled=False):  # sums over a whole document: float32
            A = self.attend(phi(q.float()), phi(k.float()), v.float(), start, memory)
        return self.W_O(merge_heads(A).to(q.dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int, memory: Memory) -> Tensor:
        """Segment by segment, read first; a segment is written where it ends. q, k, v (B, H, T, D) -> (B, H, T, D)."""
        S, T, A = self.config.segment_len, q.size(2), []
        sizes = [end - begin for begin, end in pairwise([0, *range(S - start % S, T, S), T])]  # T cut at segments' ends
        for q_s, k_s, v_s in zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
            A.append(self.read(q_s, memory))
            # every write of an open segment starts from the same M_{s-1}, so that their sum is all there is to keep
            memory.pending = memory.pending + self.update(k_s, v_s, memory)
            start += q_s.size(2)
            if start % S == 0:
                self.close_segment(memory)
        return torch.cat(A, dim=2)

    def read(self, q: Tensor, memory: Memory) -> Tensor:
        """The mixture of what all memories return to the features q (B, H, T, D) -> (B, H, T, D)."""
        A, qz = retrieve(q[:, None], memory.Mz)  # (B, G, H, T, D), (B, G, H, T, 1)
        written = memory.written[:, :, None, None, None]
        if self.config.num_memory_banks > 1:
            scores = self.bank_scores[:, :, None, None].float()  # (G, H, 1, 1)
        else:  # relevance: the query's own, and at hand already
            scores = qz / written.clamp(min=1) if self.config.normalize_relevance else qz
        scores = scores.where(written > 0, torch.finfo(torch.float32).min)  # not -inf: at first all of them are empty
        return (scores.softmax(dim=1) * A).sum(dim=1)

    def update(self, k: Tensor, v: Tensor, memory: Memory) -> Tensor:
        """What the features k and the values v (B, H, T, D) add to the memory whose turn it is, (B, H, D, D + 1).

        [phi(K)^T V, sum of phi(K)], equation (4); by the delta rule phi(K)^T (V - what M returns to phi(K)), (5).
        """
        if self.config.use_delta_rule:
            v = v - retrieve(k, memory.Mz[self.turn(memory)])[0]
        return k.transpose(-2, -1) @ F.pad(v, (0, 1), value=1.0)

    def turn(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """The index into (B, G) of the memory that each row's open segment goes to."""
        turns = memory.written.sum(dim=1) // self.config.tokens_per_turn
        return torch.arange(len(turns), device=turns.device), turns % self.config.total_memories

    def slopes(self, device: torch.device) -> Tensor:
        """ALiBi's, 2^-1 ... 2^-8 for 8 heads, times alibi_scale: (H, 1, 1), float32 whatever the model's dtype."""
        H = self.config.num_heads
        return self.config.alibi_scale * 2 ** (-8 / H * torch.arange(1, H + 1, device=device))[:, None, None]

    def close_segment(self, memory: Memory) -> None:
        """Write what is pending: M_s = M_{s-1} + pending, z alike; with ALiBi what was there fades first."""
        turn = self.turn(memory)
        tokens = torch.full_like(turn[0], self.config.segment_len)
        faded = memory.Mz * torch.exp(-self.slopes(memory.Mz.device)) if self.config.use_alibi else memory.Mz
        memory.Mz = faded.index_put(turn, memory.pending, accumulate=True)
        memory.written = memory.written.index_put(turn, tokens, accumulate=True)
        memory.pending = torch.zeros_like(memory.pending)


class CarriedMemory(Cache):
    """Layer 0's memory from window to window of long documents, a document per row.

    To the model it is a cache that only layer 0 remembers anything in: every window stands at positions from 0.
    """

    def __init__(self, batch_size: int, config: InfiniConfig, like: Tensor) -> None:
        self.segment_len, above = config.segment_len, [None] * (config.num_layers - 1)
        super().__init__([Memory(batch_size, config, like), *above], config.max_position_embeddings)

    def extend(self, num_tokens: int) -> int:
        """Open a window: its first position, 0. Raises ValueError if it would end within a segment."""
        if num_tokens % self.segment_len:
            raise ValueError(f"a window of {num_tokens} tokens is no multiple of segment_len={self.segment_len}")
        return 0


class InfiniPythiaModel(PythiaModel):
    """Pythia whose layer 0 is a memory."""

    config: InfiniConfig

    def make_attention(self, layer: int) -> Attention:
        return InfiniAttention(self.config) if layer == 0 else super().make_attention(layer)

    def init_memory(self, batch_size: int) -> CarriedMemory:
        """An empty memory for batch_size documents that are fed window by window, model(idx, cache=memory)."""
        return CarriedMemory(batch_size, self.config, like=self.embed_in.weight)

    def convert(self, source: PythiaModel) -> dict[str, Tensor]:
        """Layer 0's projections are the baseline's; phi takes the place of RoPE and softmax."""
        return bias_free_attention(source, 0)


if __name__ == "__main__":
    model, text = InfiniPythiaModel(InfiniConfig(segment_len=8)), str(__doc__)
    show(model, reference, PythiaModel(PythiaConfig()), text)
    with torch.no_grad():
        attention = InfiniAttention(InfiniConfig())
        memory, x, start = attention.init_cache(1, 10_000), model.embed_in(text_ids(text * 8, 10_000)), 0
        for end in (100, 1_000, 10_000):
            attention(x[:, start:end], start, memory)
            start, state = end, sum(tensor.nbytes for tensor in vars(memory).values())
            say(f"layer 0 after {end:,} tokens", f"{state:,} bytes, {memory.Mz.norm():.1f} the norm of what it holds")
