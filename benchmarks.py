"""Public benchmarks for eval.py: WikiText-2, LAMBADA and the Pile's test set.

They are read, cut and scored as in lm-evaluation-harness (Gao et al. 2024,
doi 10.5281/zenodo.12608602: tasks wikitext, lambada_openai, pile_10k), so that the numbers can stand beside published
ones. A text longer than the model's window L is scored in rolling windows, here L = 4 and n = 6 tokens:

    window 1   reads 0  t1 t2 t3   scores t1 t2 t3 t4     0: the end-of-text token
    window 2   reads t2 t3 t4 t5   scores       t5 t6     the last one is filled up from the left with real context

Also the search for these texts in the training data.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from tqdm import tqdm

from configurator import load_source
from kit.fast import safe_exp, score_tokens
from kit.files import InputError, one_line
from kit.report import format_table
from kit.runs import pick_device
from kit.text import Tokenizer, hub_revision, load_tokenizer, require_whole_zst
from prep import HubSet, stream_hub

HUB_TEXTS = {
    "EleutherAI/wikitext_document_level": HubSet(
        "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test", documents=62
    ),
    "EleutherAI/lambada_openai": HubSet("EleutherAI/lambada_openai", "default", "test", documents=5_153),
    "monology/pile-uncopyrighted": HubSet("monology/pile-uncopyrighted", "default", "test", documents=175_000),
    "NeelNanda/pile-10k": HubSet("NeelNanda/pile-10k", "default", "train", documents=10_000),
}
VERIFIED = "EleutherAI/pythia-70m"
PUBLISHED = {  # of that model: EleutherAI's, with a newer lm-evaluation-harness; of the Pile its first 10,000 documents
    "lambada_accuracy": 0.1842,
    "lambada_ppl": 141.3,
    "pile_word_ppl": 130.6,
    "pile_bits_per_byte": 1.0493,
}
TEXT_TASKS = {"wikitext": "wikitext", "lambada": "lambada", "pile": "pile_test"}  # task -> its setting

# --------------------------------------------------------------------------------------------- where they come from


class Document(NamedTuple):
    text: str
    subset: str


class Unavailable(NamedTuple):
    """A text that cannot be had, and why."""

    why: str


def load_texts(settings: Any, tasks: Iterable[str]) -> dict[str, list[Document] | Unavailable]:
    """The documents of each task that needs any. Raises InputError if a named file is missing or broken."""
    texts: dict[str, list[Document] | Unavailable] = {}
    for task in [task for task in TEXT_TASKS if task in tasks]:
        source = getattr(settings, TEXT_TASKS[task])
        limit = settings.pile_documents if task == "pile" else None
        if source in HUB_TEXTS:
            try:
                texts[task] = read_documents(task, hub_rows(HUB_TEXTS[source]), source, limit)
            except InputError as error:
                texts[task] = Unavailable(str(error))
        else:
            texts[task] = read_documents(task, file_rows(task, source), source, limit)
    return texts


def read_documents(task: str, rows: Iterable[Any], source: str, limit: int | None) -> list[Document]:
    """The first of a source's records as documents, each with its subset where the record names one."""
    name = "page" if task == "wikitext" else "text"
    found = []
    for number, row in enumerate(itertools.islice(rows, limit), 1):
        text = row.get(name) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise InputError(f"{source}: record {number} has no text in a field {name!r}")
        meta = row.get("meta")
        found.append(Document(text, meta.get("pile_set_name", "") if isinstance(meta, dict) else ""))
    if not found:
        raise InputError(f"{source} holds no text")
    return found


def hub_rows(hub_set: HubSet) -> Iterator[Any]:
    yield from stream_hub(hub_set, hub_revision(hub_set.path, "dataset"))


def file_rows(task: str, source: str) -> Iterator[Any]:
    """The records of a .jsonl or .jsonl.zst file; of WikiText's raw file, its pages."""
    path = Path(source)
    is_raw = task == "wikitext" and path.suffix == ".raw"
    if not (is_raw or source.endswith((".jsonl", ".jsonl.zst"))):
        raise InputError(f"--{TEXT_TASKS[task]}={source} is neither a .jsonl file nor one of {', '.join(HUB_TEXTS)}")
    try:
        if path.suffix == ".zst":
            require_whole_zst(path)
        opened = zstandard.open(path, "rt", encoding="utf-8") if path.suffix == ".zst" else path.open(encoding="utf-8")
        with opened as file:
            if is_raw:
                yield from ({"page": page} for page in raw_pages(file.read()))
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except (OSError, ValueError, zstandard.ZstdError) as error:
        raise InputError(f"{source} cannot be read ({type(error).__name__}: {one_line(error)})") from None


