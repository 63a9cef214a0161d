"""What cannot be used, typed as a person would: one line that names it, status 2, nothing executed, nothing written.

A case is a command line, words of the message, and the files that it needs. All run in one folder, the workshop, that
holds good and damaged data sets, runs and weights.
"""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIRST_BLOCK, ROOT, checkpoint_of
from safetensors.torch import save_file
from test_pythia import Malicious, truncate
from test_train import SHORT, TINY, run_training

import eval as evaluation
import prep
import sample
import train
from kit.files import run
from kit.runs import model_args
from kit.text import get_reversal_pairs
from pythia_base import PythiaConfig, PythiaModel
from tools import bench

SCRIPTS = {"train.py": train, "eval.py": evaluation, "sample.py": sample, "bench.py": bench, "prep.py": prep}
DATA = ["--data_dir=data", "--dataset=own", "--device=cpu"]
NARROW = shlex.join([*TINY, *SHORT, "--dtype=float32", *DATA])
NARROW_CONTEXT = f"{NARROW} --context_dim=8"
PHASE_1 = f"{shlex.join([*TINY[:4], *DATA])} --context_dim=8 --num_tokens=500 --batch_size=500 --max_iterations=1"

Damage = Callable[[Path], Any]


# ------------------------------------------------------------------------------------------------- damaged data sets


def edit_meta(**changes: Any) -> Damage:
    """Keys of meta.json changed, or taken away where the change is None."""

    def edit(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text()) | changes
        (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))

    return edit


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def flip_a_bit(name: str) -> Damage:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return flip


def store_as_int32(folder: Path) -> None:
    tokens = np.fromfile(folder / "train.bin", dtype=np.uint16)
    tokens.astype(np.int32).tofile(folder / "train.bin")


def swap_splits(folder: Path) -> None:
    for one, other in (("train.bin", "val.bin"), ("train_doc_index.npy", "val_doc_index.npy")):
        (folder / one).rename(folder / "between")
        (folder / other).rename(folder / one)
        (folder / "between").rename(folder / other)


REMAKE = "make it again with prep.py and --overwrite=True"
NO_MATCH = f"does not match its meta.json: {REMAKE}"
SETS: dict[str, tuple[Damage, str]] = {
    "no-meta": (lambda folder: (folder / "meta.json").unlink(), "holds no token files; make them with: python prep.py"),
    "empty-meta": (write("meta.json", b""), f"meta.json cannot be read: {REMAKE}"),
    "binary-meta": (write("meta.json", bytes(range(128, 256))), f"meta.json cannot be read: {REMAKE}"),
    "half-meta": (lambda folder: truncate(folder / "meta.json"), f"meta.json cannot be read: {REMAKE}"),
    "list-for-meta": (write("meta.json", b"[]"), f"meta.json cannot be read: {REMAKE}"),
    "no-files-in-meta": (edit_meta(files=None), f"meta.json cannot be read: {REMAKE}"),
    "no-max-id": (edit_meta(max_id=None), f"meta.json cannot be read: {REMAKE}"),
    "max-id-a-text": (edit_meta(max_id="many"), f"meta.json cannot be read: {REMAKE}"),
    "no-tokenizer": (edit_meta(tokenizer=None), f"meta.json cannot be read: {REMAKE}"),
    "unknown-tokenizer": (edit_meta(tokenizer="bpe"), f"meta.json cannot be read: {REMAKE}"),
    "no-train": (lambda folder: (folder / "train.bin").unlink(), f"train.bin {NO_MATCH}"),
    "no-val": (lambda folder: (folder / "val.bin").unlink(), f"val.bin {NO_MATCH}"),
    "no-index": (lambda folder: (folder / "val_doc_index.npy").unlink(), f"val_doc_index.npy {NO_MATCH}"),
    "truncated": (lambda folder: truncate(folder / "train.bin"), f"train.bin {NO_MATCH}"),
    "odd": (lambda folder: write("train.bin", (folder / "train.bin").read_bytes()[:-1])(folder), NO_MATCH),
    "empty": (write("train.bin", b""), f"train.bin {NO_MATCH}"),
    "int32": (store_as_int32, f"train.bin {NO_MATCH}"),
    "swapped": (swap_splits, NO_MATCH),
    "one-bit": (flip_a_bit("train.bin"), f"train.bin {NO_MATCH}"),
    "one-bit-of-val": (flip_a_bit("val.bin"), f"val.bin {NO_MATCH}"),
    "one-bit-of-index": (flip_a_bit("train_doc_index.npy"), f"train_doc_index.npy {NO_MATCH}"),
    "ids-too-large": (edit_meta(max_id=60_000), "holds token id 60000, outside the model's 50304 rows"),
}


