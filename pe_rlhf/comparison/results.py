"""The results of a comparison: a page, the numbers as JSON and CSV, and a table for the terminal."""

from __future__ import annotations

import math
import os
import platform
import shlex
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.table import Table

from pe_rlhf.comparison.analysis import analyse, to_json, to_rows
from pe_rlhf.comparison.collect import collect
from pe_rlhf.comparison.page.comparison_page import write_comparison_report
from pe_rlhf.comparison.page.comparison_plots import draw_gold, draw_win_rates
from pe_rlhf.comparison.plan import Plan
from pe_rlhf.comparison.run_result import Analysis, IntervalEstimate
from pe_rlhf.comparison.trials import Choice, choose
from pe_rlhf.runs.layout import ComparisonFiles
from pe_rlhf.system.files import csv_text, write_json, write_whole


@dataclass(frozen=True)
class ComparisonOutcome:
    """The table for the terminal, and the names of the runs that failed or have not finished."""

    table: Table
    failed: list[str]
    unfinished: list[str]


def write_results(plan: Plan) -> ComparisonOutcome:
    """Collect the runs, analyse them, and write `report.html`, `summary.json`, `results.csv` and `win_rates.svg`."""
    files = ComparisonFiles(plan.root)
    choices = [choose(plan, arm) for arm in plan.arms]
    analysis = analyse(plan.base.name, plan.config, collect(plan, choices))
    # The recipe as it was written: with its comments, and without the paths of this machine.
    recipe = plan.path.read_text(encoding="utf-8")
    write_comparison_report(analysis, files.report, recipe=recipe, facts=facts(plan))
    write_json(files.summary, {**facts(plan), **to_json(analysis), "trials": _trials(choices)})
    rows = to_rows(analysis)
    write_whole(files.results, csv_text(list(dict.fromkeys(key for row in rows for key in row)), rows))
    for path, plot in ((files.win_rates, draw_win_rates(analysis)), (files.gold, draw_gold(analysis))):
        if plot is not None:
            write_whole(path, plot.svg)
    named = {s: [f"{r.arm}, seed {r.seed}" for r in analysis.runs if r.status == s] for s in ("failed", "unfinished")}
    return ComparisonOutcome(arms_table(analysis), named["failed"], named["unfinished"])


def facts(plan: Plan) -> dict[str, str]:
    """What was compared, where and when."""
    return {
        "model": plan.base.model,
        "command": shlex.join(["pe-rlhf", "compare", plan.path.stem, *plan.overrides]),
        "seeds": ", ".join(map(str, plan.config.seeds)),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
    }


def arms_table(analysis: Analysis) -> Table:
    """A line per arm: win-rate, reward, KL, cost, and collapses."""
    table = Table(title=f"pe-rlhf compare: {analysis.name}", title_justify="left")
    for heading in ("arm", "finished", "win-rate", "reward", "KL", "s/step", "peak MiB", "collapsed"):
        table.add_column(heading, justify="left" if heading in ("arm", "collapsed") else "right")
    for arm in analysis.arms:
        collapsed = "; ".join(f"seed {c.seed}: {c.kind} at step {c.step}" for c in arm.collapses)
        count = f"{len(arm.seeds)} of {sum(run.arm == arm.arm for run in analysis.runs)}"
        estimates = (_estimate(arm.win_rate), _estimate(arm.reward), _estimate(arm.kl))
        costs = (_number(arm.seconds_per_step, ".2f"), _number(arm.peak_mib, ".0f"))
        table.add_row(arm.arm, count, *estimates, *costs, collapsed or "–")
    return table


def _estimate(estimate: IntervalEstimate | None) -> str:
    if estimate is None:
        return "–"
    if math.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f} – {estimate.high:.3f})"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _trials(choices: list[Choice]) -> list[dict[str, object]]:
    return [
        {**row, "objective": None if math.isnan(row["objective"]) else row["objective"]}
        | {"chosen": row["lr_factor"] == choice.factor}
        for choice in choices
        for row in choice.trials
    ]


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
