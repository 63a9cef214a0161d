"""Weights from elsewhere: Hugging Face checkpoints in and out, and what a model takes over from another."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kit.files import InputError, refusing

SAME = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "layer_norm_eps")
# fields of PythiaConfig -> their names in the config.json of GPT-NeoX as Pythia was released
SHAPE = {name: name for name in SAME} | {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
PYTHIA = {"hidden_act": "gelu", "use_parallel_residual": True, "tie_word_embeddings": False, "attention_bias": True}
KIT = Path(__file__).parent
OWN_IMPORT = re.compile(r"^(from|import) (kit\.)?(\w+)(.*)$", re.MULTILINE)


def settable(config: Any) -> list[str]:
    """The fields of a dataclass, or of an instance, that can be set."""
    return [f.name for f in fields(config) if f.init]


def model_args(config: Any) -> dict[str, Any]:
    """A model config as plain values, from which its class builds it again."""
    return {name: getattr(config, name) for name in settable(config)}


def load_pretrained(name_or_folder: str, model_type: str, class_name: str) -> Any:
    """A model of transformers by hub id or local folder, in float32. Raises InputError if it cannot be had."""
    with refusing(f"{name_or_folder} cannot be read", "pip install transformers", ImportError):
        import transformers
    if not (version := transformers.__version__).startswith("5."):
        raise InputError(f"{name_or_folder}: transformers is {version}, 5.* is needed to read weights")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    hint = "give a folder with config.json and weights, or a hub id where the hub can be reached"
    with refusing(f"{name_or_folder!r} cannot be read as {model_type}", hint):
        found = transformers.AutoConfig.from_pretrained(name_or_folder, trust_remote_code=False).model_type
        if found != model_type:
            raise ValueError(f"model_type={found!r}")
        load = getattr(transformers, class_name).from_pretrained
        model, report = load(name_or_folder, dtype=torch.float32, output_loading_info=True)
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise InputError(f"{name_or_folder}: the weights do not fit config.json, {wrong[0]} first of {len(wrong)}")
    return model


def read_gpt_neox(name_or_folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of PythiaConfig and the weights of a GPT-NeoX checkpoint. Raises InputError if it is none."""
    model = load_pretrained(name_or_folder, "gpt_neox", "GPTNeoXForCausalLM")
    theirs, rope = model.config, model.config.rope_parameters
    for key, value in (PYTHIA | {"rope_type": "default"}).items():
        if (found := rope[key] if key in rope else getattr(theirs, key)) != value:
            raise InputError(f"{name_or_folder} has {key}={found!r}; Pythia has {value!r}")
    shape = {ours: getattr(theirs, name) for ours, name in SHAPE.items()}
    shape |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_base": float(rope["rope_theta"])}
    weights = model.state_dict().items()
    return shape, {name.removeprefix("gpt_neox.").replace("lm_head", "embed_out"): weight for name, weight in weights}


def write_gpt_neox(model: Any, folder: Path) -> None:
    """A baseline, its config.json in the spelling that Pythia was released with."""
    c = model.config
    settings = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "torch_dtype": "float32", **PYTHIA}
    settings |= {name: getattr(c, ours) for ours, name in SHAPE.items()}
    settings |= {"rotary_pct": c.rotary_pct, "rotary_emb_base": c.rotary_base, "bos_token_id": 0, "eos_token_id": 0}
    weights = {k if k.startswith("embed_out") else f"gpt_neox.{k}": v for k, v in model.state_dict().items()}
    write_folder(folder, settings, weights)


