"""Pythia-70M: the baseline, and the parts that every variant reuses unchanged.

Pythia (Biderman et al. 2023, arXiv 2304.01373), architecture GPT-NeoX (Black et al. 2022, arXiv 2204.06745):

    tokens --> embed_in --> [ h + attention(ln1(h)) + mlp(ln2(h)) ] x 6 --> final_layer_norm --> embed_out --> logits
                                      |
                              cache: one key and one value per layer and token

Cached: 2 x 512 numbers per layer and token, 6,144 numbers = 24,576 bytes a token in float32.

Letters, for the whole project:
    B rows of a batch      T tokens of this call      P tokens attended to, cached and new (P = T without a cache)
    C hidden_size          H heads                    D head size, C / H
    V vocabulary rows      R rotated share of a head  L latent (kv_dim)     E context_dim     S segment_len
    G memories per head
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

RESIDUAL_OUTPUTS = ("dense", "dense_4h_to_h", "W_O")  # matrices of these names write to the residual stream
LOSS_ROWS = 256  # rows of logits that exist at a time in loss and scores, 51 MB in float32
LOSS_COLUMNS = 8192  # rows of the head's gradient that a chunk is added to at a time, 16 MB that malloc keeps at hand
PREFILL_TOKENS = 512  # a long prompt goes through the cache in chunks of this many tokens


@dataclass(frozen=True)
class PythiaConfig:
    """Shape of a Pythia model; the defaults are Pythia-70M. Raises ValueError where the numbers do not fit together."""

    vocab_size: int = 50304  # rows of the embedding; 50,277 of them are tokens
    hidden_size: int = 512  # width of the residual stream
    num_layers: int = 6  # decoder blocks
    num_heads: int = 8  # attention heads, hidden_size / num_heads wide each
    intermediate_size: int = 2048  # width of the MLP
    max_position_embeddings: int = 2048  # longest window the model is trained and scored on
    layer_norm_eps: float = 1e-5  # epsilon of every LayerNorm
    rotary_pct: float = 0.25  # share of each head that RoPE rotates
    rotary_base: float = 10000.0  # base of the RoPE wavelengths

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_position_embeddings")
        for name in sizes:
            require_positive(self, name)
        for name in ("layer_norm_eps", "rotary_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} has to be above 0 and finite")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")
        if not 0 <= self.rotary_pct <= 1:
            raise ValueError(f"rotary_pct={self.rotary_pct} is not between 0 and 1")
        if self.rotary_size % 2:
            raise ValueError(
                f"rotary_pct={self.rotary_pct} of a head of {self.head_size} is {self.rotary_size} dimensions: "
                "RoPE turns pairs, so it has to be even"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.rotary_pct)


def require_positive(config: object, name: str) -> None:
    """Raises ValueError if a config's field is below 1."""
    if getattr(config, name) < 1:
        raise ValueError(f"{name}={getattr(config, name)} has to be at least 1")


# ------------------------------------------------------------------------------------------------------- the cache


