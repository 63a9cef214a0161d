"""The context family: one recurrent context per token stands in for keys and values.

A ContextBlock folds the tokens into one vector, trained without labels (Phase 1, OACD) and then frozen. What attention
would remember per layer, keys and values, becomes two linear maps of that vector, which all layers share.

    e_t = LayerNorm(embedding(token_t))      c_t = LayerNorm(c_{t-1} + GELU(W [c_{t-1}; e_t] + b)),  c_{-1} = 0

    tokens --> embed_in --> embed_norm --> ContextBlock --> c_0  c_1  c_2 ... c_t       cached: the contexts alone,
                                             ^      |        |                          E numbers per token
                                             '------'        |-- W_K --> k ---.
                                              c_{t-1}        '-- W_V --> v -. |
                                      h --> LayerNorm --> W_Q --> q --> softmax(q k^T / sqrt(D)) v --> dense

Context-Pythia: h_0 = c W_in, and all layers attend to the contexts. With E = context_dim = 256 a token costs 256
numbers (1,024 bytes in float32) for the whole model instead of 6,144: 95.8% less.

Context-KV: Pythia, but some layers (layer 0) attend to every 32nd context, the current one among them:

    position 350, context_interval 32:    contexts[30], [62], ..., [286], [318], [350]
    position 1000, max_contexts 32:       contexts[8], [40], ..., [936], [968], [1000]; older ones are dropped

All positions of equal residue modulo the interval attend to one another only. The last 31 x 32 + 1 = 993 contexts are
remembered, once for all such layers, and the other layers' keys and values: 5,120 numbers per token with layer 0
replaced, plus at most 993 x 256 (1,016,832 bytes in float32).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import pythia_base
from kit.show import say, show, text_ids
from kit.weights import fused_parts
from pythia_base import (
    Attention,
    Cache,
    PythiaConfig,
    PythiaModel,
    causal_attention,
    in_float64,
    merge_heads,
    reference_rope,
    require_positive,
    rotate,
    small_init_std,
    split_heads,
)

# A test pins these: they were once lost in an edit, and Phase 1 stopped converging.
WEIGHT_STD = 0.1  # of the ContextBlock's weights under init='normal'
BIAS_STD = 0.01  # of its biases
FIRST_CONTEXTS_STD = 0.01  # of the contexts that the first iteration of Phase 1 reads

SETTLING_PASSES = 20  # at least so many parallel passes tell whether the contexts of a trained block settle
SETTLING_BATCH = 5_000  # tokens of these passes on the device at a time
RANK_ROWS = 10_000  # rows that exist in float64 at a time while the effective rank is computed

Init = Literal["normal", "xavier", "kaiming"]


# ------------------------------------------------------------------- the equations, as plain loops in float64


def reference(model: "ContextModel", idx: Tensor) -> Tensor:
    """What both models have to give: idx (B, T) -> logits (B, T, V)."""
    model = in_float64(model)
    logits = []
    for row in idx:
        embeddings = model.embed_in.weight[row]  # (T, C)
        c = reference_contexts(model.context_block, embeddings)  # (T, E)
        h = c @ model.W_in.weight.T if isinstance(model, ContextPythiaModel) else embeddings
        for layer in model.layers:
            x, a = layer.input_layernorm(h), layer.attention
            reads_contexts = isinstance(a, ContextAttention)
            attended = reference_attention(a, x, c) if reads_contexts else pythia_base.reference_attention(a, x)
            h = h + attended + layer.mlp(layer.post_attention_layernorm(h))
        logits.append(model.final_layer_norm(h) @ model.head_weight.T)
    return torch.stack(logits)


def reference_contexts(block: "ContextBlock", embeddings: Tensor) -> Tensor:
    """embeddings (T, C) -> contexts (T, E), token after token."""
    c, contexts = embeddings.new_zeros(block.context_dim), []
    for embedding in embeddings:
        e = block.embed_norm(embedding)
        for linear, norm in zip(block.linears, block.norms, strict=True):
            delta = F.gelu(linear.weight @ torch.cat([c, e]) + linear.bias)
            c = norm(c + delta)
        contexts.append(c)
    return torch.stack(contexts)


def reference_attention(a: "ContextAttention", x: Tensor, c: Tensor) -> Tensor:
    """x (T, C), contexts c (T, E) -> (T, C): head by head and query by query, over the contexts that it sees."""
    config, D, at_intervals = a.config, a.config.head_size, isinstance(a, IntervalAttention)
    heads = []
    for h in range(config.num_heads):
        rows = slice(D * h, D * (h + 1))
        q = x @ a.W_Q.weight[rows].T + a.W_Q.bias[rows]
        k, v = c @ a.W_K.weight[rows].T, c @ a.W_V.weight[rows].T
        if not at_intervals:
            q, k = (torch.stack([reference_rope(y[t], t, config) for t in range(len(x))]) for y in (q, k))
        outputs = []
        for i in range(len(x)):
            seen = list(range(i + 1))
            if at_intervals:  # i, i - 32, i - 64, ...: max_contexts of them at most
                seen = list(range(i, -1, -config.context_interval))[: config.max_contexts]
            outputs.append((k[seen] @ q[i] / math.sqrt(D)).softmax(0) @ v[seen])
        heads.append(torch.stack(outputs))
    return torch.cat(heads, dim=-1) @ a.dense.weight.T + a.dense.bias


# -------------------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True)
class ContextPythiaConfig(PythiaConfig):
    """Pythia's shape, with a recurrent context in place of keys and values."""

    context_dim: int = 256  # width E of a context, all that is cached of a token
    init: Init = "normal"  # of the ContextBlock: normal(0, 0.1), or xavier or kaiming for comparison
    embed_norm: bool = True  # LayerNorm between the embedding and the ContextBlock; without it Phase 1 does not settle

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "context_dim")
        if self.init not in get_args(Init):
            raise ValueError(f"init={self.init!r} is not one of {', '.join(get_args(Init))}")


