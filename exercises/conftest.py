"""Each check, test_03.py, gets the file with its number, 03_sliding_window.py, as `attempt`."""

from types import ModuleType

import pytest

from exercises.check import load


@pytest.fixture
def attempt(request: pytest.FixtureRequest) -> ModuleType:
    """What the reader wrote."""
    (path,) = request.path.parent.glob(f"{request.path.stem.removeprefix('test_')}_*.py")
    return load(path)