class Cache:
    """What decoding remembers: one entry per layer, allocated once. It alone knows the position.

    An entry is any object whose attributes hold the layer's tensors; entries may be shared between layers, and None
    stands for a layer that remembers nothing.
    """

    def __init__(self, layers: list[Any], max_len: int) -> None:
        self.layers = layers
        self.max_len = max_len
        self.length = 0  # tokens seen

    def extend(self, num_tokens: int) -> int:
        """Claim the next num_tokens positions and return the first of them."""
        if self.length + num_tokens > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, and {self.length + num_tokens} are asked of it")
        start, self.length = self.length, self.length + num_tokens
        return start

    def tensors(self) -> list[Tensor]:
        """Every tensor of the cache, shared ones once."""
        found = (value for entry in self.layers if entry is not None for value in vars(entry).values())
        return list({id(value): value for value in found if isinstance(value, Tensor)}.values())

    @property
    def nbytes(self) -> int:
        """Bytes really allocated, the sum over the cache's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())


class KeyValueCache:
    """One layer's keys and values, each (B, H, max_len, D)."""

    def __init__(self, batch_size: int, max_len: int, config: PythiaConfig, like: Tensor) -> None:
        shape = (batch_size, config.num_heads, max_len, config.head_size)
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)

    def append(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, D) at position start; returns all keys and values so far, (B, H, P, D)."""
        end = start + k.size(2)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


# ------------------------------------------------------------------------------------------------ parts of the block


class RotaryEmbedding(nn.Module):
    """RoPE (Su et al. 2021, arXiv 2104.09864) on the first R dimensions of a head, in halves as GPT-NeoX pairs them.

    The frequencies are no buffer: model.bfloat16() would round them.
    """

    def __init__(self, config: PythiaConfig) -> None:
        super().__init__()
        self.R, self.base = config.rotary_size, config.rotary_base

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Rotate x (B, H, T, D), whose first token stands at position start."""
        positions = torch.arange(start, start + x.size(-2), device=x.device, dtype=torch.float32)
        wavelengths = self.base ** (torch.arange(0, self.R, 2, device=x.device, dtype=torch.float32) / max(self.R, 1))
        angles = positions[:, None] * (1 / wavelengths)  # (T, R/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        x1, x2, rest = x.split([self.R // 2, self.R // 2, x.size(-1) - self.R], dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D): the T queries are the last of the P positions of k and v."""
    T, P = q.size(-2), k.size(-2)
    if T == P:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = None if T == 1 else torch.ones(T, P, dtype=torch.bool, device=q.device).tril(P - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H * D)"""
    return x.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """Causal self-attention with RoPE; the fused projection is laid out per head as (q, k, v), as in GPT-NeoX."""

    def __init__(self, config: PythiaConfig) -> None:
        super().__init__()
        self.config = config
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config)

    def init_cache(self, batch_size: int, max_len: int) -> KeyValueCache:
        return KeyValueCache(batch_size, max_len, self.config, like=self.dense.weight)

    def forward(self, x: Tensor, start: int, cache: KeyValueCache | None) -> Tensor:
        """x (B, T, C), its first token at position start -> (B, T, C)."""
        q, k, v = split_heads(self.query_key_value(x), self.config.num_heads).chunk(3, dim=-1)  # (B, H, T, D) each
        q, k = self.rotary(q, start), self.rotary(k, start)
        if cache is not None:
            k, v = cache.append(k, v, start)
        return self.dense(merge_heads(causal_attention(q, k.to(q.dtype), v.to(q.dtype))))


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: PythiaConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Block(nn.Module):
    """One decoder layer, h + attention(ln1(h)) + mlp(ln2(h)). The variants swap the attention."""

    def __init__(self, config: PythiaConfig, attention: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = attention
        self.mlp = MLP(config)

    def forward(self, h: Tensor, *attention_inputs: Any) -> Tensor:
        """h (B, T, C) -> (B, T, C); attention_inputs go to the attention as they are."""
        attended = self.attention(self.input_layernorm(h), *attention_inputs)
        return h + attended + self.mlp(self.post_attention_layernorm(h))


# --------------------------------------------------------------------------------------------------- head and loss


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in float32 of logits (..., V) against targets (...), -100 left out; 0 if that leaves none."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


class HeadLoss(torch.autograd.Function):
    """next_token_loss(h W^T, targets) without ever holding the (N, V) logits: LOSS_ROWS rows at a time.

    With p = softmax(h W^T) and y the one-hot targets, the gradient of a row's loss for its logits is p - y, so each
    chunk yields its share of dh = (p - y) W and dW = (p - y)^T h while its logits are at hand; backward only scales.
    A frozen W gets no dW.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """h (N, C), weight (V, C), targets (N,) -> scalar loss in float32; the products are in the dtype of h."""
        kept = (targets != -100)[:, None]
        targets = targets.masked_fill(targets == -100, 0)[:, None]
        dh, W = torch.empty_like(h), weight.to(h.dtype)
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=h.device)
        # on a CPU, memory that is new costs more than what is done with it: one chunk's is used for all
        logits = h.new_empty(min(len(h), LOSS_ROWS), len(weight))
        p = torch.empty_like(logits, dtype=torch.float32)
        for i in range(0, len(h), LOSS_ROWS):
            rows, y, keep = h[i : i + LOSS_ROWS], targets[i : i + LOSS_ROWS], kept[i : i + LOSS_ROWS]
            logits, p = logits[: len(rows)], p[: len(rows)]  # the last chunk may be shorter
            p.copy_(torch.mm(rows, W.T, out=logits))
            torch.log_softmax(p, dim=-1, out=p)
            total -= (p.gather(1, y) * keep).sum()
            p.exp_()
            grad = logits.copy_(p.scatter_add_(1, y, torch.full_like(y, -1, dtype=torch.float32)))  # p - y
            torch.mul(grad @ W, keep, out=dh[i : i + LOSS_ROWS])
            if dw is not None:
                rows = rows * keep
                for part, columns in zip(dw.split(LOSS_COLUMNS), grad.split(LOSS_COLUMNS, dim=1), strict=True):
                    part += columns.T @ rows
        ctx.count = kept.sum().clamp(min=1)
        ctx.save_for_backward(dh, None if dw is None else dw.to(weight.dtype))
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dh, dw = ctx.saved_tensors
        scale = grad_output / ctx.count
        return dh.mul_(scale), None if dw is None else dw.mul_(scale), None


