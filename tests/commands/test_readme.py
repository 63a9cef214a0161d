"""README.md and docs/: every command can be typed, every link leads somewhere; docs/variant.md has its own test."""

import contextlib
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from configurator import parse_settings, parse_train
from eval import EvalSettings
from prep import PrepSettings
from sample import SampleSettings
from tools.bench import BenchSettings
from tools.compare import CompareSettings
from tools.export import ExportSettings
from train import PHASES

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train.py": partial(parse_train, phases=PHASES),
    "prep.py": partial(parse_settings, PrepSettings),
    "eval.py": partial(parse_settings, EvalSettings, takes="RUN"),
    "sample.py": partial(parse_settings, SampleSettings, takes="RUN"),
    "tools.bench": partial(parse_settings, BenchSettings),
    "tools.compare": partial(parse_settings, CompareSettings),
    "tools.export": partial(parse_settings, ExportSettings, takes="RUN FOLDER"),
}


def prose(page: Path) -> str:
    """The text between the blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of its shell blocks, and what the text between them says to type."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    return "".join(blocks).splitlines() + re.findall(r"`((?:python|make|pip|pytest|torchrun) [^`]+)`", prose(page))


def headings(page: Path) -> list[str]:
    """What GitHub makes of its headings, to be linked to."""
    lines = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines]


@pytest.mark.parametrize("command", [c for page in PAGES if page.stem != "variant" for c in commands(page)])
def test_a_command_can_be_typed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    match shlex.split(command.removeprefix("!"), comments=True):
        case ["make", target, *variables]:
            makefile = Path("Makefile").read_text()
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)
            assert all(f"\n{variable.partition('=')[0]} ?=" in makefile for variable in variables)
        case ["pip", "install", "-r", file] | ["pytest", file, _]:
            assert Path(file).is_file()
        case ["python", file] if file.startswith(("model_", "pythia_base")):
            assert Path(file).is_file()
        case ["torchrun", "--standalone", _, script, *words] | ["python", "-m", script, *words]:
            PARSERS[script](words)
        case ["python", script, *words]:
            with contextlib.suppress(SystemExit):  # of --help
                PARSERS[script](words)
        case _:
            pytest.fail("no command that is known here")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https:)([^)]*)\)", prose(page)):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
