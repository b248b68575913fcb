"""From the runs of a comparison to its results: arm by arm, at equal KL, until a set reward, and pair by pair."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from decimal import ROUND_DOWN, Context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from pe_rlhf.comparison.collapse import find_collapses
from pe_rlhf.comparison.paired_runs import Measure, compare_pairs
from pe_rlhf.comparison.run_result import Analysis, ArmResult, IntervalEstimate, Row, RunResult
from pe_rlhf.comparison.run_statistics import (
    SHARE,
    UNBOUNDED,
    Range,
    interquartile_estimate,
    preference_table,
    seeds_estimate,
    two_way_estimate,
)
from pe_rlhf.comparison.trajectory import at_kl, highest_kl, known, last_quarter, to_target
from pe_rlhf.config.compare import CollapseConfig, CompareConfig

Values = Iterable[float | None]

LEAST_KL = 0.1  # nats per response: a policy that has not moved so far has not been trained
LEAST_KL_SHARE = 0.1  # of what the median arm reaches


def analyse(name: str, config: CompareConfig, runs: list[RunResult]) -> Analysis:
    """All results of a comparison; arms in the order in which they first appear among the runs.

    The metrics of an arm are those of its finished runs; its collapses are those of all its runs. Pairs are
    compared in win-rates where every finished run has one, else in rewards. The target reward is the configured one, or
    what the first arm with a finished run ends with.
    """
    by_arm: dict[str, list[RunResult]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    finished = {arm: [run for run in own if run.status == "finished"] for arm, own in by_arm.items()}
    target = config.target_reward
    if target is None:
        ends = (_known(last_quarter(run, "reward_shaped") for run in own) for own in finished.values())
        target = next((fmean(rewards) for rewards in ends if rewards), None)
    equal_kl = _equal_kl(list(finished.values()))
    rated = [known(run.evaluate.get("win_rate")) for own in finished.values() for run in own]
    measure: Measure = "win_rate" if rated and all(rated) else "reward"
    values = {arm: _known(_measured(run, measure) for run in own) for arm, own in finished.items()}
    failed = {arm: (sum(run.status == "failed" for run in own), len(own)) for arm, own in by_arm.items()}
    return Analysis(
        name=name,
        measure=measure,
        arms=[_arm(arm, by_arm[arm], finished[arm], config.collapse, equal_kl, target) for arm in by_arm],
        pairs=compare_pairs(values, failed, measure),
        target_reward=target,
        equal_kl=equal_kl,
        runs=runs,
    )


def _measured(run: RunResult, measure: Measure) -> float | None:
    return run.evaluate["win_rate"] if measure == "win_rate" else last_quarter(run, "reward_shaped")


# --- arms --------------------------------------------------------------------------------------------------------


def _arm(
    arm: str,
    runs: list[RunResult],
    finished: list[RunResult],
    collapse: CollapseConfig,
    equal_kl: float | None,
    target: float | None,
) -> ArmResult:
    """Memory is the most that any run needed; times are medians, since a busy machine only ever adds to them."""

    def of(stage: str, key: str) -> list[float]:
        return _known(getattr(run, stage).get(key) for run in finished)

    rates = of("evaluate", "win_rate")
    arrivals = [None if target is None else to_target(run, target) for run in finished]
    parameters = of("ppo", "trainable_parameters")
    return ArmResult(
        arm=arm,
        settings=runs[0].settings,
        seeds=[run.seed for run in finished],
        failed=[run.seed for run in runs if run.status == "failed"],
        reward_accuracy=_each(of("reward", "eval_accuracy"), fmean),
        win_rate=_win_rate(finished),
        win_rate_iqm=interquartile_estimate(rates, SHARE) if rates else None,
        gold=_over_seeds(of("evaluate", "gold_policy")),
        reward=_over_seeds(last_quarter(run, "reward_shaped") for run in finished),
        kl=_over_seeds(last_quarter(run, "kl") for run in finished),
        at_equal_kl=_all_at_kl(finished, "reward_shaped", equal_kl, UNBOUNDED),
        judge_at_equal_kl=_all_at_kl(finished, "judge_win_rate", equal_kl, SHARE),
        peak_mib=_each(_peaks(finished, "ppo"), max),
        seconds_per_step=_each(of("ppo", "seconds_per_step"), median),
        trainable_parameters=int(max(parameters)) if parameters else None,
        steps_to_target=_mean_of_all(found[0] if found else None for found in arrivals),
        seconds_to_target=_mean_of_all(found[1] if found else None for found in arrivals),
        reward_peak_mib=_each(_peaks(finished, "reward"), max),
        reward_seconds_per_step=_each(of("reward", "seconds_per_step"), median),
        collapses=[found for run in runs for found in find_collapses(run, collapse)],
        tasks=_tasks(finished),
    )


def _tasks(runs: list[RunResult]) -> dict[str, IntervalEstimate]:
    """What the arm's runs have in common of what is known of their tasks; see `ArmResult.tasks`."""
    metrics = [task_metrics(run) for run in runs]
    names = [name for name in (metrics[0] if metrics else {}) if all(name in each for each in metrics)]
    return {name: seeds_estimate([each[name] for each in metrics]) for name in names}


def task_metrics(run: RunResult) -> dict[str, float]:
    """The metrics of one run's tasks by name; empty for a recipe without tasks."""
    if run.tasks is None:
        return {}
    named = {name: getattr(run.tasks, name) for name in ("average", "forgetting", "forward_transfer")}
    metrics = {name: bounded.value for name, bounded in named.items() if bounded is not None}
    metrics |= {name: run.ppo[name] for name in ("overlap", "collision_rate") if name in run.ppo}
    return metrics | {f"{cell.after} → {cell.on}": cell.win_rate for cell in run.tasks.cells}


