"""Settings: config files, then --key=value overrides -> typed, checked settings. And the one table of models.

    python train.py config/mla_kv128.py config/laptop.py --max_iters=500
                    |                   |                \\_ overrides, the last word
                    |                   \\_ a layer, for any model: fills in what the experiment leaves open
                    \\_ the experiment, which picks the model or the phase

A config file is Python with plain assignments, and it is executed: run only files you trust.
A script's settings stand at its top, a model's in its file: frozen dataclasses, and the comment behind a field is its
line in --help. Bad input raises InputError; run() turns it into one line and exit status 2.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from kit.files import InputError, one_line
from kit.runs import read_checkpoint
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

S = TypeVar("S")
WIDTHS = ("hidden_size", "intermediate_size", "kv_dim", "context_dim")  # what width_divisor divides


def check_range(settings: object, lowest: float, *names: str) -> None:
    """Raises InputError if a named setting is below lowest, not finite, or too large for torch; None is left alone."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not lowest <= value < 2**63:
            raise InputError(f"{name}={value} has to be " + ("below 2^63" if value > lowest else f"at least {lowest}"))


# ---------------------------------------------------------------------------------- from the command line to settings


@dataclass(frozen=True)
class Job:
    """What a command line of train.py asks for."""

    settings: Any  # of the phase
    model_config: Any  # of the model
    name: str  # of the run's folder, from the names of the config files
    parent: str  # the command that makes the run which a config given as init_from stands for
    passed_over: list[str]  # what layers could not set


def parse_train(argv: list[str], phases: dict[str, Any]) -> Job:
    """train.py's command line: layers, then the experiment that picks model and phase, then overrides.

    phases has the settings dataclass of each phase.
    """
    if wants_help(argv):
        configs = [config_class for config_class, _ in MODELS.values()]
        print_help("python train.py [config files] [--key=value ...]", *phases.values(), *configs)
    paths, overrides = split_arguments(argv)
    files = {path: read_config(path) for path in paths}
    layers = [path for path, keys in files.items() if not keys.keys() & {"model", "phase"}]
    layered = merge(files[path] for path in layers)
    own = merge(keys for path, keys in files.items() if path not in layers)
    values = layered | own | overrides
    settings_class: type = phases[pick(values, "phase", "lm", phases)]
    config_class, _ = MODELS[pick(values, "model", "pythia", MODELS)]

    valid = [*names(settings_class), *names(config_class)]
    known = {name for cls in [*phases.values(), *(config for config, _ in MODELS.values())] for name in names(cls)}
    for where, keys in [*files.items(), ("the command line", overrides)]:
        for key in keys:
            if key not in known:
                raise InputError(unknown_key(key, where, valid, sorted(known)))
            if key not in valid and where not in layers:
                model, phase = values.get("model", "pythia"), values.get("phase", "lm")
                raise InputError(f"{where}: {key!r} is no setting of model={model!r}, phase={phase!r}, but of others")
    others = [key for key in layered if key not in valid]
    passed_over = [f"{', '.join(others)} (not of this model and phase)"] if others else []
    lost = [key for key in layered if key in own.keys() - overrides.keys() and layered[key] != own[key]]
    passed_over += [f"{key} (the experiment's {own[key]!r} stays)" for key in lost]
    settings: Any = make(settings_class, values)
    parent = ""
    if settings.init_from.endswith(".py"):
        parent = " ".join(["python train.py", settings.init_from, *layers])
        settings = dataclasses.replace(settings, init_from=f"out/{run_name([settings.init_from, *layers])}")
    return Job(
        settings=settings,
        model_config=make(config_class, divide_widths(config_class, values, settings.width_divisor)),
        name=run_name(paths) or "pythia",
        parent=parent,
        passed_over=passed_over,
    )


