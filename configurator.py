"""Settings: config files, then --key=value -> typed, checked settings. And the one table of models.

    python train.py config/mla_kv128.py config/laptop.py --max_iters=500
                    |                   |                \\_ overrides, the last word
                    |                   \\_ a layer, for any model: fills in what the experiment leaves open
                    \\_ the experiment, which picks the model or the phase

A config file is Python with plain assignments, and it is executed: run only files you trust.
A script's settings stand at its top, a model's in its file: frozen dataclasses, and the comment behind a field is its
line in --help. Bad input raises InputError; run() turns it into one line and exit status 2.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from kit.files import InputError, one_line, refusing
from kit.runs import read_checkpoint
from kit.weights import settable
from model_cascade import CascadeConfig, CascadeContextLLM
from model_context import ContextKVConfig, ContextKVPythiaModel, ContextPythiaConfig, ContextPythiaModel
from model_infini import InfiniConfig, InfiniPythiaModel
from model_mla import MLAConfig, MLAPythiaModel
from pythia_base import PythiaConfig, PythiaModel

MODELS: dict[str, tuple[type, type]] = {
    "pythia": (PythiaConfig, PythiaModel),
    "mla": (MLAConfig, MLAPythiaModel),
    "context": (ContextPythiaConfig, ContextPythiaModel),
    "context_kv": (ContextKVConfig, ContextKVPythiaModel),
    "infini": (InfiniConfig, InfiniPythiaModel),
    "cascade": (CascadeConfig, CascadeContextLLM),
}
WIDTHS = ("hidden_size", "intermediate_size", "kv_dim", "context_dim")  # what width_divisor divides
HELP = {"--help", "-h"}
S = TypeVar("S")


class Job(NamedTuple):
    """What a command line of train.py asks for."""

    settings: Any  # of the phase
    model_config: Any  # of the model
    name: str  # of the run's folder, from the names of the config files
    parent: str  # the command that makes the run which a config given as init_from stands for
    passed_over: list[str]  # settings of layers that were not taken


def parse_train(argv: list[str], phases: dict[str, Any]) -> Job:
    """train.py's command line: layers, over them the experiment that picks model or phase, over both --key=value."""
    configs = [config_class for config_class, _ in MODELS.values()]
    if HELP & set(argv):
        print_help("python train.py [config files] [--key=value ...]", *phases.values(), *configs)
    paths, typed = split_arguments(argv)
    files = {path: read_config(path) for path in paths}
    layers = [path for path, keys in files.items() if not keys.keys() & {"model", "phase"}]
    layered = {key: value for path in layers for key, value in files[path].items()}
    own = {key: value for path in paths if path not in layers for key, value in files[path].items()}
    values: dict[str, Any] = {"model": "pythia", "phase": "lm"} | layered | own | typed
    model = check("model", values["model"], Literal[tuple(MODELS)])
    phase = check("phase", values["phase"], Literal[tuple(phases)])
    settings_class, config_class = phases[phase], MODELS[model][0]

    valid = settable(settings_class) + settable(config_class)
    known = sorted({name for cls in [*phases.values(), *configs] for name in settable(cls)})
    for where, keys in {**files, "the command line": typed}.items():
        refuse_unknown(keys, where, known)
        if where not in layers and (others := [key for key in keys if key not in valid]):
            raise InputError(f"{where}: {others[0]!r} is no setting of model={model!r}, phase={phase!r}, but of others")
    passed_over = [key for key in layered if key not in valid or (values[key] != layered[key] and key not in typed)]

    settings, parent = make(settings_class, values), ""
    if settings.init_from.endswith(".py"):
        parent = " ".join(["python train.py", settings.init_from, *layers])
        settings = replace(settings, init_from=f"out/{run_name([settings.init_from, *layers])}")
    model_config: Any = make(config_class, values, settings.width_divisor)
    return Job(settings, model_config, run_name(paths) or model, parent, passed_over)


def parse_settings(settings_class: type[S], argv: list[str], takes: str = "") -> tuple[S, list[str]]:
    """Another script's command line: its settings, and its other arguments, which `takes` describes in --help."""
    if HELP & set(argv):
        print_help(" ".join(["python", sys.argv[0], *takes.split(), "[--key=value ...]"]), settings_class)
    arguments, values = split_arguments(argv)
    if arguments and not takes:
        raise InputError(f"{arguments[0]!r} is no option: options are written --key=value")
    refuse_unknown(values, "the command line", settable(settings_class))
    return make(settings_class, values), arguments


