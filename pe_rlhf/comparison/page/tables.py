"""The tables of a comparison's page: numbers as text, a dash for what was not measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from pe_rlhf.comparison.run_result import Analysis, ArmResult, IntervalEstimate, PairResult
from pe_rlhf.comparison.trajectory import known
from pe_rlhf.report.format import duration, gibibytes, number, percent
from pe_rlhf.report.page import Cell, Table

Columns = dict[str, Callable[[ArmResult], str | Cell]]
MISSING = number(None)


def arm_tables(analysis: Analysis) -> list[Table]:
    """What came of each arm, and what it took."""
    equal = "equal KL" if analysis.equal_kl is None else f"KL {number(analysis.equal_kl)}"
    reward = number(analysis.target_reward)
    results: Columns = {
        "Seeds": lambda arm: _listed(arm.seeds),
        "Failed": lambda arm: _listed(arm.failed),
        "Win-rate": lambda arm: estimate(arm.win_rate, percent),
        "Win-rate, IQM of runs": lambda arm: estimate(arm.win_rate_iqm, percent),
        "Judge's score": lambda arm: estimate(arm.gold, number),
        "Reward": lambda arm: estimate(arm.reward, number),
        "KL": lambda arm: estimate(arm.kl, number),
        f"Reward at {equal}": lambda arm: estimate(arm.at_equal_kl, number),
        f"Win-rate at {equal}": lambda arm: estimate(arm.judge_at_equal_kl, percent),
        "Reward model's accuracy": lambda arm: value(arm.reward_accuracy, percent),
    }
    costs: Columns = {
        "Trained parameters": lambda arm: value(arm.trainable_parameters, number),
        "PPO: peak memory": lambda arm: value(arm.peak_mib, gibibytes),
        "PPO: per step": lambda arm: value(arm.seconds_per_step, seconds),
        "Reward stage: peak memory": lambda arm: value(arm.reward_peak_mib, gibibytes),
        "Reward stage: per step": lambda arm: value(arm.reward_seconds_per_step, seconds),
        f"Steps to a reward of {reward}": lambda arm: value(arm.steps_to_target, _whole),
        f"Time to a reward of {reward}": lambda arm: value(arm.seconds_to_target, duration),
        "Collapses": _collapses,
    }
    about_results = (
        "Below a number its 95 % interval, over prompts and seeds for the win-rate, over seeds for all others. IQM:"
        " mean of the middle half of the runs. Reward and KL (nats per response): mean of the last quarter of PPO."
        " Failed runs do not count."
    )
    about_costs = (
        "Peak memory: the highest of the runs; time per step: their median; to a reward: their mean, a dash where one"
        " never came there."
    )
    return [
        _by_arm(analysis, "Results", about_results, results),
        _by_arm(analysis, "Cost and collapses", about_costs, costs, words=["Collapses"]),
    ]


def task_tables(analysis: Analysis) -> list[Table]:
    """What came of several tasks in each arm, and of each arm every task after every task; none without tasks."""
    if not any(arm.tasks for arm in analysis.arms):
        return []
    tables = {run.arm: run.tasks for run in analysis.runs if run.tasks is not None}
    columns: Columns = {
        "Average": lambda arm: estimate(arm.tasks.get("average"), percent),
        "Forgetting": lambda arm: estimate(arm.tasks.get("forgetting"), signed_share),
        "Forward transfer": lambda arm: estimate(arm.tasks.get("forward_transfer"), signed_share),
        "Overlap of A": lambda arm: estimate(arm.tasks.get("overlap"), number),
        "Weights changed twice": lambda arm: estimate(arm.tasks.get("collision_rate"), percent),
    }
    note = (
        "Average: win-rate over the base after the last task. Forgetting: the best before the last task minus after it."
        " Forward transfer: before a task is learnt, above one half. Overlap: √Σ‖A_i A_tᵀ‖² of the last task's adapter;"
        " changed twice: by it and an earlier one."
    )
    found = [_by_arm(analysis, "What came of the tasks", note, columns)]
    for arm in analysis.arms:
        names, policies = tables[arm.arm].tasks, tables[arm.arm].policies
        rows = [[after, *(estimate(arm.tasks.get(f"{after} → {on}"), percent) for on in names)] for after in policies]
        found.append(Table(["After", *(f"on {name}" for name in names)], rows, title=arm.arm, scrolls=True))
    return found


def settings_table(analysis: Analysis) -> Table | None:
    """What the arms change in the recipe, with the learning rates that were chosen; None where they change nothing."""
    keys = dict.fromkeys(key for arm in analysis.arms for key in arm.settings)
    columns: Columns = {key: lambda arm, key=key: setting(arm.settings.get(key)) for key in keys}
    note = "Where they differ from the recipe, with the learning rates that the runs were made with."
    return _by_arm(analysis, "Settings", note, columns, words=list(keys)) if columns else None


def pair_table(pairs: Sequence[PairResult], measure: str) -> Table:
    """The pairs of arms, in the order of the analysis."""
    written, unit = (signed_share, "win-rate") if measure == "win_rate" else (signed, "reward")
    note = (
        f"Difference: {unit} of the first arm minus that of the second. p: Welch's test with the runs as units; Holm:"
        " corrected for all pairs. Improvement: probability that a run of the first arm is better than one of the"
        " second. Below a number its 95 % interval."
    )
    rows = [
        (
            pair.a,
            pair.b,
            estimate(pair.difference, written),
            p_text(pair.p_value),
            p_text(pair.p_holm),
            estimate(pair.improvement, percent),
        )
        for pair in pairs
    ]
    columns = ("First arm", "Second arm", "Difference", "p", "p, Holm", "Improvement")
    return Table(columns, rows, "Pairs of arms", note, words=["Second arm"], scrolls=True)


def _by_arm(analysis: Analysis, title: str, note: str, columns: Columns, words: Sequence[str] = ()) -> Table:
    rows = [(arm.arm, *(cell(arm) for cell in columns.values())) for arm in analysis.arms]
    return Table(["Arm", *columns], rows, title, note, words, scrolls=True)


def _collapses(arm: ArmResult) -> str:
    told = [f"seed {c.seed}: {c.kind} at step {c.step}" + f" ({c.detail})" * bool(c.detail) for c in arm.collapses]
    return "; ".join(told) or MISSING


def setting(chosen: Any) -> str:
    """A value of a recipe's key."""
    if chosen is None or isinstance(chosen, str):
        return chosen or MISSING
    return f"{chosen:g}" if isinstance(chosen, float) else json.dumps(chosen, ensure_ascii=False)


def estimate(found: IntervalEstimate | None, written: Callable[[float], str]) -> str | Cell:
    """A number with its interval, as far as they are known."""
    if found is None or not known(found.value):
        return MISSING
    bounded = known(found.low) and known(found.high)
    interval = f"{written(found.low).removesuffix(' %')} to {written(found.high)}" if bounded else ""
    return Cell(written(found.value), interval)


def value(number_: float | None, written: Callable[[Any], str]) -> str:
    return MISSING if number_ is None or not known(number_) else written(number_)


def p_text(p: float) -> str:
    """A p-value with three decimals."""
    if not known(p):
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def signed_share(difference: float) -> str:
    """A difference of shares, written as in the sentences of the pairs."""
    return _sign(difference) + f"{abs(difference):.3f}"


def signed(difference: float) -> str:
    """A number with its sign."""
    return _sign(difference) + number(abs(difference))


def _sign(difference: float) -> str:
    return "−" if difference < 0 else "+" if difference > 0 else ""


def seconds(duration_: float) -> str:
    return f"{number(float(duration_))} s"


def _whole(steps: float) -> str:
    return number(int(steps) if steps == int(steps) else steps)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or MISSING
