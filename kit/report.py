"""What eval.py measured, as tables for a terminal and as report.md with pictures; the fields of results.json.

results.json holds data and block_size (what all runs were scored on, in windows of how many tokens) and runs, of each:

    run, model, checkpoint, weights_sha256      which weights: as named to eval.py, class, file, digest of all tensors
    settings                                    of train.py, seed among them, and in model_args the model's
    tokens_seen, steps, seed, commit, data      what it was trained on; data: tokenizer and digests of the token files
    parents                                     the runs that it started from; tokens_seen counts theirs too
    parameters, trainable_, embedding_          numbers of parameters
    val_loss, val_ppl, val_accuracy, val_tokens over the validation data, each token once
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
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kit.files import replacing

AFTER_FIRST = "after 1"  # where a memory can help: all windows of a document but the first
SHOWN_LENGTH = "2048"  # tokens at which the tables show caches
SAME_CONFIG = ("seed", "out_dir", "overwrite", "device", "data_dir")  # settings in which runs of one config may differ
PPL_MEANING = {  # of one below the number
    5: "abnormal: a leak or a causal-mask error, inspect the code",
    30: "suspicious: overfitting possible, check data volume and split",
    100: "normal at large scale",
    500: "normal from scratch",
    1000: "still falling",
    math.inf: "undertrained: more steps or another learning rate",
}
NOTE = (
    f"Caches are of {int(SHOWN_LENGTH):,} tokens, ± and bars the standard deviation over seeds (sample); what a PPL is "
    "said to be presumes a subword vocabulary of about 50,000."
)
Table = tuple[list[str], list[list[str]]]  # header, rows
Show = Callable[[dict[str, Any]], str]  # what a table shows of a run. Raises KeyError if the run does not have it


# ------------------------------------------------------------------------------------------- one config, its seeds


@dataclass(frozen=True)
class Config:
    """The runs of one config, which differ in their seed alone."""

    name: str  # of the first run's folder
    runs: list[dict[str, Any]]

    @property
    def family(self) -> str:
        """The architecture, a name from configurator.MODELS."""
        return self.runs[0].get("settings", {}).get("model", "pythia")  # Hugging Face weights are GPT-NeoX

    @cached_property
    def mean(self) -> dict[str, Any]:
        """A run's figures, each the mean over the seeds."""
        return combine(self.runs, lambda values: float(np.mean(values)))

    @cached_property
    def deviation(self) -> dict[str, Any]:
        """Likewise the sample standard deviation; empty where there is one seed."""
        found = combine(self.runs, lambda values: float(np.std(values, ddof=1))) if len(self.runs) > 1 else {}
        return found and {**found, "context_dim": self.mean.get("context_dim")}  # which a rank is divided by

    def show(self, text: Show) -> str:
        """A figure as a table has it: mean, or mean ± standard deviation, or - if a run does not have it."""
        try:
            texts = {text(run) for run in self.runs}
        except KeyError:
            return "-"
        return text(self.mean) + (f" ± {text(self.deviation)}" if len(texts) > 1 else "")


def combine(values: list[Any], statistic: Callable[[list[float]], float]) -> Any:
    """A statistic of each number in objects and lists of one form; of what is no number, the first."""
    first = values[0]
    if isinstance(first, dict):
        return {k: combine([v[k] for v in values], statistic) for k in first if all(k in v for v in values)}
    if isinstance(first, list):
        return [combine(list(each), statistic) for each in zip(*values, strict=False)]
    return statistic(values) if isinstance(first, int | float) else first


def group_runs(runs: list[dict[str, Any]]) -> list[Config]:
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


def config_key(run: dict[str, Any]) -> str:
    """What runs of one config have in common; what they started from may be named after their seed."""
    if "settings" not in run:
        return run["run"]
    kept = {k: v for k, v in run["settings"].items() if k not in SAME_CONFIG}
    for key in ("init_from", "embeddings"):
        if key in kept:
            kept[key] = kept[key].removesuffix(f"-{run['seed']}")
    return json.dumps([kept, run["tokens_seen"]], sort_keys=True)


def learning_curve(run: dict[str, Any]) -> dict[str, float]:
    """Validation PPL in the course of training by tokens seen, from the run's log; empty where there is none."""
    log = Path(run["checkpoint"]).parent / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    points = {str(line["tokens_seen"]): float(np.exp(line["val_loss"])) for line in lines if "val_loss" in line}
    return dict(list(points.items())[1:])  # the first is the untrained model's, or that of what it started from


# ------------------------------------------------------------------------------------------------------ tables


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


