"""Settings: config files, then --key=value overrides -> typed, checked settings. And the one table of models.

    python train.py config/mla_kv128.py config/laptop.py --max_iters=500
                    |                   |                \\_ overrides, the last word
                    |                   \\_ a layer, for any model
                    \\_ picks the model

A config file is Python with plain assignments, and it is executed: run only files you trust.
The comment behind a field below is its line in --help. Bad input raises InputError; run() turns it into one line and
exit status 2.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from kit.contexts import ContextSettings
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


# ------------------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True)
class TrainSettings:
    """What every phase of train.py needs."""

    model: str = "pythia"  # the architecture, a name from configurator.MODELS
    phase: Literal["lm", "phase1", "phase2"] = "lm"  # language model, ContextBlock alone, or model on frozen contexts
    out_dir: str | None = None  # the run's folder; None: out/ and the names of the config files
    overwrite: bool = False  # start anew in a folder that holds another run
    init_from: str = "scratch"  # 'scratch', 'resume', a run folder, a config (its run), a Hugging Face folder or hub id
    dataset: str = "mini"  # folder below data_dir
    data_dir: str = "data"  # where prep.py puts token files
    width_divisor: int = 1  # divides hidden_size, intermediate_size, kv_dim and context_dim of the model
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu
    seed: int = 1337  # of the weights and of the order of the data

    def __post_init__(self) -> None:
        check_range(self, 1, "width_divisor")
        check_range(self, 0, "seed")


@dataclass(frozen=True)
class LMSettings(TrainSettings):
    """Training a language model."""

    batch_size: int = 4  # windows per micro-batch
    block_size: int = 512  # tokens per window
    tokens_per_doc: int | None = None  # train on stretches of documents of so many tokens, the memory carried along
    gradient_accumulation_steps: int = 4  # micro-batches per step, shared out among the processes of torchrun
    learning_rate: float = 1e-3  # AdamW, after warmup
    min_lr: float = 1e-4  # learning rate at the end of the decay
    max_iters: int = 1200  # optimizer steps
    warmup_iters: int = 100  # steps of linear warmup
    lr_decay_iters: int | None = None  # step at which min_lr is reached; None: max_iters
    decay_lr: bool = True  # cosine decay after warmup; False keeps learning_rate
    weight_decay: float = 0.1  # AdamW, on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    eval_interval: int = 100  # steps between evaluations and checkpoints
    eval_iters: int = 20  # micro-batches of the validation data per evaluation; the end of a run takes all of it
    log_interval: int = 10  # steps between lines of the log
    patience: int | None = None  # stop after so many evaluations without a better loss; None: never
    min_ppl_gain: float = 0.0  # how much lower the PPL has to be to count as better for patience
    eval_only: bool = False  # evaluate and stop
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products in training
    compile: bool | None = None  # torch.compile; None: on CUDA only

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "batch_size", "block_size", "gradient_accumulation_steps", "eval_interval", "eval_iters")
        check_range(self, 1, "log_interval", "patience", "lr_decay_iters", "tokens_per_doc")
        check_range(self, 0, "max_iters", "warmup_iters", "learning_rate", "min_lr", "weight_decay", "grad_clip")
        check_range(self, 0, "min_ppl_gain")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} has to be at least 0 and below 1")
        if self.tokens_per_doc is not None and self.tokens_per_doc % self.block_size:
            raise InputError(f"tokens_per_doc={self.tokens_per_doc} is no multiple of block_size={self.block_size}")


@dataclass(frozen=True)
class Phase2Settings(LMSettings):
    """Training all of a model but its ContextBlock, on the exact contexts of the token stream."""

    context_stride: int = 1  # tokens per context that the cache keeps; those in between are run again for each batch

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "context_stride")
        if self.tokens_per_doc is not None:
            raise InputError("tokens_per_doc is for phase='lm': contexts run through the whole stream")


@dataclass(frozen=True)
class Phase1Settings(TrainSettings):
    """Training a ContextBlock alone, without labels (OACD)."""

    embeddings: str = "random"  # the token table: 'random', 'gpt2' (hub), a GPT-2 folder, a run folder (its output's)
    num_tokens: int = 100_000  # of the training tokens for each ContextBlock
    cascade_data: Literal["split", "all"] = "split"  # several blocks: each on its own part of the data, or all on all
    max_iterations: int = 100  # passes over all of them, one optimizer step each
    convergence_threshold: float = 0.03  # a context that moves by less, mean squared, has settled
    learning_rate: float = 0.003  # Adam
    batch_size: int = 5_000  # tokens on the device at a time
    gradient_clip: float = 2.0  # largest norm of the gradient; 0 does not clip
    context_noise: float = 0.05  # standard deviation of what is added to the input contexts
    early_stopping_threshold: float = 0.9  # stop once this share of the contexts has settled
    centroid_weight: float = 0.1  # weight of the loss term that keeps the contexts' mean at the origin
    checkpoint_interval: int = 10  # iterations between checkpoints

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "num_tokens", "max_iterations", "batch_size", "checkpoint_interval")
        check_range(self, 0, "convergence_threshold", "learning_rate", "gradient_clip", "context_noise")
        check_range(self, 0, "early_stopping_threshold", "centroid_weight")


@dataclass(frozen=True)
class PrepSettings(ContextSettings):
    """prep.py"""

    stage: Literal["tokens", "contexts"] = "tokens"  # text to token files, or token files to a context cache
    dataset: str = "mini"  # mini, pile, pile10k, wikitext2, ultrachat, or any name together with --files
    tokenizer: Literal["neox", "gpt2"] = "neox"  # GPT-NeoX-20B's, which Pythia uses, or GPT-2's
    files: str | None = None  # your own .txt, .jsonl, .jsonl.zst or .parquet files, a glob pattern
    data_dir: str = "data"  # where the token files go
    val_fraction: float = 0.1  # share of the documents held out
    seed: int = 1337  # of the split
    reversal_repeats: int = 20  # how often each forward sentence of the reversal pairs stands in the training data
    max_tokens: int | None = None  # stop after about so many tokens
    num_workers: int | None = None  # tokenising processes; None: one per core
    overwrite: bool = False  # replace token files made with other settings
    device: str = "auto"  # contexts: 'auto' takes cuda, then mps, then cpu

    def __post_init__(self) -> None:
        check_range(self, 0, "reversal_repeats", "seed", "tolerance")
        check_range(self, 1, "max_tokens", "num_workers", "lanes", "overlap", "chunk_tokens", "context_stride")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"val_fraction={self.val_fraction} has to be between 0 and 1")
        if self.context_stride > self.chunk_tokens:
            raise InputError(f"context_stride={self.context_stride} is above chunk_tokens={self.chunk_tokens}")


@dataclass(frozen=True)
class EvalSettings:
    """eval.py"""

    tasks: str = "all"  # some of val,reversal,wikitext,lambada,pile,long,cache,speed, separated by commas; or 'all'
    wikitext: str = "EleutherAI/wikitext_document_level"  # or a .jsonl file with a 'page' a line, or wiki.test.raw
    lambada: str = "EleutherAI/lambada_openai"  # or a .jsonl file with a 'text' a line
    pile_test: str = "monology/pile-uncopyrighted"  # or a .jsonl(.zst) file: 'text', and its subset as in the Pile
    pile_documents: int | None = 1000  # of the Pile's test set, from its start; None: all
    data_dir: str = "data"  # where the token files are
    dataset: str | None = None  # score on this dataset; None: the one that the first run was trained on
    block_size: int | None = None  # tokens per window, of every task; None: the smallest that a run was trained with
    batch_size: int = 8  # windows at a time
    out_dir: str = "out/compare"  # where report.md, its pictures and results.json go
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu
    allow_untrained: bool = False  # score a model that was never trained
    overlap: bool = True  # look for the evaluation texts in the training text of each run
    verify: bool = False  # score EleutherAI/pythia-70m, or the folder named, and compare with published figures
    tolerance: float = 0.01  # how far, relatively, --verify lets a figure be from the published one

    def __post_init__(self) -> None:
        check_range(self, 1, "block_size", "batch_size", "pile_documents")
        check_range(self, 0, "tolerance")


@dataclass(frozen=True)
class CompareSettings:
    """compare.py"""

    size: Literal["laptop", "full"] = "laptop"  # with config/laptop.py on top, or at Pythia-70M's size
    seeds: int = 1  # how often everything is trained, with seeds 1337, 1338, ...
    processes: int | None = None  # trainings at a time; None: one on a GPU, else two that share the cores

    def __post_init__(self) -> None:
        check_range(self, 1, "seeds", "processes")


@dataclass(frozen=True)
class SampleSettings:
    """sample.py"""

    prompt: str = ""  # the text to continue; empty starts from the end-of-text token
    max_new_tokens: int = 128  # tokens to generate
    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = 50  # draw from the k likeliest tokens; None: from all
    num_samples: int = 1  # how many texts
    compile: bool = False  # compile the decoding step: half a minute first, then faster; it needs a C++ compiler
    data_dir: str = "data"  # where the tokenizer is kept
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu
    seed: int = 1337  # of the draws

    def __post_init__(self) -> None:
        check_range(self, 0, "temperature", "seed")
        check_range(self, 1, "max_new_tokens", "top_k", "num_samples")


@dataclass(frozen=True)
class BenchSettings:
    """bench.py"""

    what: Literal["all", "train", "decode", "attention", "phase1", "contexts", "tokenize", "curves"] = "all"  # to time
    quick: bool = False  # narrower models, less work, decoding steps not compiled: minutes, and rougher ratios
    repeats: int = 3  # interleaved, after one to warm up; medians are shown
    compile: bool | None = None  # time torch.compile in training too; None: on CUDA only
    init_from: str = ""  # contexts: the phase 1 run whose ContextBlock is timed; empty: a new one
    dataset: str = "mini"  # whose text the work is done on
    data_dir: str = "data"  # where the token files are
    num_tokens: int = 500_000  # contexts: tokens of the fast form per repeat; the plain one takes a fiftieth
    num_steps: int = 500  # curves: steps whose losses are compared; not part of 'all'
    out_dir: str = "out/bench"  # where bench.json and the pictures go
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu

    def __post_init__(self) -> None:
        check_range(self, 1, "repeats", "num_steps")
        check_range(self, 1000, "num_tokens")


PHASES: dict[str, type[TrainSettings]] = {"lm": LMSettings, "phase1": Phase1Settings, "phase2": Phase2Settings}
SCRIPTS: tuple[type, ...] = (PrepSettings, EvalSettings, CompareSettings, SampleSettings, BenchSettings)
SETTINGS: tuple[type, ...] = (*PHASES.values(), *SCRIPTS)
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
    passed_over: list[str]  # keys of layered files that this model and phase do not have


def parse_train(argv: list[str]) -> Job:
    """train.py's command line: the config that picks model and phase, layers on top of it, overrides."""
    if wants_help(argv):
        configs = [config_class for config_class, _ in MODELS.values()]
        print_help("python train.py [config files] [--key=value ...]", *PHASES.values(), *configs)
    paths, overrides = split_arguments(argv)
    files = {path: read_config(path) for path in paths}
    merged = {key: value for keys in [*files.values(), overrides] for key, value in keys.items()}
    settings_class: type = PHASES[pick(merged, "phase", "lm", PHASES)]
    config_class, _ = MODELS[pick(merged, "model", "pythia", MODELS)]

    valid = [*names(settings_class), *names(config_class)]
    values: dict[str, Any] = {}
    passed_over: list[str] = []
    for where, keys in [*files.items(), ("the command line", overrides)]:
        is_layer = where in files and not picks(keys)
        for key, value in keys.items():
            if key in valid:
                values[key] = value
            elif is_layer and key in known_keys():
                passed_over.append(key)
            else:
                raise InputError(unknown_key(key, where, valid, merged))
    settings: Any = make(settings_class, values)
    layers = [path for path, keys in files.items() if not picks(keys)]
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


