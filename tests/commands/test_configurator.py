"""Settings from files and command lines, the models built from them, and what is said of bad input."""

import errno
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import ROOT, checkpoint_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._inductor.exc import InvalidCxxCompiler

from configurator import (
    MODELS,
    Job,
    Text,
    baseline_config,
    build_model,
    convert,
    load_source,
    names,
    parse_settings,
    parse_train,
)
from eval import EvalSettings
from kit.files import InputError, run
from kit.runs import model_args, pick_device, read_checkpoint
from model_mla import MLAConfig
from prep import PrepSettings
from pythia_base import PythiaConfig
from sample import SampleSettings
from train import PHASES, Phase1Settings

CONFIG = ROOT / "config"
SETTINGS = [*PHASES.values(), PrepSettings, EvalSettings, SampleSettings]
CONFIG_FILES = sorted(CONFIG.glob("*.py"))
PICKED: dict[str, Any] = {"model": "context", "phase": "phase1"}
MLA_128, LAPTOP = str(CONFIG / "mla_kv128.py"), str(CONFIG / "laptop.py")


def write(folder: Path, name: str, text: str) -> str:
    file = folder / f"{name}.py"
    file.write_text(text)
    return str(file)


def parse_files(folder: Path, *texts: str, overrides: tuple[str, ...] = ()) -> Job:
    """parse_train with config files of these texts, named a, b, ..."""
    paths = [write(folder, name, text) for name, text in zip("abc", texts, strict=False)]
    return parse_train([*paths, *overrides], PHASES)


# -------------------------------------------------------------------------------------------------- layers, overrides


def test_later_files_and_the_command_line_have_the_last_word(tmp_path: Path) -> None:
    texts = ["model = 'mla'\nkv_dim = 64\nbatch_size = 2", "max_iters = 1\nseed = 4", "max_iters = 3"]
    job = parse_files(tmp_path, *texts, overrides=("--seed=5", "--kv-dim=32", "--kv_dim=16"))
    assert (job.settings.batch_size, job.settings.max_iters, job.settings.seed) == (2, 3, 5)
    assert job.model_config == MLAConfig(kv_dim=16)
    assert job.name == "a-b-c"


def test_the_last_model_named_is_the_one(tmp_path: Path) -> None:
    job = parse_files(tmp_path, "model = 'mla'", "model = 'context'", overrides=("--model=pythia",))
    assert (job.settings.model, job.model_config) == ("pythia", PythiaConfig())


def test_nothing_given_is_the_baseline() -> None:
    assert parse_train([], PHASES) == Job(PHASES["lm"](), PythiaConfig(), name="pythia", parent="", passed_over=[])


def test_other_scripts_take_settings_and_what_they_are_for() -> None:
    assert parse_settings(PrepSettings, ["--seed=3"]) == (PrepSettings(seed=3), [])
    assert parse_settings(EvalSettings, ["out/a", "--batch_size=2", "out/b"], takes="runs") == (
        EvalSettings(batch_size=2),
        ["out/a", "out/b"],
    )


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.stem)
def test_every_config_file_parses_alone_and_below_the_laptop_layer(file: Path) -> None:
    alone, narrow = parse_train([str(file)], PHASES), parse_train([str(file), LAPTOP], PHASES)
    assert alone.passed_over == []
    if alone.settings.width_divisor == 1:
        assert narrow.model_config.hidden_size * 4 == alone.model_config.hidden_size
    assert narrow.settings.width_divisor == 4


def test_a_width_divisor_divides_every_width_and_nothing_else() -> None:
    job = parse_train([MLA_128, "--width_divisor=4"], PHASES)
    assert job.model_config == MLAConfig(hidden_size=128, intermediate_size=512, kv_dim=32)
    assert (job.model_config.num_heads, job.model_config.num_layers) == (8, 6)
    assert baseline_config(job.model_config) == PythiaConfig(hidden_size=128, intermediate_size=512)


def test_an_experiment_wins_over_a_layer_in_any_order_and_the_command_line_over_both(tmp_path: Path) -> None:
    experiment, layer = "phase = 'phase1'\nmodel = 'context'\nseed = 1\nlearning_rate = 0.3", "seed = 2\nbatch_size = 7"
    first, last = parse_files(tmp_path, experiment, layer), parse_files(tmp_path, layer, experiment)
    assert first.settings == last.settings == Phase1Settings(**PICKED, seed=1, learning_rate=0.3, batch_size=7)
    assert first.passed_over == last.passed_over == ["seed (the experiment's 1 stays)"]
    typed = parse_files(tmp_path, experiment, layer, overrides=("--seed=3",))
    assert (typed.settings.seed, typed.passed_over) == (3, [])
    assert parse_files(tmp_path, experiment, "seed = 1").passed_over == []  # the same