@dataclass(frozen=True)
class ContextKVConfig(ContextPythiaConfig):
    """Pythia's shape, with contexts at equal intervals in place of some layers' keys and values."""

    context_layers: tuple[int, ...] = (0,)  # layers that attend to contexts; a list of numbers from 0
    context_interval: int = 32  # positions from one attended context to the next
    max_contexts: int = 32  # attended contexts per position, the current one among them

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "context_interval")
        require_positive(self, "max_contexts")
        object.__setattr__(self, "context_layers", tuple(self.context_layers))  # a config file writes a list
        layers, num_layers = list(self.context_layers), self.num_layers
        if not layers or not set(layers) <= set(range(num_layers)):
            raise ValueError(f"context_layers={layers} has to name one or more of the layers 0 to {num_layers - 1}")

    @property
    def window(self) -> int:
        """Positions from the oldest attended context to the current one, both counted."""
        return (self.max_contexts - 1) * self.context_interval + 1


# ------------------------------------------------------------------------------------------------- the recurrence


class ContextBlock(nn.Module):
    """c_t = LayerNorm(c_{t-1} + GELU(W [c_{t-1}; e_t] + b)); further layers read the layer before instead of c_{t-1}.

    W [c; e] + b = W_c c + (W_e e + b). The bracket, the token half, depends on the token id alone: it is computed for
    all tokens at once, or once per distinct id and gathered, and a step of the recurrence multiplies by W_c only.
    """

    def __init__(
        self, hidden_size: int, context_dim: int, num_layers: int, layer_norm_eps: float, init: Init, embed_norm: bool
    ) -> None:
        super().__init__()
        self.context_dim = context_dim
        # embed_norm has no scale or shift of its own: contexts depend on nothing but the embedding and this block
        norm = nn.LayerNorm(hidden_size, layer_norm_eps, elementwise_affine=False)
        self.embed_norm = norm if embed_norm else nn.Identity()
        linears = [nn.Linear(context_dim + hidden_size, context_dim) for _ in range(num_layers)]
        for linear in linears:
            init_context_linear(linear, init)
        self.linears: Any = nn.ModuleList(linears)
        self.norms: Any = nn.ModuleList(nn.LayerNorm(context_dim, layer_norm_eps) for _ in range(num_layers))

    def token_half(self, embeddings: Tensor) -> Tensor:
        """W_e LayerNorm(embedding) + b, (..., C) -> (..., E), side by side if there are several layers."""
        e = self.embed_norm(embeddings)
        return torch.cat([F.linear(e, m.weight[:, self.context_dim :], m.bias) for m in self.linears], dim=-1)

    def step(self, c: Tensor, token_half: Tensor) -> Tensor:
        """c_{t-1} (B, E) and the token half of token t -> c_t (B, E)."""
        for linear, norm, half in zip(self.linears, self.norms, token_half.split(self.context_dim, -1), strict=True):
            delta = F.gelu(F.linear(c, linear.weight[:, : self.context_dim]) + half)
            c = norm(c + delta)
        return c

    def forward(self, c: Tensor, embeddings: Tensor) -> Tensor:
        """c_{t-1} (B, E) and the embedding of token t (B, C) -> c_t (B, E)."""
        return self.step(c, self.token_half(embeddings))

    def recurrence(self, embeddings: Tensor, c: Tensor | None) -> Tensor:
        """The exact contexts (B, T, E) of embeddings (B, T, C), token after token from c (B, E), or from 0 if None."""
        with torch.autocast(embeddings.device.type, enabled=False):  # rounding would add up from token to token
            halves = self.token_half(embeddings)
            c = halves.new_zeros(halves.size(0), self.context_dim) if c is None else c
            contexts = []
            for half in halves.unbind(dim=1):
                c = self.step(c, half)
                contexts.append(c)
        return torch.stack(contexts, dim=1)