def picks(keys: dict[str, Any]) -> bool:
    """Whether a config file picks the model or the phase; one that does not is a layer for any."""
    return bool(keys.keys() & {"model", "phase"})


def run_name(paths: list[str]) -> str:
    """The names of config files, joined by hyphens."""
    return "-".join(Path(path).stem for path in paths)


def parse_settings(settings_class: type[S], argv: list[str], takes: str = "[config files]") -> tuple[S, list[str]]:
    """The command line of a script other than train.py: its settings, and the arguments that are no settings.

    Where the script takes config files, keys of other scripts in them are passed over.
    """
    if wants_help(argv):
        print_help(f"python {Path(sys.argv[0]).name} {takes} [--key=value ...]", settings_class)
    arguments, values = split_arguments(argv)
    if arguments and not takes:
        raise InputError(f"{arguments[0]!r} is no option: options are written --key=value")
    for key in values:
        if key not in names(settings_class):
            raise InputError(unknown_key(key, "the command line", names(settings_class), {}))
    if takes == "[config files]":
        for path in reversed(arguments):
            for key, value in read_config(path).items():
                if key in names(settings_class):
                    values.setdefault(key, value)
                elif key not in known_keys():
                    raise InputError(unknown_key(key, path, names(settings_class), {}))
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


def known_keys() -> set[str]:
    """Every key of every script, phase and model."""
    return {name for cls in [*SETTINGS, *(config for config, _ in MODELS.values())] for name in names(cls)}


def unknown_key(key: str, where: str, valid: list[str], picked: dict[str, Any]) -> str:
    """The message about a key that cannot stand there, with the nearest one that can."""
    if key in known_keys():
        model, phase = picked.get("model", "pythia"), picked.get("phase", "lm")
        owner = f"model={model!r}, phase={phase!r}" if picked else "this script"
        return f"{where}: {key!r} is no setting of {owner}; it belongs to another model, phase or script"
    near = difflib.get_close_matches(key, valid, 1) or difflib.get_close_matches(key, sorted(known_keys()), 1)
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
