"""A trained run as a folder that transformers and lm-evaluation-harness load, on a machine without this project.

    python -m tools.export out/mla_kv128-laptop exported/mla_kv128 --push_to_hub=you/mla-kv128

The folder has the weights, the tokenizer, a model card and, but for the baseline, the code of the model.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configurator import load_source, parse_settings
from eval import count_parameters, evaluate_cache
from kit.files import InputError, refusing, run
from kit.report import format_summary
from kit.text import write_tokenizer

CARD = Path(__file__).with_name("card.md").read_text()
LIMITS = "\nIts code is in this folder. Padding on the left is refused: prompts of a batch have to be equally long."


@dataclass(frozen=True)
class ExportSettings:
    """tools/export.py"""

    push_to_hub: str | None = None  # upload the folder as well, as this repository of yours
    data_dir: str = "data"  # where the tokenizer is kept


def model_card(name: str, model: Any, checkpoint: dict[str, Any] | None, figures: dict[str, Any], where: str) -> str:
    """What a reader of the folder has to know: what it is, what it was trained on, its figures, how to load it."""
    origin = "Its weights are Hugging Face's."
    if checkpoint:
        seen, config = checkpoint["tokens_seen"], checkpoint["config"]
        origin = f"Trained on {seen:,} tokens of {config['dataset']} by commit {checkpoint['commit'] or 'not known'}"
        origin += f" in windows of {config['block_size']} tokens." if "block_size" in config else ", phase 1 alone."
    label, trust, limits = str(type(model).__doc__).splitlines()[0], ", trust_remote_code=True", LIMITS
    if type(model).__name__ == "PythiaModel":
        label, trust, limits = "A GPT-NeoX, as Pythia is.", "", ""
    facts = {"name": name, "label": label, "origin": origin, "figures": format_summary(figures), "where": where}
    return CARD.format(**facts, trust=trust, limits=limits)


def main() -> None:
    settings, arguments = parse_settings(ExportSettings, sys.argv[1:], takes="RUN FOLDER")
    if len(arguments) != 2:
        raise InputError("name a run and a new folder: python -m tools.export out/mla_kv128-laptop exported/mla_kv128")
    source, folder = arguments[0], Path(arguments[1])
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} holds something already: name a new folder, or remove it")
    model, checkpoint = load_source(source)
    summary = Path(source, "summary.json")
    with refusing(f"{summary} is damaged", "remove it, or train the run again", (ValueError, TypeError)):
        figures = dict(json.loads(summary.read_text())) if summary.is_file() else {}
    figures |= {**count_parameters(model), **evaluate_cache(model)}
    figures.pop("checkpoint", None)  # a path of this machine
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
        whole = Path(temporary, folder.name)
        model.save_pretrained(whole)
        tokenizer = checkpoint["data"]["tokenizer"] if checkpoint else "neox"
        write_tokenizer(tokenizer, settings.data_dir, whole, model.config.max_position_embeddings)
        where = settings.push_to_hub or str(folder)
        (whole / "README.md").write_text(model_card(folder.name, model, checkpoint, figures, where))
        whole.replace(folder)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if settings.push_to_hub:
        from huggingface_hub import create_repo, upload_folder

        with refusing(f"{folder} is whole, but {where} cannot be pushed"):
            create_repo(where, exist_ok=True)
            print(upload_folder(repo_id=where, folder_path=folder))


if __name__ == "__main__":
    run(main)
