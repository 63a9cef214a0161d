"""What eval.py measured: tables, report.md with pictures, and results.json, which docs/evaluation.md explains."""

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kit.files import replacing
from kit.runs import FREE
from kit.show import SHOWN_LENGTH

AFTER_FIRST = "after 1"  # where a memory can help: all windows of a document but the first
SHOWN = str(SHOWN_LENGTH)  # the tables show caches and speeds at this length
SAME_CONFIG = FREE - {"context_cache"} | {"seed", "data_dir"}  # may differ in a config
PPL_MEANING = {  # of one below the number
    5: "abnormal: a leak or a causal-mask error, inspect the code",
    30: "suspicious: overfitting possible, check data volume and split",
    100: "normal at large scale",
    500: "normal from scratch",
    1000: "still falling",
    math.inf: "undertrained: more steps or another learning rate",
}
NOTE = f"Caches are of {SHOWN_LENGTH:,} tokens; long PPL is of long documents after their first window; ± and bars: "
NOTE += "sample standard deviation over seeds. What a PPL is said to be presumes a subword vocabulary of about 50,000."
COLUMNS: dict[str, tuple[str, ...]] = {  # header: figure, format, and of several places or lengths which one
    "val loss": ("val_loss", "{:.4f}"),
    "best on the way": ("best_val_loss", "{:.4f}"),
    "val PPL": ("val_ppl", "{:.1f}"),
    "accuracy": ("val_accuracy", "{:.1%}"),
    "rev. forward": ("reversal_forward_ppl", "{:.1f}"),
    "rev. backward": ("reversal_backward_ppl", "{:.1f}"),
    "rev. ratio": ("reversal_ratio", "{:.3f}"),
    "rev. gap": ("reversal_gap", "{:.1f}"),
    "answers' ratio": ("reversal_answer_ratio", "{:.3f}"),
    "recall PPL": ("recall_ppl", "{:.1f}", "0-10"),  # what few training texts hold tells most
    "others' PPL": ("recall_ppl", "{:.1f}", "others"),
    "contexts settled": ("context_convergence_rates", "{:.1%}"),
    "contexts' rank": ("context_effective_rank", "{:.1f}"),
    "contexts' width": ("context_dim", "{:.0f}"),
    "rank / width": ("context_rank_share", "{:.1%}"),
    "long PPL": ("long_ppl", "{:.1f}", AFTER_FIRST),
    "memory reset": ("long_ppl_reset", "{:.1f}", AFTER_FIRST),
    "cache B/token": ("cache_bytes_per_token", "{:,.1f}"),
    "baseline's": ("baseline_cache_bytes_per_token", "{:,.1f}"),
    "saved": ("cache_saved", "{:.1%}"),
    "CUDA peak B": ("cuda_peak_bytes", "{:,.0f}"),
    "decode tokens/s": ("decode_tokens_per_s", "{:,.0f}"),
    "prefill tokens/s": ("prefill_tokens_per_s", "{:,.0f}"),
    "parameters": ("parameters", "{:,.0f}"),
    "tokens seen": ("tokens_seen", "{:,.0f}"),
}
Table = tuple[list[str], list[list[str]]]  # header, rows


def ppl_meaning(ppl: float) -> str:
    return next(meaning for limit, meaning in PPL_MEANING.items() if ppl < limit or limit == math.inf)


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, its columns aligned for a terminal: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    layout = " | ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    rules = [":".rjust(width, "-") if i else ":".ljust(width, "-") for i, width in enumerate(widths)]
    return "\n".join(f"| {layout.format(*row)} |" for row in [header, rules, *rows])


