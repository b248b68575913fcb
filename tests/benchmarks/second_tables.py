"""Second tables of results, beside the one of every comparison: `make results` puts them on the page.

Equal seconds: the last quarter of the steps that a run had finished when the fastest run of all ended. Sampling,
scoring and updates count; loading, evaluation and checkpoints do not. Leave the machine to such a comparison.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from statistics import fmean

from pe_rlhf.comparison.run_result import Analysis, RunResult
from pe_rlhf.comparison.run_statistics import seeds_estimate
from pe_rlhf.comparison.trajectory import PHASES, at_kl, last_quarter, rows_with
from tests.benchmarks.results import Row, estimate, markdown

LEVELS = (5, 10, 20, 30, 40)  # nats
DISAGREEMENT = "source_ensemble_disagreement"


def at_equal_seconds(analysis: Analysis) -> str:
    """The reward of every arm when the fastest run of all had ended, and how many steps it had made."""
    fastest = min((seconds_of(run)[-1] for run in finished(analysis)), default=0.0)
    rows: list[Row] = []
    for arm in (arm for arm in analysis.arms if arm.seeds):
        cut = [until(run, fastest) for run in finished(analysis, arm.arm)]
        rewards = [reward for run in cut if (reward := last_quarter(run, "reward")) is not None]
        rows.append(
            {
                "arm": f"`{arm.arm}`",
                f"reward after {fastest:.0f} s of training": over_seeds(rewards) if len(rewards) == len(cut) else "",
                "steps by then": over_seeds([len(run.metrics) for run in cut], digits=1),
                "seconds per step": "" if arm.seconds_per_step is None else f"{arm.seconds_per_step:.2f}",
            }
        )
    return markdown(rows)


def gold_over_kl(analysis: Analysis) -> str:
    """The judge's score where the KL first reaches some levels, at its best and at the end; what an ensemble disagrees.

    A level that not every run has reached has no interval, and says how many have.
    """
    rows: list[Row] = []
    for arm in (arm for arm in analysis.arms if arm.seeds):
        runs = finished(analysis, arm.arm)
        judged = [rows_with(run, "judge_score_policy", "judge_kl") for run in runs]
        best = [max(lines, key=lambda line: line["judge_score_policy"]) for lines in judged]
        scores = [
            (top["judge_score_policy"], lines[-1]["judge_score_policy"])
            for top, lines in zip(best, judged, strict=True)
        ]
        row = {"arm": f"`{arm.arm}`"}
        for level in LEVELS:
            found = [score for run in runs if (score := at_kl(run, "judge_score_policy", level)) is not None]
            row[f"judge's score at KL {level}"] = of_some(found, len(runs))
        row |= {
            "at its best": over_seeds([top for top, _ in scores]),
            "KL there": over_seeds([line["judge_kl"] for line in best], digits=1),
            "at the end": over_seeds([last for _, last in scores]),
            "KL at the end": over_seeds([lines[-1]["judge_kl"] for lines in judged], digits=1),
            "fell by": over_seeds([top - last for top, last in scores]),
        }
        if all(rows_with(run, DISAGREEMENT) for run in runs):
            row["disagreement, first step"] = over_seeds([run.metrics[0][DISAGREEMENT] for run in runs])
            row["in the last quarter"] = over_seeds([last_quarter(run, DISAGREEMENT) or math.nan for run in runs])
        rows.append(row)
    return markdown(rows)


def finished(analysis: Analysis, arm: str | None = None) -> list[RunResult]:
    return [run for run in analysis.runs if run.status == "finished" and arm in (None, run.arm)]


def over_seeds(values: list[float], digits: int = 3) -> str:
    """The mean over runs with its interval."""
    found = dataclasses.asdict(seeds_estimate(values)) if values else None
    return estimate(found, digits=digits, interval=len(values) > 1)


def of_some(values: list[float], runs: int) -> str:
    if len(values) == runs:
        return over_seeds(values)
    return f"{fmean(values):.3f} ({len(values)} of {runs} runs)" if values else ""


def seconds_of(run: RunResult) -> list[float]:
    """Seconds from the start of training to the end of each step."""
    return list(itertools.accumulate(sum(row[phase] for phase in PHASES) for row in run.metrics))


def until(run: RunResult, seconds: float) -> RunResult:
    """A run as it was after so many seconds of training."""
    done = sum(end <= seconds for end in seconds_of(run))
    return dataclasses.replace(run, metrics=run.metrics[:done])


SECOND_TABLES: dict[str, Callable[[Analysis], str]] = {
    "compare_estimators": at_equal_seconds,
    "compare_estimators_small": at_equal_seconds,
    "over_optimisation_small": gold_over_kl,
}
