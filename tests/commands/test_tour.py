"""tour.ipynb: its first half runs here, all of it in make stress; what is saved in it is of a whole run."""

from pathlib import Path
from typing import Any

import nbformat
from conftest import ROOT, Command
from nbclient import NotebookClient

SECOND_HALF = "## Train three of them"


def test_the_tour_runs(is_long: bool, tmp_path: Path) -> None:
    """Every cell has asserts of its own."""
    tour: Any = nbformat.read(ROOT / "tour.ipynb", as_version=4)
    if is_long:
        NotebookClient(tour, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
        return
    half = [cell.source.startswith(SECOND_HALF) for cell in tour.cells].index(True)
    cells = [cell.source for cell in tour.cells[:half] if cell.cell_type == "code"]
    (tmp_path / "half.py").write_text("\n\n".join([*cells, "print('to the end')"]))
    assert "to the end" in Command([str(tmp_path / "half.py")], ROOT).succeed()


def test_the_tours_outputs_are_those_of_one_run() -> None:
    """From its first cell to its last, without an error, and small enough to be looked at anywhere."""
    cells = [cell for cell in nbformat.read(ROOT / "tour.ipynb", as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for cell in cells for output in cell.outputs} == {"stream", "display_data"}
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 6
    assert (ROOT / "tour.ipynb").stat().st_size < 500_000