def merge(dicts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """All keys; of one that several have, the last one's value."""
    return {key: value for keys in dicts for key, value in keys.items()}


def run_name(paths: list[str]) -> str:
    """The names of config files, joined by hyphens."""
    return "-".join(Path(path).stem for path in paths)


def parse_settings(settings_class: type[S], argv: list[str], takes: str = "") -> tuple[S, list[str]]:
    """The command line of a script other than train.py: its settings, and the arguments that are none.

    takes says in --help what these are; a script without takes none.
    """
    if wants_help(argv):
        print_help(" ".join(["python", sys.argv[0], *takes.split(), "[--key=value ...]"]), settings_class)
    arguments, values = split_arguments(argv)
    if arguments and not takes:
        raise InputError(f"{arguments[0]!r} is no option: options are written --key=value")
    for key in values:
        if key not in names(settings_class):
            raise InputError(unknown_key(key, "the command line", names(settings_class)))
    return make(settings_class, values), arguments


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Arguments that are no options, and the --key=value options, each still a Text; a bare --key is True."""
    options: dict[str, Any] = {}
    for argument in argv:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            options[key.replace("-", "_")] = Text(value) if equals else True
        elif argument.startswith("-"):
            raise InputError(f"{argument!r} is no option: options are written --key=value")
    return [a for a in argv if not a.startswith("-")], options


class Text(str):
    """A value as it was typed, not yet of the setting's type."""


def read_config(path: str) -> dict[str, Any]:
    """Execute a config file and return what it assigns. Raises InputError if it is not there or does not run."""
    try:
        code = compile(Path(path).read_text(encoding="utf-8"), path, "exec")
        values: dict[str, Any] = {}
        exec(code, values)
    except FileNotFoundError:
        near = difflib.get_close_matches(path, map(str, Path(path).parent.glob("*.py")), 1)
        raise InputError(f"no config file {path}" + (f"; did you mean {near[0]}?" if near else "")) from None
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid Python ({error.msg})") from None
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        raise InputError(f"{path} does not run: {type(error).__name__}: {one_line(error)}") from None
    return {k: v for k, v in values.items() if not k.startswith("__") and not isinstance(v, types.ModuleType)}


def pick(values: dict[str, Any], key: str, default: str, table: dict[str, Any]) -> str:
    """The row of a table that a key names."""
    name = values.get(key, default)
    if name not in list(table):  # a list compares, and a config file may assign what has no hash
        raise InputError(f"{key}={name!r} is not one of {', '.join(table)}")
    return str(name)


def names(cls: type) -> list[str]:
    """The settable fields of a dataclass."""
    return [f.name for f in fields(cls) if f.init]


def unknown_key(key: str, where: str, *keys: list[str]) -> str:
    """The message about a key that nothing has, with the nearest of the first keys that are near."""
    near = next(filter(None, (difflib.get_close_matches(key, some, 1) for some in keys)), None)
    return f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else "; --help lists all keys")


def make(cls: type[S], values: dict[str, Any]) -> S:
    """Build a settings dataclass from those of the values that it has fields for, each checked against its type."""
    hints = typing.get_type_hints(cls)
    checked = {key: convert(key, values[key], hints[key]) for key in names(cls) if key in values}
    try:
        return cls(**checked)
    except (ValueError, OverflowError) as error:
        raise InputError(one_line(error)) from None