class Config(NamedTuple):
    """The runs of one config, which differ in their seed alone."""

    name: str  # of the first run: its folder, or checkpoint
    runs: list[dict[str, Any]]

    @property
    def family(self) -> str:
        """The architecture, a name from configurator.MODELS."""
        return self.runs[0].get("settings", {}).get("model", "pythia")  # Hugging Face weights are GPT-NeoX

    def has(self, *figures: str) -> bool:
        return all(run.get(figure) for run in self.runs for figure in figures)

    def places(self, figure: str) -> list[str]:
        """Where a figure was measured: positions, windows, lengths."""
        return [place for place in self.runs[0][figure] if all(place in run[figure] for run in self.runs)]

    def spread(self, figure: str, place: str = SHOWN) -> tuple[Any, Any]:
        """Mean and sample standard deviation over the seeds, 0 of one; of each ContextBlock where there are several."""
        values = [run[figure][place] if isinstance(run[figure], dict) else run[figure] for run in self.runs]
        differ = len(values) > 1 and np.ptp(values, axis=0).any()
        return np.mean(values, axis=0), np.std(values, axis=0, ddof=1) if differ else 0.0

    def show(self, figure: str, form: str, place: str = SHOWN) -> str:
        """A figure as a table has it: mean, or mean ± standard deviation, or - if a run does not have it."""
        try:
            spread = self.spread(figure, place)
        except KeyError:
            return "-"
        return " ± ".join(", ".join(map(form.format, np.atleast_1d(x))) for x in spread[: 1 + np.any(spread[1])])


def group_runs(runs: list[dict[str, Any]]) -> list[Config]:
    """Runs with the same settings but for the seed, and what is named after it, are of one config."""
    groups: dict[str, Config] = {}
    for run in runs:
        settings = run.get("settings", {"init_from": run["run"]})
        kept = [{k: v for k, v in settings.items() if k not in SAME_CONFIG}, run.get("tokens_seen"), run.get("data")]
        key = json.dumps(kept, sort_keys=True).replace(f'-{run.get("seed")}"', '"')
        while key in groups and run.get("seed") in [other.get("seed") for other in groups[key].runs]:
            key += "+"  # another checkpoint of the same run is no further seed
        name = "/".join(Path(run["run"]).parts[-1 - run["run"].endswith(".pt") :]) or run["run"]
        groups.setdefault(key, Config(name, [])).runs.append(run)
    return list(groups.values())


def comparison_table(configs: list[Config]) -> Table:
    """A row per config, a column per metric that any of them has; what its PPL is, of a model that was trained here."""
    cells = {"seeds": [str(len(c.runs)) for c in configs]} if any(len(c.runs) > 1 for c in configs) else {}
    cells |= {header: [c.show(*column) for c in configs] for header, column in COLUMNS.items()}
    names = dict.fromkeys(name for c in configs for name in c.runs[0].get("harness", {}))
    cells |= {name: [c.show("harness", "{:,.4f}", name) for c in configs] for name in names}
    cells["PPL is"] = [ppl_meaning(c.spread("val_ppl")[0]) if c.has("steps", "val_ppl") else "-" for c in configs]
    cells = {header: shown for header, shown in cells.items() if set(shown) != {"-"}}
    return ["run", *cells], [list(row) for row in zip([c.name for c in configs], *cells.values(), strict=True)]


def difference_table(runs: list[dict[str, Any]]) -> Table:
    """How much worse a run's PPL is than that of the first run with its seed, as far as other documents would tell."""
    found = [(run["run"], run["against"]) for run in runs if "against" in run]
    shares = [[f"{math.expm1(of[key]):+.1%}" for key in ("loss", "low", "high")] for _, of in found]
    rows = [[run, of["run"], *share, f"{of['p']:.4f}"] for (run, of), share in zip(found, shares, strict=True)]
    return ["run", "against", "PPL", "95% from", "to", "p"], rows


def place_table(title: str, configs: list[Config], figures: dict[str, str], tokens: str = "") -> Table:
    """Figures measured at several places, a row each; figures: what is added to the name; tokens: on how much text."""
    shown = [(c, key, "{:.1f}", c.name + added) for c in configs for key, added in figures.items() if c.has(key)]
    shown += [(c, tokens, "{:,.0f}", "tokens") for c in configs if c.has(tokens)][:1]  # the same for all runs
    places = list(dict.fromkeys(place for c, figure, *_ in shown for place in c.places(figure)))
    return [title, *places], [[name, *(c.show(figure, form, p) for p in places)] for c, figure, form, name in shown]


def notices(runs: list[dict[str, Any]]) -> list[str]:
    """What has to be known before the figures are read: what was not measured, and runs on other tokens than others."""
    lines = [f"{task}: not measured: {why}" for task, why in runs[0].get("not_measured", {}).items()]
    kinds: dict[str, list[str]] = {}
    for run in runs:
        known = "data" in run and f"{run['tokens_seen']:,} tokens of data {run['data']['train_sha256'][:8]}"
        kinds.setdefault(known or "tokens that are not known", []).append(run["run"])
    trained = "; ".join(f"{', '.join(names)} on {kind}" for kind, names in kinds.items())
    return lines + [f"not trained on the same tokens: {trained}"] * (len(kinds) > 1)


