"""The page of a comparison: one self-contained HTML file, made from an `Analysis` alone."""

from __future__ import annotations

from pathlib import Path

from pe_rlhf.comparison.page.bars import draw_cost, draw_drift, draw_win_rates
from pe_rlhf.comparison.page.comparison_plots import CROWDED, draw_frontier, draw_metric, draw_spectra, looks
from pe_rlhf.comparison.page.tables import arm_tables, gibibytes, pair_rows, seconds, settings_table
from pe_rlhf.comparison.run_result import Analysis, Status
from pe_rlhf.report.charts import Plot
from pe_rlhf.report.run_page import page_template
from pe_rlhf.system.files import write_whole

FEW_RUNS = 3
PAIRS_OPEN = 15  # of more pairs, those in which no difference was found are folded away
# Title, field of `ArmResult`, how it is written.
COSTS = (
    ("Peak memory, PPO", "peak_mib", gibibytes),
    ("Time per step, PPO", "seconds_per_step", seconds),
    ("Peak memory, reward stage", "reward_peak_mib", gibibytes),
    ("Time per step, reward stage", "reward_seconds_per_step", seconds),
)


def write_comparison_report(analysis: Analysis, path: Path, *, recipe: str, facts: dict[str, str]) -> None:
    """Write the page to `path`. `facts` (model, date, machine, command …) stand below the name as they are."""
    names = [arm.arm for arm in analysis.arms]
    html = page_template("comparison.html.j2").render(
        name=analysis.name,
        facts=facts,
        overview=overview(analysis),
        keys=looks(names),
        crowded=len(names) > CROWDED,
        tables=arm_tables(analysis),
        pairs=pair_rows(analysis),
        pairs_open=PAIRS_OPEN,
        measure=analysis.measure,
        training=_training_plots(analysis),
        outcomes=_outcome_plots(analysis),
        drift=[plot for plot in (draw_drift(analysis), draw_spectra(analysis)) if plot],
        missing=[run for run in analysis.runs if run.status != "finished"],
        settings=settings_table(analysis),
        recipe=recipe,
    )
    write_whole(path, html)


# --- what was run ----------------------------------------------------------------------------------------------------


def overview(analysis: Analysis) -> str:
    """How many runs of what there are, how they ended, and what is compared with what."""
    arms, runs = len(analysis.arms), len(analysis.runs)
    seeds = len({run.seed for run in analysis.runs})
    size = f"{_count(arms, 'arm')} × {_count(seeds, 'seed')}"
    size += f": {_count(runs, 'run')}" if runs == arms * seeds else f", {_count(runs, 'run')} so far"
    words = [_told(analysis, "failed", "failed"), _told(analysis, "unfinished", "did not finish")]
    rest = " and ".join(filter(None, words))
    fate = f"Of these, {rest}." if rest else "All of them finished." if runs > 1 else "It finished."
    return f"{size}. {fate if runs else ''} {_compared(analysis)}".replace("  ", " ")


def _told(analysis: Analysis, status: Status, words: str) -> str:
    """How many runs have that status, and which, where they are few."""
    runs = [run for run in analysis.runs if run.status == status]
    names = f" ({'; '.join(f'{run.arm}, seed {run.seed}' for run in runs)})" if len(runs) <= FEW_RUNS else ""
    return f"{len(runs)} {words}{names}" if runs else ""


def _compared(analysis: Analysis) -> str:
    measures = {
        "win_rate": "how often a judge prefers their answers to those of the anchor, the model before training",
        "reward": "the reward they end with, since not every run was evaluated by a judge",
    }
    if not analysis.pairs:
        return "There are no two arms with finished runs to be compared."
    compared = {arm for pair in analysis.pairs for arm in (pair.a, pair.b)}
    if len(compared) < len(analysis.arms):
        who = f"The {len(compared)} arms that have a finished run are compared with each other"
    else:
        who = "The two arms are compared" if len(compared) == 2 else "Each arm is compared with each other"
    return f"{who} in {measures[analysis.measure]}."


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# --- plots -----------------------------------------------------------------------------------------------------------


def _training_plots(analysis: Analysis) -> list[Plot]:
    plots = (
        draw_metric(analysis, "Reward", "reward", "mean score"),
        draw_metric(analysis, "Win-rate by the judge", "judge_win_rate", "share of prompts", share=True),
        draw_metric(analysis, "KL to the anchor", "kl", "nats per response"),
        draw_metric(analysis, "Entropy", "entropy", "nats per token"),
        draw_frontier(analysis),
    )
    return [plot for plot in plots if plot]


def _outcome_plots(analysis: Analysis) -> list[Plot]:
    """Win-rates and costs. Bars that are the same for all arms, of a reward stage that they share, are left out."""
    costs = [cost for cost in COSTS if not (cost[1].startswith("reward_") and _shared(analysis, cost[1]))]
    plots = [draw_win_rates(analysis), *(draw_cost(analysis, *cost) for cost in costs)]
    return [plot for plot in plots if plot]


def _shared(analysis: Analysis, key: str) -> bool:
    return len(analysis.arms) > 1 and len({getattr(arm, key) for arm in analysis.arms}) == 1
