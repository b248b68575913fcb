"""The plots of a comparison. An arm has the same colour in all of them: one legend serves the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from pe_rlhf.comparison.run_result import Analysis, RunResult
from pe_rlhf.comparison.trajectory import known, rows_with
from pe_rlhf.report.charts import Bar, Line, draw_bars, draw_lines
from pe_rlhf.report.format import number, percent
from pe_rlhf.report.page import Plot

LEAST = 1e-4  # what is below this share of an update's greatest singular value is rounding
MISSING = number(None)


def ended_runs(analysis: Analysis, arm: str) -> list[RunResult]:
    """The runs of an arm that will not go on: finished or failed."""
    return [run for run in analysis.runs if run.arm == arm and run.status != "unfinished"]


def draw_metric(analysis: Analysis, title: str, key: str, unit: str, *, shares: bool = False) -> Plot | None:
    """A PPO metric over steps, a line per arm: mean and range of its runs; a failed run counts as far as it came."""
    lines = []
    for style, arm in enumerate(analysis.arms):
        by_step: dict[int, list[float]] = defaultdict(list)
        ends = []
        for run in ended_runs(analysis, arm.arm):
            rows = rows_with(run, key)
            for row in rows:
                by_step[row["step"]].append(row[key])
            ends += [(row["step"], row[key]) for row in rows[-1:] if run.status == "failed"]
        steps = sorted(by_step)
        mean, low, high = ([of(by_step[step]) for step in steps] for of in (fmean, min, max))
        lines.append(Line(arm.arm, steps, mean, low, high, ends, style))
    note = "mean of an arm's runs; band: lowest to highest run"
    if any(line.marks for line in lines):
        note += "; ×: a run failed here"
    reference = 0.5 if shares else None
    return draw_lines(title, unit, lines, x_label="PPO step", note=note, shares=shares, reference=reference)


def draw_frontier(analysis: Analysis) -> Plot | None:
    """Reward over KL, step by step, an arm's mean over its finished runs (over failed ones where none finished).

    A run that broke off would make the line jump where it is missing from the mean.
    """
    lines = []
    for style, arm in enumerate(analysis.arms):
        ended = ended_runs(analysis, arm.arm)
        by_step: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for run in [run for run in ended if run.status == "finished"] or ended:
            for row in rows_with(run, "kl", "reward_shaped"):
                by_step[row["step"]].append((row["kl"], row["reward_shaped"]))
        kl, reward = (smoothed([fmean(run[i] for run in by_step[step]) for step in sorted(by_step)]) for i in (0, 1))
        lines.append(Line(arm.arm, kl, reward, style=style))
    level = analysis.equal_kl
    mark = (level, f"equal KL: {number(level)}") if level is not None and known(level) else None
    note = "running mean of an arm's finished runs, from the first PPO step to the last"
    return draw_lines(
        "Reward and KL", "mean score", lines, x_label="KL to the anchor, nats per response", note=note, mark=mark
    )


def draw_gold(analysis: Analysis) -> Plot | None:
    """The judge's own score over the KL of the policy it judged, an arm's mean over its finished runs."""
    lines = []
    for style, arm in enumerate(analysis.arms):
        by_step: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for run in [run for run in ended_runs(analysis, arm.arm) if run.status == "finished"]:
            for index, row in enumerate(rows_with(run, "judge_kl", "judge_score_policy", "judge_score_anchor")):
                if index == 0:  # before training the policy is the anchor
                    by_step[0].append((0.0, row["judge_score_anchor"]))
                by_step[row["step"]].append((row["judge_kl"], row["judge_score_policy"]))
        kl, score = ([fmean(run[i] for run in by_step[step]) for step in sorted(by_step)] for i in (0, 1))
        lines.append(Line(arm.arm, kl, score, style=style))
    note = "held-out prompts; mean of an arm's finished runs, from the anchor on"
    x_label = "KL to the anchor, nats per response"
    return draw_lines("Judge's score and KL", "judge's mean score", lines, x_label=x_label, note=note)


def draw_spectra(analysis: Analysis) -> Plot | None:
    """The singular values of the arms' updates, divided by the greatest."""
    lines = []
    for style, arm in enumerate(analysis.arms):
        spectra = [run.drift.get("spectrum") or [] for run in ended_runs(analysis, arm.arm)]
        spectra = [spectrum for spectrum in spectra if all(map(known, spectrum))]
        ranks = range(max(map(len, spectra), default=0))
        means = [fmean(spectrum[i] for spectrum in spectra if i < len(spectrum)) for i in ranks]
        shown = [value for value in means if value >= LEAST]
        lines.append(Line(arm.arm, range(1, len(shown) + 1), shown, style=style))
    note = "singular values of ΔW, mean over layers and runs"
    return draw_lines("Spectra of the updates", "share of the greatest", lines, x_label="rank", note=note, log=True)


def draw_win_rates(analysis: Analysis) -> Plot | None:
    """Win-rates against the anchor with their intervals."""
    bars = []
    for arm in analysis.arms:
        rate = arm.win_rate
        if rate is None or not known(rate.value):
            bars.append(Bar(arm.arm, MISSING))
        else:
            interval = (rate.low, rate.high) if known(rate.low) and known(rate.high) else None
            bars.append(Bar(arm.arm, percent(rate.value), (rate.value,), interval))
    note = "line at 50 %; whiskers: 95 % interval over prompts and seeds"
    return draw_bars("Win-rate against the anchor", bars, note=note, reference=0.5, end=1.0)


def draw_cost(analysis: Analysis, title: str, key: str, written: Callable[[float], str]) -> Plot | None:
    """A cost of `ArmResult` as a share of full tuning's, where an arm has that, otherwise of the dearest arm's."""
    costs = {arm.arm: getattr(arm, key) for arm in analysis.arms}
    costs = {arm: cost for arm, cost in costs.items() if known(cost) and cost > 0}
    if not costs:
        return None
    full = next((arm.arm for arm in analysis.arms if arm.settings.get("tuning") == "full" and arm.arm in costs), None)
    whole = full or max(costs, key=lambda arm: costs[arm])
    bars = [
        Bar(arm.arm, written(costs[arm.arm]), (costs[arm.arm] / costs[whole],))
        if arm.arm in costs
        else Bar(arm.arm, MISSING)
        for arm in analysis.arms
    ]
    return draw_bars(title, bars, note=f"100 %: {'full tuning, ' if full else ''}{whole}", reference=1.0)


def draw_drift(analysis: Analysis) -> Plot | None:
    """Where in the spectrum of the weights the arms' updates are, and how large they are."""
    bars = []
    for arm in analysis.arms:
        drifts = [run.drift for run in ended_runs(analysis, arm.arm)]
        top, bottom, norm = (
            mean_of_known(drift.get(key) for drift in drifts)
            for key in ("principal_share", "minor_share", "update_norm")
        )
        shares = () if top is None or bottom is None else (top, bottom)
        label = f"✕ {arm.arm}" if arm.collapses else arm.arm
        bars.append(Bar(label, number(norm), shares))
    note = "share of ‖ΔW‖² in W's principal (dark) and minor (light) subspace; right: ‖ΔW‖/‖W‖"
    if any(arm.collapses for arm in analysis.arms):
        note += "; ✕: a run collapsed"
    return draw_bars("Drift from the base", bars, note=note)


def smoothed(values: Sequence[float]) -> list[float]:
    """Running means over about a tenth of the steps: from one step to the next a pair of noisy metrics goes zigzag."""
    reach = len(values) // 20
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def mean_of_known(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None and known(value)]
    return fmean(measured) if measured else None
