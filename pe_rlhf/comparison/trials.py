"""Which learning rate an arm is run with: the one of its trials with the best PPO objective at the end.

The judge has no say: its prompts are what the arms are compared on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pe_rlhf.comparison.plan import Arm, Plan
from pe_rlhf.comparison.run_result import Row, Status
from pe_rlhf.comparison.runner import located, state_of
from pe_rlhf.config import KLConfig
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.system.files import read_jsonl


@dataclass(frozen=True)
class Choice:
    """An arm's trials: its learning rate and objective by factor (NaN: failed), and what came of them.

    `factor` is the chosen one; None while trials are unfinished, and where all of them have failed: see `status`.
    """

    arm: Arm
    trials: list[Row]
    factor: float | None
    status: Status = "finished"
    message: str = ""


def choose(plan: Plan, arm: Arm, places: Sequence[Path] = ()) -> Choice:
    """What the trials of an arm came to, wherever they lie; without trials, its own learning rate."""
    rows: list[Row] = []
    for factor, planned in plan.trials(arm).items():
        run = located(planned, places, plan.root)
        status, message = state_of(run)
        assert run.recipe.ppo is not None
        row = {"arm": arm.name, "lr_factor": factor, "learning_rate": run.recipe.ppo.learning_rate}
        value = objective(run.folder, run.recipe.ppo.kl) if status == "finished" else math.nan
        rows.append({**row, "status": status, "objective": value, "message": message})
    if not rows:
        return Choice(arm, rows, 1.0)
    base = plan.trial_base(arm)
    if base is not None and state_of(base := located(base, places, plan.root))[0] == "failed":
        why = f"the reward model of its trials failed, see {base.folder / 'log.txt'}"
        return Choice(arm, rows, None, "failed", why)
    if any(row["status"] == "unfinished" for row in rows):
        return Choice(arm, rows, None, "unfinished", "its trials have not finished")
    tried = [row for row in rows if not math.isnan(row["objective"])]
    if not tried:
        return Choice(arm, rows, None, "failed", f"all its {len(rows)} trials failed, see trials in summary.json")
    return Choice(arm, rows, max(tried, key=lambda row: row["objective"])["lr_factor"])


def objective(run: Path, kl: KLConfig) -> float:
    """What PPO maximises, (1−β)·r − β·KL or r − β·KL, over the last quarter of the steps; NaN where it is unknown."""
    lines = read_jsonl(RunFiles(run).stage("ppo").metrics)
    last = lines[-max(1, len(lines) // 4) :]
    weight = 1 - kl.beta if kl.form == "convex" else 1.0
    values = [
        math.nan if row["reward"] is None or row["kl"] is None else weight * row["reward"] - kl.beta * row["kl"]
        for row in last
    ]
    return sum(values) / len(values) if values else math.nan
