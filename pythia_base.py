"""Pythia-70M: the baseline, and the parts that every variant reuses unchanged. The first file to read.

Pythia (Biderman et al. 2023, arXiv 2304.01373), architecture GPT-NeoX (Black et al. 2022, arXiv 2204.06745):

    tokens --> embed_in --> [ h + attention(ln1(h)) + mlp(ln2(h)) ] x 6 --> final_layer_norm --> embed_out --> logits
                                      |
                              cache: one key and one value per layer and token

    q, k, v  = x W_QKV + b                              per head of D = 64
    q_i, k_j = RoPE(q_i, i), RoPE(k_j, j)               the first R = 16 dimensions of a head turn with the position
    a_i      = softmax_j(q_i k_j / sqrt(D)) v_j         over j <= i
    mlp(x)   = GELU(x W_1 + b_1) W_2 + b_2

Cached: 2 x 512 numbers per layer and token, 6,144 numbers = 24,576 bytes a token in float32.

Letters, for the whole project:
    B rows of a batch      T tokens of this call      P tokens attended to, cached and new (P = T without a cache)
    C hidden_size          H heads                    D head size, C / H
    V vocabulary rows      R rotated dimensions       L latent (kv_dim)     E context_dim     S segment_len
    G memories per head
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kit.fast import attend, gelu, has_kernels, head_loss, row_linear
from kit.show import show
from kit.weights import read_gpt_neox, require_known_source, take_over, write_gpt_neox, write_variant

RESIDUAL_OUTPUTS = (".dense", ".dense_4h_to_h", ".W_O")  # what writes to the residual stream, and starts accordingly
PREFILL_TOKENS = 2048  # a long prompt goes through the cache in chunks of this many tokens


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
        check_numbers(self)
        for name in ("layer_norm_eps", "rotary_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be above 0")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}")
        R, D = self.rotary_size, self.head_size
        if R % 2 or R > D:
            raise ValueError(f"rotary_pct={self.rotary_pct} is {R} of {D} dimensions: that has to be even, at most {D}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.rotary_pct)


def check_numbers(config: Any) -> None:
    """Raises ValueError unless a config's counts and widths are at least 1, its other numbers 0 or more and finite."""
    for name, hint in get_type_hints(type(config)).items():
        value, least = getattr(config, name), {int: 1, float: 0}.get(hint)
        if least is not None and not least <= value < math.inf:
            raise ValueError(f"{name}={value} has to be at least {least} and finite")


def frequencies(config: PythiaConfig, device: torch.device | None = None) -> Tensor:
    """The angles base^(-2r/R) by which RoPE turns the pairs of a head's dimensions per position, (R/2,) in float32."""
    R = config.rotary_size
    return 1 / config.rotary_base ** (torch.arange(0, R, 2, device=device, dtype=torch.float32) / max(R, 1))


kept_frequencies = functools.cache(frequencies)  # of a CPU: in decoding they would take as long as the turning


