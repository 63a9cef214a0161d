"""What eval.py measured, as tables, and as a report with pictures.

results.json holds block_size and data (what all runs were scored on, in windows of how many tokens), warnings, and in
runs an object for each run:

    run, model, checkpoint, weights_sha256      which weights: as named to eval.py, class, file, digest of all tensors
    settings                                    of train.py, seed among them, and in model_args the model's
    tokens_seen, steps, seed, commit, data      what it was trained on; data: tokenizer and digests of the token files
    parents                                     the runs that it started from; tokens_seen counts theirs too
    parameters, trainable_, embedding_          their numbers
    val_loss, val_ppl, val_accuracy, val_tokens, ppl_meaning
    position_ppl                                PPL per range of positions in the window
    context_convergence_rates, _effective_ranks of each ContextBlock on held-out tokens
    context_effective_rank, context_dim         of all side by side
    reversal_...                                see eval.evaluate_reversal_curse
    long_ppl, long_ppl_reset                    PPL per window of long documents, memory carried and memory reset
    long_documents, long_tokens                 on how much text
    cache_bytes, cache_bytes_per_token          of init_cache for one row, by length in tokens
    baseline_cache_bytes_per_token, cache_saved the same of Pythia of these widths; 1 - ours / theirs
    wikitext_..., lambada_..., pile_...         see eval.evaluate_benchmarks; not_measured: task -> why not
    decode_tokens_per_s, prefill_tokens_per_s   by length in tokens
    cuda_bytes_before, cuda_peak_bytes          allocated before, and at the peak of generating to each length; on CUDA

Losses are nats per token, bytes those of float32.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kit.files import replacing

AFTER_FIRST = "after 1"  # where a memory can help: all windows of a document but the first
SHOWN_LENGTH = "2048"  # tokens at which the tables show caches
SAME_CONFIG = ("seed", "out_dir", "overwrite", "device", "data_dir")  # settings in which runs of one config may differ

Run = dict[str, Any]
Show = Callable[[Run], str]  # a figure of a run as a table has it; KeyError where the run has none
Table = tuple[list[str], list[list[str]]]  # header, rows


# ------------------------------------------------------------------------------------------- one config, its seeds


@dataclass(frozen=True)
class Config:
    """The runs of one config, which differ in their seed alone."""

    name: str  # of the first run's folder
    runs: list[Run]

    @property
    def family(self) -> str:
        """The architecture, a name from configurator.MODELS."""
        return self.runs[0].get("settings", {}).get("model", "pythia")  # Hugging Face weights are GPT-NeoX

    @property
    def mean(self) -> Run:
        """A run's figures, each the mean over the seeds."""
        return combine(self.runs, lambda values: float(np.mean(values)))

    @property
    def deviation(self) -> Run:
        """Likewise the sample standard deviation; there are two seeds or more."""
        found = combine(self.runs, lambda values: float(np.std(values, ddof=1)))
        return {**found, "context_dim": self.mean.get("context_dim")}  # which a rank is divided by

    def show(self, text: Show) -> str:
        """A figure as a table has it: -, mean, or mean ± standard deviation."""
        shown = known(text, self.mean)
        if shown != "-" and len({text(run) for run in self.runs}) > 1:
            shown += f" ± {text(self.deviation)}"
        return shown


def combine(values: list[Any], statistic: Callable[[list[float]], float]) -> Any:
    """A statistic of each number in objects and lists of one form; of what is no number, the first."""
    first = values[0]
    if isinstance(first, dict):
        return {k: combine([v[k] for v in values], statistic) for k in first if all(k in v for v in values)}
    if isinstance(first, list):
        return [combine(list(each), statistic) for each in zip(*values, strict=False)]
    return statistic(values) if isinstance(first, int | float) else first


def group_runs(runs: list[Run]) -> list[Config]:
    """Runs with the same settings but for the seed, and what follows from it, are of one config."""
    names = [Path(run["run"]).name or run["run"] for run in runs]
    shared = names[0][names[0].rfind("-") :] if "-" in names[0] else ""  # such as -laptop
    if len(runs) > 1 and shared and all(name.endswith(shared) for name in names):
        names = [name.removesuffix(shared) for name in names]
    groups: dict[str, Config] = {}
    for name, run in zip(names, runs, strict=True):
        key = config_key(run)
        while key in groups and run.get("seed") in [other.get("seed") for other in groups[key].runs]:
            key += "+"  # another checkpoint of the same run is no further seed
        groups.setdefault(key, Config(name, [])).runs.append(run)
    return list(groups.values())


