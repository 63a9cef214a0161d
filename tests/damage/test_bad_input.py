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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import FIRST_BLOCK, ROOT, SHORT, TINY, Malicious, checkpoint_of, run_training, truncate
from safetensors.torch import save_file

import eval as evaluation
import prep
import sample
import train
from kit.files import run
from kit.runs import model_args
from kit.text import get_reversal_pairs
from pythia_base import PythiaConfig, PythiaModel
from tools import bench, compare

SCRIPTS = {"train.py": train, "eval.py": evaluation, "sample.py": sample, "prep.py": prep}
SCRIPTS |= {"bench": bench, "compare": compare}
DATA = ["--data_dir=data", "--dataset=own", "--device=cpu"]
NARROW = shlex.join([*TINY, *SHORT, "--dtype=float32", *DATA])
NARROW_CONTEXT = f"{NARROW} --context_dim=8"
PHASE_1 = f"{shlex.join([*TINY[:4], *DATA])} --context_dim=8 --num_tokens=500 --batch_size=500 --max_iterations=1"
SMALL = {"vocab_size": 31, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}

Damage = Callable[[Path], Any]


def tiny(**changes: Any) -> PythiaModel:
    return PythiaModel(PythiaConfig(**SMALL | changes))


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def edit_json(name: str, **changes: Any) -> Damage:
    """Keys of a .json file changed, or taken away where the change is None."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def halve(name: str) -> Damage:
    return lambda folder: truncate(folder / name)


def all_say(message: str, damages: dict[str, Damage]) -> dict[str, tuple[Damage, str]]:
    return {name: (damage, message) for name, damage in damages.items()}


# ------------------------------------------------------------------------------------------------- damaged data sets


def flip_a_bit(name: str) -> Damage:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return flip


def store_as_int32(folder: Path) -> None:
    np.fromfile(folder / "train.bin", dtype=np.uint16).astype(np.int32).tofile(folder / "train.bin")


def swap_splits(folder: Path) -> None:
    for one, other in (("train.bin", "val.bin"), ("train_doc_index.npy", "val_doc_index.npy")):
        (folder / one).rename(folder / "between")
        (folder / other).rename(folder / one)
        (folder / "between").rename(folder / other)


def store_as_index(make: Callable[[Path], Any]) -> Damage:
    """Another index of the validation documents, and its digest in meta.json."""

    def store(folder: Path) -> None:
        np.save(folder / "val_doc_index.npy", np.array([make(folder)]), allow_pickle=True)
        described = {"val_doc_index.npy": prep.describe(folder / "val_doc_index.npy")}
        files = json.loads((folder / "meta.json").read_text())["files"] | described
        edit_json("meta.json", files=files)(folder)

    return store


META, MATCH, REMAKE = "meta.json cannot be read", "does not match its meta.json", "prep.py and --overwrite=True"
SETS = all_say(META, {
    "empty-meta": write("meta.json", b""), "binary-meta": write("meta.json", bytes(range(128, 256))),
    "half-meta": halve("meta.json"), "list-for-meta": write("meta.json", b"[]"),
    "no-files-in-meta": edit_json("meta.json", files=None), "no-max-id": edit_json("meta.json", max_id=None),
    "max-id-a-text": edit_json("meta.json", max_id="many"), "no-tokenizer": edit_json("meta.json", tokenizer=None),
    "unknown-tokenizer": edit_json("meta.json", tokenizer="bpe"),
})  # fmt: skip
SETS |= all_say(f"train.bin {MATCH}...{REMAKE}", {
    "no-train": remove("train.bin"), "truncated": halve("train.bin"), "empty": write("train.bin", b""),
    "int32": store_as_int32, "one-bit": flip_a_bit("train.bin"),
    "odd": lambda folder: write("train.bin", (folder / "train.bin").read_bytes()[:-1])(folder),
})  # fmt: skip
SETS |= all_say(MATCH, {
    "no-val": remove("val.bin"), "no-index": remove("val_doc_index.npy"), "swapped": swap_splits,
    "one-bit-of-val": flip_a_bit("val.bin"), "one-bit-of-index": flip_a_bit("train_doc_index.npy"),
})  # fmt: skip
SETS["no-meta"] = remove("meta.json"), "holds no token files; make them with: python prep.py"
SETS["ids-too-large"] = edit_json("meta.json", max_id=60_000), "token id 60000, outside the model's 50304 rows"
INDICES = all_say("is no document index", {
    "malicious-index": store_as_index(lambda folder: Malicious(folder / "executed")),
    "index-of-numbers": store_as_index(lambda _: 1.5),
})  # fmt: skip


# ------------------------------------------------------------------------------------------- damaged runs and weights


def save(make: Callable[[Path], Any]) -> Damage:
    return lambda folder: torch.save(make(folder), folder / "ckpt.pt")


def small_checkpoint(without: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """What a run of a tiny baseline saves, as far as others read it."""
    checkpoint = checkpoint_of("pythia", tiny(), **{"model_args": SMALL, **changes})
    return {key: value for key, value in checkpoint.items() if key not in without}


def changed(*without: str, **changes: Any) -> Damage:
    return save(lambda _: small_checkpoint(without, **changes))


def changed_weights(**changes: Any) -> Damage:
    return save(lambda _: small_checkpoint(model=tiny().state_dict() | changes))


def half_a_run(folder: Path) -> None:
    changed()(folder)
    truncate(folder / "ckpt.pt")


UNREADABLE, OTHER = "truncated, or no checkpoint", "is of another version of its model"
RUNS = all_say(UNREADABLE, {
    "empty": write("ckpt.pt", b""), "text": write("ckpt.pt", "Ünï©ødé, no checkpoint".encode()), "half": half_a_run,
    "binary": write("ckpt.pt", bytes(range(256)) * 9), "whole-model": save(lambda _: tiny()),
    "malicious": save(lambda folder: Malicious(folder / "executed")),
    "malicious-inside": save(lambda folder: small_checkpoint(commit=Malicious(folder / "executed"))),
})  # fmt: skip
RUNS |= all_say("is no checkpoint of this version of the project: train it again", {
    "list": save(lambda _: [1, 2]), "no-config": changed("config"), "no-data": changed("data"),
    "no-lineage": changed("parents", "tokens_seen"), "no-data-tokenizer": changed(data={}),
    "bare-weights": save(lambda _: tiny().state_dict()), "list-for-weights": changed(model=[1]),
    "other-model": changed(config={"model": "gpt", "phase": "lm"}),
    "unhashable-model": changed(config={"model": [], "phase": "lm"}),
    "no-phase": changed(config={"model": "pythia", "dataset": "own", "seed": 1}),
})  # fmt: skip
RUNS |= all_say(OTHER, {
    "text-for-weights": changed_weights(**{"embed_in.weight": "none"}), "other-keys": changed(model_args={"n_embd": 4}),
    "mistyped-size": changed(model_args=SMALL | {"num_heads": "8"}), "numbered-keys": changed(model_args={1: 2}),
    "other-size": changed(model_args=SMALL | {"vocab_size": 30}),
    "no-size": changed(model_args=SMALL | {"num_layers": -1}),
    "absurd-size": changed(model_args=SMALL | {"vocab_size": 10**15}),
})  # fmt: skip
RUNS |= {
    "missing": (lambda folder: None, "holds neither a checkpoint nor Hugging Face weights"),
    "no-weights": (changed(model={}), f"{OTHER}: ...Missing key"),
    "one-shape": (changed_weights(**{"embed_in.weight": torch.zeros(31, 17)}), f"{OTHER}: ...size mismatch"),
    "one-too-many": (changed_weights(extra=torch.zeros(1)), f"{OTHER}: ...Unexpected key"),
}


def pickled(make: Callable[[Path], Any]) -> Damage:
    def swap(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(make(folder), folder / "pytorch_model.bin")

    return swap


def other_tensors(**tensors: torch.Tensor) -> Damage:
    return lambda folder: save_file(tensors, folder / "model.safetensors")


WEIGHTS = all_say("", {
    "empty-config": write("config.json", b""), "binary-config": write("config.json", b"\xff\xfe\x00"),
    "list-for-config": write("config.json", b"[]"), "bare-config": write("config.json", b"{}"),
    "mistyped": edit_json("config.json", hidden_size="64"), "negative": edit_json("config.json", hidden_size=-16),
    "another-width": edit_json("config.json", intermediate_size=95), "no-weights": remove("model.safetensors"),
    "another-depth": edit_json("config.json", num_hidden_layers=7), "truncated": halve("model.safetensors"),
    "huge-header": write("model.safetensors", (2**60).to_bytes(8, "little") + b"{}"),  # an exabyte
    "empty": write("model.safetensors", b""), "wrong-names": other_tensors(w=torch.zeros(2)),
    "wrong-shape": other_tensors(**{"gpt_neox.embed_in.weight": torch.zeros(3, 5)}),
    "pickled-list": pickled(lambda _: [torch.zeros(2)]),
    "pickled-run": pickled(lambda _: {"model": {"w": torch.zeros(2)}}),
    "pickled-malice": pickled(lambda folder: Malicious(folder / "executed")),
})  # fmt: skip
WEIGHTS |= {
    "no-config": (remove("config.json"), "neither a checkpoint nor Hugging Face"),
    "llama": (edit_json("config.json", model_type="llama"), "llama"),
    "activation": (edit_json("config.json", hidden_act="relu"), "relu"),
    "sequential": (edit_json("config.json", use_parallel_residual=False), "use_parallel_residual=False"),
    "tied": (edit_json("config.json", tie_word_embeddings=True), "tie_word_embeddings=True"),
    "scaled-rope": (edit_json("config.json", rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
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
    wide, gpt2 = tiny(vocab_size=50304), {"tokenizer": "gpt2"}
    wide_gpt2 = changed(model=wide.state_dict(), model_args=model_args(wide.config), data=gpt2)
    others = {
        "gpt2": changed(data=gpt2),
        "gpt2-wide": wide_gpt2,
        "few-rows": changed(),
        "untrained": changed(iter_num=0),
    }
    damaged(folder / "runs", RUNS | {name: (damage, "") for name, damage in others.items()}, folder / "bare")
    tiny().save_pretrained(folder / "weights" / "good")
    damaged(folder / "weights", WEIGHTS, folder / "weights" / "good")
    (folder / "file").write_text("a file where a folder should be")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_training("config/pythia.py", *shlex.split(NARROW), "--max_iters=1", "--out_dir=runs/pythia")
        run_training("config/phase1.py", *shlex.split(PHASE_1), "--out_dir=runs/phase1")
    for run_name in ("damaged", "seized"):
        shutil.copytree(folder / "runs" / "pythia", folder / "runs" / run_name)
    truncate(folder / "runs" / "damaged" / "ckpt.pt")
    RUNS["malicious"][0](folder / "runs" / "seized")
    return folder


# -------------------------------------------------------------------------------------------------------- the table


class Case(NamedTuple):
    line: str  # as typed
    message: str  # what the error line has to hold, in this order: parts that ... separates
    files: dict[str, str | bytes] = {}  # noqa: RUF012  written before, in the workshop


def cases(start: str, rows: dict[str, str]) -> list[Case]:
    """Command lines that begin alike, each with words of its message."""
    return [Case(f"{start} {options}", message) for options, message in rows.items()]


SETTINGS = cases("train.py", {
    "--lerning_rate=1": "'lerning_rate', did you mean 'learning_rate'?", "--qqqq=1": "'qqqq'; --help lists all keys",
    "--=1": "unknown key ''", "--größe=1": "unknown key 'größe'", "--ｓeed=1": "'ｓeed', did you mean 'seed'?",
    "'--seed\u200b=1'": "'seed\\u200b', did you mean 'seed'?", "-x": "'-x' is no option: options are written",
    "--kv_dim=64": "'kv_dim' is no setting of model='pythia'", "--num_tokens=64": "no setting of ...phase='lm'",
    "--model=gpt": "model='gpt' has to be 'pythia', 'mla'", "--model": "model=True has to be 'pythia'",
    "--phase=lmm": "phase='lmm' has to be 'lm'", "--max_iters": "max_iters=True", "--max_iters=": "max_iters=''",
    "--max_iters=1.5": "max_iters=1.5 has to be a valid integer", "--max_iters=-1": "max_iters=-1 has to be greater",
    "--patience=0": "patience=0 has to be greater than 0", f"--seed=1{'0' * 400}": "seed=1...has to be below 2^63",
    "--learning_rate=1e-5": "learning_rate=1e-05 is below min_lr=0.0001", "--learning_rate=nan": "learning_rate='nan'",
    "--learning_rate=1,5": "learning_rate=(1, 5) has to be", "--beta2=1": "beta2=1 has to be less than 1",
    "--dtype=int8": "dtype='int8' has to be 'auto', 'float32'", "--num_heads=7": "num_heads=7 ...hidden_size=512",
    f"--hidden_size=8{'0' * 400}": "hidden_size=8...has to be below 2^63", "--hidden_size=-8": "hidden_size=-8",
    "--rotary_pct=0.05": "has to be even", "--rotary_pct=2": "rotary_pct=2.0", "--width_divisor=0": "width_divisor=0",
    "--width_divisor=3": "width_divisor=3 ...hidden_size=512", "--tokens_per_doc=100": "=100 ...block_size=512",
    "config/mla_kv128.py --kv_dim=1024": "kv_dim=1024 ...hidden_size=512",
    "config/mla_kv128.py --kv_dmi=8": "unknown key 'kv_dmi', did you mean 'kv_dim'?",
    "config/infini.py --num_memory_banks=2 --num_memories=2": "exclude one another",
    "config/infini.py --segment_len=0": "segment_len=0", "config/phase1.py --init=zeros": "init='zeros'",
    "config/context_kv_phase1.py --context_layers=[9]": "context_layers=[9]",
    "config/context_kv_phase1.py --context_layers=0": "context_layers=0 has to be",
    "config/phase2.py --tokens_per_doc=512": "tokens_per_doc is for phase='lm'", "file": "file, line 1: not valid",
    "config/mla_kv12.py": "no config file config/mla_kv12.py; did you mean config/mla_kv128.py?",
    "nowhere/a.py": "no config file nowhere/a.py", "config": "config does not run: IsADirectoryError",
    "runs/pythia/ckpt.pt": "runs/pythia/ckpt.pt", f"{'a' * 300}.py": "File name too long",
})  # fmt: skip
SETTINGS += cases("eval.py", {
    "--batchsize=1 runs/pythia": "'batchsize', did you mean 'batch_size'?", "--batch_size=0": "batch_size=0",
})  # fmt: skip
SETTINGS += cases("sample.py", {
    "--temperature=-1 runs/pythia": "temperature=-1", "--top_k=0 runs/pythia": "top_k=0", "--kv_dim=1": "key 'kv_dim'",
})  # fmt: skip
SETTINGS += cases("bench", {
    "--repeats=0": "repeats=0", "--what=everything": "what='everything'",
    "config/phase1.py": "'config/phase1.py' is no option: options are written",
})  # fmt: skip
SETTINGS += cases("compare", {"--seeds=0": "seeds=0", "--size=huge": "size='huge' has to be", "a.py": "'a.py'"})
CONFIG_FILES: dict[str | bytes, str] = {
    "model = 'mla'\nkv_dimm = 1": "a.py: unknown key 'kv_dimm', did you mean 'kv_dim'?", "größe = 1": "'größe'",
    "model = 'pythia'\nkv_dim = 64": "a.py: 'kv_dim' is no setting of model='pythia'",
    "model = 'mla'\nrotary_pct = 0.5": "a.py: 'rotary_pct' is no setting of model='mla'",
    "phase = 'lm'\nnum_samples = 2": "a.py: unknown key 'num_samples'", "model = ['mla']": "model=['mla'] has to be",
    "model = 'рythia'": "model='рythia' has to be 'pythia'",  # its first letter is Cyrillic
    "max_iters = '5'": "max_iters='5' has to be a valid integer", "learning_rate = float('nan')": "learning_rate=nan",
    "model = 'mla'\nalibi_slope = float('inf')": "alibi_slope=inf", "model = ": "a.py, line 1: not valid Python",
    "model = 'mla'\nkv_dim = 6\nwidth_divisor = 4": "width_divisor=4 does not divide kv_dim=6",
    "<<<<<<< HEAD\nseed = 1": "a.py, line 1: not valid Python", "seed = “1”": "a.py, line 1: not valid Python",
    "seed = 1\nseed = 1 / 0": "a.py does not run: ZeroDivisionError", "seed = '\0'": "a.py", "exit(0)": "SystemExit",
    "import nothing_of_that_name": "a.py does not run: ModuleNotFoundError", "def f(): f()\nf()": "RecursionError",
    "dataset = lambda: 1": "dataset=<function", "out_dir = 'a\\0b'": "out_dir='a\\x00b' has to be ...characters",
    "out_dir = 'a\\ud800'": "out_dir='a\\ud800'", "seed = 1".encode("utf-16"): "a.py", bytes(range(256)): "a.py",
    b"seed = 1 # \xff\xfe": "a.py does not run: UnicodeDecodeError",
}  # fmt: skip
SETTINGS += [Case("train.py a.py", message, {"a.py": text}) for text, message in CONFIG_FILES.items()]

NO_FOLDER = "file cannot be made: a file stands in the place of a folder"
PREP = cases("prep.py", {
    "--val_fraction=1": "val_fraction=1 has to be less than 1", "--num_workers=0": "num_workers=0",
    "--tokenizer=bpe": "tokenizer='bpe' has to be 'neox' or 'gpt2'", "--stage=all": "stage='all'", "a.py": "'a.py'",
    "--dataset=ubuntu": "unknown dataset ubuntu: take one of mini, pile",
    "--dataset=mini --files=*.txt": "give your files another name", "--dataset=../x --files=*.txt": "name of a folder",
    "--dataset= --files=*.txt": "name of a folder", "--dataset=💾 --files=*.txt": "--dataset=💾 ...name of a folder",
    "--dataset=cache --files=*.txt": "name of a folder", "--dataset=x --files=no/such/*.txt": "matches no file",
    "--dataset=x --files=data": "matches no file", "--dataset=x --files=config/*.py --data_dir=file": NO_FOLDER,
    "--dataset=x --files=file --data_dir=data": "--files=file has to match files of one kind",
})  # fmt: skip
PREP += cases("prep.py --stage=contexts", {
    "--data_dir=data": "--init_from=", "--init_from=bare": "neither a checkpoint", "--overlap=0": "overlap=0",
    "--init_from=runs/pythia --data_dir=data": "has no ContextBlock", "--tolerance=-1": "tolerance=-1",
    "--init_from=runs/phase1 --dataset=wikitext2": "was trained on own",
    "--init_from=runs/phase1 --data_dir=none": "holds no token files",
    "--init_from=runs/phase1 --device=gpu": "device='gpu' cannot be used here",
})  # fmt: skip
OWN_FILES: list[tuple[str, str | bytes, str]] = [
    ("a.jsonl", '{"text": "a"}\n{"text": \n', "cannot be read: ArrowInvalid"), ("a.jsonl", "", "a.jsonl"),
    ("a.jsonl", '{"content": "a"}\n', "'text' is missing or no string; its fields are content"),
    ("a.jsonl", '{"text": null}\n{"text": "a"}\n', "'text' is missing"), ("a.jsonl", '{"text": 7}\n', "'text' is"),
    ("a.jsonl", '{"text": ["a", "b"]}\n', "'text' is missing"), ("a.jsonl", "[1, 2]\n", "'text' is missing"),
    ("a.jsonl", b'{"text": "\xff\xfe"}\n', "cannot be read"), ("a.jsonl", '{"text": "a \\ud800 b"}\n', ""),
    ("a.jsonl", bytes(range(256)), "cannot be read"), ("a.parquet", "PAR1", "cannot be read: ArrowInvalid"),
    ("a.parquet", "", "cannot be read"), ("a.jsonl.zst", "junk", "cannot be read: ZstdError"),
    ("a.jsonl.zst", FIRST_BLOCK, "a.jsonl.zst is cut off"), ("a.jsonl.zst", "", "a.jsonl.zst is cut off"),
    ("a.txt", b"\xff\xfe", "UnicodeDecodeError"), ("a.txt", "a text".encode("utf-16"), "UnicodeDecodeError"),
    ("a.txt", "", "no document fell into"), ("a.txt", " \n\u3000\n", "no document"), ("a.txt", "a", "no document"),
    ("a.txt", get_reversal_pairs()[0].backward, "the training text holds"), ("a.csv", "text\na\n", "of one kind"),
]  # fmt: skip
PREP += [
    Case(f"prep.py --dataset=broken --files=source/{name} --data_dir=data", message, {f"source/{name}": content})
    for name, content, message in OWN_FILES
]
PREP += [
    Case("prep.py --dataset=x --files=source/*", "files of one kind", {"source/a.txt": "", "source/b.jsonl": ""}),
    Case("prep.py --dataset=own --files=source/b.txt --data_dir=data", "was made with another", {"source/b.txt": "b"}),
]
RUNNING = cases(f"train.py config/pythia.py {NARROW} --out_dir=new", {
    "--dataset=none": "holds no token files; make them with", "--block_size=4096": "above the model's limit of 2048",
    "--vocab_size=100": "outside the model's 100 rows", "--vocab_size=1_000_000_000_000_000": "out of memory",
    "--device=cuda:99": "device='cuda:99' cannot be used here", "--device=": "device='' cannot be used here",
    "--block_size=32 --tokens_per_doc=64": "no memory to carry", "--init_from=resume": "new holds no checkpoint",
    "--init_from=config/none.py": "out/none is missing; make it", "--init_from=runs/few-rows": "few-rows...(31, 16)",
    "--init_from=runs/gpt2": "trained on gpt2 tokens, data/own", "--num_heads=1 --init_from=runs/pythia": "num_heads=2",
    "--init_from=weights/good": "(31, 16)", "--init_from=no/such/run": "'no/such/run' cannot be read as gpt_neox",
    "--init_from=weights/pickled-malice": "pickled-malice", "--phase=phase1": "'block_size' is no setting of",
    "--phase=phase2": "no ContextBlock", "--phase=phase2 --init_from=runs/pythia": "no Context",
})  # fmt: skip
RUNNING += cases(f"train.py config/pythia.py {NARROW}", {
    "--out_dir=file": NO_FOLDER, "--out_dir=file/run": "file/run cannot be made",
    f"--out_dir={'ü' * 200}": "File name too long", "--out_dir=runs/damaged --max_iters=1": UNREADABLE,
    "--out_dir=runs/seized --max_iters=1": UNREADABLE, "--out_dir=runs/seized --init_from=resume": UNREADABLE,
    "--out_dir=runs/pythia --max_iters=1 --learning_rate=0.5":
        "runs/pythia holds another run (learning_rate 0.001 there, 0.5 here): choose another --out_dir",
    "--out_dir=runs/pythia --max_iters=1 --hidden_size=32": "another run",
    "--out_dir=runs/pythia --init_from=resume --num_layers=3": "another run",
})  # fmt: skip
RUNNING += cases(f"train.py config/infini_long.py {NARROW} --out_dir=new", {
    "--tokens_per_doc=64 --segment_len=5": "no multiple of", "--tokens_per_doc=1600000": "no training document has",
})  # fmt: skip
RUNNING += cases(f"train.py config/phase2.py {NARROW_CONTEXT} --out_dir=new", {
    "--init_from=scratch": "has to name a run of phase 1", "--init_from=runs/pythia": "no ContextBlock",
    "--context_dim=9 --init_from=runs/phase1": "no ContextBlock", "--init_from=runs/malicious": UNREADABLE,
})  # fmt: skip
RUNNING += cases(f"train.py config/phase1.py {PHASE_1} --out_dir=new", {
    "--embeddings=no/such/table": "embeddings='no/such/table'", "--embeddings=runs/gpt2": "outside the model's 31 rows",
    "--embeddings=runs/half": UNREADABLE, "--embeddings=weights/good": "'gpt2' is needed",
    "--embeddings=runs/malicious": UNREADABLE, "--embeddings=weights/pickled-malice": "pickled-malice",
    "--out_dir=runs/pythia": "holds another run",
})  # fmt: skip
RUNNING += cases(
    f"train.py config/mla_kv64.py {NARROW} --kv_dim=8", {"--out_dir=runs/pythia --init_from=resume": "another run"}
)
RUNNING += cases("eval.py", {"": "name at least one run", "runs/nowhere": "'runs/nowhere' cannot be read as gpt_neox",
                             "runs/naïve–名前": "'runs/naïve–名前' cannot be read as gpt_neox"})  # fmt: skip
RUNNING += cases("eval.py --data_dir=data", {
    "runs/pythia --tasks=val,everything": "no task 'everything': choose from val", "runs/pythia --tasks=": "no task ''",
    "runs/pythia --data_dir=nowhere": "nowhere/own holds no token files", "runs/pythia --device=tpu": "device='tpu'",
    "runs/pythia --block_size=4096": "block_size=4096 ...runs/pythia's limit", "runs/untrained": "--allow_untrained",
    "runs/phase1": "was never trained on text; --allow_untrained", "runs/gpt2-wide": "gpt2 tokens, data/own holds neox",
    "runs/few-rows": "outside the 31 rows of runs/few-rows", "runs/pythia --out_dir=file": NO_FOLDER,
})  # fmt: skip
RUNNING += cases("sample.py --data_dir=data", {
    "": "name one run: python sample.py", "runs/pythia runs/phase1": "name one run: python sample.py",
    "runs/few-rows": "31 rows for the 50277 tokens", "runs/pythia --prompt='a\ud800'": "prompt='a\\ud800' has to be",
})  # fmt: skip
RUNNING += cases("bench --what=contexts", {
    "--out_dir=. --data_dir=nowhere": "nowhere/mini holds no token files", "--out_dir=file": NO_FOLDER,
})  # fmt: skip

DAMAGED = [
    Case(f"train.py config/pythia.py {NARROW} --dataset={name} --out_dir=new", f"data/{name}...{message}")
    for name, (_, message) in SETS.items()
]
DAMAGED += [
    Case(f"eval.py runs/pythia --data_dir=data --dataset={name}", f"data/{name}...{REMAKE}")
    for name in ("half-meta", "no-max-id", "no-val", "no-index", "one-bit-of-val", "swapped")
]
DAMAGED += [
    Case(f"eval.py runs/pythia --data_dir=data --dataset={name} --tasks=long --out_dir=.", message)
    for name, (_, message) in INDICES.items()
]
DAMAGED += [Case(f"eval.py runs/{name} --data_dir=data", f"runs/{name}...{RUNS[name][1]}") for name in RUNS]
DAMAGED += [Case(f"eval.py runs/{name}/ckpt.pt", RUNS[name][1]) for name in ("empty", "malicious-inside")]
DAMAGED += [Case(f"eval.py weights/{name} --data_dir=data", f"weights/{name}...{WEIGHTS[name][1]}") for name in WEIGHTS]
USES = ("sample.py ", "prep.py --stage=contexts --data_dir=data --init_from=",
        f"train.py config/pythia.py {NARROW} --out_dir=new --init_from=")  # fmt: skip
DAMAGED += [
    Case(f"{use}runs/{name}", f"runs/{name}...{RUNS[name][1]}")
    for name in ("half", "malicious", "bare-weights", "no-data", "one-shape")
    for use in USES
]
CASES = [*SETTINGS, *PREP, *RUNNING, *DAMAGED]


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything in a folder but locks, with size and time of the last change of files."""
    states = {path: path.lstat() for path in folder.rglob("*") if not path.name.endswith(".lock")}
    return {str(path): (state.st_size, state.st_mtime_ns) * path.is_file() for path, state in states.items()}


def test_there_are_many_and_no_two_are_the_same() -> None:
    assert len({(case.line, str(case.files)) for case in CASES}) == len(CASES) >= 200


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
