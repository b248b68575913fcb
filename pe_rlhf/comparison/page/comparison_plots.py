"""The curves of a comparison. An arm has the same colour and dashes in all of them: one legend serves the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pe_rlhf.comparison.run_result import Analysis, RunResult
from pe_rlhf.comparison.trajectory import known, rows_with
from pe_rlhf.report.charts import FEW_POINTS, INK, MUTED, SERIES, Plot, finish_axis, plot_figure
from pe_rlhf.report.format import number

# In units of the line's width. Neighbours in the list of arms differ in them, and so do colours that come close.
DASHES: tuple[tuple[float, ...], ...] = ((), (4.0, 1.8), (1.0, 1.3), (5.5, 1.5, 1.0, 1.5))
LEAST = 1e-4  # what lies below this share of an update's greatest singular value is rounding
CROWDED = 6  # with more arms than this, curves are drawn larger
BAND = "mean of an arm's runs; band: lowest to highest run"
ONE_RUN = "one run per arm"
FAILED = "×: a run failed here"


@dataclass(frozen=True)
class Look:
    """What an arm is drawn with; `number` is that of the page's CSS colour, from 1."""

    arm: str
    number: int
    dashes: tuple[float, ...]

    @property
    def colour(self) -> str:
        return SERIES[self.number - 1]


@dataclass(frozen=True)
class Line:
    """An arm's curve; low and high bound its band, `failed` is where its failed runs ended."""

    look: Look
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    failed: list[tuple[float, float]]


