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
from conftest import FIRST_BLOCK, ROOT, SHORT, TINY, Malicious, checkpoint_of, status_of, truncate, type_in
from transformers import GPT2Config, GPT2LMHeadModel

import prep
from kit.text import get_reversal_pairs
from kit.weights import model_args
from pythia_base import PythiaConfig, PythiaModel

DATA = ["--data_dir=data", "--dataset=own", "--device=cpu"]
NARROW = shlex.join([*TINY, *SHORT, "--dtype=float32", "--final_eval=False", *DATA])
PHASE_1 = f"{shlex.join([*TINY[:4], *DATA])} --context_dim=8 --num_tokens=500 --batch_size=500 --max_iterations=1"
DOCUMENTS = f"config/infini_long.py {NARROW} --segment_len=8 --tokens_per_doc=64"
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


def zeros(name: str) -> Damage:
    """As many bytes, all of them 0."""
    return lambda folder: write(name, bytes((folder / name).stat().st_size))(folder)


def malicious_index(folder: Path) -> None:
    """An index of the validation documents whose unpickling does something, and its digest in meta.json."""
    np.save(folder / "val_doc_index.npy", np.array([Malicious(folder / "executed")]), allow_pickle=True)
    described = {"val_doc_index.npy": prep.describe(folder / "val_doc_index.npy")}
    edit_json("meta.json", files=json.loads((folder / "meta.json").read_text())["files"] | described)(folder)


META, MATCH, REMAKE = "meta.json cannot be read", "does not match its meta.json", "prep.py and --overwrite=True"
SETS = all_say(META, {"half-meta": halve("meta.json"), "list-for-meta": write("meta.json", b"[]")})
SETS |= all_say(META, {
    "no-files-in-meta": edit_json("meta.json", files=None), "no-ids": edit_json("meta.json", n_vocab=None),
    "ids-a-text": edit_json("meta.json", n_vocab="many"), "no-tokenizer": edit_json("meta.json", tokenizer=None),
    "unknown-tokenizer": edit_json("meta.json", tokenizer="bpe"),
    "no-size": edit_json("meta.json", files={"train.bin": 5, "val.bin": 5}),
})  # fmt: skip
SETS |= all_say(f"train.bin {MATCH}...{REMAKE}", {
    "no-train": remove("train.bin"), "truncated": halve("train.bin"), "zeros": zeros("train.bin"),
})  # fmt: skip
SETS |= all_say(MATCH, {
    "no-val": remove("val.bin"), "no-index": remove("val_doc_index.npy"), "zeros-of-val": zeros("val.bin"),
    "zeros-of-index": zeros("train_doc_index.npy"),
})  # fmt: skip
SETS["no-meta"] = remove("meta.json"), "holds no token files; make them with: python prep.py"
SETS["ids-too-large"] = edit_json("meta.json", n_vocab=60_000), "of 60000 token ids, the model has 50304 rows"
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


UNREADABLE, OTHER = "damaged, or no checkpoint", "is of another version of its model"
RUNS = all_say(UNREADABLE, {
    "empty": write("ckpt.pt", b""), "text": write("ckpt.pt", "Ünï©ødé, no checkpoint".encode()), "half": half_a_run,
    "whole-model": save(lambda _: tiny()), "malicious": save(lambda folder: Malicious(folder / "executed")),
    "malicious-inside": save(lambda folder: small_checkpoint(commit=Malicious(folder / "executed"))),
})  # fmt: skip
RUNS |= all_say("is no checkpoint of this version of the project: train it again", {
    "list": save(lambda _: [1, 2]), "no-config": changed("config"), "no-data": changed("data"),
    "no-lineage": changed("parents", "tokens_seen"), "bare-weights": save(lambda _: tiny().state_dict()),
})  # fmt: skip
RUNS |= all_say(OTHER, {
    "text-for-weights": changed_weights(**{"embed_in.weight": "none"}), "other-keys": changed(model_args={"n_embd": 4}),
    "other-size": changed(model_args=SMALL | {"vocab_size": 30}), "list-for-weights": changed(model=[1]),
    "absurd-size": changed(model_args=SMALL | {"vocab_size": 10**15}), "no-weights": changed(model={}),
    "other-model": changed(config={"model": "gpt", "phase": "lm"}),
})  # fmt: skip
RUNS["missing"] = lambda folder: None, "holds neither a checkpoint"
RUNS["one-shape"] = changed_weights(**{"embed_in.weight": torch.zeros(31, 17)}), f"{OTHER} (...size mismatch"