def rotate(x: Tensor, positions: Tensor, config: PythiaConfig) -> Tensor:
    """RoPE (Su et al. 2021, arXiv 2104.09864) of x (B, H, T, D) at positions (T,), in halves as GPT-NeoX pairs them.

    Dimensions r and r + R/2 turn by the angle position / base^(2r/R). The angles are float32 in a bfloat16 model too.
    """
    if has_kernels(x):  # the fast form
        return torch.ops.decode.rotate.default(x, positions, kept_frequencies(config))
    angles = positions[:, None].float() * frequencies(config, x.device)  # (T, R/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    R = config.rotary_size
    x1, x2, rest = x.split([R // 2, R // 2, x.size(-1) - R], dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D): the T queries are the last of the P positions of k and v.

    mask, of a shape that broadcasts to (B, H, T, P): True where a query sees a key; without it every query sees the
    keys up to its own. scale, if it is given, takes the place of 1 / sqrt(D).
    """
    T, P = q.size(-2), k.size(-2)
    if mask is None and T == 1 and has_kernels(q):  # the fast form
        return attend(q, k, v, scale or 1 / math.sqrt(q.size(-1)))
    k, v = k.to(q.dtype), v.to(q.dtype)
    if mask is None and T == P:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if mask is None and T > 1:
        mask = torch.ones(T, P, dtype=torch.bool, device=q.device).tril(P - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, H * D) -> (B, H, T, D)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H * D)"""
    return x.transpose(1, 2).flatten(-2)


class Attention(nn.Module):
    """What a Block asks of its attention; a variant derives from it, with a cache of any kind. See RESIDUAL_OUTPUTS."""

    def init_cache(self, batch_size: int, max_len: int) -> Any:
        """What this layer remembers, allocated once: any object whose attributes hold its tensors, or None."""

    def forward(self, x: Tensor, start: int, cache: Any) -> Tensor:
        """x (B, T, C), its first token at position start, what came before it in the cache -> (B, T, C)."""
        raise NotImplementedError


class KeyValueCache:
    """One layer's keys and values, each (B, H, max_len, D)."""

    def __init__(self, batch_size: int, num_heads: int, max_len: int, head_size: int, like: Tensor) -> None:
        self.k = like.new_zeros(batch_size, num_heads, max_len, head_size)
        self.v = torch.zeros_like(self.k)

    def append(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, D) at position start; returns all keys and values so far, (B, H, P, D)."""
        end = start + k.size(2)
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v
        return self.k[:, :, :end], self.v[:, :, :end]


class SelfAttention(Attention):
    """Causal self-attention with RoPE; the fused projection is laid out per head as (q, k, v), as in GPT-NeoX."""

    def __init__(self, config: PythiaConfig) -> None:
        super().__init__()
        self.config = config
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def init_cache(self, batch_size: int, max_len: int) -> KeyValueCache:
        c = self.config
        return KeyValueCache(batch_size, c.num_heads, max_len, c.head_size, like=self.dense.weight)

    def forward(self, x: Tensor, start: int, cache: KeyValueCache | None) -> Tensor:
        q, k, v = split_heads(self.query_key_value(x), self.config.num_heads).chunk(3, dim=-1)  # (B, H, T, D) each
        positions = torch.arange(start, start + x.size(1), device=x.device)
        q, k = rotate(q, positions, self.config), rotate(k, positions, self.config)
        if cache is not None:
            k, v = cache.append(k, v, start)  # (B, H, P, D) each
        return self.dense(merge_heads(causal_attention(q, k, v)))


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: PythiaConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(x)))


class Block(nn.Module):
    """One decoder layer, h + attention(ln1(h)) + mlp(ln2(h)). The variants swap the attention."""

    def __init__(self, config: PythiaConfig, attention: Attention) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = attention
        self.mlp = MLP(config)

    def forward(self, h: Tensor, start: int, cache: Any) -> Tensor:
        return h + self.attention(self.input_layernorm(h), start, cache) + self.mlp(self.post_attention_layernorm(h))


class Cache:
    """What decoding remembers, an entry per layer (layers may share one). It alone knows the position."""

    def __init__(self, layers: list[Any], max_len: int) -> None:
        self.layers, self.max_len, self.length = layers, max_len, 0  # length: tokens seen

    def extend(self, num_tokens: int) -> int:
        """Claim the next num_tokens positions and return the first of them."""
        if self.length + num_tokens > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, and {self.length + num_tokens} are asked of it")
        start, self.length = self.length, self.length + num_tokens
        return start

    def tensors(self) -> list[Tensor]:
        entries = {id(entry): entry for entry in self.layers if entry is not None}.values()  # shared ones once
        return [value for entry in entries for value in vars(entry).values() if isinstance(value, Tensor)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


class LanguageModel(nn.Module):
    """What every model offers, from its embed_in, hidden_states and init_cache."""

    embed_out: nn.Linear
    hidden_states: Any
    init_cache: Any

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, C) that turns hidden states into logits."""
        return self.embed_out.weight

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, **inputs: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) -> logits (B, T, V) and None; with targets (B, T), -100 left out, None and their mean loss.

        The logits of a loss are never held (kit/fast.py). inputs are what else hidden_states reads, such as contexts.
        """
        h = self.hidden_states(idx, cache, **inputs)
        if targets is None:
            return row_linear(h, self.head_weight), None
        return None, head_loss(h, self.head_weight, targets)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float, top_k: int | None = None) -> Tensor:
        """Continue the prompts idx (B, T) -> (B, T + max_new_tokens); temperature 0 is greedy."""
        cache = self.init_cache(idx.size(0), idx.size(1) + max_new_tokens)
        return torch.cat([idx, *stream_tokens(self, idx, cache, max_new_tokens, temperature, top_k)], dim=1)

    def start_from(self, source: Any) -> dict[str, str]:
        """Take over what the baseline or a model of this class shares -> copied, converted or new, for each tensor."""
        require_known_source(self, source, baseline=PythiaModel)
        return take_over(self, source, self.convert(source) if type(source) is PythiaModel else {})

    def convert(self, source: "PythiaModel") -> dict[str, Tensor]:
        """Tensors of this model that are computed from a baseline's; a variant says which."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that transformers' AutoModelForCausalLM loads; a variant's holds its code as well."""
        (write_gpt_neox if type(self) is PythiaModel else write_variant)(self, Path(folder))


class PythiaModel(LanguageModel):
    """Pythia, with the parameter names of Hugging Face's GPT-NeoX. A variant overrides make_attention, or more."""

    def __init__(self, config: PythiaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList(Block(config, self.make_attention(i)) for i in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    def make_attention(self, layer: int) -> Attention:
        return SelfAttention(self.config)

    def attentions(self) -> list[Any]:
        return [block.attention for block in self.layers]

    def init_weights(self) -> None:
        """Pythia's own: wang_init for the matrices that write to the residual stream, small_init for all others."""
        C, num_layers = self.config.hidden_size, self.config.num_layers
        wang_init_std = 2 / (num_layers * math.sqrt(C))  # 0.0147 at C = 512 (Wang and Komatsuzaki 2021, GPT-J)
        for layer, attention in enumerate(self.attentions()):
            if not any(f".{name}".endswith(RESIDUAL_OUTPUTS) for name, _ in attention.named_modules()):
                raise ValueError(f"layer {layer}: what writes to the residual stream has to be called dense or W_O")
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_output = name.endswith(RESIDUAL_OUTPUTS)
                nn.init.normal_(module.weight, std=wang_init_std if is_output else small_init_std(C))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden_states(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, C); with a cache, idx continues what the cache has seen."""
        start = 0 if cache is None else cache.extend(idx.size(1))
        h = self.embed_in(idx)
        for layer, block in enumerate(self.layers):
            h = block(h, start, None if cache is None else cache.layers[layer])
        return self.final_layer_norm(h)

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """An empty cache for batch_size rows of at most max_len tokens, in the dtype and on the device of the model."""
        return Cache([attention.init_cache(batch_size, max_len) for attention in self.attentions()], max_len)

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> Self:
        """A Hugging Face GPT-NeoX by hub id, EleutherAI/pythia-70m, or folder. Raises InputError if it is none."""
        shape, weights = read_gpt_neox(name_or_folder)
        model = cls(PythiaConfig(**shape))
        model.load_state_dict(weights)
        return model


def small_init_std(hidden_size: int) -> float:
    """sqrt(2 / (5 C)), 0.0280 at C = 512 (Nguyen and Salazar 2019, arXiv 1910.05895)."""
    return math.sqrt(2 / (5 * hidden_size))


@torch.no_grad()
def stream_tokens(
    model: Any, idx: Tensor, cache: Cache, max_new_tokens: int, temperature: float, top_k: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield max_new_tokens tokens (B, 1) after the prompt idx (B, T), each as soon as it is drawn.

    Ids from num_tokens on, padding of the vocabulary, are never drawn.
    """
    if idx.size(1) == 0:
        raise ValueError("an empty prompt has no next token: start with the end-of-text token")
    for chunk in idx.split(PREFILL_TOKENS, dim=1):
        h = model.hidden_states(chunk, cache)
    for remaining in reversed(range(max_new_tokens)):
        logits = row_linear(h[:, -1], model.head_weight)  # of the last token alone
        yield (token := draw_token(logits[:, :num_tokens], temperature, top_k))
        if remaining:
            h = model.hidden_states(token, cache)


def draw_token(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """One token (B, 1) from logits (B, V): the arg-max at temperature 0, else from the top_k largest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth_largest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1)


# ------------------------------------------------------------------- the equations once more, as plain float64 loops
def reference_attention(attention: SelfAttention, x: Tensor) -> Tensor:
    """x (T, C) -> (T, C), head by head and query by query."""
    c, D = attention.config, attention.config.head_size
    qkv = x @ attention.query_key_value.weight.T + attention.query_key_value.bias  # (T, H 3 D)
    heads = []
    for h in range(c.num_heads):
        q, k, v = qkv[:, 3 * D * h : 3 * D * (h + 1)].split(D, dim=-1)  # (T, D) each
        q, k = (torch.stack([reference_rope(y[t], t, c) for t in range(len(x))]) for y in (q, k))
        heads.append([(k[: i + 1] @ q[i] / math.sqrt(D)).softmax(0) @ v[: i + 1] for i in range(len(x))])
    return torch.cat([torch.stack(head) for head in heads], dim=-1) @ attention.dense.weight.T + attention.dense.bias


def reference_rope(x: Tensor, position: int, config: PythiaConfig) -> Tensor:
    """One token's vector of one head, x (D,) -> (D,): each pair, as a complex number, turned by its angle."""
    R = config.rotary_size
    angles = [position / config.rotary_base ** (2 * r / R) for r in range(R // 2)]
    turns = (1j * torch.tensor(angles, dtype=torch.float64)).exp()
    pairs = torch.complex(x[: R // 2], x[R // 2 : R]) * turns
    return torch.cat([pairs.real, pairs.imag, x[R:]])


def reference_layers(model: PythiaModel, h: Tensor, attend: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """What the first layer reads, h (T, C) -> logits (T, V)."""
    for block in model.layers:
        h = h + attend(block.attention, block.input_layernorm(h)) + block.mlp(block.post_attention_layernorm(h))
    return model.final_layer_norm(h) @ model.head_weight.T


def reference(model: PythiaModel, idx: Tensor, attend: Callable[[Any, Tensor], Tensor] = reference_attention) -> Tensor:
    """What the model has to give: idx (B, T) -> logits (B, T, V) in float64. A variant passes its own attend."""
    model = in_float64(model)
    return torch.stack([reference_layers(model, h, attend) for h in model.embed_in.weight[idx]])


def in_float64(model: Any) -> Any:
    """The model if it is in float64 already, so that gradients reach it; else a copy."""
    return model if model.head_weight.dtype == torch.float64 else copy.deepcopy(model).double()


if __name__ == "__main__":
    model = PythiaModel(PythiaConfig())
    show(model, reference, model, str(__doc__))