def config_key(run: Run) -> str:
    """What runs of one config have in common; what they started from may be named after their seed."""
    if "settings" not in run:
        return str(run["run"])
    kept = {k: v for k, v in run["settings"].items() if k not in SAME_CONFIG}
    for key in ("init_from", "embeddings"):
        if key in kept:
            kept[key] = kept[key].removesuffix(f"-{run['seed']}")
    return json.dumps([kept, run["tokens_seen"]], sort_keys=True)


def learning_curve(run: Run) -> dict[str, float]:
    """Validation PPL in the course of training by tokens seen, from the run's log; empty where there is none."""
    log = Path(run["checkpoint"]).parent / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    points = {str(line["tokens_seen"]): float(np.exp(line["val_loss"])) for line in lines if "val_loss" in line}
    return dict(list(points.items())[1:])  # the first is the untrained model's, or that of what it started from


# --------------------------------------------------------------------------------------------------- how they look


def known(text: Show, run: Run) -> str:
    """What is shown of a run, or - where it has no such figure."""
    try:
        return text(run)
    except KeyError:
        return "-"


def figure(key: str, form: str, at: str | None = None) -> Show:
    """Shows a result by a format such as ',.1f'; of one by length, window or position, that at one of them."""
    return lambda r: format(r[key] if at is None else r[key][at], form)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45s, 12m30s, 3h05m."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def format_rank(rank: float, width: float) -> str:
    return f"{rank:.1f}/{width:.0f} = {rank / width:.1%}"


def format_bytes(count: float) -> str:
    """Whole bytes, but where a cache of constant size is shared by many tokens."""
    return f"{count:,.0f}" if count >= 10 else f"{count:.2f}"


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = ["<", *[">"] * (len(widths) - 1)]
    layout = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return "\n".join(layout.format(*row) for row in [header, ["-" * width for width in widths], *rows])


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """The same for a page."""
    sides = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, sides, *rows])


# ------------------------------------------------------------------------------------------------------- the tables

COLUMNS: dict[str, Show] = {
    "val loss": figure("val_loss", ".4f"),
    "val PPL": figure("val_ppl", ".1f"),
    "accuracy": figure("val_accuracy", ".1%"),
    "rev. forward": figure("reversal_forward_ppl", ".1f"),
    "backward": figure("reversal_backward_ppl", ".1f"),
    "ratio": figure("reversal_ratio", ".3f"),
    "answers' ratio": figure("reversal_answer_ratio", ".3f"),
    "contexts settled": lambda r: ", ".join(f"{rate:.1%}" for rate in r["context_convergence_rates"]),
    "contexts' rank": lambda r: format_rank(r["context_effective_rank"], r["context_dim"]),
    "WikiText word PPL": figure("wikitext_word_ppl", ".1f"),
    "LAMBADA": figure("lambada_accuracy", ".1%"),
    "LAMBADA PPL": figure("lambada_ppl", ".1f"),
    "Pile PPL": figure("pile_ppl", ".1f"),
    "Pile bits/byte": figure("pile_bits_per_byte", ".4f"),
    "cache B/token": lambda r: format_bytes(r["cache_bytes_per_token"][SHOWN_LENGTH]),
    "saved": figure("cache_saved", ".1%", SHOWN_LENGTH),
    "peak CUDA bytes": figure("cuda_peak_bytes", ",.0f", SHOWN_LENGTH),
    "decode tokens/s": figure("decode_tokens_per_s", ",.0f", SHOWN_LENGTH),
    "prefill tokens/s": figure("prefill_tokens_per_s", ",.0f", SHOWN_LENGTH),
    "parameters": figure("parameters", ",.0f"),
    "tokens seen": figure("tokens_seen", ",.0f"),
}