def malicious_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Malicious(folder / "executed"), folder / "pytorch_model.bin")


def code_of_its_own(folder: Path) -> None:
    """A config.json that asks for Python beside it."""
    edit_json("config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})(folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(folder / 'executed')!r})\nclass OwnConfig:\n    pass\n")


WEIGHTS = all_say("", {
    "bare-config": write("config.json", b"{}"), "mistyped": edit_json("config.json", hidden_size="64"),
    "no-weights": remove("model.safetensors"), "truncated": halve("model.safetensors"),
    "another-width": edit_json("config.json", intermediate_size=95), "no-config": remove("config.json"),
    "huge-header": write("model.safetensors", (2**60).to_bytes(8, "little") + b"{}"),  # an exabyte
})  # fmt: skip
WEIGHTS |= all_say("cannot be read as gpt_neox", {"malicious": malicious_weights, "own-code": code_of_its_own})
OTHERS: list[tuple[dict[str, Any], str]] = [  # what transformers would read
    ({"model_type": "llama"}, "model_type='llama'"), ({"hidden_act": "relu"}, "hidden_act='relu'; Pythia has 'gelu'"),
    ({"attention_bias": False}, "attention_bias=False"),
    ({"num_hidden_layers": 3}, "do not fit config.json...layers.2"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
]  # fmt: skip
WEIGHTS |= {f"other-{i}": (edit_json("config.json", **keys), message) for i, (keys, message) in enumerate(OTHERS)}


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
    damaged(
        folder / "data",
        SETS | {"malicious": (malicious_index, ""), "gpt2": (edit_json("meta.json", tokenizer="gpt2"), "")},
        data_dir / "own",
    )
    (folder / "bare").mkdir()
    wide, gpt2 = tiny(vocab_size=50304), {"tokenizer": "gpt2"}
    others = {
        "gpt2": changed(data=gpt2), "few-rows": changed(), "untrained": changed(iter_num=0),
        "gpt2-wide": changed(model=wide.state_dict(), model_args=model_args(wide.config), data=gpt2),
    }  # fmt: skip
    damaged(folder / "runs", RUNS | all_say("", others), folder / "bare")
    tiny().save_pretrained(folder / "weights" / "good")
    damaged(folder / "weights", WEIGHTS, folder / "weights" / "good")
    gpt2_config = GPT2Config(vocab_size=50304, n_positions=16, n_embd=12, n_layer=1, n_head=2)
    GPT2LMHeadModel(gpt2_config).save_pretrained(folder / "tables" / "gpt2")
    shutil.copytree(folder / "tables" / "gpt2", folder / "tables" / "mpt")
    (folder / "tables" / "mpt" / "config.json").write_text('{"model_type": "mpt"}')
    (folder / "file").write_text("a file where a folder should be")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        type_in("train.py", "config/pythia.py", *shlex.split(NARROW), "--max_iters=1", "--out_dir=runs/pythia")
        type_in("train.py", *shlex.split(DOCUMENTS), "--max_iters=1", "--out_dir=runs/documents")
        type_in("train.py", "config/phase1.py", *shlex.split(PHASE_1), "--out_dir=runs/phase1")
    for run_name in ("damaged", "seized", "stripped"):
        shutil.copytree(folder / "runs" / "pythia", folder / "runs" / run_name)
    truncate(folder / "runs" / "damaged" / "ckpt.pt")
    RUNS["malicious"][0](folder / "runs" / "seized")
    whole = torch.load(folder / "runs" / "pythia" / "ckpt.pt", weights_only=True)
    save(lambda _: {key: whole[key] for key in whole if key != "optimizer"})(folder / "runs" / "stripped")
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
    "--größe=1": "unknown key 'größe'", "'--seed\u200b=1'": "'seed\\u200b', did you mean 'seed'?", "-x": "-x",
    "--kv_dim=64": "'kv_dim' is no setting of model='pythia'", "--num_tokens=64": "no setting of ...phase='lm'",
    "--model=gpt": "model='gpt' has to be 'pythia', 'mla'", "--model": "model=True has to be 'pythia'",
    "--phase=lmm": "phase='lmm' has to be 'lm'", "--max_iters=1.5": "max_iters='1.5' has to be a valid integer",
    "--patience=0": "patience='0' has to be greater than 0", "--learning_rate=nan": "learning_rate='nan'",
    "--learning_rate=1e-5": "learning_rate=1e-05 is below min_lr=0.0001", "--num_heads=7": "num_heads=7 ...=512",
    "--hidden_size=-8": "hidden_size=-8", "--rotary_pct=0.05": "has to be even", "--rotary_pct=2": "rotary_pct=2.0",
    "--width_divisor=3": "width_divisor=3 ...hidden_size=512", "--tokens_per_doc=100": "=100 ...block_size=512",
    "config/mla_kv128.py --kv_dim=1024": "kv_dim=1024 ...hidden_size=512",
    "config/mla_kv128.py --kv_dmi=8": "unknown key 'kv_dmi', did you mean 'kv_dim'?",
    "config/infini.py --num_memory_banks=2 --num_memories=2": "exclude one another",
    "config/infini.py --segment_len=0": "segment_len=0", "config/phase1.py --init=zeros": "init='zeros'",
    "config/context_kv_phase1.py --context_layers=[9]": "context_layers=[9]",
    "config/context_kv_phase1.py --context_layers=0": "context_layers='0' has to be",
    f"--seed={2**63}": "seed=...has to be below", f"--vocab_size={10**30}": "vocab_size=...has to be below",
    "'--out_dir=a\ud800'": "out_dir=...has to be of characters",
    "'--dataset=a\0b'": "dataset=...has to be of characters",
    "--model=context_kv --context_layers=[]": "context_layers=[]", "--model=context_kv --context_layers=[-1]": "=[-1]",
    "file": "file does not run (SyntaxError",
    "config/mla_kv12.py": "no config file config/mla_kv12.py; did you mean config/mla_kv128.py?",
    "nowhere/a.py": "no config file nowhere/a.py", "config": "config does not run (IsADirectoryError",
    "runs/pythia/ckpt.pt": "runs/pythia/ckpt.pt", f"{'a' * 300}.py": "File name too long",
})  # fmt: skip
SETTINGS += cases("eval.py", {"--batchsize=1 runs/pythia": "'batchsize', did you mean 'batch_size'?"})
SETTINGS += cases("sample.py", {"--top_k=0 runs/pythia": "top_k='0'", "--kv_dim=1": "key 'kv_dim'"})
SETTINGS += cases(
    "tools.bench", {"--what=everything": "what='everything'", "config/phase1.py": "'config/phase1.py' is no option"}
)
SETTINGS += cases(
    "tools.compare", {"--seed=-1": "seed='-1'", "--size=huge": "size='huge' has to be", "--rows=a": "'a' is no run"}
)
CONFIG_FILES: dict[str | bytes, str] = {
    "model = 'mla'\nkv_dimm = 1": "a.py: unknown key 'kv_dimm', did you mean 'kv_dim'?", "größe = 1": "'größe'",
    "model = 'pythia'\nkv_dim = 64": "a.py: 'kv_dim' is no setting of model='pythia'",
    "model = 'рythia'": "model='рythia' has to be 'pythia'",  # its first letter is Cyrillic
    "max_iters = '5'": "max_iters='5' has to be a valid integer", "learning_rate = float('nan')": "learning_rate=nan",
    "model = 'mla'\nkv_dim = 6\nwidth_divisor = 4": "width_divisor=4 does not divide kv_dim=6",
    "<<<<<<< HEAD\nseed = 1": "a.py does not run (SyntaxError...line 1", "exit(0)": "SystemExit",
    "seed = '\0'": "a.py",
    "seed = 1\nseed = 1 / 0": "a.py does not run (ZeroDivisionError", "dataset = lambda: 1": "dataset=<function",
    b"seed = 1 # \xff\xfe": "a.py does not run (UnicodeDecodeError", "seed = 1".encode("utf-16"): "a.py",
}  # fmt: skip
SETTINGS += [Case("train.py a.py", message, {"a.py": text}) for text, message in CONFIG_FILES.items()]