def store_as_index(make: Callable[[Path], Any]) -> Damage:
    """Another index of the validation documents, and its digest in meta.json."""

    def store(folder: Path) -> None:
        np.save(folder / "val_doc_index.npy", np.array([make(folder)]), allow_pickle=True)
        described = {"val_doc_index.npy": prep.describe(folder / "val_doc_index.npy")}
        edit_meta(files=json.loads((folder / "meta.json").read_text())["files"] | described)(folder)

    return store


INDICES: dict[str, tuple[Damage, str]] = {
    "malicious-index": (store_as_index(lambda folder: Malicious(folder / "executed")), "is no document index"),
    "index-of-numbers": (store_as_index(lambda _: 1.5), "is no document index"),
}


# ------------------------------------------------------------------------------------------------------ damaged runs

SMALL = {"vocab_size": 31, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}


def small_checkpoint(**changes: Any) -> dict[str, Any]:
    """What a run of a tiny baseline saves, as far as others read it."""
    return checkpoint_of("pythia", PythiaModel(PythiaConfig(**SMALL)), **{"model_args": SMALL, **changes})


def save(make: Callable[[Path], Any]) -> Damage:
    return lambda folder: torch.save(make(folder), folder / "ckpt.pt")


def changed(**changes: Any) -> Damage:
    return save(lambda _: small_checkpoint(**changes))


def without(*keys: str) -> Damage:
    return save(lambda _: {k: v for k, v in small_checkpoint().items() if k not in keys})


def changed_weights(**changes: Any) -> Damage:
    return changed(model=PythiaModel(PythiaConfig(**SMALL)).state_dict() | changes)


VERSION, UNREADABLE = "is no checkpoint of this version of the project: train it again", "truncated, or no checkpoint"
OTHER = "is of another version of its model"
RUNS: dict[str, tuple[Damage, str]] = {
    "missing": (lambda folder: None, "holds neither a checkpoint nor Hugging Face weights"),
    "empty": (write("ckpt.pt", b""), UNREADABLE),
    "text": (write("ckpt.pt", "Ünï©ødé, no checkpoint".encode()), UNREADABLE),
    "binary": (write("ckpt.pt", bytes(range(256)) * 9), UNREADABLE),
    "half": (lambda folder: truncate(Path(changed()(folder) or folder / "ckpt.pt")), UNREADABLE),
    "malicious": (save(lambda folder: Malicious(folder / "executed")), UNREADABLE),
    "malicious-inside": (save(lambda folder: small_checkpoint(commit=Malicious(folder / "executed"))), UNREADABLE),
    "whole-model": (save(lambda _: PythiaModel(PythiaConfig(**SMALL))), UNREADABLE),
    "list": (save(lambda _: [1, 2]), VERSION),
    "bare-weights": (save(lambda _: PythiaModel(PythiaConfig(**SMALL)).state_dict()), VERSION),
    "no-config": (without("config"), VERSION),
    "no-data": (without("data"), VERSION),
    "no-lineage": (without("parents", "tokens_seen"), VERSION),
    "other-model": (changed(config={"model": "gpt", "phase": "lm"}), VERSION),
    "unhashable-model": (changed(config={"model": [], "phase": "lm"}), VERSION),
    "no-phase": (changed(config={"model": "pythia", "dataset": "own", "seed": 1}), VERSION),
    "no-data-tokenizer": (changed(data={}), VERSION),
    "list-for-weights": (changed(model=[1]), VERSION),
    "no-weights": (changed(model={}), f"{OTHER}: ...Missing key"),
    "text-for-weights": (changed_weights(**{"embed_in.weight": "none"}), OTHER),
    "one-shape": (changed_weights(**{"embed_in.weight": torch.zeros(31, 17)}), f"{OTHER}: ...size mismatch"),
    "one-too-many": (changed_weights(extra=torch.zeros(1)), f"{OTHER}: ...Unexpected key"),
    "other-keys": (changed(model_args={"n_embd": 4}), OTHER),
    "mistyped-size": (changed(model_args=SMALL | {"num_heads": "8"}), OTHER),
    "numbered-keys": (changed(model_args={1: 2}), OTHER),
    "other-size": (changed(model_args=SMALL | {"vocab_size": 30}), OTHER),
    "absurd-size": (changed(model_args=SMALL | {"vocab_size": 10**15}), OTHER),
    "no-size": (changed(model_args=SMALL | {"num_layers": -1}), OTHER),
}


# --------------------------------------------------------------------------------------------- damaged weight folders


