"""The cascade: N context blocks, each trained on different data, and one token layer; no attention, no growing cache.

A recurrent model. Each ContextBlock (model_context.py) folds the tokens into a vector of its own; the blocks do not
see one another. One layer predicts token t+1 from their vectors, side by side, and from token t.

    e_t    = LayerNorm(embedding(token_t))
    c^i_t  = ContextBlock_i(c^i_{t-1}, e_t),  c^i_{-1} = 0         i = 0 .. N-1
    x_t    = LayerNorm(e_t + GELU(W [c^0_t; ...; c^{N-1}_t; e_t] + b))
    logits = x_t W_E^T                                             W_E: the embedding table

                     .--> ContextBlock 0   --> c^0_t     --.
                     |      ^________| c^0_{t-1}           |
    token_t --> e_t -+--> ContextBlock N-1 --> c^{N-1}_t --+--> TokenBlock --> x_t --> W_E^T --> logits of token t+1
                     |                                     |
                     '-------------------------------------'

Cached: the N x E numbers of the last position, however long the text: with two blocks of 500, 4,000 bytes in float32.

The table is GPT-2's (Radford et al. 2019) or that of a trained run. Phase 1 trains the blocks and phase 2 the
TokenBlock; both leave the table as it is, and since the output is tied to it, no output matrix is trained or stored.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kit.show import say, show
from kit.weights import require_known_source, take_over
from model_context import ContextBlock, ContextCache, init_context_linear, reference_contexts
from pythia_base import Cache, LanguageModel, PythiaConfig, PythiaModel, check_numbers, in_float64, small_init_std


def reference(model: "CascadeContextLLM", idx: Tensor) -> Tensor:
    """The equations as plain loops in float64: idx (B, T) -> logits (B, T, V)."""
    model = in_float64(model)
    block, logits = model.token_block, []
    for row in idx:
        embeddings = model.embed_in.weight[row]  # (T, C), as phase 1 read them
        c = torch.cat([reference_contexts(b, embeddings) for b in model.context_blocks], dim=-1)  # (T, N E)
        for c_t, token in zip(c, row, strict=True):
            e_t = block.embed_norm(model.token_weight[token])
            x_t = block.norm(e_t + F.gelu(block.linear.weight @ torch.cat([c_t, e_t]) + block.linear.bias))
            logits.append(model.head_weight @ x_t)
    return torch.stack(logits).view(*idx.shape, -1)


@dataclass(frozen=True)
class CascadeConfig:
    """Shape of a cascade; the defaults are two blocks of 500 on GPT-2's table."""

    vocab_size: int = 50304  # rows of the embedding; those of the table where one is loaded
    hidden_size: int = 768  # width of the embedding; that of the table where one is loaded
    context_dim: int = 500  # width E of each block's context
    num_context_blocks: int = 2  # N
    num_layers_per_block: int = 1  # layers of a ContextBlock
    freeze_embedding: bool = True  # False: TokenBlock and tied output have a copy of the table, which phase 2 trains
    tie_weights: bool = True  # the output matrix is the embedding table; False: one of its own, trained
    max_position_embeddings: int = 2048  # longest window the model is trained and scored on
    layer_norm_eps: float = 1e-5  # epsilon of every LayerNorm

    def __post_init__(self) -> None:
        check_numbers(self)


class TokenBlock(nn.Module):
    """x_t = LayerNorm(e_t + GELU(W [c_t; e_t] + b)),  e_t = LayerNorm(embedding), c_t all contexts side by side."""

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.embed_norm = nn.LayerNorm(C, config.layer_norm_eps, elementwise_affine=False)  # as the ContextBlocks'
        self.linear = nn.Linear(config.num_context_blocks * config.context_dim + C, C)
        init_context_linear(self.linear, "normal")
        self.norm = nn.LayerNorm(C, config.layer_norm_eps)

    def forward(self, contexts: Tensor, embeddings: Tensor) -> Tensor:
        """contexts (..., N E) and the embeddings (..., C) of the same positions -> (..., C)."""
        e = self.embed_norm(embeddings)
        return self.norm(e + F.gelu(self.linear(torch.cat([contexts, e], dim=-1))))


class CascadeContextLLM(LanguageModel):
    """N recurrent contexts and one token layer."""

    positions_are_independent = True  # given their contexts, so that phase 2 can draw them one by one

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.hidden_size
        self.embed_in = nn.Embedding(V, C)
        nn.init.normal_(self.embed_in.weight, std=small_init_std(C))
        self.embed_in.requires_grad_(not config.freeze_embedding)
        how: Any = C, config.context_dim, config.num_layers_per_block, config.layer_norm_eps, "normal", True
        self.context_blocks: Any = nn.ModuleList(ContextBlock(*how) for _ in range(config.num_context_blocks))
        self.token_block = TokenBlock(config)
        if not config.freeze_embedding:
            self.embed_token = nn.Embedding.from_pretrained(self.embed_in.weight.detach().clone(), freeze=False)
        if not config.tie_weights:
            self.embed_out = nn.Linear(C, V, bias=False)
            nn.init.normal_(self.embed_out.weight, std=small_init_std(C))

    @property
    def token_weight(self) -> Tensor:
        """The table (V, C) that the TokenBlock reads; the ContextBlocks keep reading the one of phase 1."""
        return self.embed_in.weight if self.config.freeze_embedding else self.embed_token.weight

    @property
    def head_weight(self) -> Tensor:
        return self.token_weight if self.config.tie_weights else self.embed_out.weight

    def recurrences(self, idx: Tensor, c: Tensor | None) -> Tensor:
        """The exact contexts of tokens (B, T), side by side, (B, T, N E), from c (B, N E) on, or from 0 if None."""
        N, embeddings = self.config.num_context_blocks, self.embed_in(idx)
        blocks = zip(self.context_blocks, [None] * N if c is None else c.chunk(N, dim=-1), strict=True)
        return torch.cat([block.recurrence(embeddings, c_i) for block, c_i in blocks], dim=-1)

    def hidden_states(self, idx: Tensor, cache: Cache | None = None, contexts: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> (B, T, C); contexts (B, T, N E) of these positions, if they are known already."""
        start = 0 if cache is None else cache.extend(idx.size(1))
        if contexts is None:
            contexts = self.recurrences(idx, None if cache is None else cache.layers[0].read(start - 1))
        if cache is not None:
            cache.layers[0].write(contexts, start)
        return self.token_block(contexts, F.embedding(idx, self.token_weight))

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """The contexts of the last position: as many numbers for any max_len."""
        width = self.config.num_context_blocks * self.config.context_dim
        return Cache([ContextCache(batch_size, 1, width, like=self.embed_in.weight)], max_len)

    def start_from(self, source: Any) -> dict[str, str]:
        """As LanguageModel's; the copy of the table that phase 2 trains starts as the table, unless it was trained."""
        require_known_source(self, source, baseline=PythiaModel)
        starts_copy = not self.config.freeze_embedding and not hasattr(source, "embed_token")
        return take_over(self, source, {"embed_token.weight": source.embed_in.weight} if starts_copy else {})


if __name__ == "__main__":
    model = CascadeContextLLM(CascadeConfig())
    show(model, reference, PythiaModel(PythiaConfig(hidden_size=768, num_heads=12)), str(__doc__))
    for length in (100, 10_000, 1_000_000):
        say(f"state after {length:,} tokens", f"{model.init_cache(1, length).nbytes:,} bytes")