@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [("phase1", 0.003), ("context_kv_phase1", 0.003), ("cascade_phase1", 0.003), ("cascade_phase2", 0.001)],
)
@pytest.mark.parametrize("layer", ["laptop", "pile"])
def test_layers_leave_the_learning_rates_of_phase_1_and_the_cascade(
    name: str, learning_rate: float, layer: str
) -> None:
    assert (
        parse_train([str(CONFIG / f"{name}.py"), str(CONFIG / f"{layer}.py")], PHASES).settings.learning_rate
        == learning_rate
    )


def test_a_layer_may_hold_keys_that_the_model_does_not_have(tmp_path: Path) -> None:
    job = parse_files(tmp_path, "model = 'pythia'", "kv_dim = 64\nmax_iters = 3\nnum_tokens = 4")
    assert job.passed_over == ["kv_dim, num_tokens (not of this model and phase)"]
    assert job.settings.max_iters == 3


def test_a_config_in_the_place_of_a_source_stands_for_its_run_under_the_same_layers(tmp_path: Path) -> None:
    job = parse_files(tmp_path, "phase = 'phase2'\nmodel = 'context'\ninit_from = 'config/phase1.py'", "seed = 3")
    assert job.settings.init_from == "out/phase1-b"
    assert job.parent == f"python train.py config/phase1.py {tmp_path / 'b.py'}"


# -------------------------------------------------------------------------------------------------------------- types

Mode = Literal["auto", "fast"]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (Text("1"), float, 1.0),
        (Text("-1e-3"), float, -0.001),
        (Text("1_000"), int, 1000),
        (Text("None"), int | None, None),
        (Text("none"), str | None, None),
        (Text("None"), str, "None"),
        (Text("true"), bool, True),
        (Text("False"), bool | None, False),
        (True, bool, True),  # a bare --key
        (Text("12"), str, "12"),
        (Text("1e5"), str | None, "1e5"),
        (Text("True"), str, "True"),
        (Text("[1]"), str, "[1]"),
        (Text("'quoted'"), str, "'quoted'"),
        (Text("a = b"), str, "a = b"),
        (Text("{[]: 1}"), str, "{[]: 1}"),
        (Text(""), str, ""),
        (Text("fast"), Mode, "fast"),
        (Text("[1, 2]"), list[int], [1, 2]),
        (Text("(1, 2)"), list[float], [1.0, 2.0]),
        (Text("['a', 'b']"), list[str], ["a", "b"]),
        (Text("[]"), list[int] | None, []),
        (1, float, 1.0),
        (None, float | None, None),
        ((0.5, 1), list[float], [0.5, 1.0]),
    ],
)
def test_values_get_the_type_of_their_setting(value: Any, hint: Any, expected: Any) -> None:
    converted = convert("key", value, hint)
    assert (converted, type(converted)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "hint", "named"),
    [
        (Text("1.0"), int, "int"),
        (Text("1e3"), int, "int"),
        (Text("True"), int, "int"),
        (Text("one"), int, "int"),
        (Text(""), int, "int"),
        (Text("None"), int, "int"),
        (Text("{[]: 1}"), int, "int"),
        (Text("nan"), float, "float"),
        (Text("True"), float, "float"),
        (Text("1" + "0" * 400), float, "float"),
        (Text("1"), bool, "bool"),
        (Text("fst"), Mode, "one of 'auto', 'fast'"),
        (Text("[1, 'a']"), list[int], "int"),
        (Text("[1, 2"), list[int], "a list of int"),
        (Text("1"), list[int] | None, "a list of int or None"),
        ("1", int, "int"),
        (1, str, "str"),
        (True, str, "str"),  # a bare --key
        ([], Mode, "one of 'auto', 'fast'"),
    ],
)
def test_values_of_another_type_are_refused(value: Any, hint: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"key=.* has to be {re.escape(named)}$"):
        convert("key", value, hint)


# ---------------------------------------------------------------------------------------------------------- bad input

KEYS = st.sampled_from(
    sorted({name for cls in [*SETTINGS, *(config for config, _ in MODELS.values())] for name in names(cls)})
)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers() | st.text())
TYPED = st.text() | VALUES.map(repr) | st.sampled_from(["0x" + "f" * 5000, "9" * 5000, "(" * 500, "{[]}", "1e999"])
ARGUMENTS = st.lists(st.builds("--{}={}".format, KEYS | st.text(), TYPED) | KEYS.map("--{}".format), max_size=4)