NO_FOLDER = "File exists: file"
NO_ENTRY = ": /sys...what was complete before is kept"  # where not even root may write
PREP = cases("prep.py", {
    "--val_fraction=1": "val_fraction='1' has to be less than 1", "a.py": "'a.py'",
    "--tokenizer=bpe": "tokenizer='bpe' has to be 'neox' or 'gpt2'", "--dataset=x --files=no/*.txt": "of one kind",
    "--dataset=ubuntu": "--dataset=ubuntu without --files: take one of mini, pile",
    "--dataset=mini --files=*.txt": "another name", "--dataset=../x --files=*.txt": "name of a folder",
    "--dataset= --files=*.txt": "name of a folder", "--dataset=cache --files=*.txt": "name of a folder",
    "--dataset=x --files=config/*.py --data_dir=file": NO_FOLDER,
    "--dataset=x --files=source/*.txt --data_dir=/sys": NO_ENTRY,
    "--dataset=x --files=file --data_dir=data": "--files=file has to match files of one kind",
})  # fmt: skip
PREP += cases("prep.py --stage=contexts", {
    "--data_dir=data": "--init_from=", "--init_from=bare": "neither a checkpoint", "--overlap=0": "overlap='0'",
    "--init_from=runs/pythia --data_dir=data": "has no ContextBlock",
    "--init_from=runs/phase1 --dataset=wikitext2": "was trained on own",
    "--init_from=runs/phase1 --device=gpu": "device='gpu' cannot be used here",
})  # fmt: skip
OWN_FILES: list[tuple[str, str | bytes, str]] = [
    ("a.jsonl", '{"text": "a"}\n{"text": \n', "cannot be read: ArrowInvalid"), ("a.jsonl", "", "a.jsonl"),
    ("a.jsonl", '{"content": "a"}\n', "'text' is missing or no string; its fields are content"),
    ("a.jsonl", '{"text": null}\n{"text": "a"}\n', "'text' is missing"), ("a.jsonl", "[1, 2]\n", "is missing"),
    ("a.jsonl", bytes(range(256)), "cannot be read"), ("a.parquet", "PAR1", "cannot be read: ArrowInvalid"),
    ("a.jsonl.zst", "junk", "a.jsonl.zst cannot be read (OSError: ZSTD"), ("a.jsonl.zst", FIRST_BLOCK, "Truncated"),
    ("a.txt", b"\xff\xfe", "UnicodeDecodeError"), ("a.txt", " \n\u3000\n", "no document"),
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
    "--dataset=notes": "python prep.py --dataset=notes --data_dir=data --files=GLOB",
    "--data_dir=nowhere --dataset=pile": "python prep.py --dataset=pile --data_dir=nowhere",
    "--dataset=mini-gpt2": "python prep.py --dataset=mini --tokenizer=gpt2 --data_dir=data",
    "--block_size=4096": "above the model's limit of 2048",
    "--vocab_size=100": "the model has 100 rows", "--vocab_size=1_000_000_000_000_000": "out of memory",
    f"--batch_size={2**62}": f"batch_size x gradient_accumulation_steps = {2**62}",
    "--device=cuda:99": "device='cuda:99' cannot be used here", "--device=": "device=''",
    "--tokens_per_doc=64": "no memory to carry",
    "--init_from=resume": "new holds no checkpoint", "--init_from=config/none.py": "out/none is missing; make it",
    "--init_from=runs/few-rows": "few-rows...vocab_size=31", "--init_from=weights/good": "vocab_size=31",
    "--init_from=runs/gpt2-wide --intermediate_size=24": "trained on gpt2 tokens, data/own",
    "--num_heads=1 --init_from=runs/pythia": "num_heads=2", "--phase=phase1": "'block_size' is no setting of",
    "--init_from=no/such/run": "'no/such/run' cannot be read as gpt_neox", "--phase=phase2": "a run of phase 1",
    "--phase=phase2 --init_from=runs/pythia": "no ContextBlock", "--log_to=wandb": "it takes pip install wandb",
})  # fmt: skip
RUNNING += cases(f"train.py config/pythia.py {NARROW}", {
    "--out_dir=/sys": NO_ENTRY, "--out_dir=/sys/run": NO_ENTRY,
    "--out_dir=file": NO_FOLDER, f"--out_dir={'ü' * 200}": "File name too long",
    "--out_dir=runs/damaged --max_iters=1": UNREADABLE, "--out_dir=runs/seized --init_from=resume": UNREADABLE,
    "--out_dir=runs/stripped --init_from=resume": "runs/stripped/ckpt.pt cannot be gone on from, it has no optimizer",
    "--out_dir=runs/pythia --max_iters=1 --learning_rate=0.5":
        "runs/pythia holds another run (learning_rate 0.001 there, 0.5 here): another --out_dir",
    "--out_dir=runs/pythia --max_iters=1 --hidden_size=32": "another run",
    "--out_dir=runs/pythia --init_from=resume --num_layers=3": "another run",
    "--out_dir=runs/pythia --init_from=resume --optimizer=muon": "optimizer 'adamw' there, 'muon' here",
    "--out_dir=runs/pythia --overwrite=True --block_size=4096": "above the model's limit of 2048",
})  # fmt: skip
RUNNING += [
    Case(
        f"train.py {DOCUMENTS} --out_dir=runs/documents --init_from=resume --batch_size=2", "batch_size 4 there, 2 here"
    )
]
RUNNING += cases(f"train.py config/phase1.py {PHASE_1} --out_dir=runs/phase1 --init_from=resume", {
    "--num_tokens=9": "9 here): another --out_dir", "--cascade_data=all": "(cascade_data 'split' there, 'all' here)",
})  # fmt: skip
RUNNING += cases(f"train.py config/infini_long.py {NARROW} --out_dir=new", {
    "--tokens_per_doc=64 --segment_len=5": "no multiple of", "--tokens_per_doc=1600000": "no training document has",
})  # fmt: skip
RUNNING += cases(f"train.py config/phase2.py {NARROW} --context_dim=8 --out_dir=new", {
    "--init_from=runs/pythia": "no ContextBlock", "--context_dim=9 --init_from=runs/phase1": "no ContextBlock",
    "--init_from=runs/malicious": UNREADABLE,
})  # fmt: skip
RUNNING += cases(f"train.py config/phase1.py {PHASE_1} --out_dir=new", {
    "--embeddings=no/such/table": "embeddings='no/such/table'", "--embeddings=runs/gpt2": "the model has 31 rows",
    "--embeddings=runs/half": UNREADABLE, "--embeddings=weights/good": "cannot be read as gpt2",
    "--embeddings=tables/mpt": "'mpt'", "--embeddings=bare": "bare...cannot be read",  # mpt has a wte as well
    "--embeddings=gpt2": "'random' and a run folder of yours need no hub",
    "--embeddings=tables/gpt2 --num_heads=1 --rotary_pct=0.5": "trained on gpt2 tokens, data/own",
    "--embeddings=runs/gpt2-wide": "trained on gpt2 tokens, data/own",
    "--embeddings=runs/pythia --hidden_size=12 --num_heads=3 --rotary_pct=0.5": "num_heads=3 does not divide",
    "--out_dir=runs/pythia": "holds another run",
})  # fmt: skip
RUNNING += cases("eval.py", {"": "name at least one run", "runs/naïve–名前": "'runs/naïve–名前' cannot be read"})
RUNNING += cases("eval.py --data_dir=data", {
    "runs/pythia --tasks=val,revarsal": "no task 'revarsal', did you mean 'reversal'",
    "runs/pythia --include_path=nowhere": "include_path='nowhere' is no folder",
    "runs/pythia --data_dir=nowhere": "nowhere/own holds no token files", "runs/pythia --out_dir=file": NO_FOLDER,
    "runs/pythia --block_size=4096": "block_size=4096 ...runs/pythia's limit", "runs/untrained": "--allow_untrained",
    "runs/phase1": "was never trained on text; --allow_untrained", "runs/gpt2-wide": "gpt2 tokens, data/own holds neox",
    "runs/few-rows": "runs/few-rows has 31 rows",
    "weights/good --dataset=gpt2": "weights/good is Hugging Face's, taken to be of neox tokens, data/gpt2 holds gpt2",
})  # fmt: skip
RUNNING += cases("sample.py --data_dir=data", {
    "": "name one run: python sample.py", "runs/few-rows": "31 rows for the 50277 tokens",
})  # fmt: skip
RUNNING += cases("tools.export", {
    "runs/pythia": "a run and a new folder", "runs/pythia file": "file holds something", "bare new": "bare",
    "runs/pythia weights": "weights holds something", "runs/pythia new --push_to_hubs=me/it": "'push_to_hub'",
})  # fmt: skip
RUNNING += cases("tools.bench --what=decode --quick=True --device=cpu --data_dir=data --dataset=own", {
    "--out_dir=/sys/bench": NO_ENTRY,
})  # fmt: skip
RUNNING += cases("tools.bench --what=contexts", {
    "--out_dir=. --data_dir=nowhere": "nowhere/mini holds no token files", "--out_dir=file": NO_FOLDER,
    "--gguf=no.gguf,file": "no.gguf is not there: docs/speed.md", "--ct2=no": "no is not there: docs/speed.md",
})  # fmt: skip

