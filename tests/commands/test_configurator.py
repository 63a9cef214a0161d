"""Settings from files and command lines, the models built from them, and what is said of bad input."""

import errno
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch._inductor.exc import InvalidCxxCompiler

from configurator import MODELS, Job, Text, baseline_cache_bytes, check, parse_settings
from configurator import parse_train as parse_command
from eval import EvalSettings
from kit.files import InputError, refusing, run
from kit.weights import model_args, settable
from model_context import ContextKVConfig
from model_mla import MLAConfig
from prep import PrepSettings
from pythia_base import PythiaConfig
from sample import SampleSettings
from train import PHASES, LMSettings, Phase1Settings

CONFIG = ROOT / "config"
MODEL_CONFIGS = [config for config, _ in MODELS.values()]
SETTINGS = [*PHASES.values(), PrepSettings, EvalSettings, SampleSettings]


def parse_train(*argv: object) -> Job:
    return parse_command(list(map(str, argv)), PHASES)


def parse_files(folder: Path, *texts: str, overrides: tuple[str, ...] = ()) -> Job:
    """parse_train with config files of these texts, named a.py, b.py, ..."""
    paths = [folder / f"{name}.py" for name in "abc"[: len(texts)]]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return parse_train(*paths, *overrides)


def test_from_the_baseline_to_the_command_line_the_last_word_counts(tmp_path: Path) -> None:
    assert parse_train() == Job(LMSettings(), PythiaConfig(), name="pythia", parent="", passed_over=[])
    assert parse_train("--model=mla").name == "mla", "what a baseline then finds in out/pythia is its own"
    texts = ["model = 'mla'\nkv_dim = 64\nbatch_size = 2", "max_iters = 1\nseed = 4", "max_iters = 3"]
    job = parse_files(tmp_path, *texts, overrides=("--seed=5", "--kv-dim=32", "--kv_dim=16"))
    assert job.settings == LMSettings(model="mla", batch_size=2, max_iters=3, seed=5)
    assert (job.model_config, job.name) == (MLAConfig(kv_dim=16), "a-b-c")
    job = parse_files(tmp_path, "model = 'mla'", "model = 'context'", overrides=("--model=pythia",))
    assert (job.settings, job.model_config) == (LMSettings(), PythiaConfig())
    assert parse_settings(PrepSettings, ["--seed=3"]) == (PrepSettings(seed=3), [])
    runs = ["out/a", "--batch_size=2", "out/b"]
    assert parse_settings(EvalSettings, runs, takes="RUN") == (EvalSettings(batch_size=2), ["out/a", "out/b"])


def test_an_experiment_wins_over_a_layer_in_any_order_and_the_command_line_over_both(tmp_path: Path) -> None:
    picked: dict[str, Any] = {"model": "context", "phase": "phase1"}
    experiment, layer = "phase = 'phase1'\nmodel = 'context'\nseed = 1\nlearning_rate = 0.3", "seed = 2\nbatch_size = 7"
    first, last = parse_files(tmp_path, experiment, layer), parse_files(tmp_path, layer, experiment)
    assert first.settings == last.settings == Phase1Settings(**picked, seed=1, learning_rate=0.3, batch_size=7)
    assert first.passed_over == last.passed_over == ["seed"]
    typed = parse_files(tmp_path, experiment, layer, overrides=("--seed=3",))
    assert (typed.settings.seed, typed.passed_over) == (3, [])
    assert parse_files(tmp_path, experiment, "seed = 1").passed_over == []  # the same
    other = parse_files(tmp_path, "model = 'pythia'", "kv_dim = 64\nmax_iters = 3\nnum_tokens = 4")
    assert (other.settings, other.passed_over) == (LMSettings(max_iters=3), ["kv_dim", "num_tokens"])


@pytest.mark.parametrize("layer", ["laptop", "pile"])
@pytest.mark.parametrize("name", [path.stem for path in CONFIG.glob("*.py")])
def test_config_files_parse_alone_and_below_a_layer(name: str, layer: str) -> None:
    alone, narrow = parse_train(CONFIG / f"{name}.py"), parse_train(CONFIG / f"{layer}.py", CONFIG / f"{name}.py")
    assert alone.passed_over == []
    if "phase1" in name or "cascade" in name:
        own = 0.001 if "phase2" in name else 0.003
        assert alone.settings.learning_rate == narrow.settings.learning_rate == own
    if layer == "laptop" and alone.settings.width_divisor == 1:
        assert narrow.model_config.hidden_size * 4 == alone.model_config.hidden_size


def test_what_is_typed_becomes_what_it_stands_for(tmp_path: Path) -> None:
    """A divisor divides every width and nothing else, a list is a config's tuple, a config its run under the layers."""
    config = parse_train(CONFIG / "mla_kv128.py", "--width_divisor=4").model_config
    assert config == MLAConfig(hidden_size=128, intermediate_size=512, kv_dim=32)
    assert baseline_cache_bytes(config, 1) == 6 * 2 * 128 * 4
    config = parse_train("--model=context_kv", "--context_layers=[2,0]").model_config
    assert config == ContextKVConfig(context_layers=(2, 0))
    assert ContextKVConfig(**json.loads(json.dumps(model_args(config)))) == config, "also out of a checkpoint"
    job = parse_files(tmp_path, "phase = 'phase2'\nmodel = 'context'\ninit_from = 'config/phase1.py'", "seed = 3")
    assert job.settings.init_from == "out/phase1-b"
    assert job.parent == f"python train.py config/phase1.py {tmp_path / 'b.py'}"


