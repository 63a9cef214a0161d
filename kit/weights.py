"""Weights from elsewhere: Hugging Face checkpoints in and out, and what a model takes over from another."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kit.files import InputError, make_folder, one_line, replacing

# ------------------------------------------------------------------------------------------ Hugging Face checkpoints


def load_pretrained(name_or_folder: str, model_type: str, class_name: str) -> Any:
    """A model of transformers by hub id or local folder, in float32. Raises InputError if it cannot be had."""
    try:
        import transformers
    except ImportError:
        raise InputError(f"{name_or_folder}: to read Hugging Face weights, pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        found = transformers.AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False).model_type
        if found != model_type:
            raise InputError(f"{name_or_folder} has model_type={found!r}, {model_type!r} is needed")
        model, report = getattr(transformers, class_name).from_pretrained(
            name_or_folder, dtype=torch.float32, output_loading_info=True
        )
    except InputError:
        raise
    except Exception as error:  # of a hub out of reach, a folder without files, zip, pickle and JSON readers
        raise InputError(
            f"{name_or_folder!r} cannot be read as {model_type} ({type(error).__name__}: {one_line(error)[:150]}): "
            "give a folder with config.json and weights, or a hub id where the hub can be reached"
        ) from None
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise InputError(f"{name_or_folder}: the weights do not fit config.json, {wrong[0]} first of {len(wrong)}")
    return model


def read_gpt_neox(name_or_folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of PythiaConfig and the weights of a GPT-NeoX checkpoint. Raises InputError if it is none."""
    model = load_pretrained(name_or_folder, "gpt_neox", "GPTNeoXForCausalLM")
    c, rope = model.config, model.config.rope_parameters
    required = {"hidden_act": "gelu", "use_parallel_residual": True, "tie_word_embeddings": False}
    for key, value in (required | {"attention_bias": True}).items():
        if getattr(c, key) != value:
            raise InputError(f"{name_or_folder} has {key}={getattr(c, key)!r}; Pythia has {value!r}")
    if rope["rope_type"] != "default":
        raise InputError(f"{name_or_folder} has a RoPE of type {rope['rope_type']!r}; Pythia has 'default'")
    shape = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_layers": c.num_hidden_layers,
        "num_heads": c.num_attention_heads,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "layer_norm_eps": c.layer_norm_eps,
        "rotary_pct": rope["partial_rotary_factor"],
        "rotary_base": float(rope["rope_theta"]),
    }
    return shape, {
        name.removeprefix("gpt_neox.").replace("lm_head", "embed_out"): weight
        for name, weight in model.state_dict().items()
    }


def write_gpt_neox(model: Any, folder: Path) -> None:
    """A baseline as config.json, in the spelling that Pythia was released with, and model.safetensors."""
    from safetensors.torch import save

    c = model.config
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "layer_norm_eps": c.layer_norm_eps,
        "rotary_pct": c.rotary_pct,
        "rotary_emb_base": c.rotary_base,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    weights = {k if k.startswith("embed_out") else f"gpt_neox.{k}": v for k, v in model.state_dict().items()}
    make_folder(folder)
    with replacing(folder / "model.safetensors") as file:
        file.write(save(weights, metadata={"format": "pt"}))
    with replacing(folder / "config.json") as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def read_gpt2_table(name_or_folder: str) -> Tensor:
    """The token embedding (V, C) of a GPT-2 checkpoint. Raises InputError if it cannot be had."""
    table: Tensor = load_pretrained(name_or_folder, "gpt2", "GPT2Model").wte.weight.detach()
    return table


# --------------------------------------------------------------------------------- starting from a trained model


def require_known_source(model: Any, source: Any, baseline: type) -> None:
    """Raises ValueError unless a source's weights mean in this model what they mean in the source.

    Names and shapes do not tell: two attentions can lay out a matrix of one name and one shape differently.
    """
    if type(source) not in (type(model), baseline):
        raise ValueError(
            f"the source is a {type(source).__name__}: a {type(model).__name__} can start from the baseline, "
            f"{baseline.__name__}, and from its own class"
        )
    theirs, mine = ({f.name for f in fields(m.config) if f.init} for m in (source, model))
    for name in ("num_heads", "rotary_pct", "rotary_base"):  # no shape shows them
        values = [getattr(m.config, name) for m in (source, model) if name in theirs & mine]
        if len(set(values)) > 1:
            raise ValueError(f"the source has {name}={values[0]}, this model {values[1]}")
    shapes = [tuple(m.embed_in.weight.shape) for m in (source, model)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the source's embedding is {shapes[0]}, this model's {shapes[1]}: pretrained weights need the same "
            "widths (width_divisor = 1)"
        )


def take_over(model: Any, source: Any, converted: dict[str, Tensor]) -> dict[str, str]:
    """Give a model the converted tensors, and a source's own where name, shape and the layer's attention are the same.

    Returns, for each tensor of the model, copied, converted or new.
    """
    theirs, mine = source.state_dict(), model.state_dict()
    attentions = [{n: type(m) for n, m in each.named_modules() if n.endswith(".attention")} for each in (model, source)]
    foreign = tuple(f"{name}." for name, kind in attentions[0].items() if attentions[1].get(name) is not kind)
    copied = {
        name: weight
        for name, weight in theirs.items()
        if name in mine and weight.shape == mine[name].shape and name not in converted and not name.startswith(foreign)
    }
    model.load_state_dict({**mine, **copied, **converted})
    return {k: "copied" if k in copied else "converted" if k in converted else "new" for k in mine}


def bias_free_attention(source: Any, layer: int) -> dict[str, Tensor]:
    """A baseline's attention for a variant without biases: W_Q, W_K, W_V, W_O (C, C) under the names of their tensors.

    Softmax's weights sum to 1, so that the value and output biases add W_O b_V + b_O whatever is attended to: that
    moves into the bias of the parallel MLP. Biases of queries and keys have no place there and are dropped.
    """
    weights, theirs = source.state_dict(), f"layers.{layer}.attention"
    mlp_bias = f"layers.{layer}.mlp.dense_4h_to_h.bias"
    W_Q, W_K, W_V = fused_parts(source, layer, "weight")
    b_V = fused_parts(source, layer, "bias")[2]
    W_O, b_O = weights[f"{theirs}.dense.weight"], weights[f"{theirs}.dense.bias"]
    return {
        f"{theirs}.W_Q.weight": W_Q,
        f"{theirs}.W_K.weight": W_K,
        f"{theirs}.W_V.weight": W_V,
        f"{theirs}.W_O.weight": W_O,
        mlp_bias: weights[mlp_bias] + b_O + W_O @ b_V,
    }


def fused_parts(source: Any, layer: int, part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights or biases of a baseline's queries, keys and values, (C, C) or (C,) each, out of the fused projection."""
    fused = source.state_dict()[f"layers.{layer}.attention.query_key_value.{part}"]  # (H 3 D, C) or (H 3 D)
    q, k, v = (rows.flatten(0, 1) for rows in fused.unflatten(0, (source.config.num_heads, 3, -1)).unbind(1))
    return q, k, v
