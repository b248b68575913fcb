"""The page of a comparison, made from its `Analysis` only."""

from __future__ import annotations

from pathlib import Path

from pe_rlhf.comparison.page.comparison_plots import (
    draw_cost,
    draw_drift,
    draw_frontier,
    draw_gold,
    draw_metric,
    draw_spectra,
    draw_win_rates,
)
from pe_rlhf.comparison.page.tables import arm_tables, pair_table, seconds, settings_table, task_tables
from pe_rlhf.comparison.paired_runs import SIGNIFICANT
from pe_rlhf.comparison.run_result import Analysis, PairResult
from pe_rlhf.report.charts import legend
from pe_rlhf.report.format import gibibytes
from pe_rlhf.report.page import Page, PageSection, Plot, Table
from pe_rlhf.system.files import write_whole

PAIRS_OPEN = 15  # of more pairs, those in which no difference was found are folded away
# Title, field of `ArmResult`, how it is written.
COSTS = (
    ("Peak memory, PPO", "peak_mib", gibibytes),
    ("Time per step, PPO", "seconds_per_step", seconds),
    ("Peak memory, reward stage", "reward_peak_mib", gibibytes),
    ("Time per step, reward stage", "reward_seconds_per_step", seconds),
)
MEASURES = {
    "win_rate": "how often a judge prefers their answers to those of the anchor, the model before training",
    "reward": "the reward they end with, since not every run was evaluated by a judge",
}


def write_comparison_report(analysis: Analysis, path: Path, *, recipe: str, facts: dict[str, str]) -> None:
    """Write the page to `path`. `facts` (model, date, machine, command …) are below the name as they are."""
    keys = legend([arm.arm for arm in analysis.arms])
    settings = settings_table(analysis)
    page = Page(
        title=analysis.name,
        kind="comparison",
        facts=facts,
        sections=[
            PageSection("Arms", note=overview(analysis), tables=arm_tables(analysis)),
            *_findings(analysis),
            _tasks(analysis),
            PageSection("Training", legend=keys, plots=_training_plots(analysis)),
            PageSection("Win-rate and cost", plots=_outcome_plots(analysis)),
            PageSection("What training did to the weights", legend=keys, plots=_weight_plots(analysis)),
            PageSection("Failed and unfinished runs", tables=_missing(analysis)),
            PageSection("Settings of the arms", tables=[settings] if settings else []),
            PageSection("Recipe", code=recipe, folded=True),
        ],
    )
    write_whole(path, page.html())


def overview(analysis: Analysis) -> str:
    """How many runs there are, how they ended, and what the arms are compared in."""
    count = {status: sum(run.status == status for run in analysis.runs) for status in ("failed", "unfinished")}
    ended = f"{len(analysis.runs)} runs, {count['failed']} failed, {count['unfinished']} unfinished."
    arms = len({arm for pair in analysis.pairs for arm in (pair.a, pair.b)})
    compared = f"{arms} arms are compared in {MEASURES[analysis.measure]}." if arms else "There is nothing to compare."
    return f"{len(analysis.arms)} arms, {len({run.seed for run in analysis.runs})} seeds: {ended} {compared}"


def _findings(analysis: Analysis) -> list[PageSection]:
    """The pairs in sentences and numbers; of many, those without a difference are folded away."""
    found = [pair for pair in analysis.pairs if pair.p_holm < SIGNIFICANT]
    others = [pair for pair in analysis.pairs if pair not in found]
    if len(analysis.pairs) <= PAIRS_OPEN:
        found, others = analysis.pairs, []
    none = f"No difference was found in any of {len(others)} pairs." if others and not found else ""
    return [
        _pairs("What was found", found, analysis.measure, note=none),
        _pairs(f"The other {len(others)} pairs", others, analysis.measure, folded=True),
    ]


def _pairs(title: str, pairs: list[PairResult], measure: str, *, note: str = "", folded: bool = False) -> PageSection:
    tables = [pair_table(pairs, measure)] if pairs else []
    return PageSection(title, note, [pair.sentence for pair in pairs], tables, folded=folded)


def _tasks(analysis: Analysis) -> PageSection:
    """Every task after every task; empty for a recipe without tasks."""
    note = "Mean over seeds with its 95 % interval. The win-rate of an arm is its average; curves are the last task's."
    tables = task_tables(analysis)
    return PageSection("Tasks", note=note if tables else "", tables=tables)


def _training_plots(analysis: Analysis) -> list[Plot]:
    plots = (
        draw_metric(analysis, "Reward", "reward_shaped", "mean score, penalties included"),
        draw_metric(analysis, "Win-rate by the judge", "judge_win_rate", "share of prompts", shares=True),
        draw_metric(analysis, "KL to the anchor", "kl", "nats per response"),
        draw_metric(analysis, "Entropy", "entropy", "nats per token"),
        draw_frontier(analysis),
        draw_gold(analysis),
    )
    return [plot for plot in plots if plot]


def _outcome_plots(analysis: Analysis) -> list[Plot]:
    """Win-rates and costs. A reward stage that all arms share is left out."""
    costs = [cost for cost in COSTS if not (cost[1].startswith("reward_") and _shared(analysis, cost[1]))]
    plots = [draw_win_rates(analysis), *(draw_cost(analysis, *cost) for cost in costs)]
    return [plot for plot in plots if plot]


def _weight_plots(analysis: Analysis) -> list[Plot]:
    return [plot for plot in (draw_drift(analysis), draw_spectra(analysis)) if plot]


def _shared(analysis: Analysis, key: str) -> bool:
    return len(analysis.arms) > 1 and len({getattr(arm, key) for arm in analysis.arms}) == 1


def _missing(analysis: Analysis) -> list[Table]:
    runs = [run for run in analysis.runs if run.status != "finished"]
    columns = ("Arm", "Seed", "Status", "Message")
    rows = [(run.arm, str(run.seed), run.status, run.message.strip() or "–") for run in runs]
    return [Table(columns, rows, words=["Status", "Message"])] if rows else []
