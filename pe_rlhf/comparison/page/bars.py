"""The bars of a comparison: a row for each arm, with its name at the left and its number at the right."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pe_rlhf.comparison.page.comparison_plots import Look, ended_runs, looks
from pe_rlhf.comparison.page.tables import MISSING
from pe_rlhf.comparison.run_result import Analysis, ArmResult
from pe_rlhf.comparison.trajectory import known
from pe_rlhf.report.charts import INK, Plot, finish_axis, plot_figure
from pe_rlhf.report.format import number, percent

NAME_WIDTH, NAME_LINES = 22, 3


@dataclass(frozen=True)
class Bar:
    """An arm's bar, or two of which the second is lighter; none where nothing was measured. `text` is its number."""

    look: Look
    values: tuple[float, ...] = ()
    text: str = MISSING
    interval: tuple[float, float] | None = None
    mark: str = ""


def draw_win_rates(analysis: Analysis) -> Plot | None:
    """Win-rates against the anchor with their intervals, and a line at 50 %."""
    bars = []
    for look, arm in _arms(analysis):
        rate = arm.win_rate
        if rate is None or not known(rate.value):
            bars.append(Bar(look))
        else:
            interval = (rate.low, rate.high) if known(rate.low) and known(rate.high) else None
            bars.append(Bar(look, (rate.value,), percent(rate.value), interval))
    note = "line at 50 %; whiskers: 95 % interval over prompts and seeds"
    return _bar_plot("Win-rate against the anchor", note, bars, reference=0.5, top=1.0)


def draw_cost(analysis: Analysis, title: str, key: str, shown: Callable[[float], str]) -> Plot | None:
    """A figure of `ArmResult`, beside that of an arm with full tuning where there is one, else as it is."""
    arms = _arms(analysis)
    tuned = [arm for _, arm in arms if arm.settings.get("tuning") == "full" and (getattr(arm, key) or 0) > 0]
    if not tuned:
        values = {look: getattr(arm, key) for look, arm in arms}
        bars = [Bar(look, (v,), shown(v)) if known(v) else Bar(look) for look, v in values.items()]
        return _bar_plot(title, "", bars, scaled=False)
    whole = getattr(tuned[0], key)
    shares = {look: getattr(arm, key) / whole if known(getattr(arm, key)) else None for look, arm in arms}
    bars = [Bar(look) if v is None else Bar(look, (v,), f"{100 * v:.0f} %") for look, v in shares.items()]
    return _bar_plot(title, f"100 %: full tuning ({tuned[0].arm}), {shown(whole)}", bars, reference=1.0)


def draw_drift(analysis: Analysis) -> Plot | None:
    """Where in the spectrum of the weights the arms' updates lie, and how large they are."""
    bars = []
    for look, arm in _arms(analysis):
        drifts = [run.drift for run in ended_runs(analysis, arm.arm)]
        top, bottom, norm = (
            _mean(drift.get(key) for drift in drifts) for key in ("principal_share", "minor_share", "update_norm")
        )
        shares = () if top is None or bottom is None else (top, bottom)
        bars.append(Bar(look, shares, number(norm), mark=" ✕" if arm.collapses else ""))
    note = "share of ‖ΔW‖² in W's principal (dark) and minor (light) subspace; right: ‖ΔW‖/‖W‖"
    collapsed = "; ✕: a run collapsed" if any(arm.collapses for arm in analysis.arms) else ""
    return _bar_plot("Drift from the base", note + collapsed, bars)


def _arms(analysis: Analysis) -> list[tuple[Look, ArmResult]]:
    return list(zip(looks([arm.arm for arm in analysis.arms]), analysis.arms, strict=True))


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None and known(value)]
    return fmean(measured) if measured else None


def _bar_plot(
    title: str,
    note: str,
    bars: Sequence[Bar],
    *,
    reference: float | None = None,
    top: float | None = None,
    scaled: bool = True,
) -> Plot | None:
    """`reference`: where a line stands. `top`: the end of x. `scaled`: x is in per cent, otherwise it has no numbers.

    None where no arm has a value.
    """
    if not any(bar.values for bar in bars):
        return None
    names = [wrapped(bar.look.arm) + bar.mark for bar in bars]
    lines = max(max(name.count("\n") + 1 for name in names), 1.3)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for row, bar in enumerate(bars):
            _draw_bar(axis, row, bar)
        if reference is not None:
            axis.axvline(reference, color=INK, linewidth=1, zorder=3)
        # An arm's name may hold what matplotlib would read as a formula.
        axis.set_yticks(range(len(bars)), names, parse_math=False, fontsize=9, linespacing=1.1)
        axis.set_ylim(len(bars) - 0.45, -0.55)
        axis.set_xlim(0, top)
        axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2.5, 5, 10]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{round(100 * x, 6):g} %" if scaled else ""))
        finish_axis(axis, "")
        axis.grid(visible=False, axis="y")
        axis.grid(visible=scaled, axis="x")

    told = " ".join(f"{bar.look.arm}: {_in_words(bar)}." for bar in bars)
    return plot_figure(title, note, told, draw, size=(4.3, 0.55 + len(bars) * (0.15 * lines + 0.12)))


def _draw_bar(axis: Axes, row: int, bar: Bar) -> None:
    height = 0.62 / max(len(bar.values), 1)
    for i, value in enumerate(bar.values):
        y = row + (i - (len(bar.values) - 1) / 2) * height
        axis.barh(y, value, height, color=bar.look.colour, alpha=0.8 if i == 0 else 0.4)
    if bar.interval:
        axis.plot(bar.interval, (row, row), color=INK, linewidth=1.3, marker="|", markersize=6)
    axis.text(1.02, row, bar.text, transform=axis.get_yaxis_transform(), va="center", color=INK, fontsize=9)


def _in_words(bar: Bar) -> str:
    if bar.interval:
        return f"{bar.text}, 95 % interval {percent(bar.interval[0])} to {percent(bar.interval[1])}"
    if len(bar.values) > 1:
        return f"{percent(bar.values[0])} principal, {percent(bar.values[1])} minor, ‖ΔW‖/‖W‖ {bar.text}"
    return "not measured" if bar.text == MISSING else bar.text


def wrapped(name: str) -> str:
    """An arm's name on up to three lines, cut behind spaces and punctuation where that is possible."""
    lines = [""]
    for piece in re.findall(r"[^\s,/_=+-]+[\s,/_=+-]*|[\s,/_=+-]+", name):
        for part in textwrap.wrap(piece, NAME_WIDTH, drop_whitespace=False, break_on_hyphens=False):
            if len((lines[-1] + part).rstrip()) > NAME_WIDTH:
                lines.append("")
            lines[-1] += part
    kept = [line.strip() for line in lines[:NAME_LINES]]
    return "\n".join(kept) + ("…" if len(lines) > NAME_LINES else "")
