"""docs/variant.md, 'Add your own variant', followed to the letter."""

import json
import re
import shutil
import sys
from pathlib import Path

from conftest import ROOT, TINY_LAYER, Command


def insert(path: Path, lines: str, table: str) -> None:
    """Put the import before that of pythia_base and the row at the end of the table that opens with a line."""
    added, row = lines.splitlines()
    before, opening, rows = path.read_text().partition(table)
    before = before.replace("from pythia_base import", f"{added}\nfrom pythia_base import", 1)
    path.write_text(before + opening + rows.replace("\n}\n", f"\n{row}\n}}\n", 1))


def move_in() -> None:
    """Forget the project where it was imported from, and take the one in this folder."""
    ours = {path.stem for path in [*ROOT.glob("*.py"), ROOT / "kit", ROOT / "tools", *ROOT.glob("tests/**/*.py")]}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [str(Path.cwd()), *(path for path in sys.path if not path.startswith(str(ROOT / "tests")))]


def test_the_variant_of_the_docs(data_dir: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "variant.md").read_text()
    architecture, row, config, line = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)

    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml")]:
        shutil.copy(path, tmp_path)
    for name in ("config", "tests", "kit", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cache").symlink_to(data_dir / "cache")
    (tmp_path / "data" / "mini").symlink_to(data_dir / "own")
    (tmp_path / "config" / "laptop.py").write_text(TINY_LAYER.format(max_iters=4))

    (tmp_path / "model_mqa.py").write_text(architecture)
    insert(tmp_path / "configurator.py", row, "MODELS: ")
    (tmp_path / "config" / "mqa.py").write_text(config)
    insert(tmp_path / "tests" / "equations" / "test_models.py", line, "CONFIGS: ")
    outputs = [Command(command.split()[1:], tmp_path, move_in).succeed() for command in commands.splitlines()]
    summary = json.loads((tmp_path / "out" / "mqa-laptop" / "summary.json").read_text())
    assert summary["steps"] == 20
    assert re.search("3,072.0 a token, 87.5% less than the baseline", outputs[0])
    assert re.search(r"[1-9][0-9] passed", outputs[2])
