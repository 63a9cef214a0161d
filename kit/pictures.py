"""The pictures of the report: readable on a projector, in black and white, and without telling colours apart.

Every line has a marker, a line style and its name beside it; the colours are Okabe and Ito's (jfly.uni-koeln.de/color).
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from kit.files import replacing
from kit.report import AFTER_FIRST, SHOWN_LENGTH, Config

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))
GREY = "#777777"
Style = dict[str, Any]
End = tuple[float, str, Style]  # a line's last y, its name and its style
STYLES: list[Style] = [
    {"color": colour, "marker": marker, "linestyle": line, "markersize": 8}
    for colour, marker, line in zip(COLOURS, MARKERS, LINES, strict=True)
]
BASELINE_STYLE: Style = {"color": GREY, "marker": "", "linestyle": "-"}
LOOK: Any = {"font.size": 14, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2}
LABEL_GAP = 0.08  # least distance of the names of two lines, as a share of the panel's height
ANGLES = sorted((math.pi * k / 8 for k in range(-7, 9)), key=lambda angle: abs(math.sin(angle)))  # the level ones first


@dataclass(frozen=True)
class LinePicture:
    """A figure of eval.py that is a number for each x, as lines."""

    name: str
    key: str  # of the figure in a run's results
    x: str
    y: str
    caption: str
    unit: float | None = None  # of x, which is a number; None: x is a name
    log_x: bool = False
    dotted: str | None = None  # a second figure of the same configs, drawn dotted


LINE_PICTURES = (
    LinePicture(
        "cache.png", "cache_bytes", "tokens in the cache", "bytes of the cache",
        "Cache bytes of one row of text against its length, as allocated.", unit=1, log_x=True,
    ),
    LinePicture(
        "positions.png", "position_ppl", "position in the window", "PPL",
        "PPL by position in the window: what more context is worth. Each panel has its own scale.",
    ),
    LinePicture(
        "training.png", "learning_curve", "million tokens seen", "validation PPL",
        "Validation PPL in the course of training, on a sample of the validation data. Each panel has its own scale.",
        unit=1e6,
    ),
    LinePicture(
        "long.png", "long_ppl", "window of a long document", "PPL",
        "PPL per window of long documents; dotted with hollow markers: the memory reset before each window. Later "
        "windows are of fewer, other documents, so compare lines, not windows. Each panel has its own scale.",
        dotted="long_ppl_reset",
    ),
)  # fmt: skip


def draw_pictures(configs: list[Config], folder: Path) -> dict[str, str]:
    """Draw what the configs have figures for; returns the file names and captions."""
    drawn = {}
    with matplotlib.rc_context(LOOK):
        if len(points := [c for c in configs if {"val_ppl", "cache_bytes_per_token"} <= c.mean.keys()]) > 1:
            save(draw_tradeoff(points), folder / "tradeoff.png")
            drawn["tradeoff.png"] = (
                f"Validation PPL against cache bytes per token at {int(SHOWN_LENGTH):,} tokens. Filled and joined: the "
                "best front, where nothing smaller is better."
            )
        for picture in LINE_PICTURES:
            if with_it := [c for c in configs if c.mean.get(picture.key)]:
                save(draw_lines(picture, with_it), folder / picture.name)
                drawn[picture.name] = picture.caption
    return drawn


def save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file)


# ------------------------------------------------------------------------------------------------- the trade-off


def draw_tradeoff(configs: list[Config]) -> Figure:
    """PPL against cache bytes per token, a marker and a colour per architecture."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    families = list(dict.fromkeys(c.family for c in configs))
    front = best_front(configs)
    for c in configs:
        style = families.index(c.family) % len(MARKERS)
        axes.errorbar(
            *place(c), yerr=c.deviation["val_ppl"] if len(c.runs) > 1 else None, capsize=5, marker=MARKERS[style],
            color=COLOURS[style], markersize=12, markeredgewidth=2, mfc=COLOURS[style] if c in front else "white",
        )  # fmt: skip
    axes.plot(*zip(*map(place, front), strict=True), drawstyle="steps-post", color=GREY, linewidth=1.5, zorder=0)
    axes.set(xscale="log", yscale="log", ylabel="validation PPL (lower is better)")
    axes.set_xlabel(f"cache bytes per token at {int(SHOWN_LENGTH):,} tokens (fewer is better)")
    axes.margins(x=0.15, y=0.15)
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if right < 1000 * left else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    plain_ticks(axes)
    figure.draw_without_rendering()
    label_points(axes, [(*place(c), c.name) for c in configs])
    return figure


def place(config: Config) -> tuple[float, float]:
    return config.mean["cache_bytes_per_token"][SHOWN_LENGTH], config.mean["val_ppl"]