SUMMARY: dict[str, Show] = {  # what the end of a training run shows
    "validation loss": figure("val_loss", ".4f"),
    "best validation loss on the way": figure("best_val_loss", ".4f"),
    "validation PPL": figure("val_ppl", ".1f"),
    "validation accuracy": figure("val_accuracy", ".1%"),
    "reversal, forward PPL": figure("reversal_forward_ppl", ".1f"),
    "reversal, backward PPL": figure("reversal_backward_ppl", ".1f"),
    "reversal ratio (1 is best)": figure("reversal_ratio", ".3f"),
    "reversal gap (0 is best)": figure("reversal_gap", ".1f"),
    "  of the answers alone, ratio": figure("reversal_answer_ratio", ".3f"),
    "long documents, PPL after window 1": figure("long_ppl", ".1f", AFTER_FIRST),
    "  with the memory reset": figure("long_ppl_reset", ".1f", AFTER_FIRST),
    "cache bytes per token": lambda r: format_bytes(r["cache_bytes_per_token"][SHOWN_LENGTH]),
    "  of the baseline": lambda r: format_bytes(r["baseline_cache_bytes_per_token"][SHOWN_LENGTH]),
    f"cache saved, {int(SHOWN_LENGTH):,} tokens": figure("cache_saved", ".1%", SHOWN_LENGTH),
    "parameters": figure("parameters", ",.0f"),
    "checkpoint": lambda r: r["checkpoint"],
}

TRAINING: dict[str, Show] = {  # what a run was trained on, and which checkpoint was scored
    "run": lambda r: r["run"],
    "tokens seen": figure("tokens_seen", ","),
    "steps": figure("steps", ","),
    "seed": figure("seed", ""),
    "commit": lambda r: r["commit"][:8] + "+" * r["commit"].endswith("+"),
    "training data": lambda r: r["data"]["train_sha256"][:8],
    "started from": lambda r: ", ".join(r["parents"]) or "scratch",
    "checkpoint": lambda r: r["checkpoint"],
    "weights, SHA-256": lambda r: r["weights_sha256"][:16],
}


def format_summary(results: Run) -> str:
    """The figures of one run, a line each; of a run that was not measured in full, those that there are."""
    rows = [[name, shown] for name, text in SUMMARY.items() if (shown := known(text, results)) != "-"]
    for where, ppl in results.get("position_ppl", {}).items():
        rows.append([f"PPL at positions {where}", f"{ppl:.1f}"])
    return "\n\n".join([format_table(["measured", "value"], rows), *ppl_meanings([Config("this run", [results])])])


def comparison_table(configs: list[Config]) -> Table:
    """A row per config, a column per metric that any of them has."""
    columns = {header: [c.show(text) for c in configs] for header, text in COLUMNS.items()}
    shown = {header: column for header, column in columns.items() if set(column) != {"-"}}
    if max(len(c.runs) for c in configs) > 1:
        shown = {"seeds": [str(len(c.runs)) for c in configs], **shown}
    return ["run", *shown], [list(row) for row in zip([c.name for c in configs], *shown.values(), strict=True)]


def position_table(configs: list[Config]) -> Table:
    """PPL by position in the window."""
    scored = [c for c in configs if "position_ppl" in c.mean]
    ranges = list(dict.fromkeys(where for c in scored for where in c.mean["position_ppl"]))
    rows = [[c.name, *(c.show(figure("position_ppl", ".1f", where)) for where in ranges)] for c in scored]
    return ["PPL at positions", *ranges], rows


def long_table(configs: list[Config]) -> Table:
    """PPL per window of long documents, and how much text stands behind each figure."""
    scored = [c for c in configs if "long_ppl" in c.mean]
    windows, rows = list(scored[0].mean["long_ppl"]) if scored else [], []
    for c in scored:
        names = {"long_ppl": c.name, "long_ppl_reset": "  memory reset before each window"}
        rows += [[n, *(c.show(figure(key, ".1f", w)) for w in windows)] for key, n in names.items() if key in c.mean]
    for key, name in {"long_documents": "documents", "long_tokens": "tokens"}.items() if scored else ():
        rows.append([name, *(f"{scored[0].mean[key][window]:,.0f}" for window in windows)])
    return ["long documents, PPL in window", *windows], rows