def looks(arms: Sequence[str]) -> list[Look]:
    """A look for each arm; beyond the colours there are, they come again with other dashes."""
    count = len(SERIES)
    return [Look(arm, i % count + 1, DASHES[(i + i // count) % len(DASHES)]) for i, arm in enumerate(arms)]


def ended_runs(analysis: Analysis, arm: str) -> list[RunResult]:
    """The runs of an arm that will not go on: finished or failed."""
    return [run for run in analysis.runs if run.arm == arm and run.status != "unfinished"]


def draw_metric(analysis: Analysis, title: str, key: str, unit: str, *, share: bool = False) -> Plot | None:
    """A PPO metric over steps, a line per arm; None where no run has it."""
    lines = [line for look in looks([arm.arm for arm in analysis.arms]) if (line := _metric(analysis, look, key))]
    if not lines:
        return None
    several = any(len(ended_runs(analysis, line.look.arm)) > 1 for line in lines)
    wide = key == "kl" and _blown_up(lines)

    def draw(axis: Axes) -> None:
        axis.set_xlabel("PPO step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if share:
            axis.axhline(0.5, color=MUTED, linewidth=0.9)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %"))
        if wide:
            axis.set_yscale("symlog", linthresh=_middle(lines))
            _plain_numbers(axis.yaxis)

    notes = [BAND if several else ONE_RUN, FAILED if any(line.failed for line in lines) else ""]
    notes += ["logarithmic at the top" if wide else ""]
    return _line_plot(title, notes, lines, unit, draw, "step")


def draw_frontier(analysis: Analysis) -> Plot | None:
    """Reward over KL, step by step, an arm's mean over its finished runs (over failed ones where none finished).

    A run that broke off would make the line jump where it is missing from the mean.
    """
    lines = [line for look in looks([arm.arm for arm in analysis.arms]) if (line := _frontier(analysis, look))]
    if not lines:
        return None
    across = [Line(line.look, line.y, line.x, line.x, line.x, []) for line in lines]
    wide, mark = _blown_up(across), analysis.equal_kl

    def draw(axis: Axes) -> None:
        for line in lines:
            axis.plot(line.x[-1], line.y[-1], marker="o", markersize=5, color=line.look.colour)
        axis.set_xlabel("KL to the anchor, nats per response")
        if mark is not None and known(mark):
            axis.axvline(mark, color=INK, linewidth=1, linestyle=(0, (3, 2)))
            words = {"ha": "center", "va": "bottom", "color": MUTED, "fontsize": 8.5}
            axis.text(mark, 1.02, f"equal KL: {number(mark)}", transform=axis.get_xaxis_transform(), **words)
        if wide:
            axis.set_xscale("symlog", linthresh=_middle(across))
            _plain_numbers(axis.xaxis)

    told = " ".join(
        f"{line.look.arm}: {line.y[0]:.3g} at KL {line.x[0]:.3g}, {line.y[-1]:.3g} at KL {line.x[-1]:.3g}."
        for line in lines
    )
    notes = ["running mean of an arm's finished runs from the first PPO step to the last (dot)"]
    notes += ["logarithmic at the right" if wide else ""]
    return _line_plot("Reward and KL", notes, lines, "mean score", draw, told=told)


def draw_spectra(analysis: Analysis) -> Plot | None:
    """The singular values of the arms' updates, beside the first; None where no run has an update that is known."""
    lines = []
    for look in looks([arm.arm for arm in analysis.arms]):
        spectra = [run.drift.get("spectrum") or [] for run in ended_runs(analysis, look.arm)]
        spectra = [spectrum for spectrum in spectra if spectrum and all(map(known, spectrum))]
        ranks = range(max(map(len, spectra), default=0))
        means = [fmean(spectrum[i] for spectrum in spectra if i < len(spectrum)) for i in ranks]
        shown = [value for value in means if value >= LEAST]
        if shown:
            lines.append(Line(look, [i + 1.0 for i in range(len(shown))], shown, shown, shown, []))
    if not lines:
        return None

    def draw(axis: Axes) -> None:
        axis.set_xlabel("singular value")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        _plain_numbers(axis.yaxis)
        if max(line.x[-1] for line in lines) > 32:
            axis.set_xscale("log", base=2)
            _plain_numbers(axis.xaxis)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))

    notes = ["singular values of ΔW beside the greatest, mean over layers and runs"]
    return _line_plot("Spectra of the updates", notes, lines, "share of the greatest", draw, "singular value")


def _line_plot(
    title: str,
    notes: Sequence[str],
    lines: Sequence[Line],
    unit: str,
    finish: Callable[[Axes], None],
    place: str = "",
    told: str = "",
) -> Plot:
    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for line in lines:
            colour, few = line.look.colour, len(line.x) <= FEW_POINTS
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.1, linewidth=0)
            style = (0, line.look.dashes) if line.look.dashes else "-"
            axis.plot(line.x, line.y, color=colour, linestyle=style, marker="o" if few else "")
            for x, y in line.failed:
                axis.plot(x, y, color=colour, marker="x", markersize=7, markeredgewidth=1.8)
        finish_axis(axis, unit)
        finish(axis)

    words = [
        f"{line.look.arm}: {line.y[0]:.3g} at {place} {line.x[0]:.0f}, {line.y[-1]:.3g} at {place} {line.x[-1]:.0f}."
        for line in lines
    ]
    size = (5.0, 3.5) if len(lines) > CROWDED else (4.3, 3.0)
    return plot_figure(title, "; ".join(filter(None, notes)), told or " ".join(words), draw, size)


def _metric(analysis: Analysis, look: Look, key: str) -> Line | None:
    """Mean and range over the arm's runs that have ended, step by step; a failed run counts as far as it came."""
    by_step: dict[int, list[float]] = {}
    failed = []
    for run in ended_runs(analysis, look.arm):
        measured = [(row["step"], row[key]) for row in rows_with(run, key)]
        for step, value in measured:
            by_step.setdefault(step, []).append(value)
        if run.status == "failed" and measured:
            failed.append(measured[-1])
    if not by_step:
        return None
    steps = sorted(by_step)
    at = [by_step[step] for step in steps]
    return Line(
        look, list(map(float, steps)), [fmean(v) for v in at], [min(v) for v in at], [max(v) for v in at], failed
    )


def _frontier(analysis: Analysis, look: Look) -> Line | None:
    by_step: dict[int, list[tuple[float, float]]] = {}
    ended = ended_runs(analysis, look.arm)
    for run in [run for run in ended if run.status == "finished"] or ended:
        for row in rows_with(run, "kl", "reward"):
            by_step.setdefault(row["step"], []).append((row["kl"], row["reward"]))
    if not by_step:
        return None
    means = [tuple(map(fmean, zip(*by_step[step], strict=True))) for step in sorted(by_step)]
    kl, reward = (_smooth(values) for values in zip(*means, strict=True))
    return Line(look, kl, reward, reward, reward, [])


def _smooth(values: Sequence[float]) -> list[float]:
    """Running means over about a tenth of the steps; from one step to the next a pair of noisy metrics goes zigzag."""
    reach = len(values) // 20
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _blown_up(lines: Sequence[Line]) -> bool:
    """Whether one arm goes so far beyond the others that these would lie flat on a linear scale."""
    return max(max(line.high) for line in lines) > 8 * _middle(lines) > 0


def _middle(lines: Sequence[Line]) -> float:
    return median(max(line.high) for line in lines)


def _plain_numbers(axis: Axis) -> None:
    """Numbers as they are on a logarithmic axis, where matplotlib would write powers of ten as formulas."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