def format_table(header: list[str], rows: list[list[str]], is_page: bool = False) -> str:
    """Columns as wide as their widest cell, the first to the left, the others to the right; or Markdown, for a page."""
    widths = [0 if is_page else max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = ["<", *[">"] * (len(widths) - 1)]
    bar, ends = (" | ", ("| ", " |")) if is_page else ("  ", ("", ""))
    layout = bar.join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)).join(ends)
    rules = [":--" if side == "<" else "--:" for side in sides] if is_page else ["-" * width for width in widths]
    return "\n".join(layout.format(*row) for row in [header, rules, *rows])


def column(key: str, form: str | Callable[[float], str], place: str = SHOWN_LENGTH) -> Show:
    """A figure in a format: of several places or lengths the one at place, of several blocks all."""
    show = form.format if isinstance(form, str) else form

    def text(run: dict[str, Any]) -> str:
        value = run[key][place] if isinstance(run[key], dict) else run[key]
        return ", ".join(map(show, value)) if isinstance(value, list) else show(value)

    return text


COLUMNS: dict[str, Show] = {
    "val loss": column("val_loss", "{:.4f}"),
    "best on the way": column("best_val_loss", "{:.4f}"),
    "val PPL": column("val_ppl", "{:.1f}"),
    "accuracy": column("val_accuracy", "{:.1%}"),
    "rev. forward": column("reversal_forward_ppl", "{:.1f}"),
    "rev. backward": column("reversal_backward_ppl", "{:.1f}"),
    "rev. ratio": column("reversal_ratio", "{:.3f}"),
    "rev. gap": column("reversal_gap", "{:.1f}"),
    "answers' ratio": column("reversal_answer_ratio", "{:.3f}"),
    "contexts settled": column("context_convergence_rates", "{:.1%}"),
    "contexts' rank": lambda run: format_rank(run["context_effective_rank"], run["context_dim"]),
    "WikiText word PPL": column("wikitext_word_ppl", "{:.1f}"),
    "LAMBADA": column("lambada_accuracy", "{:.1%}"),
    "LAMBADA PPL": column("lambada_ppl", "{:.1f}"),
    "Pile PPL": column("pile_ppl", "{:.1f}"),
    "Pile bits/byte": column("pile_bits_per_byte", "{:.4f}"),
    "cache B/token": column("cache_bytes_per_token", format_bytes),
    "baseline's": column("baseline_cache_bytes_per_token", format_bytes),
    "saved": column("cache_saved", "{:.1%}"),
    "CUDA peak MB": column("cuda_peak_bytes", lambda count: f"{count / 1e6:,.1f}"),
    "decode tokens/s": column("decode_tokens_per_s", "{:,.0f}"),
    "prefill tokens/s": column("prefill_tokens_per_s", "{:,.0f}"),
    "parameters": column("parameters", "{:,.0f}"),
    "tokens seen": column("tokens_seen", "{:,.0f}"),
}
TRAINING_COLUMNS: dict[str, Show] = {
    "tokens seen": column("tokens_seen", "{:,.0f}"),
    "steps": column("steps", "{:,.0f}"),
    "seed": column("seed", "{:.0f}"),
    "commit": lambda run: run["commit"][:8] + "+" * run["commit"].endswith("+"),
    "training data": lambda run: run["data"]["train_sha256"][:8],
    "started from": lambda run: ", ".join(run["parents"]) or "scratch",
    "checkpoint": column("checkpoint", "{}"),
    "weights, SHA-256": lambda run: run["weights_sha256"][:16],
}


def ppl_meaning(ppl: float) -> str:
    """What a perplexity says about a run."""
    return next((meaning for limit, meaning in PPL_MEANING.items() if ppl < limit), PPL_MEANING[math.inf])


def comparison_table(configs: list[Config]) -> Table:
    """A row per config, a column per metric that any of them has."""
    cells = {header: [c.show(text) for c in configs] for header, text in COLUMNS.items()}
    own = {"steps", "val_ppl"}  # of the models trained here
    cells["PPL is"] = [ppl_meaning(c.mean["val_ppl"]) if own <= c.mean.keys() else "-" for c in configs]
    cells = {header: shown for header, shown in cells.items() if set(shown) != {"-"}}
    if any(len(c.runs) > 1 for c in configs):
        cells = {"seeds": [str(len(c.runs)) for c in configs], **cells}
    return ["run", *cells], [list(row) for row in zip([c.name for c in configs], *cells.values(), strict=True)]