def edit_config(**changes: Any) -> Damage:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def pickled(make: Callable[[Path], Any]) -> Damage:
    def swap(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(make(folder), folder / "pytorch_model.bin")

    return swap


def other_tensors(**tensors: torch.Tensor) -> Damage:
    return lambda folder: save_file(tensors, folder / "model.safetensors")


def huge_header(folder: Path) -> None:
    """A header that says it is an exabyte long."""
    (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")


WEIGHTS: dict[str, tuple[Damage, str]] = {
    "no-config": (lambda folder: (folder / "config.json").unlink(), "holds neither a checkpoint nor Hugging Face"),
    "empty-config": (write("config.json", b""), "config.json cannot be used"),
    "binary-config": (write("config.json", b"\xff\xfe\x00"), "config.json cannot be used"),
    "list-for-config": (write("config.json", b"[]"), "config.json cannot be used"),
    "bare-config": (write("config.json", b"{}"), "config.json cannot be used ...vocab_size"),
    "mistyped": (edit_config(hidden_size="64"), "config.json cannot be used"),
    "negative": (edit_config(hidden_size=-16), "config.json cannot be used"),
    "llama": (edit_config(model_type="llama"), "model_type='llama'; Pythia has 'gpt_neox'"),
    "activation": (edit_config(hidden_act="relu"), "hidden_act='relu'; Pythia has 'gelu'"),
    "sequential": (edit_config(use_parallel_residual=False), "use_parallel_residual=False; Pythia has True"),
    "tied": (edit_config(tie_word_embeddings=True), "tie_word_embeddings=True; Pythia has False"),
    "scaled-rope": (edit_config(rope_scaling={"type": "linear", "factor": 2.0}), "RoPE of type 'linear'"),
    "another-width": (edit_config(intermediate_size=95), "does not fit its config.json"),
    "another-depth": (edit_config(num_hidden_layers=7), "does not fit its config.json...layers.2"),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "truncated": (lambda folder: truncate(folder / "model.safetensors"), "cannot be read ...truncated, or no weight"),
    "empty": (write("model.safetensors", b""), "cannot be read ...truncated, or no weight file"),
    "huge-header": (huge_header, "cannot be read ...truncated, or no weight file"),
    "wrong-shape": (other_tensors(**{"gpt_neox.embed_in.weight": torch.zeros(3, 5)}), "does not fit its config.json"),
    "wrong-names": (other_tensors(w=torch.zeros(2)), "does not fit its config.json"),
    "pickled-list": (pickled(lambda _: [torch.zeros(2)]), "cannot be read ...no weight file"),
    "pickled-run": (pickled(lambda _: {"model": {"w": torch.zeros(2)}}), "cannot be read ...no weight file"),
    "pickled-malice": (pickled(lambda folder: Malicious(folder / "executed")), "cannot be read ...no weight file"),
}


def damaged(folder: Path, table: dict[str, tuple[Damage, str]], good: Path) -> None:
    """A damaged copy of what is good for each row of a table."""
    for name, (damage, _) in table.items():
        shutil.copytree(good, folder / name)
        damage(folder / name)


@pytest.fixture(scope="module")
def workshop(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "config").symlink_to(ROOT / "config")
    (folder / "data").mkdir()
    (folder / "data" / "cache").symlink_to(ROOT / "data" / "cache")
    shutil.copytree(data_dir / "own", folder / "data" / "own")
    damaged(folder / "data", SETS | INDICES, data_dir / "own")
    (folder / "bare").mkdir()
    damaged(folder / "runs", RUNS, folder / "bare")
    PythiaModel(PythiaConfig(**SMALL)).save_pretrained(folder / "weights" / "good")
    damaged(folder / "weights", WEIGHTS, folder / "weights" / "good")
    (folder / "runs" / "gpt2").mkdir()
    changed(data={"tokenizer": "gpt2"})(folder / "runs" / "gpt2")
    wide = PythiaConfig(**SMALL | {"vocab_size": 50304})
    (folder / "runs" / "gpt2-wide").mkdir()
    changed(data={"tokenizer": "gpt2"}, model=PythiaModel(wide).state_dict(), model_args=model_args(wide))(
        folder / "runs" / "gpt2-wide"
    )
    (folder / "runs" / "few-rows").mkdir()
    changed()(folder / "runs" / "few-rows")
    (folder / "runs" / "untrained").mkdir()
    changed(iter_num=0)(folder / "runs" / "untrained")
    (folder / "file").write_text("a file where a folder should be")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_training(patch, "config/pythia.py", *shlex.split(NARROW), "--max_iters=1", "--out_dir=runs/pythia")
        run_training(patch, "config/phase1.py", *shlex.split(PHASE_1), "--out_dir=runs/phase1")
    for run_name in ("damaged", "seized"):
        shutil.copytree(folder / "runs" / "pythia", folder / "runs" / run_name)
    truncate(folder / "runs" / "damaged" / "ckpt.pt")
    RUNS["malicious"][0](folder / "runs" / "seized")
    return folder


# -------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Case:
    line: str  # as typed
    message: str  # what the error line has to hold, in this order: parts that ... separates
    files: dict[str, str | bytes] = field(default_factory=dict)  # written before, in the workshop


def config(text: str | bytes, message: str, overrides: str = "") -> Case:
    """A config file a.py with this text."""
    return Case(f"train.py a.py {overrides}", message, {"a.py": text})


def own_files(name: str, content: str | bytes, message: str, options: str = "") -> Case:
    """prep.py on a file with this content."""
    line = f"prep.py --dataset=broken --files=source/{name} --data_dir=data {options}"
    return Case(line, message, {f"source/{name}": content})


MLA = "model = 'mla'\n"
SETTINGS = [
    Case("train.py --lerning_rate=1", "the command line: unknown key 'lerning_rate', did you mean 'learning_rate'?"),
    Case("train.py --qqqq=1", "the command line: unknown key 'qqqq'; --help lists all keys"),
    Case("train.py --=1", "unknown key ''"),
    Case("train.py --größe=1", "unknown key 'größe'"),
    Case("train.py --ｓeed=1", "unknown key 'ｓeed', did you mean 'seed'?"),
    Case("train.py '--seed\u200b=1'", "unknown key 'seed\\u200b', did you mean 'seed'?"),
    Case("train.py --kv_dim=64", "the command line: 'kv_dim' is no setting of model='pythia', phase='lm'"),
    Case("train.py --num_tokens=64", "'num_tokens' is no setting of model='pythia', phase='lm'"),
    Case("train.py -x", "'-x' is no option: options are written --key=value"),
    Case("train.py --model=gpt", "model='gpt' is not one of pythia, mla"),
    Case("train.py --model", "model=True is not one of pythia, mla"),
    Case("train.py --phase=lmm", "phase='lmm' is not one of lm"),
    Case("train.py --max_iters", "max_iters=True has to be int"),
    Case("train.py --max_iters=", "max_iters='' has to be int"),
    Case("train.py --max_iters=1.5", "max_iters='1.5' has to be int"),
    Case("train.py --max_iters=٣_", "max_iters='٣_' has to be int"),
    Case("train.py --max_iters=-1", "max_iters=-1 has to be at least 0"),
    Case("train.py --batch_size=0", "batch_size=0 has to be at least 1"),
    Case("train.py --patience=0", "patience=0 has to be at least 1"),
    Case(f"train.py --seed=1{'0' * 400}", "has to be below 2^63"),
    Case("train.py --seed=None", "seed='None' has to be int"),
    Case("train.py --learning_rate=1e999", "learning_rate=inf has to be below 2^63"),
    Case("train.py --learning_rate=1e-5", "learning_rate=1e-05 is below min_lr=0.0001"),
    Case("train.py --learning_rate=nan", "learning_rate='nan' has to be float"),
    Case("train.py --learning_rate=1,5", "learning_rate='1,5' has to be float"),
    Case("train.py --beta2=1", "beta2=1.0 has to be at least 0 and below 1"),
    Case("train.py --compile=perhaps", "compile='perhaps' has to be bool or None"),
    Case("train.py --dtype=int8", "dtype='int8' has to be one of 'auto', 'float32'"),
    Case("train.py --num_heads=7", "num_heads=7 does not divide hidden_size=512"),
    Case(f"train.py --hidden_size=8{'0' * 400}", "hidden_size=8...has to be below 2^63"),
    Case("train.py --hidden_size=-8", "hidden_size=-8 has to be at least 1"),
    Case("train.py --rotary_pct=0.05", "has to be even"),
    Case("train.py --rotary_pct=2", "rotary_pct=2.0 is not between 0 and 1"),
    Case("train.py --width_divisor=0", "width_divisor=0 has to be at least 1"),
    Case("train.py --width_divisor=3", "width_divisor=3 does not divide hidden_size=512"),
    Case("train.py --tokens_per_doc=100", "tokens_per_doc=100 is no multiple of block_size=512"),
    Case("train.py config/mla_kv128.py --kv_dim=1024", "kv_dim=1024 is above hidden_size=512"),
    Case("train.py config/mla_kv128.py --kv_dmi=8", "unknown key 'kv_dmi', did you mean 'kv_dim'?"),
    Case("train.py config/infini.py --num_memory_banks=2 --num_memories=2", "exclude one another"),
    Case("train.py config/infini.py --segment_len=0", "segment_len=0 has to be at least 1"),
    Case("train.py config/context_kv_phase1.py --context_layers=[9]", "context_layers=[9] has to name one or more of"),
    Case("train.py config/context_kv_phase1.py --context_layers=0", "context_layers='0' has to be a list of int"),
    Case("train.py config/phase1.py --init=zeros", "init='zeros'"),
    Case("train.py config/phase2.py --tokens_per_doc=512", "tokens_per_doc is for phase='lm'"),
    Case("train.py config/mla_kv12.py", "no config file config/mla_kv12.py; did you mean config/mla_kv128.py?"),
    Case("train.py nowhere/a.py", "no config file nowhere/a.py"),
    Case("train.py config", "config does not run: IsADirectoryError"),
    Case("train.py file", "file, line 1: not valid Python"),
    Case("train.py runs/pythia/ckpt.pt", "runs/pythia/ckpt.pt"),
    Case(f"train.py {'a' * 300}.py", "File name too long"),
    config("", "unknown key 'lr'", "--lr=1"),
    config(MLA + "kv_dimm = 1", "a.py: unknown key 'kv_dimm', did you mean 'kv_dim'?"),
    config("größe = 1", "a.py: unknown key 'größe'"),
    config("model = 'pythia'\nkv_dim = 64", "a.py: 'kv_dim' is no setting of model='pythia'"),
    config(MLA + "rotary_pct = 0.5", "a.py: 'rotary_pct' is no setting of model='mla'"),
    config("phase = 'lm'\nnum_samples = 2", "a.py: unknown key 'num_samples'"),
    config("model = ['mla']", "model=['mla'] is not one of pythia, mla"),
    config("model = 'рythia'", "model='рythia' is not one of pythia"),  # its first letter is Cyrillic
    config("max_iters = '5'", "max_iters='5' has to be int"),
    config("learning_rate = float('nan')", "learning_rate=nan has to be at least 0"),
    config("beta1 = float('nan')", "beta1=nan has to be at least 0 and below 1"),
    config(MLA + "alibi_slope = float('inf')", "alibi_slope=inf"),
    config(MLA + "kv_dim = 6", "width_divisor=4 does not divide kv_dim=6", "--width_divisor=4"),
    config("model = ", "a.py, line 1: not valid Python"),
    config("<<<<<<< HEAD\nseed = 1", "a.py, line 1: not valid Python"),
    config("seed = “1”", "a.py, line 1: not valid Python"),
    config("seed = 1\nseed = 1 / 0", "a.py does not run: ZeroDivisionError: division by zero"),
    config("import nothing_of_that_name", "a.py does not run: ModuleNotFoundError"),
    config("exit(0)", "a.py does not run: SystemExit"),
    config("def f(): f()\nf()", "a.py does not run: RecursionError"),
    config("dataset = lambda: 1", "dataset=<function"),
    config("seed = '\0'", "a.py"),
    config("out_dir = 'a\\0b'", "out_dir='a\\x00b' holds a character that no file name and no text can hold"),
    config("out_dir = 'a\\ud800'", "out_dir='a\\ud800' holds a character that no file name and no text can hold"),
    config("seed = 1".encode("utf-16"), "a.py"),
    config(b"seed = 1 # \xff\xfe", "a.py does not run: UnicodeDecodeError"),
    config(bytes(range(256)), "a.py"),
    Case("eval.py --batchsize=1 runs/pythia", "unknown key 'batchsize', did you mean 'batch_size'?"),
    Case("eval.py --batch_size=0 runs/pythia", "batch_size=0 has to be at least 1"),
    Case("sample.py --temperature=-1 runs/pythia", "temperature=-1.0 has to be at least 0"),
    Case("sample.py --top_k=0 runs/pythia", "top_k=0 has to be at least 1"),
    Case("sample.py --kv_dim=1 runs/pythia", "unknown key 'kv_dim'"),
    Case("bench.py --repeats=0", "repeats=0 has to be at least 1"),
    Case("bench.py --what=everything", "what='everything' has to be one of"),
    Case("bench.py --num_tokens=1", "num_tokens=1 has to be at least 1000"),
    Case("prep.py --val_fraction=1", "val_fraction=1.0 has to be between 0 and 1"),
    Case("prep.py --num_workers=0", "num_workers=0 has to be at least 1"),
    Case("prep.py --tokenizer=bpe", "tokenizer='bpe' has to be one of 'neox', 'gpt2'"),
    Case("prep.py --stage=all", "stage='all' has to be one of 'tokens', 'contexts'"),
    Case("prep.py a.py", "'a.py' is no option: options are written", {"a.py": "val_fraction = 0.5"}),
]
NO_FOLDER = "file cannot be made: a file stands in the place of a folder"
PREP = [
    Case("prep.py --dataset=ubuntu", "unknown dataset ubuntu: take one of mini, pile"),
    Case("prep.py --dataset=mini --files=*.txt", "give your files another name"),
    Case("prep.py --dataset=../x --files=*.txt", "cannot be the name of a folder"),
    Case("prep.py --dataset= --files=*.txt", "cannot be the name of a folder"),
    Case("prep.py --dataset=💾 --files=*.txt", "--dataset=💾 cannot be the name of a folder"),
    Case("prep.py --dataset=cache --files=*.txt", "cannot be the name of a folder"),
    Case("prep.py --dataset=x --files=no/such/*.txt", "matches no file"),
    Case("prep.py --dataset=x --files=data", "matches no file"),
    Case("prep.py --dataset=x --files=file --data_dir=data", "--files=file has to match files of one kind"),
    Case("prep.py --dataset=x --files=config/*.py --data_dir=file", NO_FOLDER),
    own_files("a.jsonl", '{"text": "a"}\n{"text": \n', "cannot be read: ArrowInvalid"),
    own_files("a.jsonl", '{"content": "a"}\n', "'text' is missing or no string; its fields are content"),
    own_files("a.jsonl", '{"text": null}\n{"text": "a"}\n', "'text' is missing or no string"),
    own_files("a.jsonl", '{"text": 7}\n', "'text' is missing or no string"),
    own_files("a.jsonl", '{"text": ["a", "b"]}\n', "'text' is missing or no string"),
    own_files("a.jsonl", "[1, 2]\n", "'text' is missing or no string"),
    own_files("a.jsonl", "", "a.jsonl"),
    own_files("a.jsonl", b'{"text": "\xff\xfe"}\n', "cannot be read"),
    own_files("a.jsonl", '{"text": "a \\ud800 b"}\n', ""),
    own_files("a.jsonl", bytes(range(256)), "cannot be read"),
    own_files("a.parquet", "PAR1", "cannot be read: ArrowInvalid"),
    own_files("a.parquet", "", "cannot be read"),
    own_files("a.jsonl.zst", "junk", "cannot be read: ZstdError"),
    own_files("a.jsonl.zst", FIRST_BLOCK, "a.jsonl.zst is cut off"),
    own_files("a.jsonl.zst", "", "a.jsonl.zst is cut off"),
    own_files("a.txt", b"\xff\xfe", "cannot be read: UnicodeDecodeError"),
    own_files("a.txt", "a text".encode("utf-16"), "cannot be read: UnicodeDecodeError"),
    own_files("a.txt", "", "no document fell into the"),
    own_files("a.txt", " \n\u3000\n", "no document fell into the"),
    own_files("a.txt", "a", "no document fell into the"),
    own_files("a.txt", get_reversal_pairs()[0].backward, "the training text holds"),
    own_files("a.csv", "text\na\n", "has to match files of one kind"),
    Case("prep.py --dataset=x --files=source/*", "files of one kind", {"source/a.txt": "", "source/b.jsonl": ""}),
    Case("prep.py --dataset=own --files=source/b.txt --data_dir=data", "was made with another", {"source/b.txt": "b"}),
    Case("prep.py --stage=contexts --data_dir=data", "needs the run of a trained ContextBlock: --init_from="),
    Case("prep.py --stage=contexts --init_from=bare", "holds neither a checkpoint"),
    Case("prep.py --stage=contexts --init_from=runs/pythia --data_dir=data", "has no ContextBlock: name a run of"),
    Case("prep.py --stage=contexts --init_from=runs/phase1 --dataset=wikitext2", "was trained on own: leave out"),
    Case("prep.py --stage=contexts --init_from=runs/phase1 --data_dir=none", "holds no token files"),
    Case("prep.py --stage=contexts --init_from=runs/phase1 --lanes=0", "lanes=0 has to be at least 1"),
    Case("prep.py --stage=contexts --context_stride=0", "context_stride=0 has to be at least 1"),
    Case("prep.py --stage=contexts --context_stride=200_000", "context_stride=200000 is above chunk_tokens=100000"),
    Case("train.py config/phase2.py --context_stride=0", "context_stride=0 has to be at least 1"),
    Case("prep.py --stage=contexts --method=fast", "method='fast' has to be one of 'lanes', 'sequential'"),
    Case("prep.py --stage=contexts --init_from=runs/phase1 --device=gpu", "device='gpu' cannot be used here"),
]
ELSEWHERE = "--out_dir=new"
COMBINATIONS = [
    Case(f"train.py config/pythia.py {NARROW} --dataset=none {ELSEWHERE}", "holds no token files; make them with"),
    Case(f"train.py config/pythia.py {NARROW} --block_size=4096 {ELSEWHERE}", "above the model's limit of 2048"),
    Case(f"train.py config/pythia.py {NARROW} --vocab_size=100 {ELSEWHERE}", "outside the model's 100 rows"),
    Case(f"train.py config/pythia.py {NARROW} --vocab_size=1_000_000_000_000_000 {ELSEWHERE}", "out of memory"),
    Case(f"train.py config/pythia.py {NARROW} --device=cuda:99 {ELSEWHERE}", "device='cuda:99' cannot be used here"),
    Case(f"train.py config/pythia.py {NARROW} --device= {ELSEWHERE}", "device='' cannot be used here"),
    Case(f"train.py config/pythia.py {NARROW} --block_size=32 --tokens_per_doc=64 {ELSEWHERE}", "no memory to carry"),
    Case(f"train.py config/infini_long.py {NARROW} --tokens_per_doc=64 --segment_len=5 {ELSEWHERE}", "no multiple of"),
    Case(f"train.py config/infini_long.py {NARROW} --tokens_per_doc=1600000 {ELSEWHERE}", "no training document has"),
    Case(f"train.py config/pythia.py {NARROW} --init_from=resume {ELSEWHERE}", "new holds no checkpoint"),
    Case(f"train.py config/pythia.py {NARROW} --init_from=config/none.py {ELSEWHERE}", "out/none is missing; make it"),
    Case(f"train.py config/pythia.py {NARROW} --init_from=runs/few-rows {ELSEWHERE}", "embedding is (31, 16)"),
    Case(f"train.py config/pythia.py {NARROW} --init_from=runs/gpt2 {ELSEWHERE}", "trained on gpt2 tokens, data/own"),
    Case(f"train.py config/pythia.py {NARROW} --num_heads=1 --init_from=runs/pythia {ELSEWHERE}", "num_heads=2"),
    Case(f"train.py config/pythia.py {NARROW} --init_from=weights/good {ELSEWHERE}", "embedding is (31, 16)"),
    Case(f"train.py config/pythia.py {NARROW} --init_from=no/such/run {ELSEWHERE}", "'no/such/run' is no local folder"),
    Case(f"train.py config/pythia.py {NARROW} --phase=phase1 {ELSEWHERE}", "'block_size' is no setting of"),
    Case(f"train.py config/pythia.py {NARROW} --phase=phase2 {ELSEWHERE}", "init_from has to name a run of phase 1"),
    Case(f"train.py config/pythia.py {NARROW} --phase=phase2 --init_from=runs/pythia {ELSEWHERE}", "no ContextBlock"),
    Case(f"train.py config/phase2.py {NARROW_CONTEXT} --init_from=scratch {ELSEWHERE}", "has to name a run of phase 1"),
    Case(f"train.py config/phase2.py {NARROW_CONTEXT} --init_from=runs/pythia {ELSEWHERE}", "no ContextBlock"),
    Case(f"train.py config/phase2.py {NARROW} --context_dim=9 --init_from=runs/phase1 {ELSEWHERE}", "no ContextBlock"),
    Case(f"train.py config/phase1.py {PHASE_1} --embeddings=no/such/table {ELSEWHERE}", "embeddings='no/such/table'"),
    Case(f"train.py config/phase1.py {PHASE_1} --embeddings=runs/gpt2 {ELSEWHERE}", "outside the model's 31 rows"),
    Case(f"train.py config/phase1.py {PHASE_1} --embeddings=runs/half {ELSEWHERE}", "truncated, or no checkpoint"),
    Case(f"train.py config/phase1.py {PHASE_1} --embeddings=weights/good {ELSEWHERE}", "holds no GPT-2"),
    Case(f"train.py config/pythia.py {NARROW} --out_dir=file", NO_FOLDER),
    Case(f"train.py config/pythia.py {NARROW} --out_dir=file/run", "file/run cannot be made"),
    Case(f"train.py config/pythia.py {NARROW} --out_dir={'ü' * 200}", "File name too long"),
    Case(f"train.py config/pythia.py {NARROW} --out_dir=runs/damaged --max_iters=1", UNREADABLE),
    Case(f"train.py config/pythia.py {NARROW} --out_dir=runs/seized --max_iters=1", UNREADABLE),
    Case(f"train.py config/pythia.py {NARROW} --out_dir=runs/seized --init_from=resume --max_iters=9", UNREADABLE),
    Case(f"train.py config/pythia.py {NARROW} --init_from=weights/pickled-malice {ELSEWHERE}", "no weight file"),
    Case(f"train.py config/phase1.py {PHASE_1} --embeddings=runs/malicious {ELSEWHERE}", UNREADABLE),
    Case(f"train.py config/phase1.py {PHASE_1} --embeddings=weights/pickled-malice {ELSEWHERE}", "no weight file"),
    Case(f"train.py config/phase2.py {NARROW_CONTEXT} --init_from=runs/malicious {ELSEWHERE}", UNREADABLE),
    Case(f"train.py config/pythia.py {NARROW} --out_dir=runs/pythia --max_iters=1 --learning_rate=0.5",
         "runs/pythia holds another run (learning_rate 0.001 there, 0.5 here): choose another --out_dir"),
    Case(f"train.py config/pythia.py {NARROW} --out_dir=runs/pythia --max_iters=1 --hidden_size=32", "another run"),
    Case(f"train.py config/pythia.py {NARROW} --out_dir=runs/pythia --init_from=resume --num_layers=3", "another run"),
    Case(f"train.py config/mla_kv64.py {NARROW} --kv_dim=8 --out_dir=runs/pythia --init_from=resume", "another run"),
    Case(f"train.py config/phase1.py {PHASE_1} --out_dir=runs/pythia", "holds another run"),
    Case("eval.py", "name at least one run: python eval.py"),
    Case("eval.py runs/nowhere", "'runs/nowhere' is no local folder"),
    Case("eval.py runs/naïve–名前", "'runs/naïve–名前' is no local folder"),
    Case("eval.py runs/pythia --tasks=val,everything", "no task 'everything': choose from val"),
    Case("eval.py runs/pythia --tasks= --data_dir=data", "no task ''"),
    Case("eval.py runs/pythia --data_dir=nowhere", "nowhere/own holds no token files"),
    Case("eval.py runs/pythia --data_dir=data --block_size=4096", "block_size=4096 is above runs/pythia's limit"),
    Case("eval.py runs/untrained --data_dir=data", "was never trained on text; --allow_untrained"),
    Case("eval.py runs/phase1 --data_dir=data", "was never trained on text; --allow_untrained"),
    Case("eval.py runs/gpt2-wide --data_dir=data", "trained on gpt2 tokens, data/own holds neox tokens"),
    Case("eval.py runs/few-rows --data_dir=data", "outside the 31 rows of runs/few-rows"),
    Case("eval.py runs/pythia --data_dir=data --out_dir=file", NO_FOLDER),
    Case("eval.py runs/pythia --data_dir=data --device=tpu", "device='tpu' cannot be used here"),
    Case("sample.py", "name one run: python sample.py"),
    Case("sample.py runs/pythia runs/phase1", "name one run: python sample.py"),
    Case("sample.py runs/few-rows --data_dir=data", "runs/few-rows has 31 rows for the 50277 tokens of text"),
    Case("sample.py runs/pythia --data_dir=data --prompt='a\ud800'", "prompt='a\\ud800' holds a character that no"),
    Case("bench.py a.py", "'a.py' is no option: options are written", {"a.py": "seed = 1"}),
    Case("bench.py --out_dir=. --what=contexts --data_dir=nowhere", "nowhere/mini holds no token files"),
    Case("bench.py --out_dir=. --what=contexts --init_from=runs/pythia", "runs/pythia has no ContextBlock"),
    Case("bench.py --out_dir=file --data_dir=data --dataset=own", NO_FOLDER),
]  # fmt: skip
DAMAGED_SETS = [
    Case(f"train.py config/pythia.py {NARROW} --dataset={name} {ELSEWHERE}", message)
    for name, (_, message) in SETS.items()
]
DAMAGED_SETS += [
    Case(f"eval.py runs/pythia --data_dir=data --dataset={name}", f"data/{name}...{REMAKE}")
    for name in ("half-meta", "no-max-id", "no-val", "no-index", "one-bit-of-val", "swapped")
]
DAMAGED_SETS += [
    Case(f"eval.py runs/pythia --data_dir=data --dataset={name} --tasks=long --overlap=False --out_dir=.", message)
    for name, (_, message) in INDICES.items()
]
DAMAGED_RUNS = [Case(f"eval.py runs/{name} --data_dir=data", message) for name, (_, message) in RUNS.items()]
DAMAGED_RUNS += [
    Case(f"{line}runs/{name}", RUNS[name][1])
    for name in ("half", "malicious", "bare-weights", "no-data", "one-shape")
    for line in (
        "sample.py ",
        "bench.py --out_dir=. --what=contexts --data_dir=data --dataset=own --init_from=",
        "prep.py --stage=contexts --data_dir=data --init_from=",
        f"train.py config/pythia.py {NARROW} {ELSEWHERE} --init_from=",
    )
]
DAMAGED_RUNS += [Case(f"eval.py runs/{name}/ckpt.pt", RUNS[name][1]) for name in ("empty", "malicious-inside")]
DAMAGED_WEIGHTS = [Case(f"eval.py weights/{name} --data_dir=data", message) for name, (_, message) in WEIGHTS.items()]
CASES = [*SETTINGS, *PREP, *COMBINATIONS, *DAMAGED_SETS, *DAMAGED_RUNS, *DAMAGED_WEIGHTS]


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything in a folder but locks, with size and time of the last change of files."""
    states = {path: path.lstat() for path in folder.rglob("*") if not path.name.endswith(".lock")}
    return {str(path): (state.st_size, state.st_mtime_ns) * path.is_file() for path, state in states.items()}


def test_there_are_many_and_no_two_are_the_same() -> None:
    assert len({(case.line, str(case.files)) for case in CASES}) == len(CASES) >= 80


@pytest.mark.parametrize("case", CASES, ids=[f"{i}: {case.line[:60]}" for i, case in enumerate(CASES)])
def test_bad_input_is_one_line_and_leaves_nothing(
    case: Case, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.rmtree("source", ignore_errors=True)
    Path("source").mkdir()
    for name, content in case.files.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(workshop)
    script, *words = shlex.split(case.line)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as end:
        run(SCRIPTS[script].main)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(".*".join(map(re.escape, case.message.split("..."))), lines[0]), lines[0]
    assert len(lines[0]) < 1000
    assert snapshot(workshop) == before
