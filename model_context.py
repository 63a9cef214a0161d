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
remembered, once for all such layers: 5,120 numbers per token for the keys and values of the other layers, plus at most
993 x 256 (1,016,832 bytes in float32).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import pythia_base
from kit.fast import attend_latents, has_kernels, row_linear
from kit.show import say, show, text_ids
from kit.weights import fused_parts
from pythia_base import Attention, Cache, PythiaConfig, PythiaModel, merge_heads, rotate, split_heads

# A test pins these: they were once lost in an edit, and Phase 1 stopped converging.
WEIGHT_STD, BIAS_STD = 0.1, 0.01  # of the ContextBlock's weights and biases under init='normal'
FIRST_CONTEXTS_STD = 0.01  # of the contexts that the first iteration of Phase 1 reads
SETTLING_PASSES = 20  # parallel passes, at least, that tell whether contexts settle, whatever the exact ones do
REBUILT_KEYS = 1024  # at a time, in decoding: they stay in the processor's cache
ROWS_AT_A_TIME = 5_000  # contexts on the device in these passes, and in float64 for the effective rank
Init = Literal["normal", "xavier", "kaiming"]


def reference(model: "ContextModel", idx: Tensor) -> Tensor:
    """The equations of both models as plain loops in float64: idx (B, T) -> logits (B, T, V)."""
    model, logits = pythia_base.in_float64(model), []
    for embeddings in model.embed_in.weight[idx]:  # (T, C)
        c = reference_contexts(model.context_block, embeddings)  # (T, E)
        h = c @ model.W_in.weight.T if isinstance(model, ContextPythiaModel) else embeddings
        logits.append(pythia_base.reference_layers(model, h, functools.partial(reference_attention, c=c)))
    return torch.stack(logits)


def reference_contexts(block: "ContextBlock", embeddings: Tensor) -> Tensor:
    """embeddings (T, C) -> contexts (T, E), token after token."""
    c, contexts = embeddings.new_zeros(block.context_dim), []
    for embedding in embeddings:
        e = block.embed_norm(embedding)
        for linear, norm in zip(block.linears, block.norms, strict=True):
            c = norm(c + F.gelu(linear.weight @ torch.cat([c, e]) + linear.bias))
        contexts.append(c)
    return torch.stack(contexts)


def reference_attention(a: Any, x: Tensor, c: Tensor) -> Tensor:
    """x (T, C), contexts c (T, E) -> (T, C): head by head and query by query, over the contexts that it sees."""
    if not isinstance(a, ContextAttention):
        return pythia_base.reference_attention(a, x)
    T, D, heads = len(x), a.config.head_size, []
    for h in range(a.config.num_heads):
        rows = slice(D * h, D * (h + 1))
        q, k, v = x @ a.W_Q.weight[rows].T + a.W_Q.bias[rows], c @ a.W_K.weight[rows].T, c @ a.W_V.weight[rows].T
        if isinstance(a, IntervalAttention):  # i, i - 32, i - 64, ...: max_contexts of them at most
            seen = [list(range(i, -1, -a.config.context_interval))[: a.config.max_contexts] for i in range(T)]
        else:
            seen = [list(range(i + 1)) for i in range(T)]
            q, k = (torch.stack([pythia_base.reference_rope(y[t], t, a.config) for t in range(T)]) for y in (q, k))
        heads.append([(k[seen[i]] @ q[i] / math.sqrt(D)).softmax(0) @ v[seen[i]] for i in range(T)])
    return torch.cat([torch.stack(head) for head in heads], dim=-1) @ a.dense.weight.T + a.dense.bias


@dataclass(frozen=True)
class ContextPythiaConfig(PythiaConfig):
    """Pythia's shape, with a recurrent context in place of keys and values."""

    context_dim: int = 256  # width E of a context, all that is cached of a token
    init: Init = "normal"  # of the ContextBlock: normal(0, 0.1), or xavier or kaiming for comparison
    embed_norm: bool = True  # LayerNorm between the embedding and the ContextBlock; without it Phase 1 does not settle