def place_table(title: str, configs: list[Config], figures: dict[str, str]) -> Table:
    """Figures that are a PPL for each of several places, by their names; an empty one stands for the config's."""
    rows = [(c, key, name or c.name) for c in configs for key, name in figures.items() if key in c.mean]
    places = list(dict.fromkeys(place for c, key, _ in rows for place in c.mean[key]))
    return [title, *places], [[name, *(c.show(column(key, "{:.1f}", p)) for p in places)] for c, key, name in rows]


def tables(configs: list[Config]) -> dict[str, Table]:
    """What eval.py prints, by titles for a page."""
    names = {"long_ppl": "", "long_ppl_reset": "  memory reset before each window"}
    header, rows = place_table("long documents, PPL in window", configs, names)
    for c in [c for c in configs if "long_ppl" in c.mean][:1]:  # on how much text, which is the same for all runs
        rows += [[key, *(f"{c.mean[f'long_{key}'][w]:,.0f}" for w in header[1:])] for key in ("documents", "tokens")]
    positions = place_table("PPL at positions", configs, {"position_ppl": ""})
    found = {
        "Figures": comparison_table(configs),
        "Perplexity by position": positions,
        "Long documents": (header, rows),
    }
    return {title: table for title, table in found.items() if table[1]}


def notices(runs: list[dict[str, Any]]) -> list[str]:
    """What has to be known before the figures are read: what was not measured, and runs on other tokens than others."""
    lines = [f"{task}: not measured: {why}" for task, why in runs[0].get("not_measured", {}).items()]
    kinds: dict[str, list[str]] = {}
    for run in runs:
        known = "data" in run and f"{run['tokens_seen']:,} tokens of data {run['data']['train_sha256'][:8]}"
        kinds.setdefault(known or "tokens that are not known", []).append(run["run"])
    trained = "; ".join(f"{', '.join(names)} on {kind}" for kind, names in kinds.items())
    return lines + [f"not trained on the same tokens: {trained}"] * (len(kinds) > 1)


def format_comparison(runs: list[dict[str, Any]]) -> str:
    """The tables for a terminal."""
    configs = group_runs(runs)
    shown = [format_table(*table) for table in tables(configs).values()]
    return "\n\n".join([*notices(runs), *shown, NOTE])


def format_summary(figures: dict[str, Any]) -> str:
    """The figures of one run, a line each; of a run that was not measured in full, those that there are."""
    header, (row,) = comparison_table([Config("", [figures])])
    rows = [list(pair) for pair in zip(header[1:], row[1:], strict=True)]
    rows += [[f"PPL at positions {where}", f"{ppl:.1f}"] for where, ppl in figures.get("position_ppl", {}).items()]
    long = {"long_ppl": "long documents, PPL after window 1", "long_ppl_reset": "  memory reset before each window"}
    rows += [[name, f"{figures[key][AFTER_FIRST]:.1f}"] for key, name in long.items() if key in figures]
    return format_table(["measured", "value"], [*rows, ["checkpoint", figures["checkpoint"]]]) + f"\n\n{NOTE}"


# ----------------------------------------------------------------------------------------------------- the report


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, report.md and the pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = results["runs"]
    configs = group_runs([{**run, "learning_curve": learning_curve(run)} for run in runs])
    training = [[run["run"], *map(Config("", [run]).show, TRAINING_COLUMNS.values())] for run in runs]
    found = {**tables(configs), "What each run was trained on": (["run", *TRAINING_COLUMNS], training)}
    parts = [
        f"# Comparison\n\nScored on `{results['data']}` in windows of {results['block_size']} tokens. {NOTE}",
        *notices(runs),
        *(f"## {title}\n\n{format_table(*table, is_page=True)}" for title, table in found.items()),
        *(f"![{name}]({name})\n\n{caption}" for name, caption in draw_pictures(configs, folder).items()),
    ]
    with replacing(folder / "report.md") as file:
        file.write(("\n\n".join(parts) + "\n").encode())
    with replacing(folder / "results.json") as file:  # last: by it compare.py knows that the report is whole
        file.write(json.dumps(results, indent=2).encode())


# ---------------------------------------------------------- pictures, readable in black and white: markers and lines

GREY = "#777777"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))
STYLES: list[dict[str, Any]] = [
    {"color": colour, "marker": marker, "linestyle": line}
    for colour, marker, line in zip(COLOURS, "os^DvPX", LINES, strict=True)
]
LOOK: Any = {"font.size": 14, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2}
LOOK |= {"lines.markersize": 8, "legend.frameon": False}
PICTURES = {  # file: figure, labels of x and y, what x is divided by (0: it is a name), caption
    "cache": ("cache_bytes", "tokens in the cache", "bytes", 1, "Cache of one row of text against its length."),
    "positions": ("position_ppl", "position in the window", "PPL", 0, "What more context is worth."),
    "training": ("learning_curve", "million tokens seen", "validation PPL", 1e6, "On a sample of the validation data."),
    "long": ("long_ppl", "window of a long document", "PPL", 0, "Dotted: memory reset. Later, fewer documents."),
}


