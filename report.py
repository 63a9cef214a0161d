"""What eval.py measured, as tables."""

from collections.abc import Callable
from typing import Any

AFTER_FIRST = "after 1"  # where a memory can help: all windows of a document but the first
SHOWN_LENGTH = "2048"  # tokens at which the tables show caches


def format_rank(rank: float, width: int) -> str:
    return f"{rank:.1f}/{width} = {rank / width:.1%}"


def format_bytes(count: float) -> str:
    """Whole bytes, but where a cache of constant size is shared by many tokens."""
    return f"{count:,.0f}" if count >= 10 else f"{count:.2f}"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = ["<", *[">"] * (len(widths) - 1)]
    layout = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(layout.format(*row) for row in [header, ["-" * width for width in widths], *rows])


def format_summary(results: dict[str, Any]) -> str:
    """The figures of one run, a line each."""
    rows = [
        ["validation loss", f"{results['val_loss']:.4f}"],
        ["validation PPL", f"{results['val_ppl']:.1f}"],
        ["validation accuracy", f"{results['val_accuracy']:.1%}"],
        *(["PPL at positions " + where, f"{ppl:.1f}"] for where, ppl in results["position_ppl"].items()),
        ["reversal, forward PPL", f"{results['reversal_forward_ppl']:.1f}"],
        ["reversal, backward PPL", f"{results['reversal_backward_ppl']:.1f}"],
        ["reversal ratio (1 is best)", f"{results['reversal_ratio']:.3f}"],
        ["reversal gap (0 is best)", f"{results['reversal_gap']:.1f}"],
        ["  of the answers alone, ratio", f"{results['reversal_answer_ratio']:.3f}"],
        *long_rows(results),
        ["cache bytes per token", format_bytes(results["cache_bytes_per_token"][SHOWN_LENGTH])],
        ["  of the baseline", format_bytes(results["baseline_cache_bytes_per_token"][SHOWN_LENGTH])],
        [f"cache saved, {int(SHOWN_LENGTH):,} tokens", f"{results['cache_saved'][SHOWN_LENGTH]:.1%}"],
        ["parameters", f"{results['parameters']:,}"],
        ["checkpoint", results["checkpoint"]],
    ]
    meaning = f"PPL {results['val_ppl']:.1f} is {results['ppl_meaning']} (with a subword vocabulary of about 50,000)"
    return format_table(["measured", "value"], rows) + "\n\n" + meaning


def long_rows(results: dict[str, Any]) -> list[list[str]]:
    """What a memory is worth on long documents: PPL after their first window."""
    names = {"long_ppl": "long documents, PPL after window 1", "long_ppl_reset": "  with the memory reset"}
    return [[name, f"{results[key][AFTER_FIRST]:.1f}"] for key, name in names.items() if key in results]


COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {  # header -> the result it needs, how it is shown
    "val loss": ("val_loss", lambda r: f"{r['val_loss']:.4f}"),
    "val PPL": ("val_ppl", lambda r: f"{r['val_ppl']:.1f}"),
    "accuracy": ("val_accuracy", lambda r: f"{r['val_accuracy']:.1%}"),
    "rev. forward": ("reversal_forward_ppl", lambda r: f"{r['reversal_forward_ppl']:.1f}"),
    "backward": ("reversal_backward_ppl", lambda r: f"{r['reversal_backward_ppl']:.1f}"),
    "ratio": ("reversal_ratio", lambda r: f"{r['reversal_ratio']:.3f}"),
    "answers' ratio": ("reversal_answer_ratio", lambda r: f"{r['reversal_answer_ratio']:.3f}"),
    "cache B/token": ("cache_bytes_per_token", lambda r: format_bytes(r["cache_bytes_per_token"]["2048"])),
    "saved": ("cache_saved", lambda r: f"{r['cache_saved'][SHOWN_LENGTH]:.1%}"),
    "parameters": ("parameters", lambda r: f"{r['parameters']:,}"),
    "tokens seen": ("tokens_seen", lambda r: f"{r['tokens_seen']:,}"),
}


def format_comparison(results: list[dict[str, Any]]) -> str:
    """A row per run, a column per metric that any of them has; below it PPL by position, and what the PPL means."""
    shown = {header: show for header, (key, show) in COLUMNS.items() if any(key in r for r in results)}
    rows = [[r["run"], *(show(r) if COLUMNS[h][0] in r else "-" for h, show in shown.items())] for r in results]
    text = format_table(["run", *shown], rows)
    if all("position_ppl" in r for r in results):
        ranges = list(results[0]["position_ppl"])
        rows = [[r["run"], *(f"{r['position_ppl'][where]:.1f}" for where in ranges)] for r in results]
        text += "\n\n" + format_table(["PPL at positions", *ranges], rows)
        meanings = [f"{r['run']}: PPL {r['val_ppl']:.1f} is {r['ppl_meaning']}" for r in results if "steps" in r]
        text += "\n\n" + "\n".join(meanings)
        text += "\n(what a PPL means presumes a subword vocabulary of about 50,000)"
    if scored := [r for r in results if "long_ppl" in r]:
        text += "\n\n" + format_long(scored)
    return text


def format_long(results: list[dict[str, Any]]) -> str:
    """PPL per window of long documents, and how much text stands behind each figure."""
    first, rows = results[0], []
    for r in results:
        names = {"long_ppl": r["run"], "long_ppl_reset": "  memory reset before each window"}
        rows += [[name, *(f"{ppl:.1f}" for ppl in r[key].values())] for key, name in names.items() if key in r]
    names = {"long_documents": "documents", "long_tokens": "tokens"}
    rows += [[name, *(f"{number:,.0f}" for number in first[key].values())] for key, name in names.items()]
    return format_table(["long documents, PPL in window", *first["long_ppl"]], rows)
