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
    cuda_peak_bytes, cuda_bytes_before          of generating up to each length, and before; on CUDA
    cuda_bytes_before, cuda_peak_bytes          allocated before, and at the peak of generating to each length; on CUDA
    overlap                                     how many documents of each evaluation text stand in the training text

Losses are nats per token, bytes those of float32.
"""

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

    @property
    def mean(self) -> dict[str, Any]:
        """A run's figures, each the mean over the seeds."""
        return combine(self.runs, lambda values: float(np.mean(values)))

    @property
    def deviation(self) -> dict[str, Any]:
        """Likewise the sample standard deviation; there are two seeds or more."""
        return combine(self.runs, lambda values: float(np.std(values, ddof=1)))

    def show(self, key: str, text: Callable[[dict[str, Any]], str]) -> str:
        """A figure as a table has it: -, mean, or mean ± standard deviation."""
        if not all(key in run for run in self.runs):
            return "-"
        shown = text(self.mean)
        if len(self.runs) > 1 and len({text(run) for run in self.runs}) > 1:
            shown += f" ± {text(self.deviation)}"
        return shown


def combine(values: list[Any], statistic: Callable[[list[float]], float]) -> Any:
    """A statistic of each number in objects of one form; of what is no number, the first."""
    first = values[0]
    if isinstance(first, dict):
        return {k: combine([v[k] for v in values], statistic) for k in first if all(k in v for v in values)}
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


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """The same for a page."""
    sides = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, sides, *rows])


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
    "contexts' rank": (
        "context_effective_rank",
        lambda r: (
            f"{r['context_effective_rank']:.0f}/{r['context_dim']:.0f} = "
            f"{r['context_effective_rank'] / r['context_dim']:.1%}"
        ),
    ),
    "WikiText word PPL": ("wikitext_word_ppl", lambda r: f"{r['wikitext_word_ppl']:.1f}"),
    "LAMBADA": ("lambada_accuracy", lambda r: f"{r['lambada_accuracy']:.1%}"),
    "LAMBADA PPL": ("lambada_ppl", lambda r: f"{r['lambada_ppl']:.1f}"),
    "Pile PPL": ("pile_ppl", lambda r: f"{r['pile_ppl']:.1f}"),
    "Pile bits/byte": ("pile_bits_per_byte", lambda r: f"{r['pile_bits_per_byte']:.4f}"),
    "cache B/token": ("cache_bytes_per_token", lambda r: format_bytes(r["cache_bytes_per_token"][SHOWN_LENGTH])),
    "saved": ("cache_saved", lambda r: f"{r['cache_saved'][SHOWN_LENGTH]:.1%}"),
    "decode tokens/s": ("decode_tokens_per_s", lambda r: f"{r['decode_tokens_per_s'][SHOWN_LENGTH]:,.0f}"),
    "prefill tokens/s": ("prefill_tokens_per_s", lambda r: f"{r['prefill_tokens_per_s'][SHOWN_LENGTH]:,.0f}"),
    "parameters": ("parameters", lambda r: f"{r['parameters']:,.0f}"),
    "tokens seen": ("tokens_seen", lambda r: f"{r['tokens_seen']:,.0f}"),
}


Table = tuple[list[str], list[list[str]]]  # header, rows


def comparison_table(configs: list[Config]) -> Table:
    """A row per config, a column per metric that any of them has."""
    shown = {h: column for h, column in COLUMNS.items() if any(column[0] in run for c in configs for run in c.runs)}
    seeds = max(len(c.runs) for c in configs) > 1
    header = ["run", *(["seeds"] if seeds else []), *shown]
    return header, [
        [c.name, *([str(len(c.runs))] if seeds else []), *(c.show(key, text) for key, text in shown.values())]
        for c in configs
    ]


def position_table(configs: list[Config]) -> Table:
    """PPL by position in the window."""
    scored = [c for c in configs if "position_ppl" in c.mean]
    ranges = list(dict.fromkeys(where for c in scored for where in c.mean["position_ppl"]))
    return ["PPL at positions", *ranges], [
        [c.name, *(show_ppl(c, "position_ppl", where) for where in ranges)] for c in scored
    ]


def long_table(configs: list[Config]) -> Table:
    """PPL per window of long documents, and how much text stands behind each figure."""
    scored = [c for c in configs if "long_ppl" in c.mean]
    windows = list(scored[0].mean["long_ppl"]) if scored else []
    rows = []
    for c in scored:
        names = {"long_ppl": c.name, "long_ppl_reset": "  memory reset before each window"}
        rows += [[name, *(show_ppl(c, key, w) for w in windows)] for key, name in names.items() if key in c.mean]
    for key, name in {"long_documents": "documents", "long_tokens": "tokens"}.items() if scored else ():
        rows.append([name, *(f"{scored[0].mean[key][w]:,.0f}" for w in windows)])
    return ["long documents, PPL in window", *windows], rows