def init_context_linear(linear: nn.Linear, init: Init) -> None:
    """normal: weights normal(0, 0.1), biases normal(0, 0.01). The others, biases 0, are there to be compared with."""
    nn.init.zeros_(linear.bias)
    match init:
        case "normal":
            nn.init.normal_(linear.weight, std=WEIGHT_STD)
            nn.init.normal_(linear.bias, std=BIAS_STD)
        case "xavier":
            nn.init.xavier_uniform_(linear.weight)
        case "kaiming":
            nn.init.kaiming_uniform_(linear.weight)


# ------------------------------------------------------------- Phase 1: OACD, origin-anchored centroid dispersion


def oacd_loss(contexts: Tensor, centroid_weight: float) -> Tensor:
    """-||C - mean(C)||_F / n + centroid_weight ||mean(C)||^2 of contexts C (n, E): spread out, around the origin."""
    centroid = contexts.mean(dim=0)
    return -(contexts - centroid).norm() / len(contexts) + centroid_weight * centroid.square().sum()


def compute_convergence_rate(new: Tensor, old: Tensor, threshold: float) -> float:
    """Share of the rows of (n, E) that moved by less than threshold, mean squared, from old to new."""
    return ((new - old).square().mean(dim=-1) < threshold).float().mean().item()


def effective_rank(contexts: Tensor) -> float:
    """exp(-sum p log p) of the normalised singular values p of contexts (N, E): E if all directions are used alike."""
    gram = sum(rows.double().T @ rows.double() for rows in contexts.split(RANK_ROWS))  # its eigenvalues are squares
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular_values / singular_values.sum()
    return torch.special.entr(p).sum().exp().item()


def first_contexts(num_tokens: int, context_dim: int) -> Tensor:
    """What the first iteration takes for the contexts of the one before it, (N, E), on the CPU."""
    return torch.empty(num_tokens, context_dim).normal_(std=FIRST_CONTEXTS_STD)