def write_folder(folder: Path, settings: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """config.json and model.safetensors."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_variant(model: Any, folder: Path) -> None:
    """Any other model with its code, which transformers runs if it is trusted; modeling.py names its classes."""
    config, source = model.config, Path(inspect.getfile(type(model)))
    classes = {"AutoConfig": "modeling.ExportedConfig", "AutoModelForCausalLM": "modeling.ExportedModel"}
    settings: dict[str, Any] = {"architectures": ["ExportedModel"], "auto_map": classes, "dtype": "float32"}
    settings |= {"model_type": "kv-cache-pythia", "model_args": model_args(config)}
    settings |= {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "max_position_embeddings")}
    write_folder(folder, settings, {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()})
    copy_code(source, folder)
    names = f"{type(config).__name__} as Config, {type(model).__name__} as Model"
    imports = [f"from .{path.stem} import __doc__ as _" for path in sorted(folder.glob("*.py"))]  # for transformers 4
    imports.append(f"from .{source.stem} import {names}")
    wrapper = re.sub(r"from \.variant .*", "\n".join(imports), (KIT / "modeling.py").read_text())
    (folder / "modeling.py").write_text(wrapper)


def copy_code(source: Path, folder: Path) -> None:
    """A file of this project and what it imports of the project, side by side, their imports made relative."""

    def relative(match: re.Match[str]) -> str:
        word, kit, name, rest = match.groups()
        imported = (KIT if kit else source.parent) / f"{name}.py"
        if not imported.is_file():
            return match[0]
        copy_code(imported, folder)
        return f"from .{name}{rest}" if word == "from" else f"from . import {name}{rest}"

    (folder / source.name).write_text(OWN_IMPORT.sub(relative, source.read_text()))


def require_known_source(model: Any, source: Any, baseline: type) -> None:
    """Raises ValueError unless a source's weights mean in this model what they mean in the source.

    Names and shapes do not tell: two attentions can lay out a matrix of one name and one shape differently.
    """
    if type(source) not in (type(model), baseline):
        mine, theirs = type(model).__name__, type(source).__name__
        raise ValueError(f"the source is a {theirs}: a {mine} starts from its own class or from {baseline.__name__}")
    shared = set(settable(source.config)) & set(settable(model.config))
    meaning = ("num_heads", "rotary_pct", "rotary_base", "use_rope", "layer_norm_eps", "embed_norm")
    for name in (*meaning, "hidden_size", "vocab_size"):
        values = [getattr(m.config, name) for m in (source, model) if name in shared]
        if len(set(values)) > 1:
            hint = "; released weights need width_divisor=1" if name == "hidden_size" else ""
            raise ValueError(f"the source has {name}={values[0]}, this model {values[1]}{hint}")


def take_over(model: Any, source: Any, converted: dict[str, Tensor]) -> dict[str, str]:
    """Give a model converted tensors, and a source's where name, shape and attention are the same -> how each began."""
    theirs, mine = source.state_dict(), model.state_dict()
    attentions = [{n: type(m) for n, m in each.named_modules() if n.endswith(".attention")} for each in (model, source)]
    foreign = tuple(f"{name}." for name, kind in attentions[0].items() if attentions[1].get(name) is not kind)
    same = (k for k, weight in theirs.items() if k in mine and weight.shape == mine[k].shape)
    copied = {k: theirs[k] for k in same if k not in converted and not k.startswith(foreign)}
    model.load_state_dict({**mine, **copied, **converted})
    return {k: "copied" if k in copied else "converted" if k in converted else "new" for k in mine}


def bias_free_attention(source: Any, layer: int) -> dict[str, Tensor]:
    """A baseline's attention for a variant without biases: W_Q, W_K, W_V, W_O (C, C) under the names of their tensors.

    Softmax's weights sum to 1, so that the value and output biases add W_O b_V + b_O whatever is attended to: that
    moves into the bias of the parallel MLP. Biases of queries and keys have no place there and are dropped.
    """
    weights, theirs = source.state_dict(), f"layers.{layer}.attention"
    mlp_bias, W_O = f"layers.{layer}.mlp.dense_4h_to_h.bias", weights[f"{theirs}.dense.weight"]
    matrices = [*fused_parts(source, layer, "weight"), W_O]
    b_O, b_V = weights[f"{theirs}.dense.bias"], fused_parts(source, layer, "bias")[2]
    named = {f"{theirs}.W_{name}.weight": W for name, W in zip("QKVO", matrices, strict=True)}
    return named | {mlp_bias: weights[mlp_bias] + b_O + W_O @ b_V}


def fused_parts(source: Any, layer: int, part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights or biases of a baseline's queries, keys and values, (C, C) or (C,) each, out of the fused projection."""
    fused = source.state_dict()[f"layers.{layer}.attention.query_key_value.{part}"]  # (H 3 D, C) or (H 3 D)
    q, k, v = (rows.flatten(0, 1) for rows in fused.unflatten(0, (source.config.num_heads, 3, -1)).unbind(1))
    return q, k, v
