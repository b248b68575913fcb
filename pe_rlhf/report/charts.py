"""Lines, bars, reliability diagrams and matrices as SVG, for a page or a file of its own.

The colours are of middle lightness: they are seen on white and on black. Text stays text, and a page gives it the
colour and the font of its own. No pyplot: nothing here has global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.typing import RcKeyType

from pe_rlhf.report.format import percent
from pe_rlhf.report.page import Key, Plot

Row = dict[str, Any]

# Each has a contrast of at least 3 to white and to a dark page.
COLOURS = ("#3b82d0", "#d0691f", "#2a9d78", "#cc4f98", "#8a70e0", "#94871f")
GREY = "#7a828e"
DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}
SETTINGS: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9.5,
    "text.color": GREY,
    "text.parse_math": False,  # a name with a dollar sign is no formula
    "axes.labelcolor": GREY,
    "axes.edgecolor": f"{GREY}66",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-12, 12),
    "grid.color": f"{GREY}44",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 3.5,
}
SIZE = (4.3, 3.0)
FEW_POINTS = 12  # up to here each point gets a marker: a line does not show where it was measured
LABEL_LENGTH = 26
PLOTS_KEPT = 64

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """A curve. low, high: the band around it. marks: single points, drawn as ×. style: its number in a legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marks: Sequence[tuple[float, float]] = ()
    style: int | None = None


@dataclass(frozen=True)
class Bar:
    """A bar, or two of which the second is lighter; none where nothing was measured. `text` stands at its right."""

    label: str
    text: str
    values: Sequence[float] = ()
    interval: tuple[float, float] | None = None


def looks(number: int) -> tuple[str, str]:
    """Colour and CSS border style of the n-th line, from 0; they differ up to 18 lines."""
    return COLOURS[number % len(COLOURS)], tuple(DASHES)[number // len(COLOURS) % len(DASHES)]


def legend(labels: Sequence[str]) -> list[Key]:
    """The legend that plots share whose lines have the styles 0, 1, …"""
    return [Key(label, *looks(number)) for number, label in enumerate(labels)]


def points(rows: Sequence[Row], key: str, label: str, low: str | None = None, high: str | None = None) -> Line:
    """A metric over steps, from the rows that have it; low, high: the metrics that bound its band."""
    having = [row for row in rows if all(row.get(name) is not None for name in (key, low, high) if name)]
    steps, values = [row["step"] for row in having], [row[key] for row in having]
    below, above = ([row[name] for row in having] if name else [] for name in (low, high))
    return Line(label, steps, values, below, above)


def drawn_once(draw: Callable[P, T]) -> Callable[P, T]:
    """Keep what was drawn, by the arguments: a run's page is written after each stage, with the plots of all before."""
    kept: dict[str, T] = {}

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        key = repr((args, kwargs))
        if key not in kept:
            if len(kept) == PLOTS_KEPT:
                kept.clear()
            kept[key] = draw(*args, **kwargs)
        return kept[key]

    return drawn


@drawn_once
def draw_lines(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    note: str = "",
    log: bool = False,
    shares: bool = False,
    reference: float | None = None,
    mark: tuple[float, str] | None = None,
) -> Plot | None:
    """Curves on one pair of axes; None where no curve has a point.

    shares: y is written in per cent. reference: where a horizontal line is drawn. mark: a vertical line and its name.
    A legend is drawn for several lines, except where they have numbers, as those of a legend that plots share.
    """
    shown = [line for line in lines if line.x]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for i, line in enumerate(shown):
            _draw_line(axis, line, i if line.style is None else line.style)
        axis.set_xlabel(x_label)
        axis.set_ylabel(unit)
        if x_label.endswith("step"):
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if log and any(value > 0 for line in shown for value in line.y):  # a mismatch may be 0 throughout
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter("")
        if shares:
            axis.yaxis.set_major_formatter(_in_percent())
        if reference is not None:
            axis.axhline(reference, color=GREY, linewidth=0.9)
        if mark is not None:
            axis.axvline(mark[0], color=GREY, linewidth=1, linestyle="--")
            axis.text(mark[0], 1.02, mark[1], transform=axis.get_xaxis_transform(), ha="center", fontsize=8.5)
        if len(shown) > 1 and shown[0].style is None:
            _legend(axis)

    return Plot(title, note, _svg(title, draw))


def draw_bars(
    title: str, bars: Sequence[Bar], *, note: str = "", reference: float | None = None, end: float | None = None
) -> Plot | None:
    """A horizontal bar for each name, in shares; None where nothing was measured.

    reference: where a vertical line is drawn. end: of the axis.
    """
    if not any(bar.values for bar in bars):
        return None

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for row, bar in enumerate(bars):
            height = 0.62 / max(len(bar.values), 1)
            for i, value in enumerate(bar.values):
                y = row + (i - (len(bar.values) - 1) / 2) * height
                axis.barh(y, value, height, color=looks(row)[0], alpha=(0.6, 0.3)[i])
            if bar.interval:
                axis.plot(bar.interval, (row, row), color=GREY, linewidth=1.5, marker="|", markersize=7)
            axis.text(1.02, row, bar.text, transform=axis.get_yaxis_transform(), va="center")
        if reference is not None:
            axis.axvline(reference, color=GREY, linewidth=1)
        names = [b.label if len(b.label) <= LABEL_LENGTH else f"{b.label[: LABEL_LENGTH - 1]}…" for b in bars]
        axis.set_yticks(range(len(bars)), names)
        axis.set_ylim(len(bars) - 0.45, -0.55)
        axis.set_xlim(0, end)
        axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2.5, 5, 10]))
        axis.xaxis.set_major_formatter(_in_percent())
        axis.grid(visible=False, axis="y")
        axis.grid(visible=True, axis="x")

    return Plot(title, note, _svg(title, draw, (SIZE[0], 0.6 + 0.3 * len(bars))))