def ppl_meanings(configs: list[Config]) -> list[str]:
    """What the PPL of models trained here means."""
    trained = [c for c in configs if {"steps", "ppl_meaning"} <= c.runs[0].keys()]
    lines = [f"{c.name}: PPL {c.mean['val_ppl']:.1f} is {c.runs[0]['ppl_meaning']}" for c in trained]
    note = "(what a PPL means presumes a subword vocabulary of about 50,000)"
    return ["\n".join([*lines, note])] if lines else []


def not_measured(runs: list[Run]) -> list[str]:
    """What could not be measured and why; the texts are the same for all runs."""
    return [f"{task}: not measured: {why}" for task, why in runs[0].get("not_measured", {}).items()]


def format_comparison(results: list[Run]) -> str:
    """The tables for a terminal."""
    configs = group_runs(results)
    tables = [make(configs) for make in (comparison_table, position_table, long_table)]
    parts = [*not_measured(results), *(format_table(*table) for table in tables if table[1]), *ppl_meanings(configs)]
    return "\n\n".join(parts)


# ----------------------------------------------------------------------------------------------------- the report


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, report.md and the pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{**run, "learning_curve": learning_curve(run)} for run in results["runs"]]
    configs = group_runs(runs)
    page = report_page(results, configs, draw_pictures(configs, folder))
    with replacing(folder / "report.md") as file:
        file.write(page.encode())
    with replacing(folder / "results.json") as file:  # last: it says that the report is whole
        file.write(json.dumps(results, indent=2).encode())


def report_page(results: dict[str, Any], configs: list[Config], pictures: dict[str, str]) -> str:
    """report.md, from file names and captions of the pictures."""
    runs = results["runs"]
    seeds = "± and bars are the sample standard deviation over seeds." if len(runs) > len(configs) else ""
    tables = {
        "Perplexity by position": position_table(configs),
        "Long documents": long_table(configs),
        "What each run was trained on": (
            list(TRAINING),
            [[known(text, run) for text in TRAINING.values()] for run in runs],
        ),
    }
    parts = [
        "# Comparison",
        f"Scored on `{results['data']}` in windows of {results['block_size']} tokens, all by the same code in "
        f"float32. Cache bytes are those of the tensors that `init_cache` allocates for {int(SHOWN_LENGTH):,} tokens. "
        f"{seeds}",
        *(f"**Warning: {warning}**" for warning in results.get("warnings", [])),
        markdown_table(*comparison_table(configs)),
        *not_measured(runs),
        *(f"![{name}]({name})\n\n{caption}" for name, caption in pictures.items()),
        *(f"## {title}\n\n{markdown_table(*table)}" for title, table in tables.items() if table[1]),
        *(f"## What the perplexities mean\n\n{text}" for text in ppl_meanings(configs)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


# ------------------------------------------------------- pictures, readable on a projector and in black and white

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 3)))
LOOK: Any = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2}
LINE_PICTURES = {  # file name -> (figure, x axis, unit of x if it is a number, caption)
    "cache.png": ("cache_bytes", "tokens in the cache", 1, "Cache bytes of one row of text against its length."),
    "positions.png": ("position_ppl", "position in the window", None, "PPL by position: what more context is worth."),
    "training.png": ("learning_curve", "million tokens seen", 1e6, "Validation PPL in training, on a sample."),
    "long.png": (
        "long_ppl", "window of a long document", None,
        "PPL per window of long documents; dotted, the memory reset before each window. Later windows are of fewer, "
        "other documents, so compare lines, not windows.",
    ),
}  # fmt: skip


def draw_pictures(configs: list[Config], folder: Path) -> dict[str, str]:
    """Draw what the configs have figures for; returns the file names and captions."""
    import matplotlib

    drawn = {}
    with matplotlib.rc_context(LOOK):
        placed = [c for c in configs if {"val_ppl", "cache_bytes_per_token"} <= c.mean.keys()]
        if len(placed) > 1:
            save(draw_tradeoff(placed), folder / "tradeoff.png")
            drawn["tradeoff.png"] = (
                f"Validation PPL against cache bytes per token at {int(SHOWN_LENGTH):,} tokens. Filled and joined: the "
                "best front, where nothing smaller is better. The line across is the baseline's PPL."
            )
        for name, (key, x, unit, caption) in LINE_PICTURES.items():
            if with_it := [c for c in configs if c.mean.get(key)]:
                save(draw_lines(with_it, key, x, unit), folder / name)
                drawn[name] = caption
    return drawn