@dataclass(frozen=True)
class ContextKVConfig(ContextPythiaConfig):
    """Pythia's shape, with contexts at equal intervals in place of some layers' keys and values."""

    context_layers: tuple[int, ...] = (0,)  # layers that attend to contexts; a list of numbers from 0
    context_interval: int = 32  # positions from one attended context to the next
    max_contexts: int = 32  # attended contexts per position, the current one among them

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "context_layers", tuple(self.context_layers))  # a config file writes a list
        layers, num_layers = list(self.context_layers), self.num_layers
        if not layers or not set(layers) <= set(range(num_layers)):
            raise ValueError(f"context_layers={layers} has to name one or more of the layers 0 to {num_layers - 1}")

    @property
    def window(self) -> int:
        """Contexts that are remembered: from the oldest attended one to the current one."""
        return (self.max_contexts - 1) * self.context_interval + 1


class ContextBlock(nn.Module):
    """c_t = LayerNorm(c_{t-1} + GELU(W [c_{t-1}; e_t] + b)); further layers read the layer before instead of c_{t-1}.

    W [c; e] + b = W_c c + (W_e e + b). The bracket, the token half, depends on the token id alone: it is computed for
    all tokens, or distinct ids, at once, and a step of the recurrence multiplies by W_c only.
    """

    def __init__(self, C: int, context_dim: int, num_layers: int, eps: float, init: Init, embed_norm: bool) -> None:
        super().__init__()
        self.context_dim = context_dim
        # embed_norm has no scale or shift of its own: contexts depend on nothing but the embedding and this block
        self.embed_norm = nn.LayerNorm(C, eps, elementwise_affine=False) if embed_norm else nn.Identity()
        linears = [nn.Linear(context_dim + C, context_dim) for _ in range(num_layers)]
        self.linears: Any = nn.ModuleList(linears)
        self.norms: Any = nn.ModuleList(nn.LayerNorm(context_dim, eps) for _ in range(num_layers))
        for linear in linears:
            init_context_linear(linear, init)

    def token_half(self, embeddings: Tensor) -> Tensor:
        """W_e LayerNorm(embedding) + b, (..., C) -> (..., E), side by side if there are several layers."""
        e = self.embed_norm(embeddings)
        return torch.cat([row_linear(e, m.weight[:, self.context_dim :], m.bias) for m in self.linears], dim=-1)

    def step(self, c: Tensor, token_half: Tensor) -> Tensor:
        """c_{t-1} (B, E) and the token half of token t -> c_t (B, E)."""
        for linear, norm, half in zip(self.linears, self.norms, token_half.split(self.context_dim, -1), strict=True):
            c = norm(c + F.gelu(row_linear(c, linear.weight[:, : self.context_dim]) + half))
        return c

    def forward(self, c: Tensor, embeddings: Tensor) -> Tensor:
        """c_{t-1} (B, E) and the embedding of token t (B, C) -> c_t (B, E)."""
        return self.step(c, self.token_half(embeddings))

    def recurrence(self, embeddings: Tensor, c: Tensor | None) -> Tensor:
        """The exact contexts (B, T, E) of embeddings (B, T, C), token after token from c (B, E), or from 0 if None."""
        if torch.compiler.is_compiling():  # unrolled over its tokens, it would take minutes to compile
            return torch.compiler.disable(self.recurrence)(embeddings, c)
        with torch.autocast(embeddings.device.type, enabled=False):  # rounding would add up from token to token
            halves = self.token_half(embeddings)
            c = halves.new_zeros(halves.size(0), self.context_dim) if c is None else c.to(halves.dtype)
            if len(self.linears) == 1 and has_kernels(halves):  # the fast form
                W, norm = self.linears[0].weight[:, : self.context_dim], self.norms[0]
                return torch.ops.decode.recurrence.default(halves, c.contiguous(), W, norm.weight, norm.bias, norm.eps)
            contexts = []
            for half in halves.unbind(dim=1):
                c = self.step(c, half)
                contexts.append(c)
        return torch.stack(contexts, dim=1)