Mode = Literal["auto", "fast"]
Share = Annotated[float, Field(ge=0, lt=1)]
GOOD: list[tuple[Any, Any, Any]] = [
    (Text("1"), float, 1.0), (Text("-1e-3"), float, -0.001), (Text("1_000"), int, 1000), (Text("3"), PositiveInt, 3),
    (Text("None"), int | None, None), (Text("none"), str | None, None), (Text("None"), str, "None"),
    (Text("true"), bool, True), (Text("False"), bool | None, False), (True, bool, True),  # a bare --key
    (Text("12"), str, "12"), (Text("1e5"), str | None, "1e5"), (Text("[1]"), str, "[1]"), (Text("a = b"), str, "a = b"),
    (Text(""), str, ""), (Text("fast"), Mode, "fast"), (Text("[1, 2]"), tuple[int, ...], (1, 2)),
    (1, float, 1.0), (None, float | None, None), ((0.5, 1), list[float], [0.5, 1.0]), (0, NonNegativeFloat, 0.0),
]  # fmt: skip
BAD: list[tuple[Any, Any, str]] = [  # more of them, as typed: tests/damage/test_bad_input.py
    (Text("1e3"), int, "integer"), (Text("True"), int, "integer"), (True, int, "int"), (Text(""), int, "integer"),
    (Text("None"), int, "integer"), (Text("1e999"), float, "finite"), (Text("True"), float, "number"),
    (True, float, "number"), (1, bool, "boolean"), (Text("perhaps"), bool | None, "boolean"),
    ([], Mode, "'auto' or 'fast'"), (Text("[1, 2"), list[int], "JSON"), (Text("1"), list[int], "array"),
    (1, str, "string"), (True, str, "string"), (-0.5, NonNegativeFloat, "equal to 0"), (1, Share, "less than 1"),
    (Text("nan"), float, "finite"), (Text("0"), PositiveInt, "greater than 0"),
    (Text("9" * 5000), int, "has to be"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "hint", "expected"), GOOD)
def test_values_get_the_type_of_their_setting(value: Any, hint: Any, expected: Any) -> None:
    checked = check("key", value, hint)
    assert (checked, type(checked)) == (expected, type(expected))


@pytest.mark.parametrize(("value", "hint", "named"), BAD, ids=range(len(BAD)))
def test_values_of_another_type_or_out_of_range_are_refused(value: Any, hint: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"key=.{{,100}}{re.escape(named)}"):
        check("key", value, hint)


KEYS = st.sampled_from(sorted({name for cls in [*SETTINGS, *MODEL_CONFIGS] for name in settable(cls)}))
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers() | st.text())
TYPED = st.text() | VALUES.map(repr) | st.sampled_from(["9" * 5000, "(" * 500, "{[]}", "1e999"])
ARGUMENTS = st.lists(st.builds("--{}={}".format, KEYS | st.text(), TYPED) | KEYS.map("--{}".format), max_size=4)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ARGUMENTS, st.sampled_from(SETTINGS), st.dictionaries(KEYS, VALUES, max_size=4))
def test_a_command_line_and_a_config_file_parse_or_are_refused(
    tmp_path: Path, arguments: list[str], settings_class: type, values: dict[str, Any]
) -> None:
    """Whatever is typed, nothing but InputError is raised."""
    with suppress(InputError):
        parse_train(*arguments)
    with suppress(InputError):
        parse_settings(settings_class, arguments)
    with suppress(InputError):
        parse_files(tmp_path, "".join(f"{key} = {value!r}\n" for key, value in values.items()))


@pytest.mark.parametrize("cls", [None, PrepSettings, EvalSettings, SampleSettings])
def test_help_lists_every_key_once_as_the_source_has_it(cls: type | None, capsys: pytest.CaptureFixture[str]) -> None:
    """With type, default and comment."""
    with pytest.raises(SystemExit, match="0"):
        parse_settings(cls, ["--seed=2", "-h"]) if cls else parse_train("--seed=2", "--help")
    text = capsys.readouterr().out
    shown = re.findall(r"^  --(\w+)=\S.* \(.+\)\n      \S+", text, re.MULTILINE)
    assert len(shown) == len(set(shown)) == text.count("\n  --")
    assert set(shown) == {name for c in ([cls] if cls else [*PHASES.values(), *MODEL_CONFIGS]) for name in settable(c)}
    if not cls:
        assert "  --kv_dim=128 (int)\n      width L of the latent, all that is cached" in text
        assert '  --dtype="auto" (Literal["auto", "float32", "bfloat16", "float16"])\n' in text


ENDS = [
    (InputError("one\ntwo"), 2, "error: one two\n"),
    (OSError(errno.ENOSPC, "No space left", "out/ckpt.pt"), 2, "error: No space left: out/ckpt.pt; what was complete"),
    (torch.OutOfMemoryError("not enough memory"), 2, "error: out of memory: a smaller batch or model is needed"),
    (InvalidCxxCompiler(), 2, "error: torch.compile finds no C++ compiler: install one"),
    (KeyboardInterrupt(), 130, ""),
    (ValueError("a defect of the project"), None, ""),
    (FileNotFoundError(errno.ENOENT, "not there"), None, ""),
]


@pytest.mark.parametrize(("error", "status", "line"), ENDS)
def test_errors_of_the_user_end_in_a_line_and_a_status_others_are_not_hidden(
    error: BaseException, status: int | None, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit if status else type(error)) as end:
        run(main)
    assert getattr(end.value, "code", None) == status
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == len(line.splitlines())


def test_what_is_no_other_librarys_error_is_not_called_one() -> None:
    for error in (InputError("no such run"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(error)) as found, refusing("a file cannot be read"):
            raise error
        assert found.value is error