def save(picture: Any, path: Path) -> None:
    with replacing(path) as file:
        picture.savefig(file)


def styles(configs: list[Config]) -> list[dict[str, Any]]:
    """A colour and a marker per architecture, a line per config of it."""
    families = list(dict.fromkeys(c.family for c in configs))
    seen: dict[str, int] = {}
    found = []
    for c in configs:
        number, within = families.index(c.family) % len(MARKERS), seen.setdefault(c.family, 0)
        seen[c.family] += 1
        found.append({"color": COLOURS[number], "marker": MARKERS[number], "linestyle": LINES[within % len(LINES)]})
    return found


def draw_tradeoff(configs: list[Config]) -> Any:
    """PPL against cache bytes per token, with bars over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    picture = Figure(figsize=(12, 7), layout="constrained")
    axes, front = picture.subplots(), best_front(configs)
    by_size = sorted(zip(configs, styles(configs), strict=True), key=lambda pair: place(pair[0]))
    for c, style in by_size:  # as in the legend, whose numbers tell two of one architecture apart
        bar = c.deviation["val_ppl"] if len(c.runs) > 1 else None
        fill = style["color"] if c in front else "white"
        label = f"{c.name}: {format_bytes(place(c)[0])}, {place(c)[1]:.1f}"
        axes.errorbar(*place(c), yerr=bar, label=label, capsize=5, **style | {"linestyle": "", "ms": 11, "mfc": fill})
        if c.family == "pythia":
            axes.axhline(place(c)[1], color="#777777", linewidth=1, zorder=0)
    axes.plot(*zip(*map(place, front), strict=True), drawstyle="steps-post", color="#777777", linewidth=1.5, zorder=0)
    axes.set(xscale="log", yscale="log", ylabel="validation PPL (lower is better)")
    axes.set_xlabel(f"cache bytes per token at {int(SHOWN_LENGTH):,} tokens (fewer is better)")
    plain_ticks(axes)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter("")
    picture.legend(loc="outside right upper", frameon=False, title="run: bytes, PPL")
    return picture


def place(config: Config) -> tuple[float, float]:
    return config.mean["cache_bytes_per_token"][SHOWN_LENGTH], config.mean["val_ppl"]


def best_front(configs: list[Config]) -> list[Config]:
    """Those than which none is both as small and better, by size."""
    ordered = sorted(configs, key=place)
    lowest = itertools.accumulate((place(c)[1] for c in ordered), min, initial=float("inf"))
    return [c for c, before in zip(ordered, lowest, strict=False) if place(c)[1] < before]


def draw_lines(configs: list[Config], key: str, x_label: str, unit: float | None) -> Any:
    """A figure by length, position, tokens seen or window: a line per config, with bars over seeds."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 7), layout="constrained")
    axes = picture.subplots()
    for c, style in zip(configs, styles(configs), strict=True):
        y = {x: value for x, value in c.mean[key].items() if x != AFTER_FIRST}
        xs = [float(x) / unit for x in y] if unit else list(y)
        bars = [c.deviation[key][x] for x in y] if len(c.runs) > 1 else None
        axes.errorbar(xs, list(y.values()), yerr=bars, label=c.name, capsize=4, markersize=8, mfc="white", **style)
        if reset := c.mean.get(f"{key}_reset"):
            axes.plot(xs, [reset[x] for x in y], **style | {"linestyle": ":", "linewidth": 1})
    axes.set(xlabel=x_label, ylabel="bytes" if key == "cache_bytes" else "PPL", yscale="log")
    axes.grid(alpha=0.3)
    if key == "cache_bytes":
        axes.set_xscale("log", base=2)
    else:
        plain_ticks(axes)
    picture.legend(loc="outside right upper", frameon=False)
    return picture


def plain_ticks(axes: Any) -> None:
    """Round numbers on a logarithmic axis of less than a decade."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