def format_summary(figures: dict[str, Any]) -> str:
    """The figures of one run, a line each; of a run that was not measured in full, those that there are."""
    header, (row,) = comparison_table([Config("", [figures])])
    rows = [list(pair) for pair in zip(header[1:], row[1:], strict=True)]
    rows += [["checkpoint", figures["checkpoint"]]] if "checkpoint" in figures else []
    return format_table(["measured", "value"], rows) + (f"\n\n{NOTE}" if "val_ppl" in figures else "")


def training_table(runs: list[dict[str, Any]]) -> Table:
    """What each run was trained on, but Hugging Face's weights, of which that is not known."""
    rows = []
    for run in (run for run in runs if "steps" in run):
        counts = [f"{run['tokens_seen']:,}", f"{run['steps']:,}", str(run["seed"])]
        digests = [run["commit"][:8] + run["commit"][40:], run["data"]["train_sha256"][:8]]
        rows.append([run["run"], *counts, *digests, ", ".join(run["parents"]) or "scratch"])
    return ["run", "tokens seen", "steps", "seed", "commit", "training data", "started from"], rows


def format_comparison(results: dict[str, Any]) -> str:
    """All tables of which anything was measured, as Markdown."""
    runs, configs = results["runs"], group_runs(results["runs"])
    long = {"long_ppl": "", "long_ppl_reset": ", memory reset"}
    found = {
        "Figures": comparison_table(configs),
        "Differences, with other documents drawn (paired bootstrap)": difference_table(runs),
        "Positions": place_table("PPL at positions", configs, {"position_ppl": ""}),
        "Recall": place_table("PPL, training count", configs, {"recall_ppl": ""}, "recall_tokens"),
        "Long documents": place_table("PPL in window", configs, long, "long_tokens"),
        "What each run was trained on": training_table(runs),
    }
    parts = [
        f"# Comparison\n\nScored on `{results['data']}` in windows of {results['block_size']} tokens. {NOTE}",
        *notices(runs),
        *(f"## {title}\n\n{format_table(*table)}" for title, table in found.items() if table[1]),
    ]
    return "\n\n".join(parts) + "\n"


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, report.md and the pictures into a folder."""
    configs = group_runs([{**run, "learning_curve": learning_curve(run)} for run in results["runs"]])
    shown = [f"\n![{name}]({name})\n\n{caption}\n" for name, caption in draw_pictures(configs, folder).items()]
    with replacing(folder / "report.md") as file:
        file.write("".join([format_comparison(results), *shown]).encode())
    with replacing(folder / "results.json") as file:  # last
        file.write(json.dumps(results, indent=2).encode())


def learning_curve(run: dict[str, Any]) -> dict[str, float]:
    """Validation PPL in the course of training by tokens seen, from the run's log; empty where there is none."""
    log = Path(run["checkpoint"]).parent / "log.jsonl"
    text = log.read_text() if log.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]  # the last one may be half
    evaluations = [line for line in lines if "val_loss" in line][1:]  # the first is of what it started from
    return {str(line["tokens_seen"]): np.exp(line["val_loss"]) for line in evaluations}


GREY = {"color": "#777777"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))
LOOKS = zip(COLOURS, "os^DvPX", LINES, strict=True)  # readable in black and white
STYLES: list[dict[str, Any]] = [{"color": c, "marker": marker, "linestyle": line} for c, marker, line in LOOKS]
LOOK: Any = {"font.size": 14, "lines.linewidth": 2, "lines.markersize": 8, "legend.frameon": False}
LOOK |= {"axes.spines.top": False, "axes.spines.right": False}
FRONT = "Filled and joined: the best front, than which nothing smaller is better. Dotted: Pythia's PPL; three times as "
FRONT += "much is beyond the picture, in the legend alone."
PICTURES = {  # file: figures of y and x, their labels; caption
    "tradeoff": (("val_ppl", "cache_bytes_per_token"), "validation PPL", "cache bytes per token", FRONT),
    "cache": (("cache_bytes",), "bytes", "thousand tokens in the cache", "Cache of one row of text."),
    "positions": (("position_ppl",), "PPL", "position in the window", "What more context is worth."),
    "training": (("learning_curve",), "validation PPL", "million tokens seen", "On a sample of the validation data."),
    "long": (("long_ppl",), "PPL", "window of a long document", "Later windows are of fewer documents."),
}
UNITS = {"cache_bytes": 1e3, "learning_curve": 1e6}  # what numbers on the x-axis are divided by; others are names


