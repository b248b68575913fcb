"""Line plots, stacked times and reliability diagrams as SVG to be put into an HTML page.

Colours are CSS variables of that page (`--ink`, `--muted`, `--grid`, `--c1` … `--c12`) and text stays text, so a plot
follows the page's light or dark theme and its fonts. No pyplot: nothing here has global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

Row = dict[str, Any]

# Matplotlib wants real colours; these stand-ins become CSS variables once the plot is drawn.
INK, MUTED, GRID = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0202{i:02x}" for i in range(1, 13))
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {colour: f"c{i}" for i, colour in enumerate(SERIES, 1)}

STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pe-rlhf",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.7,
    "lines.markersize": 3.5,
}
FEW_POINTS = 12  # up to here each point gets a marker: a line alone does not show where it was measured


@dataclass(frozen=True)
class Plot:
    """A finished plot: its title, a remark for the caption and the SVG, whose label tells the data in words."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Panel:
    """One pair of axes: the unit of y, and which metrics are drawn under which label.

    `band` names the metric that is drawn as ± around the first line.
    """

    unit: str
    lines: dict[str, str]
    band: str | None = None


@dataclass(frozen=True)
class Curves:
    """Metrics over steps: one panel or several, one above the other."""

    title: str
    panels: tuple[Panel, ...]
    x_label: str
    note: str = ""


def draw_curves(curves: Curves, rows: Sequence[Row]) -> Plot | None:
    """The curves of `rows` (one per logged step); None where no row has any of their metrics."""
    drawn = [panel for panel in curves.panels if any(points(rows, key)[0] for key in panel.lines)]
    if not drawn:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel in zip(axes, drawn, strict=True):
            _draw_panel(axis, panel, rows)
        axes[-1].set_xlabel(curves.x_label)
        axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))

    told = [_in_words(rows, key, label) for panel in drawn for key, label in panel.lines.items()]
    return plot_figure(curves.title, curves.note, " ".join(filter(None, told)), draw)


def draw_stacked(curves: Curves, rows: Sequence[Row]) -> Plot | None:
    """The metrics of the one panel stacked on each other, step by step; None where a row lacks one of them."""
    (panel,) = curves.panels
    if not rows or any(row.get(key) is None for row in rows for key in panel.lines):
        return None
    steps = [row["step"] for row in rows]
    edges = [step - 0.5 for step in steps] + [steps[-1] + 0.5]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        floor = [0.0] * len(rows)
        for colour, (key, label) in zip(SERIES, panel.lines.items(), strict=False):
            top = [low + row[key] for low, row in zip(floor, rows, strict=True)]
            axis.stairs(top, edges, baseline=floor, fill=True, color=colour, alpha=0.75, linewidth=0, label=label)
            floor = top
        finish_axis(axis, panel.unit, legend=True)
        axis.set_xlabel(curves.x_label)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))

    told = [_in_words(rows, key, label) for key, label in panel.lines.items()]
    return plot_figure(curves.title, curves.note, " ".join(told), draw)


def draw_reliability(title: str, bins: Sequence[Row]) -> Plot | None:
    """How often a reward model is right (y) at each confidence (x); bins are those of the reward stage's summary."""
    filled = [row for row in bins if row["count"]]
    if not filled:
        return None
    low, high = bins[0]["lower"], bins[-1]["upper"]

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
        confidence, accuracy = [r["mean_confidence"] for r in filled], [r["accuracy"] for r in filled]
        top.plot(confidence, accuracy, color=SERIES[0], marker="o", markersize=4.5, label="reward model")
        top.set_ylim(-0.03, 1.03)
        finish_axis(top, "accuracy", legend=True)
        widths = [row["upper"] - row["lower"] for row in bins]
        bottom.bar(
            [r["lower"] for r in bins], [r["count"] for r in bins], widths, align="edge", color=SERIES[0], alpha=0.5
        )
        bottom.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        finish_axis(bottom, "pairs")
        bottom.set_xlabel("confidence")

    told = [
        f"At confidence {r['mean_confidence']:.2f}: right {r['accuracy']:.2f} of {r['count']} pairs." for r in filled
    ]
    return plot_figure(title, "calibrated: right as often as it is sure", " ".join(told), draw)


def points(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, from the rows that have it."""
    having = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in having], [row[key] for row in having]


def _draw_panel(axis: Axes, panel: Panel, rows: Sequence[Row]) -> None:
    for colour, (key, label) in zip(SERIES, panel.lines.items(), strict=False):
        steps, values = points(rows, key)
        axis.plot(steps, values, color=colour, label=label, marker="o" if len(steps) <= FEW_POINTS else "")
    if panel.band:
        key = next(iter(panel.lines))
        both = [row for row in rows if row.get(key) is not None and row.get(panel.band) is not None]
        lower, upper = ([row[key] + sign * row[panel.band] for row in both] for sign in (-1, 1))
        axis.fill_between([row["step"] for row in both], lower, upper, color=SERIES[0], alpha=0.16, linewidth=0)
    finish_axis(axis, panel.unit, legend=len(panel.lines) > 1)


def finish_axis(axis: Axes, unit: str, *, legend: bool = False) -> None:
    """Label y, leave out tick marks and vertical grid lines, put a legend above the axes."""
    axis.set_ylabel(unit)
    axis.tick_params(length=0)
    axis.grid(visible=False, axis="x")
    if legend:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, labelcolor=MUTED, columnspacing=1.2)


def _in_words(rows: Sequence[Row], key: str, label: str) -> str:
    steps, values = points(rows, key)
    if not steps:
        return ""
    return f"{label}: {values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} at step {steps[-1]}."


def plot_figure(
    title: str, note: str, told: str, draw: Callable[[Figure], None], size: tuple[float, float] = (4.3, 3.0)
) -> Plot:
    """Draw on a fresh figure under this module's style and turn it into inline SVG; `size` in inches."""
    buffer = io.StringIO()
    # Without these entries matplotlib writes no metadata block, which would carry the date and foreign addresses.
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return Plot(title, note, _inline(buffer.getvalue(), title, told))


def _inline(document: str, title: str, told: str) -> Markup:
    """An SVG document as an element of an HTML page: no prolog, no namespaces, ids of its own, themed colours."""
    body = re.sub(r"^.*?<svg[^>]*>", "", document, flags=re.DOTALL)
    size = re.search(r'viewBox="([^"]+)"', document)
    assert size, "matplotlib's SVG has a viewBox"
    prefix = re.sub(r"\W+", "-", title.lower())
    body = body.replace("xlink:href", "href")
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    opening = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(size[1], f"{title}. {told}")
    return opening + Markup(body)