def show_ppl(config: Config, key: str, where: str) -> str:
    return config.show(key, lambda r: f"{r[key][where]:.1f}" if where in r[key] else "-")


def training_table(runs: list[dict[str, Any]]) -> Table:
    """What each run was trained on, and which checkpoint was scored."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "run": lambda r: r["run"],
        "tokens seen": lambda r: f"{r['tokens_seen']:,}",
        "steps": lambda r: f"{r['steps']:,}",
        "seed": lambda r: str(r["seed"]),
        "commit": lambda r: r["commit"][:8] + "+" * r["commit"].endswith("+"),
        "training data": lambda r: r["data"]["train_sha256"][:8],
        "started from": lambda r: ", ".join(r["parents"]) or "scratch",
        "checkpoint": lambda r: r["checkpoint"],
        "weights, SHA-256": lambda r: r["weights_sha256"][:16],
    }
    return list(columns), [[known(show, run) for show in columns.values()] for run in runs]


def known(show: Callable[[dict[str, Any]], str], run: dict[str, Any]) -> str:
    """What is shown of a run; of Hugging Face weights it is not known what they were trained on."""
    try:
        return show(run)
    except KeyError:
        return "-"


def overlap_table(runs: list[dict[str, Any]]) -> Table:
    """How many documents of each evaluation text share 13 words in a row with a run's training text, or stand in it."""
    header, rows = ["training text of", "evaluation text", "documents", "share 13 words", "stand in it whole"], []
    for run in runs:
        counts = run.get("overlap", {})
        if "not_measured" in counts:
            rows.append([run["run"], f"not measured: {counts['not_measured']}", "-", "-", "-"])
            continue
        for name, c in counts.items():
            figures = (c["documents"], c["sharing_13_words"], c["in_training_text"])
            rows.append([run["run"], name, *(f"{figure:,}" for figure in figures)])
    return header, rows


def ppl_meanings(configs: list[Config]) -> list[str]:
    """What the PPL of models trained here means."""
    trained = [c for c in configs if {"steps", "ppl_meaning"} <= c.runs[0].keys()]
    return [f"{c.name}: PPL {c.mean['val_ppl']:.1f} is {c.runs[0]['ppl_meaning']}" for c in trained]


def not_measured(runs: list[dict[str, Any]]) -> list[str]:
    """What could not be measured and why; the texts are the same for all runs."""
    return [f"{task}: not measured: {why}" for task, why in runs[0].get("not_measured", {}).items()]


VOCABULARY_NOTE = "(what a PPL means presumes a subword vocabulary of about 50,000)"


def format_comparison(results: list[dict[str, Any]]) -> str:
    """The tables for a terminal."""
    configs = group_runs(results)
    tables = [make(configs) for make in (comparison_table, position_table, long_table)]
    parts = [*not_measured(results), *(format_table(*table) for table in tables if table[1])]
    if meanings := ppl_meanings(configs):
        parts.append("\n".join([*meanings, VOCABULARY_NOTE]))
    return "\n\n".join(parts)


# ----------------------------------------------------------------------------------------------------- the report


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, report.md and the pictures into a folder."""
    from kit.pictures import draw_pictures  # matplotlib is slow to import, and training needs the tables alone

    folder.mkdir(parents=True, exist_ok=True)
    runs = [{**run, "learning_curve": learning_curve(run)} for run in results["runs"]]
    configs = group_runs(runs)
    page = report_page(results, configs, draw_pictures(configs, folder))
    with replacing(folder / "report.md") as file:
        file.write(page.encode())
    with replacing(folder / "results.json") as file:  # last: by it compare.py knows that the report is whole
        file.write(json.dumps(results, indent=2).encode())


def report_page(results: dict[str, Any], configs: list[Config], pictures: dict[str, str]) -> str:
    """report.md, from file names and captions of the pictures."""
    runs = results["runs"]
    seeds = "± and bars are the sample standard deviation over seeds." if len(runs) > len(configs) else ""
    parts = [
        "# Comparison",
        f"Scored on `{results['data']}` in windows of {results['block_size']} tokens, all by the same code in "
        f"float32. Cache bytes are those of the tensors that `init_cache` allocates for {int(SHOWN_LENGTH):,} tokens. "
        f"{seeds}",
        *(f"**Warning: {warning}**" for warning in results.get("warnings", [])),
        markdown_table(*comparison_table(configs)),
        *not_measured(runs),
        *(f"![{name}]({name})\n\n{caption}" for name, caption in pictures.items()),
        *section("Perplexity by position", position_table(configs)),
        *section("Long documents", long_table(configs)),
        *section("What each run was trained on", training_table(runs)),
        *section("Evaluation text within the training text", overlap_table(runs)),
    ]
    if meanings := ppl_meanings(configs):
        parts += ["## What the perplexities mean", "\n".join(f"- {line}" for line in [*meanings, VOCABULARY_NOTE])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def section(title: str, table: Table) -> list[str]:
    return [f"## {title}", markdown_table(*table)] if table[1] else []
