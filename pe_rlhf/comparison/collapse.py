"""How a run collapsed: by its metrics, by the kind of its failure, or by the judge's win-rates."""

from __future__ import annotations

import math

from pe_rlhf.comparison.run_result import Collapse, CollapseKind, RunResult
from pe_rlhf.comparison.trajectory import known, last_quarter, last_step, rows_with
from pe_rlhf.config.compare import CollapseConfig
from pe_rlhf.report.format import number, percent
from pe_rlhf.report.run_page import over_optimisation
from pe_rlhf.runs.over_optimisation import judge_turned_down
from reward.errors import Kind

CLEAR = 2.0  # standard errors of the first step's mean reward that a change must exceed to be called one
FALLEN = 0.5  # standard deviations of the first step's rewards


def find_collapses(run: RunResult, config: CollapseConfig) -> list[Collapse]:
    """Each kind of collapse at most once, at the PPO step where it was seen first; in the order of the steps.

    - not finite: reward, KL or policy loss in the metrics, or a failure of kind `not_finite`. A failed step has no line
      in the metrics, so it is the one after the last line.
    - KL blow-up: over `config.kl` nats per response, or a failure of kind `kl_limit`.
    - entropy collapse: below `config.entropy_share` of the first step's entropy.
    - reward hacking: the judge's win-rate fell after its best step (which is reported) while the reward rose; or the
      judge prefers the anchor at the end, although the reward has clearly risen.
    - reward collapse: the mean reward of the last quarter of the steps is clearly below the first step's, and by more
      than half a standard deviation of single rewards (a medium effect by Cohen's convention). The step is the first
      with a reward that low.

    A change of reward is clear if it exceeds two standard errors of the first step's mean.
    """
    tests = (_not_finite(run), _kl(run, config.kl), _entropy(run, config.entropy_share), _hacked(run), _fallen(run))
    return sorted((collapse for collapse in tests if collapse), key=lambda collapse: collapse.step)


def _not_finite(run: RunResult) -> Collapse | None:
    for row in run.metrics:
        if lost := [key for key in ("reward", "kl", "policy_loss") if key in row and not known(row[key])]:
            return Collapse(run.seed, "not finite", row["step"], f"no finite {' and no finite '.join(lost)}")
    return _failed(run, "not_finite", "not finite")


def _kl(run: RunResult, limit: float) -> Collapse | None:
    for row in rows_with(run, "kl"):
        if row["kl"] > limit:
            detail = f"KL of {number(row['kl'])} nats per response, over {number(limit)}"
            return Collapse(run.seed, "KL blow-up", row["step"], detail)
    return _failed(run, "kl_limit", "KL blow-up")


def _failed(run: RunResult, failure: Kind, kind: CollapseKind) -> Collapse | None:
    if run.status != "failed" or run.failure != failure:
        return None
    return Collapse(run.seed, kind, last_step(run) + 1, run.message)


def _entropy(run: RunResult, share: float) -> Collapse | None:
    rows = rows_with(run, "entropy")
    for row in rows:
        if row["entropy"] < share * rows[0]["entropy"]:
            detail = f"entropy of {number(row['entropy'])} nats per token, {number(rows[0]['entropy'])} at first"
            return Collapse(run.seed, "entropy collapse", row["step"], detail)
    return None


def _hacked(run: RunResult) -> Collapse | None:
    judged = rows_with(run, "reward_shaped", "judge_win_rate", "judge_ci_low", "judge_ci_high")
    if judged and (turn := judge_turned_down(judged)):
        return Collapse(run.seed, "reward hacking", turn[0]["step"], over_optimisation(judged))
    if (change := _change(run)) is None or not known(high := run.evaluate.get("ci_high", math.nan)):
        return None
    rise, noise, _ = change
    if high >= 0.5 or rise <= noise:
        return None
    rate = percent(run.evaluate["win_rate"])
    detail = f"the policy wins {rate} against the anchor at the end, while the reward rose by {number(rise)}"
    return Collapse(run.seed, "reward hacking", last_step(run), detail)


def _fallen(run: RunResult) -> Collapse | None:
    if (change := _change(run)) is None:
        return None
    rise, noise, spread = change
    fall = max(noise, FALLEN * spread)
    if -rise <= fall:
        return None
    rows = rows_with(run, "reward_shaped")
    first = rows[0]["reward_shaped"]
    step = next(row["step"] for row in rows if row["reward_shaped"] < first - fall)
    return Collapse(run.seed, "reward collapse", step, f"reward from {number(first)} to {number(first + rise)}")


def _change(run: RunResult) -> tuple[float, float, float] | None:
    """Reward of the last quarter less the first step's; what of that may be noise; standard deviation of rewards."""
    rows, last = rows_with(run, "reward_shaped", "reward_std", "episodes"), last_quarter(run, "reward_shaped")
    if not rows or last is None:
        return None
    first = rows[0]
    responses = first["episodes"] / first["step"]
    return last - first["reward_shaped"], CLEAR * first["reward_std"] / math.sqrt(responses), first["reward_std"]