def convert(key: str, value: Any, hint: Any) -> Any:
    """A value as typed or assigned -> the field's type. Raises InputError if it is of another."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    literal = parse_text(value, options) if isinstance(value, Text) else value
    if isinstance(literal, str) and re.search("[\0\ud800-\udfff]", literal):
        raise InputError(f"{key}={str(literal)!r} holds a character that no file name and no text can hold")
    for option in options:
        if option is float and type(literal) is int and abs(literal) <= sys.float_info.max:
            return float(literal)
        if option is int and type(literal) is int and abs(literal) >= 2**63:
            raise InputError(f"{key}={shorten(literal)} has to be below 2^63")
        if typing.get_origin(option) is Literal and literal in typing.get_args(option):
            return literal
        if typing.get_origin(option) in (list, tuple) and isinstance(literal, list | tuple):
            return [convert(key, item, typing.get_args(option)[0]) for item in literal]
        if option in (type(literal), None):
            return literal
    raise InputError(f"{key}={shorten(value)} has to be {type_name(hint)}")


def shorten(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def parse_text(text: Text, options: tuple[Any, ...]) -> Any:
    """What was typed -> a Python value; where the setting is a string, all but None is taken as it stands."""
    try:
        literal = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        literal = {"true": True, "false": False, "none": None}.get(text.lower(), str(text))
    if literal is None and type(None) in options:
        return None
    is_string = any(option is str or typing.get_origin(option) is Literal for option in options)
    return str(text) if is_string else literal


def type_name(hint: Any) -> str:
    """A type as --help prints it: int, float or None, one of 'a', 'b'."""
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (list, tuple):
        return f"a list of {type_name(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else hint.__name__


def divide_widths(config_class: type, values: dict[str, Any], divisor: int) -> dict[str, Any]:
    """The model's settings with every width divided. Raises InputError where a width is no multiple of the divisor."""
    divided = dict(values)
    hints = typing.get_type_hints(config_class)
    for field in fields(config_class):
        if field.name in WIDTHS and divisor > 1:
            width = convert(field.name, values.get(field.name, field.default), hints[field.name])
            if width % divisor:
                raise InputError(f"width_divisor={divisor} does not divide {field.name}={width}")
            divided[field.name] = width // divisor
    return divided


# ------------------------------------------------------------------------------------------------------------- help


def wants_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


def print_help(usage: str, *classes: type) -> NoReturn:
    """Every key with its type, default and the comment behind it; keys that classes share are printed once."""
    print(f"usage: {usage}")
    shown: set[str] = set()
    for cls in classes:
        hints, comments = typing.get_type_hints(cls), field_comments(cls)
        own = [f for f in fields(cls) if f.init and f.name not in shown]
        if own:
            print(f"\n{(cls.__doc__ or '').splitlines()[0]}  [{cls.__name__}]")
        for field in own:
            print(f"  --{field.name}={field.default!r} ({type_name(hints[field.name])})\n      {comments[field.name]}")
            shown.add(field.name)
    sys.exit(0)


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, those of its bases included."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(base), re.MULTILINE))
    return comments


# ----------------------------------------------------------------------------- models from settings and from runs


def build_model(name: str, model_config: Any) -> Any:
    """A new model of the table with freshly initialised weights."""
    return MODELS[name][1](model_config)


def baseline_config(model_config: Any) -> PythiaConfig:
    """The Pythia of the same widths and depth, which a variant's cache is held against.

    A model without attention is held against Pythia's six layers at its hidden_size, whatever number divides that.
    """
    shared = set(names(PythiaConfig)) & set(names(type(model_config)))
    values = {name: getattr(model_config, name) for name in shared}
    if "num_heads" not in shared:
        values |= {"num_heads": 1, "rotary_pct": 0.0}  # a cache is as large with any number of heads
    return PythiaConfig(**values)


def rebuild_model(checkpoint: dict[str, Any], source: str | Path) -> Any:
    """The trained model of a checkpoint. Raises InputError if its weights and settings do not belong together."""
    try:
        config_class, model_class = MODELS[checkpoint["config"]["model"]]
        model = model_class(config_class(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{source} is of another version of its model: {one_line(error)[:200]}") from None
    return model


def load_source(source: str) -> tuple[Any, dict[str, Any] | None]:
    """A trained model by run folder, checkpoint file, Hugging Face folder or hub id; and its checkpoint, if any."""
    path = Path(source)
    if (path / "ckpt.pt").is_file() or path.is_file():
        checkpoint = read_checkpoint(path)
        return rebuild_model(checkpoint, source), checkpoint
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{source} holds neither a checkpoint nor Hugging Face weights")
    try:
        return PythiaModel.from_pretrained(source), None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(one_line(error)) from None