def best_front(configs: list[Config]) -> list[Config]:
    """Those than which none is both as small and better, by size."""
    ordered = sorted(configs, key=place)
    lowest = itertools.accumulate((place(c)[1] for c in ordered), min, initial=float("inf"))
    return [c for c, before in zip(ordered, lowest, strict=False) if place(c)[1] < before]


def label_points(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """The name of each point as near to it as it covers no other name and no other point."""
    places = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = [Bbox.from_extents(x - 10, y - 10, x + 10, y + 10) for x, y in places]
    frame = axes.get_window_extent()
    for x, y, name in points:
        for distance, angle in itertools.product(range(14, 200, 18), ANGLES):
            dx, dy = distance * math.cos(angle), distance * math.sin(angle)
            side, edge = ("left", 0) if dx > 0 else ("right", 1)
            label = axes.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=13,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                arrowprops={"arrowstyle": "-", "color": GREY, "relpos": (edge, 0.5)},
            )  # fmt: skip
            label.get_window_extent()  # with its line; this moves the text to its place
            box = Text.get_window_extent(label)
            if frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and not box.count_overlaps(taken):
                break
            if (distance, angle) != (194, ANGLES[-1]):
                label.remove()
        taken.append(box)


# ----------------------------------------------------------------------------------------------------- the lines


def draw_lines(picture: LinePicture, configs: list[Config]) -> Figure:
    """A panel for each architecture, the baseline in all of them."""
    baseline = next((c for c in configs if c.family == "pythia"), None)
    families: dict[str, list[Config]] = {}
    for c in configs:
        if c is not baseline or len(configs) == 1:
            families.setdefault(c.family, []).append(c)
    columns = min(2, len(families))
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(7 * columns, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=picture.log_x, squeeze=False)
    ends: list[list[End]] = []
    for axes, (family, members) in zip(panels.flat, families.items(), strict=False):
        lines = [] if baseline is None or baseline in members else [(baseline, BASELINE_STYLE)]
        lines += zip(members, itertools.cycle(STYLES), strict=False)
        ends.append([draw_line(axes, picture, *line) for line in lines])
        axes.set(title=family, yscale="log", xlabel=picture.x)
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
        if picture.log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        else:
            plain_ticks(axes)
    for axes in panels.flat[len(families) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel(picture.y)
    figure.draw_without_rendering()
    for axes, names in zip(panels.flat, ends, strict=False):
        label_ends(axes, names)
    return figure


def draw_line(axes: Axes, picture: LinePicture, config: Config, style: Style) -> End:
    """A config's line, with bars where it has several seeds, and the dotted one that belongs to it."""
    y = points(config.mean[picture.key])
    x = [float(at) / picture.unit for at in y] if picture.unit else list(y)
    bars = list(points(config.deviation[picture.key]).values()) if len(config.runs) > 1 else None
    axes.errorbar(x, list(y.values()), yerr=bars, capsize=4, **style)
    if picture.dotted in config.mean:
        dotted = points(config.mean[picture.dotted])
        axes.plot(list(dotted), list(dotted.values()), **{**style, "linestyle": ":", "mfc": "white"})
    return list(y.values())[-1], config.name, style


def points(figures: dict[str, float]) -> dict[str, float]:
    """Without what sums them up."""
    return {x: y for x, y in figures.items() if x != AFTER_FIRST}


def label_ends(axes: Axes, ends: list[End]) -> None:
    """Name and marker of each line to the right of its panel, as near to its end as the others leave room."""
    to_share = axes.transScale + axes.transLimits  # from data to shares of the panel
    ends = sorted(ends, key=lambda end: end[0])
    heights = [float(to_share.transform((axes.get_xlim()[1], y))[1]) for y, _, _ in ends]
    places = list(itertools.accumulate(heights, lambda below, height: max(height, below + LABEL_GAP)))
    lift = sum(places) / len(places) - sum(heights) / len(heights)  # the stack has grown upwards: centre it
    lift = max(min(lift, places[0]), places[-1] - 1)
    for (_, name, style), height, place in zip(ends, heights, places, strict=True):
        inside = {"transform": axes.transAxes, "clip_on": False, "color": style["color"]}
        axes.plot([1, 1.06], [height, place - lift], linewidth=0.8, **inside)
        axes.plot([1.06, 1.12], [place - lift] * 2, linestyle=style["linestyle"], **inside)
        axes.plot([1.09], [place - lift], marker=style["marker"], markersize=8, **inside)
        axes.annotate(name, (1.14, place - lift), xycoords="axes fraction", va="center", annotation_clip=False)


def plain_ticks(axes: Axes) -> None:
    """Round numbers on a logarithmic axis of less than a decade."""
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