class Text(str):
    """A value as it was typed, not yet of the setting's type."""


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Arguments that are no options, and the --key=value options, each still a Text; a bare --key is True."""
    options: dict[str, Any] = {}
    for argument in argv:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            options[key.replace("-", "_")] = Text(value) if equals else True
    return [argument for argument in argv if not argument.startswith("--")], options


def read_config(path: str) -> dict[str, Any]:
    """Execute a config file and return what it assigns. Raises InputError if it is not there or does not run."""
    values: dict[str, Any] = {}
    if not Path(path).exists():
        near = difflib.get_close_matches(path, map(str, Path(path).parent.glob("*.py")), 1)
        raise InputError(f"no config file {path}" + (f"; did you mean {near[0]}?" if near else ""))
    with refusing(f"{path} does not run", errors=(Exception, SystemExit)):  # whatever the file's own code raises
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), values)
    return {k: v for k, v in values.items() if not k.startswith("__") and not isinstance(v, ModuleType)}


def run_name(paths: list[str]) -> str:
    return "-".join(Path(path).stem for path in paths)


def refuse_unknown(keys: Iterable[str], where: str, known: list[str]) -> None:
    """Raises InputError for the first key that nothing has, with the nearest one that there is."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f", did you mean {near[0]!r}?" if near else "; --help lists all keys"
            raise InputError(f"{where}: unknown key {key!r}{hint}")


def make(cls: type[S], values: dict[str, Any], divisor: int = 1) -> S:
    """A settings dataclass of the values that it has fields for, checked, its widths divided. Raises InputError."""
    hints = get_type_hints(cls, include_extras=True)
    checked = {key: check(key, values[key], hints[key]) for key in settable(cls) if key in values}
    for key in [width for width in WIDTHS if width in hints and divisor > 1]:
        width = checked.get(key, getattr(cls, key))
        if width % divisor:
            raise InputError(f"width_divisor={divisor} does not divide {key}={width}")
        checked[key] = width // divisor
    try:
        return cls(**checked)
    except (ValueError, OverflowError) as error:
        raise InputError(one_line(error)) from None


def check(key: str, value: Any, hint: Any) -> Any:
    """A value, read leniently if it was typed and strictly if not -> the setting's type. Raises InputError."""
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
    try:
        if not isinstance(value, Text):
            checked = adapter.validate_python(value, strict=not isinstance(value, list | tuple))
        elif value.lower() == "none" and NoneType in get_args(hint):
            checked = None
        elif get_origin(hint) in (list, tuple):
            checked = adapter.validate_json(value)
        else:
            checked = adapter.validate_python(str(value))
        if isinstance(checked, int) and abs(checked) >= 2**63:
            raise ValueError("below 2^63")
        if isinstance(checked, str) and re.search("[\0\ud800-\udfff]", checked):
            raise ValueError("of characters that a file name and a text can hold")
    except ValueError as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise InputError(f"{key}={value!r:.80} has to be {reason.removeprefix('Input should be ')}") from None
    return checked


def print_help(usage: str, *classes: type) -> NoReturn:
    """Every key with its type, default and comment as in the source; keys that classes share are printed once."""
    print(f"usage: {usage}")
    shown: set[str] = set()
    for cls in classes:
        sources = [inspect.getsource(base) for base in reversed(cls.__mro__) if is_dataclass(base)]
        lines = re.findall(r"^    (\w+): (.*?) = (.*?)  # (.*)$", "\n".join(sources), re.MULTILINE)
        own = {name: line for name, *line in lines if name in settable(cls) and name not in shown}
        if own:
            print(f"\n{(cls.__doc__ or '').splitlines()[0]}  [{cls.__name__}]")
        for name, (hint, default, comment) in own.items():
            print(f"  --{name}={default} ({hint})\n      {comment}")
        shown |= own.keys()
    sys.stdout.flush()  # here run() sees that a reader has gone, at exit nobody would
    sys.exit(0)


def baseline_cache_bytes(model_config: Any, num_tokens: int) -> int:
    """Bytes of one row's cache in the Pythia of the same widths and depth (where a model has none: six layers)."""
    shape = {name: getattr(model_config, name, getattr(PythiaConfig, name)) for name in ("hidden_size", "num_layers")}
    one_head = PythiaConfig(**shape, num_heads=1, rotary_pct=0.0)  # a cache is as large with any number of heads
    with torch.device("meta"):  # nothing is allocated
        return PythiaModel(one_head).init_cache(1, num_tokens).nbytes


def load_source(source: str) -> tuple[Any, dict[str, Any] | None]:
    """A trained model by run folder, checkpoint file, Hugging Face folder or hub id; and its checkpoint, if any."""
    path = Path(source)
    if (path / "ckpt.pt").is_file() or path.is_file():
        checkpoint = read_checkpoint(path)
        mismatch = KeyError, TypeError, ValueError, RuntimeError
        with refusing(f"{source} is of another version of its model", errors=mismatch):
            config_class, model_class = MODELS[checkpoint["config"]["model"]]
            model = model_class(config_class(**checkpoint["model_args"]))
            model.load_state_dict(checkpoint["model"])
        return model, checkpoint
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{source} holds neither a checkpoint nor Hugging Face weights")
    with refusing(f"{source} is no Pythia", errors=(OSError, ValueError, KeyError)):
        return PythiaModel.from_pretrained(source), None