@settings(deadline=None, max_examples=300)
@given(ARGUMENTS, st.sampled_from(SETTINGS))
def test_a_command_line_parses_or_is_refused(arguments: list[str], settings_class: type) -> None:
    """Whatever is typed, nothing but InputError is raised."""
    with suppress(InputError):
        parse_train(arguments, PHASES)
    with suppress(InputError):
        parse_settings(settings_class, arguments)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_a_config_file_parses_or_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    with suppress(InputError):
        parse_files(tmp_path, "".join(f"{key} = {value!r}\n" for key, value in values.items()))


# --------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("ask", "classes"),
    [
        (lambda argv: parse_train(argv, PHASES), [*PHASES.values(), *(config for config, _ in MODELS.values())]),
        *(
            (lambda argv, cls=cls: parse_settings(cls, argv), [cls])
            for cls in (PrepSettings, EvalSettings, SampleSettings)
        ),
    ],
    ids=["train", "prep", "eval", "sample"],
)
def test_help_lists_every_key_once_with_type_default_and_comment(
    ask: Callable[[list[str]], Any], classes: list[type], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        ask(["--seed=2", "--help"])
    text = capsys.readouterr().out
    shown = re.findall(r"^  --(\w+)=\S.* \(.+\)\n      \S+", text, re.MULTILINE)
    assert len(shown) == len(set(shown)) == text.count("\n  --")
    assert set(shown) == {name for cls in classes for name in names(cls)}


def test_help_says_what_a_key_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_train(["-h"], PHASES)
    text = capsys.readouterr().out
    assert "  --kv_dim=128 (int)\n      width L of the latent, all that is cached" in text
    assert "  --patience=None (int or None)\n" in text
    assert "  --dtype='auto' (one of 'auto', 'float32', 'bfloat16', 'float16')\n" in text


# ------------------------------------------------------------------------------------------------ models and their runs

SMALL = {"vocab_size": 31, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}


def make_run(folder: Path, name: str) -> dict[str, Any]:
    """A run folder with ckpt.pt; returns what it holds."""
    config = MODELS[name][0](**SMALL, **({"kv_dim": 8} if name == "mla" else {}))
    checkpoint = checkpoint_of(name, build_model(name, config))
    folder.mkdir(exist_ok=True)
    torch.save(checkpoint, folder / "ckpt.pt")
    return checkpoint


@pytest.mark.parametrize("name", ["pythia", "mla"])
def test_a_run_is_loaded_as_it_was_saved(tmp_path: Path, name: str) -> None:
    saved = make_run(tmp_path, name)
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        model, checkpoint = load_source(str(source))
        assert model_args(model.config) == saved["model_args"]
        torch.testing.assert_close(model.state_dict(), saved["model"], atol=0, rtol=0)
        assert checkpoint is not None
        assert checkpoint["iter_num"] == 3
        assert type(model) is MODELS[name][1]


def test_huggingface_weights_are_a_source(tmp_path: Path) -> None:
    baseline = build_model("pythia", PythiaConfig(**SMALL))
    baseline.save_pretrained(tmp_path)
    model, checkpoint = load_source(str(tmp_path))
    assert checkpoint is None
    torch.testing.assert_close(model.state_dict(), baseline.state_dict(), atol=0, rtol=0)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"{path} holds no checkpoint"):
            read_checkpoint(path)
    with pytest.raises(InputError, match=r"nowhere.* is no local folder"):
        load_source(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"device='{name}' cannot be used here"):
        pick_device(name)


# -------------------------------------------------------------------------------------------------------- exit statuses


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("one\ntwo"), 2, "error: one two\n"),
        (
            OSError(errno.ENOSPC, "No space left", "out/ckpt.pt"),
            2,
            "error: No space left: out/ckpt.pt; what was complete",
        ),
        (torch.OutOfMemoryError("not enough memory"), 2, "error: out of memory: a smaller batch or model is needed"),
        (InvalidCxxCompiler(), 2, "error: torch.compile finds no C++ compiler: install one"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_of_the_user_end_in_a_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_info:
        run(main)
    assert exit_info.value.code == status
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == len(line.splitlines())


@pytest.mark.parametrize("error", [ValueError("a defect"), FileNotFoundError(errno.ENOENT, "not there")])
def test_errors_of_the_project_are_not_hidden(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error), match=r"a defect|not there"):
        run(main)
