"""What the metrics lines of one run say: its end, where its KL first reaches a level, how long a reward took."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from pe_rlhf.comparison.run_result import Row, RunResult

PHASES = ("seconds_rollout", "seconds_score", "seconds_update")


def known(value: Any) -> bool:
    """Whether it is a finite number; what was not finite is null in the metrics."""
    return isinstance(value, int | float) and math.isfinite(value)


def rows_with(run: RunResult, *keys: str) -> list[Row]:
    """The lines that have a finite number under each of the keys."""
    return [row for row in run.metrics if all(known(row.get(key)) for key in keys)]


def last_step(run: RunResult) -> int:
    """The last step that was written; 0 where none was."""
    return run.metrics[-1]["step"] if run.metrics else 0


def last_quarter(run: RunResult, key: str) -> float | None:
    """Mean over the last quarter of the steps, at least one; None where nothing is known there."""
    rows = run.metrics[-max(1, len(run.metrics) // 4) :]
    values = [row[key] for row in rows if known(row.get(key))]
    return fmean(values) if values else None


def highest_kl(run: RunResult) -> float:
    return max((row["kl"] for row in rows_with(run, "kl")), default=0.0)


def at_kl(run: RunResult, key: str, kl: float) -> float | None:
    """A metric where the KL first reaches a level, between two lines by a straight line; None where it is not known.

    A metric that not every line has, as the judge's, is read off the straight line between those that do have it.
    """
    step, rows = _step_at_kl(run, kl), rows_with(run, key)
    if step is not None and key.startswith("judge_"):
        step -= 1  # a line has the KL of the policy before the step's update, and the judge's word on the one after it
    if step is None or not rows or not rows[0]["step"] <= step <= rows[-1]["step"]:
        return None
    after = next(row for row in rows if row["step"] >= step)
    before = next(row for row in reversed(rows) if row["step"] <= step)
    return _between(before["step"], before[key], after["step"], after[key], step)


def to_target(run: RunResult, target: float) -> tuple[int, float] | None:
    """The first step with that reward, and the seconds up to its end (NaN: not known). None: no such step."""
    seconds = 0.0
    for row in run.metrics:
        seconds += sum(row[phase] if known(row.get(phase)) else math.nan for phase in PHASES)
        if known(row.get("reward_shaped")) and row["reward_shaped"] >= target:
            return row["step"], seconds
    return None


def _step_at_kl(run: RunResult, kl: float) -> float | None:
    """The step, not a whole one, at which the KL first reaches a level."""
    before: Row | None = None
    for row in rows_with(run, "kl"):
        if row["kl"] >= kl:
            return row["step"] if before is None else _between(before["kl"], before["step"], row["kl"], row["step"], kl)
        before = row
    return None


def _between(x0: float, y0: float, x1: float, y1: float, x: float) -> float:
    return y0 if x1 == x0 else y0 + (x - x0) / (x1 - x0) * (y1 - y0)
