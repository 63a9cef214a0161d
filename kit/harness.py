"""Tasks of lm-evaluation-harness (Gao et al. 2024, doi 10.5281/zenodo.12608602), scored on exported models.

The harness reads an exported folder with its own hf model, so that its numbers are those of its own command line:

    lm_eval run --model hf --model_args pretrained=FOLDER,trust_remote_code=True,max_length=512 --tasks wikitext
"""

import difflib
import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.files import InputError, one_line, refusing
from kit.text import write_tokenizer

INSTALL = "pip install -r requirements-eval.txt"
VERSION = "0.4."  # what its version begins with


@dataclass(frozen=True)
class Harness:
    names: list[str]  # of the harness's tasks that can be measured
    not_measured: dict[str, str]  # the others, and why
    manager: Any = None  # its index of tasks

    def score(self, model: Any, tokenizer: str, data_dir: str, block_size: int, batch_size: int) -> dict[str, Any]:
        """The figures of a model, by task and metric, in windows of at most block_size tokens."""
        figures: dict[str, Any] = {"not_measured": self.not_measured} if self.not_measured else {}
        if not self.names:
            return figures
        from lm_eval import simple_evaluate

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            write_tokenizer(tokenizer, data_dir, Path(folder), model.config.max_position_embeddings)
            theirs = {"pretrained": folder, "trust_remote_code": True, "max_length": block_size}
            options = {"batch_size": batch_size, "device": str(model.head_weight.device), "bootstrap_iters": 0}
            with refusing(f"{', '.join(self.names)} cannot be scored"):  # a task's templates are run only now
                results = simple_evaluate("hf", theirs, tasks=self.names, task_manager=self.manager, **options)
        figures["harness"] = {
            f"{task} {metric.removesuffix(',none')}": value
            for task, metrics in results["results"].items()
            for metric, value in metrics.items()
            if isinstance(value, float) and "stderr" not in metric
        }
        return figures


def find_tasks(names: list[str], own: Sequence[str], include_path: str | None) -> Harness:
    """The harness's tasks of these names, those of task files in include_path before its own.

    Where the harness or the hub is missing a task is not measured. Raises InputError, with the nearest name, also of
    the project's own, if there is no such task, and if its file or its local data are broken.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"include_path={include_path!r} is no folder")
    if not names:
        return Harness([], {})
    try:
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError:
        for name in names:
            if near := difflib.get_close_matches(name, own, 1, cutoff=0.8):
                raise InputError(f"no task {name!r}, did you mean {near[0]!r}?") from None
        return Harness([], dict.fromkeys(names, f"lm-evaluation-harness is not installed: {INSTALL}"))
    if not (version := importlib.metadata.version("lm_eval")).startswith(VERSION):
        raise InputError(f"lm-evaluation-harness is {version}, {VERSION}* is needed: {INSTALL}")
    for file in Path(include_path).rglob("*.yaml") if include_path else ():  # its index passes over broken ones
        with refusing(f"{file} cannot be read"):
            load_yaml(file, resolve_func=False)
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if set(names) - set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)  # its own 15,000 take half a minute to list
    found, not_measured = [], {}
    for name in names:
        if name not in manager.all_tasks:
            (near,) = difflib.get_close_matches(name, [*own, *manager.all_tasks], 1, cutoff=0)
            raise InputError(f"no task {name!r}, did you mean {near!r}?")
        try:
            manager.load([name])
            found.append(name)
        except ConnectionError as error:
            not_measured[name] = one_line(error)
        except Exception as error:  # of YAML, of templates, of datasets' readers
            raise InputError(f"task {name!r} cannot be read ({type(error).__name__}: {one_line(error)})") from None
    return Harness(found, not_measured, manager)