def _win_rate(runs: list[RunResult]) -> IntervalEstimate | None:
    """Over prompts and seeds where each run's preferences are known, else over seeds.

    Over prompts, each prompt counts once, however many of its samples have a valid verdict.
    """
    rated = [run for run in runs if known(run.evaluate.get("win_rate"))]
    table = preference_table([run.preferences for run in rated])
    if table.size and not np.isnan(table).all(axis=0).any():
        return two_way_estimate(table)
    return _over_seeds((run.evaluate["win_rate"] for run in rated), SHARE)


def _equal_kl(arms: list[list[RunResult]]) -> float | None:
    """The largest KL that every run of every arm reaches, rounded down to two digits; None where that says nothing.

    An arm that hardly moves would pull the comparison of all others down to where nothing has been learnt yet. So arms
    are left out that have a run which stays below 0.1 nats, or below a tenth of what the median arm reaches, unless
    fewer than two would remain. An arm reaches what the least of its runs does at its highest.
    """
    lowest_of = [min(highest_kl(run) for run in runs) for runs in arms if runs]
    reached = [kl for kl in lowest_of if kl >= LEAST_KL]
    if len(reached) < 2:
        return None
    typical = [kl for kl in reached if kl >= LEAST_KL_SHARE * median(reached)]
    lowest = min(typical if len(typical) > 1 else reached)
    return float(Context(prec=2, rounding=ROUND_DOWN).create_decimal(repr(float(lowest))))


def _all_at_kl(runs: list[RunResult], key: str, kl: float | None, within: Range) -> IntervalEstimate | None:
    values = [None if kl is None else at_kl(run, key, kl) for run in runs]
    present = _known(values)
    return seeds_estimate(present, within) if present and len(present) == len(values) else None


def _peaks(runs: list[RunResult], stage: str) -> list[float]:
    """Peak memory of a stage in MiB: the GPU's where there was one, else the process's."""
    stages = [getattr(run, stage) for run in runs]
    return _known(stage.get("peak_cuda_mib", stage.get("peak_rss_mib")) for stage in stages)


def _known(values: Values) -> list[float]:
    return [value for value in values if value is not None and known(value)]


def _over_seeds(values: Values, within: Range = UNBOUNDED) -> IntervalEstimate | None:
    present = _known(values)
    return seeds_estimate(present, within) if present else None


def _each(values: list[float], summary: Callable[[list[float]], float]) -> float | None:
    return summary(values) if values else None


def _mean_of_all(values: Values) -> float | None:
    listed = list(values)
    present = _known(listed)
    return fmean(present) if present and len(present) == len(listed) else None


# --- files -------------------------------------------------------------------------------------------------------

REWARD = ("eval_accuracy", "eval_pairs", "train_pairs", "seconds", "seconds_per_step", "peak_rss_mib", "peak_cuda_mib")
REWARD += ("trainable_parameters",)
PPO = ("steps", "episodes", "reward_first", "reward_last", "kl_last", "seconds", "seconds_per_step")
PPO += ("tokens_per_second", "peak_rss_mib", "peak_cuda_mib", "trainable_parameters")
EVALUATE = ("win_rate", "ci_low", "ci_high", "n", "wins", "ties", "losses", "kl", "gold_policy", "gold_anchor")
EVALUATE += ("reward_policy", "reward_anchor", "mean_length_policy", "mean_length_anchor", "seconds")
DRIFT = ("update_norm", "principal_share", "minor_share", "stable_rank")
COLUMNS = {"reward": REWARD, "ppo": PPO, "evaluate": EVALUATE, "drift": DRIFT}


def to_json(analysis: Analysis) -> dict[str, Any]:
    """For `summary.json`: all but the runs' folders, metrics and preferences; NaN is None."""
    short = replace(analysis, runs=[replace(run, metrics=[], preferences={}) for run in analysis.runs])
    tree = _plain(asdict(short))
    for run in tree["runs"]:
        del run["metrics"], run["preferences"], run["folder"]
    return tree


def to_rows(analysis: Analysis) -> list[Row]:
    """For `results.csv`: a flat row per run, all with the same columns, None where nothing is known.

    Settings are named as in the recipe, `adapter.init`; metrics by stage, `ppo_reward_last`. `reward`, penalties
    included, and `kl` are means over the last quarter of the steps.
    """
    keys = list(dict.fromkeys(key for run in analysis.runs for key in run.settings))
    collapses: dict[tuple[str, int], list[str]] = {}
    for arm in analysis.arms:
        for found in arm.collapses:
            collapses.setdefault((arm.arm, found.seed), []).append(f"{found.kind} at step {found.step}")
    return [
        {"arm": run.arm, "seed": run.seed, "status": run.status, "message": run.message, "failure": run.failure}
        | {key: _cell(run.settings.get(key)) for key in keys}
        | {"collapses": "; ".join(collapses.get((run.arm, run.seed), []))}
        | {"reward": last_quarter(run, "reward_shaped"), "kl": last_quarter(run, "kl")}
        | {f"{s}_{key}": _cell(_plain(getattr(run, s).get(key))) for s, names in COLUMNS.items() for key in names}
        | {f"tasks_{name}": value for name, value in task_metrics(run).items()}
        for run in analysis.runs
    ]


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else value