DAMAGED = [
    Case(f"train.py config/pythia.py {NARROW} --dataset={name} --out_dir=new", f"data/{name}...{message}")
    for name, (_, message) in SETS.items()
]
DAMAGED += [Case(f"eval.py runs/pythia --data_dir=data --dataset={n}", REMAKE) for n in ("half-meta", "no-val")]
DAMAGED += cases(
    "eval.py runs/pythia --data_dir=data --dataset=malicious", {"--tasks=long --out_dir=.": "no document index"}
)
DAMAGED += [Case(f"eval.py runs/{name} --data_dir=data", f"runs/{name}...{RUNS[name][1]}") for name in RUNS]
DAMAGED += [Case(f"eval.py weights/{name} --data_dir=data", f"weights/{name}...{WEIGHTS[name][1]}") for name in WEIGHTS]
for use in ("sample.py runs/", f"train.py config/pythia.py {NARROW} --out_dir=new --init_from=runs/"):
    DAMAGED += [Case(use + name, RUNS[name][1]) for name in ("malicious", "no-data", "one-shape")]
CASES = [*SETTINGS, *PREP, *RUNNING, *DAMAGED]


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything in a folder but locks, with size and time of the last change of files."""
    states = {path: path.lstat() for path in folder.rglob("*") if not path.name.endswith(".lock")}
    return {str(path): (state.st_size, state.st_mtime_ns) * path.is_file() for path, state in states.items()}


@pytest.mark.parametrize("case", CASES, ids=[f"{i}: {case.line[:60]}" for i, case in enumerate(CASES)])
def test_bad_input_is_one_line_and_leaves_nothing(
    case: Case, workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for missing in ("lm_eval.tasks", "wandb"):  # the index of the former takes half a minute to list
        monkeypatch.setitem(sys.modules, missing, None)
    shutil.rmtree("source", ignore_errors=True)
    Path("source").mkdir()
    for name, content in case.files.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(workshop)
    assert status_of(*shlex.split(case.line)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(".*".join(map(re.escape, case.message.split("..."))), lines[0]), lines[0]
    assert len(lines[0]) < 1000
    assert snapshot(workshop) == before