def init_context_linear(linear: nn.Linear, init: Init) -> None:
    """normal: weights normal(0, 0.1), biases normal(0, 0.01). The others, biases 0, are there to be compared with."""
    nn.init.zeros_(linear.bias)
    if init == "normal":
        nn.init.normal_(linear.weight, std=WEIGHT_STD)
        nn.init.normal_(linear.bias, std=BIAS_STD)
    elif init == "xavier":
        nn.init.xavier_uniform_(linear.weight)
    elif init == "kaiming":
        nn.init.kaiming_uniform_(linear.weight)
    else:
        raise ValueError(f"init={init!r} is not one of {', '.join(get_args(Init))}")


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
    gram = sum(rows.double().T @ rows.double() for rows in contexts.split(ROWS_AT_A_TIME))
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # the eigenvalues of C^T C are their squares
    p = singular_values / singular_values.sum()
    return torch.special.entr(p).sum().exp().item()


def first_contexts(num_tokens: int, context_dim: int) -> Tensor:
    """What the first iteration takes for the contexts of the one before it, (N, E), on the CPU."""
    return torch.empty(num_tokens, context_dim).normal_(std=FIRST_CONTEXTS_STD)


def oacd_iteration(
    block: ContextBlock, table: Tensor, tokens: Tensor, contexts: Tensor, *, batch_size: int, context_noise: float,
    centroid_weight: float, gradient_clip: float, convergence_threshold: float,
) -> tuple[float, float]:  # fmt: skip
    """One pass over all N tokens in parallel -> loss, convergence rate; and gradients, but under no_grad.

    tokens (N,) and contexts (N, E), the last iteration's, then this one's, stay on the CPU and visit the device of the
    embedding table (V, C) a batch at a time. The token half is computed and differentiated once per distinct id.
    """
    distinct, places = tokens.unique(return_inverse=True)
    token_half = block.token_half(table[distinct.to(table.device)].detach())  # (distinct ids, E)
    half_gradient = torch.zeros_like(token_half)
    total_loss, rate, before = 0.0, 0.0, contexts.new_zeros(1, block.context_dim)  # c_{-1}
    block.zero_grad()
    for where, old in zip(places.split(batch_size), contexts.split(batch_size), strict=True):
        shifted = torch.cat([before, old[:-1]]).to(table.device)  # token t reads what the last pass gave token t-1
        before = old[-1:].clone()  # the next batch reads it after it is written over
        where = where.to(table.device)
        half: Any = F.embedding(where, token_half).detach().requires_grad_()
        new = block.step(shifted + context_noise * torch.randn_like(shifted), half)
        loss = oacd_loss(new, centroid_weight) / math.ceil(len(tokens) / batch_size)
        if torch.is_grad_enabled():
            loss.backward()
            half_gradient.index_add_(0, where, half.grad)
        total_loss += loss.item()
        new = new.detach().cpu()
        rate += compute_convergence_rate(new, old, convergence_threshold) * len(old) / len(tokens)
        old.copy_(new)
    if torch.is_grad_enabled():
        token_half.backward(half_gradient)
        if gradient_clip:
            nn.utils.clip_grad_norm_(block.parameters(), gradient_clip)
    return total_loss, rate


@torch.no_grad()
def settled_share(
    block: ContextBlock, table: Tensor, tokens: Tensor, *, iterations: int, noise: float, threshold: float
) -> float:
    """Convergence rate over tokens (N,), weights frozen, in the last of Phase 1's iterations, or of SETTLING_PASSES."""
    frozen = {"context_noise": noise, "centroid_weight": 0.0, "gradient_clip": 0.0, "convergence_threshold": threshold}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same start and noise for every model
        contexts = first_contexts(len(tokens), block.context_dim)
        for _ in range(max(iterations, SETTLING_PASSES)):
            _, rate = oacd_iteration(block, table, tokens, contexts, batch_size=ROWS_AT_A_TIME, **frozen)
    return rate