def draw_pictures(configs: list[Config], folder: Path) -> dict[str, str]:
    """Draw what the configs have figures for; returns the file names and captions."""
    import matplotlib
    from matplotlib.figure import Figure

    captions = {}
    with matplotlib.rc_context(LOOK):
        for name, (figures, y_label, x_label, caption) in PICTURES.items():
            if drawn := [c for c in configs if c.has(*figures)]:
                picture = Figure(layout="constrained")
                draw = draw_tradeoff if name == "tradeoff" else draw_lines
                draw(picture, drawn, figures[0], x_label, y_label)
                with replacing(folder / f"{name}.png") as file:
                    picture.savefig(file)
                captions[f"{name}.png"] = caption
    return captions


def draw_tradeoff(picture: Any, configs: list[Config], figure: str, x_label: str, y_label: str) -> None:
    """A marker and a colour per architecture; filled where on the best front."""
    axes, front = picture.subplots(), best_front(configs)
    styles = dict(zip(dict.fromkeys(c.family for c in configs), itertools.cycle(STYLES), strict=False))
    for c in sorted(configs, key=place):  # the numbers in the legend tell two of one architecture apart
        (size, ppl), style = place(c), {**styles[c.family], "linestyle": "none", "markersize": 12, "capsize": 5}
        style |= {"markeredgewidth": 2, "markerfacecolor": style["color"] if c in front else "white"}
        axes.errorbar(size, ppl, yerr=c.spread(figure)[1], label=f"{c.name}: {size:,.1f}, {ppl:.1f}", **style)
        if c.family == "pythia" and math.isfinite(ppl):
            axes.axhline(ppl, linestyle=":", zorder=0, **GREY)
            ppls = [place(each)[1] for each in configs]
            axes.set_ylim(0.9 * min(ppls), min(3 * ppl, 1.05 * max(ppls) + 1))
    axes.step(*zip(*map(place, front), strict=True), where="post", zorder=0, **GREY)
    axes.set(xscale="log", xlabel=f"{x_label} (fewer is better)", ylabel=f"{y_label} (lower is better)")
    picture.set_size_inches(12, 7)
    picture.legend(loc="outside right center", title="run: bytes, PPL")


def place(config: Config) -> tuple[float, float]:
    return config.spread("cache_bytes_per_token")[0], config.spread("val_ppl")[0]


def best_front(configs: list[Config]) -> list[Config]:
    """Those than which none is both as small and better, by size."""
    ordered = sorted(configs, key=place)
    return [c for i, c in enumerate(ordered) if all(place(c)[1] < place(smaller)[1] for smaller in ordered[:i])]


def draw_lines(picture: Any, configs: list[Config], figure: str, x_label: str, y_label: str) -> None:
    """A panel for each architecture, the baseline as a grey line in all of them."""
    baseline, unit = next((c for c in configs if c.family == "pythia"), configs[0]), UNITS.get(figure)
    families = list(dict.fromkeys(c.family for c in configs if c is not baseline)) or [baseline.family]
    rows, columns = -(-len(families) // 2), min(2, len(families))
    picture.set_size_inches(8 * columns, 4.2 * rows)
    for number, family in enumerate(families, 1):
        axes = picture.add_subplot(rows, columns, number)
        members = [c for c in configs if c.family == family and c is not baseline]
        for c, style in zip([baseline, *members], itertools.chain([GREY], itertools.cycle(STYLES)), strict=False):
            places = [place for place in c.places(figure) if place != AFTER_FIRST]
            x = [float(place) / unit for place in places] if unit else places
            y, bars = zip(*(c.spread(figure, place) for place in places), strict=True)
            axes.errorbar(x, y, yerr=bars, capsize=4, label=c.name, **style)
        axes.set(title=family, yscale="log" if unit else "linear", xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