@drawn_once
def draw_reliability(bins: Sequence[Row]) -> Plot | None:
    """How often a reward model is right (y) at each confidence (x); bins are those of the reward stage's summary."""
    filled = [row for row in bins if row["count"]]
    if not filled:
        return None
    low, high = bins[0]["lower"], bins[-1]["upper"]

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", label="calibrated")
        confidence, accuracy = [row["mean_confidence"] for row in filled], [row["accuracy"] for row in filled]
        top.plot(confidence, accuracy, color=COLOURS[0], marker="o", label="reward model")
        top.set_ylim(-0.03, 1.03)
        top.set_ylabel("accuracy")
        _legend(top)
        widths = [row["upper"] - row["lower"] for row in bins]
        counts = [row["count"] for row in bins]
        bottom.bar([row["lower"] for row in bins], counts, widths, align="edge", color=COLOURS[0], alpha=0.5)
        bottom.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        bottom.set_ylabel("pairs")
        bottom.set_xlabel("confidence")

    return Plot("Reliability", "calibrated: right as often as it is sure", _svg("Reliability", draw))


def draw_matrix(title: str, matrix: Sequence[Sequence[float]], label: str) -> Plot:
    """A square matrix, divided by its greatest entry; blue is negative, red is positive. `label`: of both axes."""
    greatest = max((abs(value) for row in matrix for value in row), default=0.0) or 1.0

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        mesh = axis.pcolormesh(
            [[value / greatest for value in row] for row in matrix], cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True
        )
        axis.set_aspect("equal")
        axis.invert_yaxis()
        axis.grid(visible=False)
        axis.set_xlabel(label)
        axis.set_ylabel(label)
        figure.colorbar(mesh, ax=axis, shrink=0.8)

    return Plot(title, "divided by its greatest entry", _svg(title, draw))


def _draw_line(axis: Axes, line: Line, number: int) -> None:
    colour, style = looks(number)
    marker = "o" if len(line.x) <= FEW_POINTS else ""
    axis.plot(line.x, line.y, color=colour, linestyle=DASHES[style], marker=marker, label=line.label)
    if line.low:
        axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    for x, y in line.marks:
        axis.plot(x, y, color=colour, marker="x", markersize=7, markeredgewidth=1.8)


def _legend(axis: Axes) -> None:
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1.2, handlelength=1.2)


def _in_percent() -> FuncFormatter:
    return FuncFormatter(lambda value, _: percent(value).replace(".0 ", " "))


def _svg(name: str, draw: Callable[[Figure], None], size: tuple[float, float] = SIZE) -> Markup:
    """An SVG element. Its ids are salted with the name, since a page holds several; the same data, the same text."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        FigureCanvasSVG(figure).print_svg(buffer, metadata=no_metadata)  # `savefig` draws twice
    document = buffer.getvalue()
    # Groups are numbered from 1 in every plot: ids that nothing refers to, and that would be there twice.
    return Markup(re.sub(r'<g id="[^"]*_\d+"', "<g", document[document.index("<svg") :]))