def draw_pictures(configs: list[Config], folder: Path) -> dict[str, str]:
    """Draw what the configs have figures for; returns the file names and captions."""
    import matplotlib
    from matplotlib.figure import Figure

    captions = {}
    with matplotlib.rc_context(LOOK):
        scored = [c for c in configs if {"val_ppl", "cache_bytes_per_token"} <= c.mean.keys()]
        if len(scored) > 1:
            draw_tradeoff(figure := Figure(figsize=(12, 7), layout="constrained"), scored)
            save(figure, folder / "tradeoff.png")
            captions["tradeoff.png"] = "Filled and joined: the best front, than which nothing smaller is better."
        for name, (key, x_label, y_label, unit, caption) in PICTURES.items():
            if with_it := [c for c in configs if c.mean.get(key)]:
                draw_lines(figure := Figure(layout="constrained"), with_it, key, x_label, y_label, unit)
                save(figure, folder / f"{name}.png")
                captions[f"{name}.png"] = caption
    return captions


def save(figure: Any, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file)


def draw_tradeoff(figure: Any, configs: list[Config]) -> None:
    """PPL against cache bytes per token, a marker and a colour per architecture, and the baseline's PPL as a line."""
    axes, front = figure.subplots(), best_front(configs)
    styles = dict(zip(dict.fromkeys(c.family for c in configs), itertools.cycle(STYLES), strict=False))
    for c in sorted(configs, key=place):  # the numbers in the legend tell two of one architecture apart
        style = {**styles[c.family], "linestyle": "none", "markersize": 12, "markeredgewidth": 2}
        label = f"{c.name}: {format_bytes(place(c)[0])}, {place(c)[1]:.1f}"
        fill = {} if c in front else {"markerfacecolor": "white"}
        axes.errorbar(*place(c), yerr=c.deviation.get("val_ppl"), label=label, capsize=5, **style, **fill)
    axes.step(*zip(*map(place, front), strict=True), where="post", label="best front", zorder=0, color=GREY)
    for c in [c for c in configs if c.family == "pythia"][:1]:
        axes.axhline(place(c)[1], linestyle=":", label="Pythia's PPL", zorder=0, color=GREY)
    axes.set(xscale="log", ylabel="validation PPL (lower is better)")
    axes.set_xlabel(f"cache bytes per token at {int(SHOWN_LENGTH):,} tokens (fewer is better)")
    figure.legend(loc="outside right center", title="run: bytes, PPL")


def place(config: Config) -> tuple[float, float]:
    return config.mean["cache_bytes_per_token"][SHOWN_LENGTH], config.mean["val_ppl"]


def best_front(configs: list[Config]) -> list[Config]:
    """Those than which none is both as small and better, by size."""
    ordered = sorted(configs, key=place)
    lowest = itertools.accumulate((place(c)[1] for c in ordered), min, initial=math.inf)
    return [c for c, before in zip(ordered, lowest, strict=False) if place(c)[1] < before]


def draw_lines(figure: Any, configs: list[Config], key: str, x_label: str, y_label: str, unit: float) -> None:
    """A panel for each architecture, the baseline as a line in all of them."""
    baseline = next((c for c in configs if c.family == "pythia"), configs[0])
    families = list(dict.fromkeys(c.family for c in configs if c is not baseline)) or [baseline.family]
    rows, columns = -(-len(families) // 2), min(2, len(families))
    figure.set_size_inches(8 * columns, 4.2 * rows)
    for number, family in enumerate(families, 1):
        axes = figure.add_subplot(rows, columns, number)
        members = [c for c in configs if c.family == family and c is not baseline]
        for c, style in zip(
            [baseline, *members], itertools.chain([{"color": GREY}], itertools.cycle(STYLES)), strict=False
        ):
            y = {place: ppl for place, ppl in c.mean[key].items() if place != AFTER_FIRST}
            x = [float(place) / unit for place in y] if unit else list(y)
            bars = [c.deviation[key][place] for place in y] if c.deviation else None
            axes.errorbar(x, list(y.values()), yerr=bars, capsize=4, label=c.name, **style)
            if reset := key == "long_ppl" and c.mean.get("long_ppl_reset"):
                axes.plot(x, [reset[w] for w in y], **{**style, "linestyle": ":", "markerfacecolor": "white"})
        axes.set(title=family, yscale="log" if unit else "linear", xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        if key == "cache_bytes":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