def raw_pages(text: str) -> Iterator[str]:
    """The pages of wiki.test.raw; one begins at a heading of the first level, ' = Title = '."""
    lines: list[str] = []
    for line in text.split("\n"):
        if re.fullmatch(r"= (?!=).*(?<!=) =", line.strip()):
            if (page := "\n".join(lines)).strip():
                yield page
            lines = []
        lines.append(line)
    yield "\n".join(lines)


# WikiText's tokens back to prose. (The harness has one more rule, which looks for slashes that no text holds.)
PROSE = (
    ("s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
QUOTES = ("()", "[]", "{}", '""', "''")
LAYOUT = (
    *(("= " * level + "=", "=" * (level + 1)) for level in (3, 2, 1)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(page: str) -> str:
    """A page of WikiText as prose: 'the game ( 2010 ) @-@ like' -> 'the game (2010)-like'."""
    for tokens, prose in PROSE:
        page = page.replace(tokens, prose)
    for pair in QUOTES:
        opening, closing = pair[0], pair[1]
        page = re.sub(rf"\{opening}\s*([^\{closing}]*?)\s*\{closing}", rf"{opening}\1{closing}", page)
    for tokens, prose in LAYOUT:
        page = page.replace(tokens, prose)
    return page


# ----------------------------------------------------------------------------------------------------- windows


class Window(NamedTuple):
    """What a model reads in one go, and behind it the last token to be scored."""

    ids: npt.NDArray[np.uint16]
    scored: int  # how many of the last ids are scored


def token_array(tokenizer: Tokenizer, text: str, end_of_text: bool = True) -> npt.NDArray[np.uint16]:
    return np.array([tokenizer.end_of_text] * end_of_text + tokenizer.encode(text), dtype=np.uint16)


def rolling_windows(ids: npt.NDArray[np.uint16], length: int) -> Iterator[Window]:
    """Windows of at most `length` tokens that score each of ids but the first, the end-of-text token, once."""
    for start in range(0, len(ids) - 1, length):
        end = min(start + length, len(ids) - 1)
        yield Window(ids[max(end - length, 0) : end + 1], scored=end - start)


def last_word_window(tokenizer: Tokenizer, text: str, length: int) -> Window:
    """LAMBADA: all but the last word is context, cut from the left; a blank and the last word are scored.

    Both are tokenised as one string, which is then cut after as many tokens as the context alone has.
    """
    context, _, word = text.rpartition(" ")
    if not word:
        raise InputError(f"a LAMBADA text has to end in a word: {one_line(text)[-60:]!r}")
    skipped = len(tokenizer.encode(context.rstrip()))
    ids = token_array(tokenizer, f"{context} {word}", end_of_text=not skipped)
    scored = len(ids) - max(skipped, 1)
    return Window(ids[-(length + 1) :], scored)


# ------------------------------------------------------------------------------------------------------ scoring


@torch.inference_mode()
def score_windows(
    model: Any, windows: list[Window], batch_size: int, device: torch.device, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood in nats of what each window scores, and whether each of those tokens is the arg-max."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].ids))
    log_p, right = np.zeros(len(windows)), np.ones(len(windows), bool)
    with tqdm(desc=name, total=len(windows), unit="window", leave=False, mininterval=1) as progress:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            longest = len(windows[rows[0]].ids) - 1
            idx = torch.zeros(len(rows), longest, dtype=torch.long)  # padded on the right, which nothing before sees
            targets = torch.full((len(rows), longest), -100)
            for row, i in enumerate(rows):
                ids, scored = torch.from_numpy(windows[i].ids.astype(np.int64)), windows[i].scored
                idx[row, : len(ids) - 1] = ids[:-1]
                targets[row, len(ids) - 1 - scored : len(ids) - 1] = ids[-scored:]
            kept = targets != -100
            h = model.hidden_states(idx.to(device))[kept.to(device)]  # no other row needs the head
            losses, correct = score_tokens(h[None], model.head_weight, targets[kept][None].to(device))
            counts = kept.sum(1).tolist()
            log_p[rows] = [-part.sum().item() for part in losses[0].cpu().double().split(counts)]
            right[rows] = [part.all().item() for part in correct[0].cpu().split(counts)]
            progress.update(len(rows))
    return log_p, right


def evaluate_lambada(
    model: Any, documents: list[Document], tokenizer: Tokenizer, block_size: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Accuracy and PPL of the last words (Paperno et al. 2016, arXiv 1606.06031); PPL is that of whole words."""
    windows = [last_word_window(tokenizer, document.text, block_size) for document in documents]
    log_p, right = score_windows(model, windows, batch_size, device, "lambada")
    return {
        "lambada_accuracy": right.mean().item(),
        "lambada_ppl": safe_exp(-log_p.mean().item()),
        "lambada_documents": len(documents),
    }


def evaluate_text(
    model: Any,
    task: str,
    documents: list[Document],
    tokenizer: Tokenizer,
    block_size: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """Figures of whole documents in rolling windows: of WikiText's pages as prose, or of the Pile, also by subset.

    Words and bytes are those of the document as it is given, in WikiText before it is made prose.
    """
    texts = [detokenize(text) if task == "wikitext" else text for text, _ in documents]
    ids = [token_array(tokenizer, text) for text in texts]
    windows = [list(rolling_windows(each, block_size)) for each in ids]
    log_p, _ = score_windows(model, list(itertools.chain(*windows)), batch_size, device, task)
    owner = np.repeat(np.arange(len(documents)), [len(each) for each in windows])
    columns = {
        "loss": -np.bincount(owner, log_p, minlength=len(documents)),
        "tokens": np.array([len(each) - 1 for each in ids]),
        "words": np.array([len(re.split(r"\s+", text)) for text, _ in documents]),
        "bytes": np.array([len(text.encode()) for text, _ in documents]),
    }
    subset = np.array([document.subset for document in documents])
    results: dict[str, Any] = {f"{task}_{name}": value for name, value in text_figures(columns).items()}
    if names := sorted(set(subset.tolist()) - {""}):
        each = {name: {key: column[subset == name] for key, column in columns.items()} for name in names}
        results[f"{task}_subsets"] = {name: text_figures(part) for name, part in each.items()}
    return results


def evaluate_benchmarks(
    model: Any,
    tasks: tuple[str, ...],
    texts: Mapping[str, list[Document] | Unavailable],
    tokenizer: Tokenizer,
    block_size: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """The figures of each task that has texts; not_measured says why of those whose texts cannot be had."""
    results: dict[str, Any] = {}
    for task in [task for task in tasks if task in TEXT_TASKS]:
        documents = texts[task]
        if isinstance(documents, Unavailable):
            results.setdefault("not_measured", {})[task] = documents.why
        elif task == "lambada":
            results |= evaluate_lambada(model, documents, tokenizer, block_size, batch_size, device)
        else:
            results |= evaluate_text(model, task, documents, tokenizer, block_size, batch_size, device)
    return results


def text_figures(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """From the summed loss, tokens, words and bytes of each document: loss and PPL are a token's."""
    loss, tokens, words, num_bytes = (columns[name].sum().item() for name in ("loss", "tokens", "words", "bytes"))
    return {
        "loss": loss / max(tokens, 1),
        "ppl": safe_exp(loss / max(tokens, 1)),
        "word_ppl": safe_exp(loss / words),
        "byte_ppl": safe_exp(loss / max(num_bytes, 1)),
        "bits_per_byte": loss / max(num_bytes, 1) / math.log(2),
        "documents": len(columns["loss"]),
        "tokens": tokens,
    }


# ------------------------------------------------------------------------------------- against published figures


def verify(settings: Any, sources: list[str], tasks: Iterable[str]) -> bool:
    """Hold a model's figures against those published for pythia-70m, and print both; whether all are within tolerance.

    Raises InputError if the weights or the texts cannot be had.
    """
    if len(sources) > 1:
        raise InputError(f"--verify is for one model: {VERIFIED}, or the folder that has it")
    (source,) = sources or [VERIFIED]
    tasks = tuple(task for task in tasks if task in ("lambada", "pile"))
    model, device = load_source(source)[0], pick_device(settings.device)
    texts = load_texts(replace(settings, pile_test="NeelNanda/pile-10k", pile_documents=None), tasks)
    tokenizer, block_size = load_tokenizer("neox", settings.data_dir), model.config.max_position_embeddings
    model.to(device).eval()
    results = evaluate_benchmarks(model, tasks, texts, tokenizer, block_size, settings.batch_size, device)
    if missing := results.get("not_measured"):
        raise InputError(f"nothing can be verified: {'; '.join(missing.values())}")
    differences = {name: results[name] / PUBLISHED[name] - 1 for name in PUBLISHED if name in results}
    rows = [[name, f"{PUBLISHED[name]:g}", f"{results[name]:.4f}", f"{d:+.2%}"] for name, d in differences.items()]
    print(format_table([f"{source}, windows of {block_size}", "published", "measured", "difference"], rows))
    is_close = all(abs(difference) <= settings.tolerance for difference in differences.values())
    print(f"\n{'all' if is_close else 'NOT all'} within {settings.tolerance:.1%} of what was published")
    return is_close
