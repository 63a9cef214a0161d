"""Every check of exercises/ passes on the right attempt, and says what is wrong with the obvious wrong ones."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, Command

from exercises.check import load

EXERCISES, SOLUTIONS = ROOT / "exercises", ROOT / "tests" / "solutions"
NAMES = sorted(path.stem for path in EXERCISES.glob("0*.py"))


class WrongAttempt(NamedTuple):
    """An edit of the right attempt. Of exercise 8 it is the bug that is planted."""

    title: str
    right: str
    wrong: str
    complaint: str

    @property
    def name(self) -> str:
        return next(name for name in NAMES if name.startswith(self.title[:2]))


def read_wrong_attempts() -> list[WrongAttempt]:
    """Blocks of a title and lines that begin with - for right, + for wrong, ? for what the check has to say."""
    attempts = []
    for block in (SOLUTIONS / "wrong_attempts.txt").read_text().strip().split("\n\n"):
        title, *lines = block.splitlines()
        parts = ("\n".join(line[1:] for line in lines if line[0] == mark) for mark in "-+?")
        attempts.append(WrongAttempt(title, *parts))
    return attempts


WRONG = read_wrong_attempts()
BUGS = [attempt for attempt in WRONG if attempt.title.startswith("08")]


def as_it_comes(name: str) -> str:
    return (EXERCISES / f"{name}.py").read_text()


def right_attempt(name: str) -> str:
    """The source of a solution; of exercise 8, the exercise without its bugs."""
    if not name.startswith("08"):
        return (SOLUTIONS / f"{name[3:]}.py").read_text()
    source = as_it_comes(name)
    for bug in BUGS:
        source = edit(source, bug.wrong, bug.right)
    return source


def edit(source: str, old: str, new: str) -> str:
    assert old in source
    return source.replace(old, new)


def complaints(name: str, source: str, folder: Path) -> Iterator[str]:
    """What the check says of an attempt, test by test."""
    path = folder / f"{name}.py"
    path.write_text(source)
    attempt, check = load(path), load(EXERCISES / f"test_{name[:2]}.py")
    for test in [value for key, value in vars(check).items() if key.startswith("test_")]:
        try:
            test(attempt)
        except AssertionError as error:
            yield str(error)


@pytest.mark.parametrize("name", NAMES)
def test_the_right_attempt_passes_and_an_exercise_as_it_comes_does_not(name: str, tmp_path: Path) -> None:
    """All but the last one start empty; that one has a complaint for each of its bugs."""
    assert list(complaints(name, right_attempt(name), tmp_path)) == []
    if name.startswith("08"):
        assert len(list(complaints(name, as_it_comes(name), tmp_path))) == len(BUGS)
    else:
        with pytest.raises(NotImplementedError):
            next(complaints(name, as_it_comes(name), tmp_path))


@pytest.mark.parametrize("wrong", WRONG, ids=lambda attempt: attempt.title)
def test_a_wrong_attempt_is_told_what_is_wrong(wrong: WrongAttempt, tmp_path: Path) -> None:
    """Among the things that the check complains of."""
    source = edit(right_attempt(wrong.name), wrong.right, wrong.wrong)
    assert any(wrong.complaint in complaint for complaint in complaints(wrong.name, source, tmp_path))


def test_the_command_checks_the_file_of_the_same_number(tmp_path: Path) -> None:
    shutil.copytree(EXERCISES, tmp_path / "exercises", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "exercises" / "04_absorbed.py").write_text(right_attempt("04_absorbed"))
    assert "5 passed" in Command(["-m", "pytest", "exercises/test_04.py"], tmp_path).succeed()


def test_every_exercise_has_a_page_and_a_line() -> None:
    for name in NAMES:
        page = (EXERCISES / f"{name}.md").read_text()
        assert f"pytest exercises/test_{name[:2]}.py" in page
        assert f"]({name}.md)" in (EXERCISES / "README.md").read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (EXERCISES / link).exists(), link