def score_tokens(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats of every token, and whether the arg-max is right: (B, T) float32 and bool, for h (B, T, C)."""
    losses, right = [], []
    for rows, y in zip(h.flatten(0, 1).split(LOSS_ROWS), targets.flatten().split(LOSS_ROWS), strict=True):
        logits = (rows @ weight.T).float()  # (LOSS_ROWS, V)
        losses.append(F.cross_entropy(logits, y, reduction="none", ignore_index=-100))
        right.append(logits.argmax(dim=-1) == y)
    return torch.cat(losses).view_as(targets), torch.cat(right).view_as(targets)


def safe_exp(loss: float) -> float:
    """PPL of a mean loss; infinite where exp would fail."""
    return math.exp(loss) if loss < 700 else math.inf


def head_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """next_token_loss of the head's logits for h (B, T, C), in the dtype of autocast where that is on."""
    device_type = h.device.type
    if torch.is_autocast_enabled(device_type):
        h = h.to(torch.get_autocast_dtype(device_type))
    if not torch.is_grad_enabled():
        return score_tokens(h, weight.to(h.dtype), targets)[0].sum() / (targets != -100).sum().clamp(min=1)
    return HeadLoss.apply(h.flatten(0, 1), weight, targets.flatten())


def logits_and_loss(
    h: Tensor, weight: Tensor, targets: Tensor | None, return_logits: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What forward returns, from the hidden states h (B, T, C) and the head's weight (V, C)."""
    if targets is not None and not return_logits:
        return None, head_loss(h, weight, targets)
    logits = F.linear(h, weight)
    return logits, None if targets is None else next_token_loss(logits, targets)


# -------------------------------------------------------------------------------------------------------- the model


def small_init_std(hidden_size: int) -> float:
    """sqrt(2 / (5 C)), 0.0280 at C = 512 (Nguyen and Salazar 2019, arXiv 1910.05895)."""
    return math.sqrt(2 / (5 * hidden_size))


def wang_init_std(num_layers: int, hidden_size: int) -> float:
    """2 / (layers sqrt(C)), 0.0147 for six layers and C = 512 (Wang's, in GPT-NeoX-20B, arXiv 2204.06745)."""
    return 2 / (num_layers * math.sqrt(hidden_size))


class PythiaModel(nn.Module):
    """Pythia, with the parameter names of Hugging Face's GPT-NeoX. A variant overrides make_attention, or more."""

    def __init__(self, config: PythiaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, self.make_attention(i)) for i in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    def make_attention(self, layer: int) -> nn.Module:
        """The attention of one layer: a module with forward(x, start, cache) and init_cache(batch_size, max_len)."""
        return Attention(self.config)

    def init_weights(self) -> None:
        """Pythia's own: wang_init for the matrices that write to the residual stream, small_init for all others.

        Raises ValueError if a layer's attention has no matrix under one of the names RESIDUAL_OUTPUTS.
        """
        c = self.config
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.rpartition(".")[2] in RESIDUAL_OUTPUTS
                std = wang_init_std(c.num_layers, c.hidden_size) if writes else small_init_std(c.hidden_size)
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer, attention in enumerate(self.attentions()):
            if not {name for name, _ in attention.named_modules()} & set(RESIDUAL_OUTPUTS):
                names = " or ".join(RESIDUAL_OUTPUTS)
                raise ValueError(
                    f"layer {layer}: the matrix that writes to the residual stream has to be called {names}"
                )

    def hidden_states(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, C); with a cache, idx continues what the cache has seen."""
        start = 0 if cache is None else cache.extend(idx.size(1))
        h = self.embed_in(idx)
        for layer, block in enumerate(self.layers):
            h = block(h, start, None if cache is None else cache.layers[layer])
        return self.final_layer_norm(h)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        return_logits: bool = True,
        **inputs: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) -> logits (B, T, V), and the mean cross entropy if there are targets (B, T), -100 left out.

        return_logits=False (training) returns None for the logits, and never holds them. What else a variant's
        hidden_states reads, such as contexts, is passed on to it.
        """
        return logits_and_loss(self.hidden_states(idx, cache, **inputs), self.head_weight, targets, return_logits)

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, C) that turns hidden states into logits."""
        return self.embed_out.weight

    def attentions(self) -> list[Any]:
        """The attention module of every layer."""
        return [block.attention for block in self.layers]

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """An empty cache for batch_size rows of at most max_len tokens, in the dtype and on the device of the model."""
        return Cache([attention.init_cache(batch_size, max_len) for attention in self.attentions()], max_len)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float, top_k: int | None = None) -> Tensor:
        """Continue the prompts idx (B, T) -> (B, T + max_new_tokens); temperature 0 is greedy."""
        cache = self.init_cache(idx.size(0), idx.size(1) + max_new_tokens)
        return torch.cat([idx, *stream_tokens(self, idx, cache, max_new_tokens, temperature, top_k)], dim=1)

    def start_from(self, source: "PythiaModel") -> dict[str, str]:
        """Take over what a trained model shares with this one; returns, for each tensor, copied, converted or new.

        The source is the baseline or of this model's own class. Raises ValueError if it is neither, or of other widths,
        heads or rotations.
        """
        require_known_source(self, source)
        return take_over(self, source, self.convert(source) if type(source) is PythiaModel else {})

    def convert(self, source: "PythiaModel") -> dict[str, Tensor]:
        """Tensors of this model that are computed from a source's; a variant says which."""
        return {}

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> "PythiaModel":
        """Read a Hugging Face GPT-NeoX checkpoint: a hub id such as EleutherAI/pythia-70m, or a local folder.

        Raises FileNotFoundError if there is no such checkpoint, ValueError if it is another architecture.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
            folder = download_checkpoint(name_or_folder)
        config_file = folder / "config.json"
        try:
            config = config_from_huggingface(json.loads(config_file.read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{config_file} cannot be used ({type(error).__name__}: {error})") from None
        model = cls(config)
        state = {k.removeprefix("gpt_neox."): v for k, v in read_weights(folder).items()}
        state = {k: v for k, v in state.items() if not k.endswith(HUGGINGFACE_BUFFERS)}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{folder} does not fit its config.json: {' '.join(str(error).split())[:300]}") from None
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors so that transformers' AutoModelForCausalLM loads them."""
        from safetensors.torch import save_file

        if type(self) is not PythiaModel:
            raise TypeError(f"{type(self).__name__} is not GPT-NeoX: its layout has no place for what the variant adds")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config_to_huggingface(self.config), indent=2) + "\n")
        state = {k if k.startswith("embed_out") else f"gpt_neox.{k}": v for k, v in self.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# --------------------------------------------------------------------------------- starting from a trained model


def require_known_source(model: Any, source: Any) -> None:
    """Raises ValueError unless a source's weights mean in this model what they mean in the source.

    Names and shapes do not tell: two attentions can lay out a matrix of one name and one shape differently.
    """
    if type(source) not in (type(model), PythiaModel):
        raise ValueError(
            f"the source is a {type(source).__name__}: a {type(model).__name__} can start from the baseline, "
            "PythiaModel, and from its own class"
        )
    for name in ("num_heads", "rotary_pct", "rotary_base"):  # no shape shows them
        settable = {f.name for f in fields(model.config) if f.init} & {f.name for f in fields(source.config) if f.init}
        theirs, mine = getattr(source.config, name, None), getattr(model.config, name, None)
        if name in settable and theirs != mine:
            raise ValueError(f"the source has {name}={theirs}, this model {mine}")
    theirs, mine = tuple(source.embed_in.weight.shape), tuple(model.embed_in.weight.shape)
    if theirs != mine:
        raise ValueError(
            f"the source's embedding is {theirs}, this model's {mine}: pretrained weights need the same widths "
            "(width_divisor = 1)"
        )


def take_over(model: nn.Module, source: nn.Module, converted: dict[str, Tensor]) -> dict[str, str]:
    """Give a model the converted tensors, and a source's own where name, shape and the layer's attention are the same.

    Returns, for each tensor of the model, copied, converted or new.
    """
    theirs, mine = source.state_dict(), model.state_dict()
    layers = [dict(m.named_modules()) for m in (model, source)]
    foreign = tuple(
        f"{name}."
        for name in layers[0]
        if name.endswith(".attention") and type(layers[0][name]) is not type(layers[1].get(name))
    )
    copied = {
        k: v
        for k, v in theirs.items()
        if k not in converted and not k.startswith(foreign) and k in mine and v.shape == mine[k].shape
    }
    model.load_state_dict({**mine, **copied, **converted})
    return {k: "copied" if k in copied else "converted" if k in converted else "new" for k in mine}


def bias_free_attention(source: PythiaModel, layer: int) -> dict[str, Tensor]:
    """A baseline's attention for a variant without biases: W_Q, W_K, W_V, W_O (C, C) under the names of their tensors.

    Softmax's weights sum to 1, so that the value and output biases add W_O b_V + b_O whatever is attended to: that
    moves into the bias of the parallel MLP. Biases of queries and keys have no place there and are dropped. Empty if
    the source's layer is not the baseline's.
    """
    weights, theirs = source.state_dict(), f"layers.{layer}.attention"
    mlp_bias = f"layers.{layer}.mlp.dense_4h_to_h.bias"
    if f"{theirs}.query_key_value.weight" not in weights:
        return {}
    heads = (source.config.num_heads, 3, -1)
    W_Q, W_K, W_V = weights[f"{theirs}.query_key_value.weight"].unflatten(0, heads).unbind(1)  # (H, D, C) each
    b_V = weights[f"{theirs}.query_key_value.bias"].unflatten(0, heads)[:, 2].flatten()
    W_O, b_O = weights[f"{theirs}.dense.weight"], weights[f"{theirs}.dense.bias"]
    return {
        f"{theirs}.W_Q.weight": W_Q.flatten(0, 1),
        f"{theirs}.W_K.weight": W_K.flatten(0, 1),
        f"{theirs}.W_V.weight": W_V.flatten(0, 1),
        f"{theirs}.W_O.weight": W_O,
        mlp_bias: weights[mlp_bias] + b_O + W_O @ b_V,
    }


# ------------------------------------------------------------------------------------------- generation, optimizer


@torch.no_grad()
def stream_tokens(
    model: Any,
    idx: Tensor,
    cache: Cache,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    num_tokens: int | None = None,
    step: Any = None,
) -> Iterator[Tensor]:
    """Yield max_new_tokens tokens (B, 1) after the prompt idx (B, T), each as soon as it is drawn.

    Ids from num_tokens on are padding rows of the vocabulary and are never drawn. step takes the model's place after
    the prompt: compile_step(model). Raises ValueError on an empty prompt.
    """
    step = step or model
    if idx.size(1) == 0:
        raise ValueError("an empty prompt has no next token: start with the end-of-text token")
    for chunk in idx.split(PREFILL_TOKENS, dim=1):
        logits, _ = model(chunk, cache=cache)
    for remaining in reversed(range(max_new_tokens)):
        token = draw_token(logits[:, -1, :num_tokens], temperature, top_k)
        yield token
        if remaining:
            logits, _ = step(token, cache=cache)


def input_major(model: nn.Module) -> None:
    """Lay every matrix out as (in, out) in memory, its values and its shape as they are.

    A CPU decodes one row up to twice as fast in float32 from it: the product of a vector then adds up rows of memory.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.T.contiguous().T


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, whose product with one row x is written as a sum: compiled, that reads W as fast as memory gives it.

    A library's matrix product is made for many rows.
    """
    if x.numel() > x.size(-1):
        return F.linear(x, weight, bias)
    y = (weight.float() * x.flatten().float()).sum(dim=-1)
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], -1)