def shifted_batches(
    places: Tensor, contexts: Tensor, batch_size: int, context_noise: float, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A parallel pass, a batch at a time: places (n,) on the device, the contexts (n, E) that it is to write over, and
    those that it reads, noisy, on the device: token t reads what the last pass gave token t-1.
    """
    before = contexts.new_zeros(1, contexts.size(1))  # c_{-1}
    for where, old in zip(places.split(batch_size), contexts.split(batch_size), strict=True):
        shifted = torch.cat([before, old[:-1]]).to(device)
        before = old[-1:].clone()  # the next batch reads it after it is written over
        yield where.to(device), old, shifted + context_noise * torch.randn_like(shifted)


@torch.no_grad()
def settled_share(
    block: ContextBlock, table: Tensor, tokens: Tensor, *, iterations: int, noise: float, threshold: float
) -> float:
    """Convergence rate over tokens (N,) with frozen weights: that of the last of as many passes as Phase 1 took.

    But no fewer than SETTLING_PASSES. A block whose contexts never settle shows it here, whatever its exact ones do.
    """
    distinct, places = tokens.unique(return_inverse=True)
    token_half = block.token_half(table[distinct.to(table.device)])  # (distinct ids, E)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same start and noise for every model
        contexts = first_contexts(len(tokens), block.context_dim)
        for _ in range(max(iterations, SETTLING_PASSES)):
            before = contexts.clone()
            for where, old, noisy in shifted_batches(places, contexts, SETTLING_BATCH, noise, table.device):
                old.copy_(block.step(noisy, F.embedding(where, token_half)))
    return compute_convergence_rate(contexts, before, threshold)


def oacd_iteration(
    block: ContextBlock,
    table: Tensor,
    tokens: Tensor,
    contexts: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int,
    context_noise: float,
    centroid_weight: float,
    gradient_clip: float,
    convergence_threshold: float,
) -> tuple[float, float]:
    """One iteration over all N tokens in parallel, and one optimizer step; returns its loss and convergence rate.

    tokens (N,) and contexts (N, E) stay on the CPU and visit the device of the embedding table (V, C) a batch at a
    time, so that the device's memory does not grow with N. Contexts hold the last iteration's, then this one's.

    The token half is computed, and differentiated, once per distinct id: its gradient is summed up over the batches.
    """
    num_batches = math.ceil(len(tokens) / batch_size)
    distinct, places = tokens.unique(return_inverse=True)
    token_half = block.token_half(table[distinct.to(table.device)].detach())  # (distinct ids, E)
    half_gradient = torch.zeros_like(token_half)
    total_loss, rate = 0.0, 0.0
    optimizer.zero_grad()
    for where, old, noisy in shifted_batches(places, contexts, batch_size, context_noise, table.device):
        half = F.embedding(where, token_half.detach()).requires_grad_()
        new = block.step(noisy, half)
        loss = oacd_loss(new, centroid_weight) / num_batches
        loss.backward()
        assert half.grad is not None
        half_gradient.index_add_(0, where, half.grad)
        total_loss += loss.item()
        new = new.detach().cpu()
        rate += compute_convergence_rate(new, old, convergence_threshold) * len(old) / len(tokens)
        old.copy_(new)
    token_half.backward(half_gradient)
    if gradient_clip:
        nn.utils.clip_grad_norm_(block.parameters(), gradient_clip)
    optimizer.step()
    return total_loss, rate


# --------------------------------------------------------------------------------------- the models' common parts


class ContextCache:
    """The contexts of the last num_positions positions, (B, num_positions, E): position p stands at p % num_positions.

    The last of them is also the state of the recurrence, so nothing else has to be remembered.
    """

    def __init__(self, batch_size: int, num_positions: int, context_dim: int, like: Tensor) -> None:
        self.contexts = like.new_zeros(batch_size, num_positions, context_dim)

    def read(self, positions: Tensor) -> Tensor:
        """The contexts (B, ..., E) of positions (...); what was never written, position -1 above all, is zero."""
        return self.contexts[:, positions % self.contexts.size(1)]

    def state(self, start: int) -> Tensor:
        """c_{start - 1}, (B, E), from which the recurrence goes on."""
        return self.read(torch.arange(start - 1, start, device=self.contexts.device))[:, 0]

    def write(self, contexts: Tensor, start: int) -> None:
        """Store contexts (B, T, E) of the positions from start on, as many of the last as there is room for."""
        kept = contexts[:, -self.contexts.size(1) :]
        end = start + contexts.size(1)
        positions = torch.arange(end - kept.size(1), end, device=contexts.device)
        self.contexts[:, positions % self.contexts.size(1)] = kept.to(self.contexts.dtype)


class ContextAttention(Attention):
    """Queries from the tokens; keys and values are linear maps of contexts, which stand where a cache would."""

    def __init__(self, config: ContextPythiaConfig) -> None:
        super().__init__()
        C, E = config.hidden_size, config.context_dim
        self.config: Any = config
        self.W_Q = nn.Linear(C, C)
        self.W_K = nn.Linear(E, C, bias=False)
        self.W_V = nn.Linear(E, C, bias=False)
        self.dense = nn.Linear(C, C)


class ContextModel(PythiaModel):
    """What Context-Pythia and Context-KV share: one ContextBlock, which phase 2 leaves as phase 1 has trained it."""

    config: ContextPythiaConfig

    def __init__(self, config: ContextPythiaConfig) -> None:
        super().__init__(config)
        self.context_block = ContextBlock(  # after Pythia's init_weights, since it has an init of its own
            config.hidden_size, config.context_dim, 1, config.layer_norm_eps, config.init, config.embed_norm
        )

    @property
    def context_blocks(self) -> list[ContextBlock]:
        """The blocks whose contexts, side by side, the model reads."""
        return [self.context_block]

    def freeze_for_phase2(self) -> None:
        """Phase 2 trains all but what the cached contexts were computed with."""
        self.context_block.requires_grad_(False)
        self.embed_in.requires_grad_(False)

    def convert(self, source: PythiaModel) -> dict[str, Tensor]:
        """A baseline's queries and output projections; keys and values have nothing there to start from."""
        converted, theirs = dict[str, Tensor](), source.state_dict()
        for layer, attention in enumerate(self.attentions()):
            if isinstance(attention, ContextAttention):
                for part in ("weight", "bias"):
                    prefix = f"layers.{layer}.attention"
                    converted[f"{prefix}.W_Q.{part}"] = fused_parts(source, layer, part)[0]
                    converted[f"{prefix}.dense.{part}"] = theirs[f"{prefix}.dense.{part}"]
        return converted


# ------------------------------------------------------------------------------------------------- Context-Pythia


class CausalContextAttention(ContextAttention):
    """Causal attention with RoPE to all contexts.

    Expanded for training and long prompts; absorbed for decoding, where only the rotated dimensions of the keys are
    rebuilt. The two are equal.
    """

    def forward(self, x: Tensor, start: int, contexts: Tensor) -> Tensor:
        """x (B, T, C) of the last T of the P positions whose contexts (B, P, E) are given -> (B, T, C)."""
        T, P = x.size(1), contexts.size(1)
        positions = torch.arange(P, device=x.device)
        q = rotate(split_heads(self.W_Q(x), self.config.num_heads), positions[P - T :], self.config)  # (B, H, T, D)
        attend = self.absorbed if T < P and self.absorbing_is_cheaper(T) else self.expanded
        return self.dense(merge_heads(attend(q, contexts, positions)))

    def expanded(self, q: Tensor, contexts: Tensor, positions: Tensor) -> Tensor:
        """Every key and value: k = RoPE(c W_K), v = c W_V. q (B, H, T, D), contexts (B, P, E) -> (B, H, T, D)."""
        k = rotate(split_heads(self.W_K(contexts), self.config.num_heads), positions, self.config)  # (B, H, P, D)
        v = split_heads(self.W_V(contexts), self.config.num_heads)
        return causal_attention(q, k, v)

    def absorbed(self, q: Tensor, contexts: Tensor, positions: Tensor) -> Tensor:
        """Where RoPE does not turn, q k^T = (q W_K^T) c^T: no key is rebuilt; where it does, R of D dimensions are.

        q (B, H, T, D), contexts (B, P, E) -> (B, H, T, D)
        """
        B, H, T, D = q.shape
        P, R = contexts.size(1), self.config.rotary_size
        W_K, W_V = self.W_K.weight.view(H, D, -1), self.W_V.weight.view(H, D, -1)  # (H, D, E)
        k_rotated = F.linear(contexts, W_K[:, :R].flatten(0, 1)).view(B, P, H, R).transpose(1, 2)
        k_rotated = rotate(k_rotated, positions, self.config)  # (B, H, P, R)
        q_latent = (q[..., R:] @ W_K[:, R:]).flatten(1, 2)  # (B, H T, E): one product serves all heads
        scores = q[..., :R] @ k_rotated.transpose(2, 3) + (q_latent @ contexts.transpose(1, 2)).view(B, H, T, P)
        future = torch.ones(T, P, dtype=torch.bool, device=q.device).triu(P - T + 1)
        weights = (scores / math.sqrt(D)).masked_fill(future, -math.inf).softmax(dim=-1)
        out_latent = (weights.flatten(1, 2) @ contexts).view(B, H, T, -1)  # (B, H, T, E)
        return out_latent @ W_V.transpose(1, 2)

    def absorbing_is_cheaper(self, T: int) -> bool:
        """Per layer, absorbing costs P E (H R) + T P H (2 E) products, expanding P E (2 H D) + T P H (2 D)."""
        E, D, R = self.config.context_dim, self.config.head_size, self.config.rotary_size
        return 2 * T * (E - D) < E * (2 * D - R)


class ContextPythiaModel(ContextModel):
    """Pythia whose layers all attend to one shared sequence of contexts, and to nothing else of the tokens."""

    def __init__(self, config: ContextPythiaConfig) -> None:
        super().__init__(config)
        self.W_in = nn.Linear(config.context_dim, config.hidden_size, bias=False)
        nn.init.normal_(self.W_in.weight, std=small_init_std(config.hidden_size))

    def make_attention(self, layer: int) -> CausalContextAttention:
        return CausalContextAttention(self.config)

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """One entry of contexts, shared by all layers."""
        contexts = ContextCache(batch_size, max_len, self.config.context_dim, like=self.W_in.weight)
        return Cache([contexts] * self.config.num_layers, max_len)

    def hidden_states(self, idx: Tensor, cache: Cache | None = None, contexts: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> (B, T, C); contexts (B, T, E) of these positions, if they are known already."""
        start = 0 if cache is None else cache.extend(idx.size(1))
        if contexts is None:
            before = None if cache is None else cache.layers[0].state(start)
            contexts = self.context_block.recurrence(self.embed_in(idx), before)
        h = self.W_in(contexts)
        if cache is not None:
            cache.layers[0].write(contexts, start)
            contexts = cache.layers[0].contexts[:, : cache.length]  # (B, P, E)
        for block in self.layers:
            h = block(h, start, contexts)
        return self.final_layer_norm(h)


# ----------------------------------------------------------------------------------------------------- Context-KV


@dataclass(frozen=True)
class Columns:
    """Contexts at equal intervals as interval_columns lays them out, (B R, rows, E), and which rows a query sees."""

    contexts: Tensor
    seen: Tensor  # (B R, 1, query rows, rows)


def to_columns(x: Tensor, num_columns: int) -> Tensor:
    """(B, T, W) -> (B R, rows, W): position t goes to column t % R, R = num_columns, each a sequence of its own."""
    x = F.pad(x, (0, 0, 0, -x.size(1) % num_columns))
    return x.unflatten(1, (-1, num_columns)).transpose(1, 2).flatten(0, 1)


def from_columns(x: Tensor, num_columns: int) -> Tensor:
    """(B R, rows, W) -> (B, T, W), T filled up to whole rows."""
    return x.unflatten(0, (-1, num_columns)).transpose(1, 2).flatten(1, 2)


def interval_columns(contexts: Tensor, start: int, past: ContextCache | None, config: ContextKVConfig) -> Columns:
    """Contexts (B, T, E) from position start on -> columns (B R, rows, E), and which rows a query sees.

        start - 32   start - 31   ...     J rows of the past, from the cache
        start        start + 1    ...     the rows of this call
        start + 32   start + 33   ...     each column is a causal sequence of its own

    There are R = min(T, interval) columns. The mask is (B R, 1, query rows, rows): no later row, none that is
    max_contexts or more rows back, none before position 0.
    """
    (B, T, _), device = contexts.shape, contexts.device
    R = min(T, config.context_interval)
    J = min(config.max_contexts - 1, (start + R - 1) // config.context_interval)
    rows = torch.arange(-J, -(-T // R), device=device)
    positions = start + config.context_interval * rows[:, None] + torch.arange(R, device=device)  # (rows, R)
    if past is not None:
        contexts = torch.cat([past.read(positions[:J].flatten()), contexts], dim=1)  # (B, J R + T, E)
    age = rows[J:, None] - rows  # (query rows, rows), in intervals
    seen = (age >= 0) & (age < config.max_contexts) & (positions.T[:, None] >= 0)  # (R, query rows, rows)
    return Columns(to_columns(contexts, R), seen.repeat(B, 1, 1)[:, None])


class IntervalAttention(ContextAttention):
    """Attention to the contexts at equal intervals; without RoPE, since the contexts carry the order."""

    def forward(self, x: Tensor, start: int, columns: Columns) -> Tensor:
        """x (B, T, C), and what interval_columns makes of its contexts -> (B, T, C)."""
        B, T, _ = x.shape
        R, H = columns.seen.size(0) // B, self.config.num_heads
        q = split_heads(to_columns(self.W_Q(x), R), H)  # (B R, H, query rows, D)
        k = split_heads(self.W_K(columns.contexts), H)  # (B R, H, rows, D)
        v = split_heads(self.W_V(columns.contexts), H)
        out = merge_heads(causal_attention(q, k, v, columns.seen))  # (B R, query rows, C)
        return self.dense(from_columns(out, R)[:, :T])


class ContextKVPythiaModel(ContextModel):
    """Pythia with interval attention to shared contexts in the layers named by context_layers."""

    config: ContextKVConfig

    def make_attention(self, layer: int) -> Attention:
        return IntervalAttention(self.config) if layer in self.config.context_layers else super().make_attention(layer)

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """One ring of contexts for all replaced layers, keys and values for the others."""
        num_positions = min(max_len, self.config.window)
        contexts = ContextCache(batch_size, num_positions, self.config.context_dim, like=self.embed_in.weight)
        entries = (
            contexts if isinstance(attention, IntervalAttention) else attention.init_cache(batch_size, max_len)
            for attention in self.attentions()
        )
        return Cache(list(entries), max_len)

    def hidden_states(self, idx: Tensor, cache: Cache | None = None, contexts: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> (B, T, C); contexts (B, T, E) of these positions, if they are known already."""
        start = 0 if cache is None else cache.extend(idx.size(1))
        past = None if cache is None else cache.layers[self.config.context_layers[0]]
        h = self.embed_in(idx)
        if contexts is None:
            contexts = self.context_block.recurrence(h, None if past is None else past.state(start))
        columns = interval_columns(contexts, start, past, self.config)  # the same for all replaced layers
        if past is not None:
            past.write(contexts, start)  # only now: it takes the place of contexts that were still to be read
        for layer, block in enumerate(self.layers):
            own = None if cache is None else cache.layers[layer]
            h = block(h, start, columns if layer in self.config.context_layers else own)
        return self.final_layer_norm(h)


if __name__ == "__main__":
    pythia, text = PythiaModel(PythiaConfig()), str(__doc__)
    show(ContextPythiaModel(ContextPythiaConfig()), reference, pythia, text)
    show(ContextKVPythiaModel(ContextKVConfig(context_interval=4, max_contexts=5)), reference, pythia, text)
    ids, model = text_ids(text, 2000)[0], ContextPythiaModel(ContextPythiaConfig())
    block, contexts = model.context_block, first_contexts(len(ids), 256)
    optimizer = torch.optim.Adam(block.parameters(), lr=0.003)
    for iteration in range(1, 21):
        _, rate = oacd_iteration(
            block, model.embed_in.weight, ids, contexts, optimizer, batch_size=500, context_noise=0.05,
            centroid_weight=0.1, gradient_clip=2.0, convergence_threshold=0.03,
        )  # fmt: skip
        if iteration in (1, 2, 5, 10, 20):
            say(
                f"OACD, iteration {iteration}",
                f"effective rank {effective_rank(contexts):.1f} of 256, {rate:.0%} settled",
            )
