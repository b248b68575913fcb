"""The learning rate of an arm: that of its trial with the best PPO objective at the end.

The judge's verdicts are not used for it, because the arms are compared on the judge's prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pe_rlhf.algo.rewards import kl_objective
from pe_rlhf.comparison.plan import Arm, Plan
from pe_rlhf.comparison.run_result import Row, Status
from pe_rlhf.comparison.runner import refuse_changed, state_of
from pe_rlhf.config import KLConfig
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.metrics import read_metrics


@dataclass(frozen=True)
class Choice:
    """An arm's trials: learning rate and objective by factor (NaN: failed), and the factor that was chosen.

    `factor` is None while trials are unfinished, and if all of them have failed; `status` says which.
    """

    arm: Arm
    trials: list[Row]
    factor: float | None
    status: Status = "finished"
    message: str = ""


def choose(plan: Plan, arm: Arm) -> Choice:
    """The learning rate of an arm by its trials; without trials, its own."""
    rows: list[Row] = []
    for factor, run in plan.trials(arm).items():
        refuse_changed([run])
        state = state_of(run)
        assert run.recipe.ppo is not None
        row = {"arm": arm.name, "lr_factor": factor, "learning_rate": run.recipe.ppo.learning_rate}
        value = objective(run.folder, run.recipe.ppo.kl) if state.status == "finished" else math.nan
        rows.append({**row, "status": state.status, "objective": value, "message": state.message})
    if not rows:
        return Choice(arm, rows, 1.0)
    base = plan.trial_base(arm)
    if base is not None and state_of(base).status == "failed":
        why = f"the reward model of its trials failed, see {RunFiles(base.folder).log}"
        return Choice(arm, rows, None, "failed", why)
    if any(row["status"] == "unfinished" for row in rows):
        return Choice(arm, rows, None, "unfinished", "its trials have not finished")
    tried = [row for row in rows if not math.isnan(row["objective"])]
    if not tried:
        return Choice(arm, rows, None, "failed", f"all its {len(rows)} trials failed, see trials in summary.json")
    return Choice(arm, rows, max(tried, key=lambda row: row["objective"])["lr_factor"])


def objective(run: Path, kl: KLConfig) -> float:
    """PPO's objective, penalties included, over the last quarter of the steps; NaN where it is unknown."""
    lines = read_metrics(RunFiles(run).stage("ppo").metrics)
    last = lines[-max(1, len(lines) // 4) :]
    values: list[float] = []
    for row in last:
        reward, distance = row["reward_shaped"], row["kl"]
        if reward is None or distance is None:
            return math.nan
        values.append(kl_objective(reward, distance, beta=kl.beta, form=kl.form))
    return sum(values) / len(values) if values else math.nan
