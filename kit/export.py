"""A model as a folder that transformers, and through it lm-evaluation-harness, loads without this project."""

import json
from pathlib import Path
from typing import Any

from kit.files import InputError, one_line
from kit.text import neox_json


def export_model(model: Any, tokenizer: str, data_dir: str, folder: Path) -> None:
    """Write the model and its tokenizer, 'neox' or 'gpt2', into a folder. Raises InputError if that cannot be had."""
    model.save_pretrained(folder)
    if tokenizer == "gpt2":
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained("gpt2").save_pretrained(folder)
        except OSError as error:
            raise InputError(f"the files of gpt2's tokenizer cannot be had ({one_line(error)[:150]})") from None
        return
    (folder / "tokenizer.json").write_bytes(neox_json(data_dir))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "pad_token": "<|padding|>",
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