class ContextCache:
    """The contexts of the last num_positions positions, (B, num_positions, E): position p stands at p % num_positions.

    The last of them is also the state of the recurrence, so nothing else has to be remembered.
    """

    def __init__(self, batch_size: int, num_positions: int, context_dim: int, like: Tensor) -> None:
        self.contexts = like.new_zeros(batch_size, num_positions, context_dim)

    def read(self, positions: Tensor | int) -> Tensor:
        """The contexts (B, ..., E) of positions (...); what was never written, position -1 above all, is zero."""
        return self.contexts[:, positions % self.contexts.size(1)]

    def write(self, contexts: Tensor, start: int) -> None:
        """Store contexts (B, T, E) of the positions from start on, as many of the last as there is room for."""
        kept, end = contexts[:, -self.contexts.size(1) :], start + contexts.size(1)
        positions = torch.arange(end - kept.size(1), end, device=contexts.device)
        self.contexts[:, positions % self.contexts.size(1)] = kept.to(self.contexts.dtype)


class ContextAttention(Attention):
    """Queries from the tokens; keys and values are linear maps of contexts, which stand where a cache would."""

    def __init__(self, config: ContextPythiaConfig) -> None:
        super().__init__()
        C, E = config.hidden_size, config.context_dim
        self.config: Any = config
        self.W_Q = nn.Linear(C, C)
        self.W_K, self.W_V = (nn.Linear(E, C, bias=False) for _ in range(2))
        self.dense = nn.Linear(C, C)