class RowLinear(nn.Linear):
    """A Linear of a model that decodes compiled."""

    def forward(self, x: Tensor) -> Tensor:
        return row_linear(x, self.weight, self.bias)


def compile_step(model: Any) -> Any:
    """model(token, cache=cache) for the tokens (B, 1) after a prompt, compiled: some 30 s at the first ones.

    The position is a symbol in it, so that all tokens run one program. Infini's layer 0 stays outside of it.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear

    def step(token: Tensor, cache: Cache) -> tuple[Tensor, None]:
        return row_linear(model.hidden_states(token, cache), model.head_weight), None

    # what a row product reads is computed before it, and not again for each of its sums
    return torch.compile(step, dynamic=True, options={"realize_reads_threshold": 0, "realize_opcount_threshold": 0})


def draw_token(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """One token (B, 1) from logits (B, V): the arg-max at temperature 0, else from the top_k largest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth_largest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over what is trained: matrices and embeddings decay, biases, LayerNorms and scores of any shape do not."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


# ------------------------------------------------------------------------------------- Hugging Face's file layout

HUGGINGFACE_BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")  # in older checkpoints


def download_checkpoint(hub_id: str) -> Path:
    """Fetch config and weights of a hub id, or find them in the hub's cache; returns the folder."""
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*patterns, "pytorch_model*.bin*"]))
    except Exception as error:  # the hub's client raises many types; each means that the weights cannot be had
        raise FileNotFoundError(
            f"{hub_id!r} is no local folder and could not be had from the hub ({type(error).__name__}): "
            "give a folder with config.json and model.safetensors or pytorch_model.bin"
        ) from None
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder in float32, whole or in shards, safetensors before pickles."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            safe = file.suffix == ".safetensors"
            tensors = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
            state |= {name: tensor.float() for name, tensor in tensors.items()}
        except Exception as error:  # safetensors, zip and pickle readers each have errors of their own
            raise ValueError(f"{file} cannot be read ({type(error).__name__}): truncated, or no weight file") from None
    return state


def config_from_huggingface(config: dict[str, Any]) -> PythiaConfig:
    """GPT-NeoX's config.json -> PythiaConfig. Raises ValueError where it asks for what Pythia does not have."""
    required = {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "attention_bias": True,
    }
    for key, value in required.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json has {key}={config[key]!r}; Pythia has {value!r}")
    rope = config.get("rope_parameters") or {}  # transformers 5; before, the two stood at the top level
    scaling = config.get("rope_scaling") or rope
    if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
        raise ValueError(f"config.json has a RoPE of type {kind!r}; Pythia has 'default'")
    return PythiaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        layer_norm_eps=config["layer_norm_eps"],
        rotary_pct=rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25)),
        rotary_base=float(rope.get("rope_theta", config.get("rotary_emb_base", 10000))),
    )


def config_to_huggingface(config: PythiaConfig) -> dict[str, Any]:
    """PythiaConfig -> the config.json that EleutherAI released Pythia with."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.layer_norm_eps,
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": config.rotary_base,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