class ContextModel(PythiaModel):
    """What Context-Pythia and Context-KV share: one ContextBlock, which phase 2 leaves as phase 1 has trained it."""

    config: Any
    prepare: Any  # stores contexts in the cache; embeddings (B, T, C) -> h_0, and what attention to contexts is given

    def __init__(self, config: ContextPythiaConfig) -> None:
        super().__init__(config)
        C, E, eps = config.hidden_size, config.context_dim, config.layer_norm_eps
        self.context_block = ContextBlock(C, E, 1, eps, config.init, config.embed_norm)  # with an init of its own
        self.context_blocks = [self.context_block]  # those whose contexts, side by side, the model reads

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """The last contexts, once for all layers that attend to contexts; keys and values for the others."""
        num_positions = min(max_len, getattr(self.config, "window", max_len))
        ring = ContextCache(batch_size, num_positions, self.config.context_dim, like=self.embed_in.weight)
        attentions = self.attentions()
        layers = [ring if isinstance(a, ContextAttention) else a.init_cache(batch_size, max_len) for a in attentions]
        return Cache(layers, max_len)

    def hidden_states(self, idx: Tensor, cache: Cache | None = None, contexts: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> (B, T, C); contexts (B, T, E) of these positions, if they are known already."""
        start, own = (0, [None] * len(self.layers)) if cache is None else (cache.extend(idx.size(1)), cache.layers)
        past = next((entry for entry in own if isinstance(entry, ContextCache)), None)
        embeddings = self.embed_in(idx)
        if contexts is None:
            contexts = self.context_block.recurrence(embeddings, None if past is None else past.read(start - 1))
        h, attended = self.prepare(embeddings, contexts, start, past)
        for block, entry in zip(self.layers, own, strict=True):
            h = block(h, start, attended if isinstance(block.attention, ContextAttention) else entry)
        return self.final_layer_norm(h)

    def convert(self, source: PythiaModel) -> dict[str, Tensor]:
        """A baseline's queries and output projections; keys and values have nothing there to start from."""
        converted = {}
        for layer, attention in enumerate(self.attentions()):
            for part in ("weight", "bias") if isinstance(attention, ContextAttention) else ():
                prefix = f"layers.{layer}.attention"
                converted[f"{prefix}.W_Q.{part}"] = fused_parts(source, layer, part)[0]
                converted[f"{prefix}.dense.{part}"] = source.state_dict()[f"{prefix}.dense.{part}"]
        return converted


# ------------------------------------------------------------------------------------------------- Context-Pythia
class CausalContextAttention(ContextAttention):
    """Causal attention with RoPE to all contexts: expanded for several tokens, absorbed for one."""

    def forward(self, x: Tensor, start: int, contexts: Tensor) -> Tensor:
        """x (B, T, C) of the last T of the P positions whose contexts (B, P, E) are given -> (B, T, C)."""
        positions = torch.arange(start, start + x.size(1), device=x.device)
        q = rotate(split_heads(self.W_Q(x), self.config.num_heads), positions, self.config)  # (B, H, T, D)
        form = self.absorbed if x.size(1) == 1 else self.expanded
        return self.dense(merge_heads(form(q, contexts)))

    def expanded(self, q: Tensor, contexts: Tensor) -> Tensor:
        """Every key and value: k = RoPE(c W_K), v = c W_V. q (B, H, T, D), contexts (B, P, E) -> (B, H, T, D)."""
        contexts = contexts.to(q.dtype)
        k, v = (split_heads(W(contexts), self.config.num_heads) for W in (self.W_K, self.W_V))  # (B, H, P, D)
        return pythia_base.causal_attention(q, rotate(k, torch.arange(k.size(2), device=k.device), self.config), v)

    def absorbed(self, q: Tensor, contexts: Tensor) -> Tensor:
        """The same of one token: where RoPE does not turn, q k^T = (q W_K^T) c^T; of a key R dimensions are rebuilt."""
        (_, H, _, D), P, R = q.shape, contexts.size(1), self.config.rotary_size
        W_K, W_V = self.W_K.weight.view(H, D, -1), self.W_V.weight.view(H, D, -1)  # (H, D, E)
        q, W_turned, turned = q / math.sqrt(D), W_K[:, :R].flatten(0, 1), []  # W_turned (H R, E)
        for begin in range(0, P, REBUILT_KEYS):
            c = contexts[:, begin : begin + REBUILT_KEYS].to(q.dtype)
            k = split_heads(F.linear(c, W_turned), H)  # (B, H, REBUILT_KEYS, R)
            k = rotate(k, torch.arange(begin, begin + c.size(1), device=k.device), self.config)
            turned.append(q[..., :R] @ k.transpose(2, 3))
        out_latent = attend_latents(q[..., R:] @ W_K[:, R:], contexts, torch.cat(turned, dim=-1))  # (B, H, 1, E)
        return out_latent @ W_V.transpose(1, 2)


class ContextPythiaModel(ContextModel):
    """Pythia whose layers all attend to one shared sequence of contexts, and to nothing else of the tokens."""

    def __init__(self, config: ContextPythiaConfig) -> None:
        super().__init__(config)
        self.W_in = nn.Linear(config.context_dim, config.hidden_size, bias=False)
        nn.init.normal_(self.W_in.weight, std=pythia_base.small_init_std(config.hidden_size))

    def make_attention(self, layer: int) -> CausalContextAttention:
        return CausalContextAttention(self.config)

    def prepare(self, h: Tensor, contexts: Tensor, start: int, past: ContextCache | None) -> tuple[Tensor, Tensor]:
        h = self.W_in(contexts)
        if past is not None:
            past.write(contexts, start)
            contexts = past.contexts[:, : start + h.size(1)]  # (B, P, E)
        return h, contexts


# ----------------------------------------------------------------------------------------------------- Context-KV
def to_columns(x: Tensor, num_columns: int) -> Tensor:
    """(B, T, W) -> (B M, rows, W): position t goes to column t % M, M = num_columns, each a sequence of its own."""
    x = F.pad(x, (0, 0, 0, -x.size(1) % num_columns))
    return x.unflatten(1, (-1, num_columns)).transpose(1, 2).flatten(0, 1)


def interval_columns(
    contexts: Tensor, start: int, past: ContextCache | None, config: ContextKVConfig
) -> tuple[Tensor, Tensor]:
    """Contexts (B, T, E) from position start on -> columns (B M, rows, E), and which rows a query sees.

        start - 32   start - 31   ...     J rows of the past, from the cache
        start        start + 1    ...     the rows of this call
        start + 32   start + 33   ...     each column is a causal sequence of its own

    There are M = min(T, interval) columns. The mask is (B M, 1, query rows, rows): no later row, none that is
    max_contexts or more rows back, none before position 0.
    """
    (B, T, _), device = contexts.shape, contexts.device
    M = min(T, config.context_interval)
    J = min(config.max_contexts - 1, (start + M - 1) // config.context_interval)
    rows = torch.arange(-J, -(-T // M), device=device)
    positions = start + config.context_interval * rows[:, None] + torch.arange(M, device=device)  # (rows, M)
    if past is not None:
        contexts = torch.cat([past.read(positions[:J].flatten()), contexts], dim=1)  # (B, J M + T, E)
    age = rows[J:, None] - rows  # (query rows, rows), in intervals
    seen = (age >= 0) & (age < config.max_contexts) & (positions.T[:, None] >= 0)  # (M, query rows, rows)
    return to_columns(contexts, M), seen.repeat(B, 1, 1)[:, None]


class IntervalAttention(ContextAttention):
    """Attention to the contexts at equal intervals; without RoPE, since the contexts carry the order."""

    def forward(self, x: Tensor, start: int, columns: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, T, C), and what interval_columns makes of its contexts -> (B, T, C)."""
        (contexts, seen), (B, T, _), H = columns, x.shape, self.config.num_heads
        q = split_heads(to_columns(self.W_Q(x), len(seen) // B), H)  # (B M, H, query rows, D)
        k, v = (split_heads(W(contexts), H) for W in (self.W_K, self.W_V))  # (B M, H, rows, D)
        out = merge_heads(pythia_base.causal_attention(q, k, v, seen))  # (B M, query rows, C)
        return self.dense(out.unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)[:, :T])


class ContextKVPythiaModel(ContextModel):
    """Pythia with interval attention to shared contexts in the layers named by context_layers."""

    def make_attention(self, layer: int) -> Attention:
        return IntervalAttention(self.config) if layer in self.config.context_layers else super().make_attention(layer)

    def prepare(self, h: Tensor, contexts: Tensor, start: int, past: ContextCache | None) -> tuple[Tensor, Any]:
        columns = interval_columns(contexts, start, past, self.config)
        if past is not None:
            past.write(contexts, start)  # only now: it takes the place of contexts that were still to be read
        return h, columns


if __name__ == "__main__":
    text, quarter = str(__doc__), dict[str, Any](hidden_size=128, num_heads=2, intermediate_size=512)
    pythia, ids = PythiaModel(PythiaConfig(**quarter)), text_ids(text, 2000)[0]
    show(ContextPythiaModel(ContextPythiaConfig(**quarter, context_dim=64)), reference, pythia, text)
    config = ContextKVConfig(**quarter, context_dim=64, context_interval=4, max_contexts=5)
    show(ContextKVPythiaModel(config), reference, pythia, text)
    block: Any = ContextBlock(128, 64, 1, 1e-5, "normal", True)
    contexts = first_contexts(len(ids), 64)
    recipe = {"context_noise": 0.05, "centroid_weight": 0.1, "gradient_clip": 2.0, "convergence_threshold": 0.03}
    for iteration in range(1, 21):
        _, rate = oacd_iteration(block, pythia.embed_in.weight, ids, contexts, batch_size=500, **recipe)
        for weight in block.parameters():  # train.py takes Adam, which imports PyTorch's compiler, for seconds
            weight.data -= 0.003 * weight.grad.sign()
        if iteration in (1, 2, 5, 10, 20):
            rank = effective_rank(contexts)
            say(f"OACD, iteration {iteration}", f"effective rank {rank:.1f} of 64, {rate:.0%} settled")
