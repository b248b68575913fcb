"""What the parts of a comparison hand to each other: runs as they were found, and their analysis."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pe_rlhf.runs.task_table import TaskTable

Row = dict[str, Any]
Status = Literal["finished", "failed", "unfinished"]
CollapseKind = Literal["not finite", "KL blow-up", "entropy collapse", "reward hacking", "reward collapse"]


@dataclass(frozen=True)
class RunResult:
    """One run of an arm with one seed, as it was found on disk. A stage that the run has not reached is empty.

    message, failure: why a failed run failed, for people and as the `kind` of `reward.errors`; the kind is None where
        an older version wrote `failure.json`.
    settings: what the arm changes in the base recipe, and the learning rate that was chosen for it, by recipe key.
    reward, ppo, evaluate: the stages' summaries; `reward` is the shared reward stage's where it was trained once.
    metrics: the lines of `ppo/metrics.jsonl`.
    preferences: the judge's preferences for the policy, by prompt.
    drift: size, rank and direction of the policy's update; see `drift.py`.
    tasks: of a recipe with tasks: every task after every task. `ppo`, `metrics` and `drift` are then the last task's,
        and the win-rate of `evaluate` is the average over tasks after the last one.
    """

    arm: str
    seed: int
    status: Status
    message: str = ""
    failure: str | None = None
    folder: Path | None = None
    settings: Row = field(default_factory=dict)
    reward: Row = field(default_factory=dict)
    ppo: Row = field(default_factory=dict)
    evaluate: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    preferences: dict[str, list[float]] = field(default_factory=dict)
    drift: Row = field(default_factory=dict)
    tasks: TaskTable | None = None


@dataclass(frozen=True)
class IntervalEstimate:
    """A number with its 95 % interval; NaN bounds where there is too little to tell."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Collapse:
    """What went wrong in a run, and the PPO step at which it was seen first."""

    seed: int
    kind: CollapseKind
    step: int
    detail: str


@dataclass(frozen=True)
class ArmResult:
    """One arm over its finished `seeds`. None: not measured. Bounds are over seeds; of `win_rate` over prompts too.

    reward, kl: of the last quarter of the PPO steps; every reward here has the penalties included. gold: the judge's
        mean score of the policy on held-out prompts.
    at_equal_kl: reward where the KL first reaches `Analysis.equal_kl`. judge_at_equal_kl: the judge's win-rate there.
    steps_to_target, seconds_to_target: until the reward reaches `Analysis.target_reward`; None where a run never did.
    win_rate_iqm: interquartile mean over the runs' win-rates.
    tasks: of a recipe with tasks: average, forgetting, forward_transfer, overlap and collision_rate of the last task,
        and the win-rate on each task after each, by `after → on`.
    """

    arm: str
    settings: Row
    seeds: list[int]
    failed: list[int]
    reward_accuracy: float | None
    win_rate: IntervalEstimate | None
    win_rate_iqm: IntervalEstimate | None
    gold: IntervalEstimate | None
    reward: IntervalEstimate | None
    kl: IntervalEstimate | None
    at_equal_kl: IntervalEstimate | None
    judge_at_equal_kl: IntervalEstimate | None
    peak_mib: float | None
    seconds_per_step: float | None
    trainable_parameters: int | None
    steps_to_target: float | None
    seconds_to_target: float | None
    reward_peak_mib: float | None = None
    reward_seconds_per_step: float | None = None
    collapses: list[Collapse] = field(default_factory=list)
    tasks: dict[str, IntervalEstimate] = field(default_factory=dict)


@dataclass(frozen=True)
class PairResult:
    """Two arms against each other in their win-rates over the anchor (their rewards where there is no evaluation).

    difference: a − b. p_value: Welch's test with the runs as units. p_holm: corrected for all pairs.
    improvement: probability that a run of a is better than one of b. sentence: in words.
    """

    a: str
    b: str
    difference: IntervalEstimate
    p_value: float
    p_holm: float
    improvement: IntervalEstimate
    sentence: str


@dataclass(frozen=True)
class Analysis:
    """A comparison, analysed. measure: what the pairs are compared in, `win_rate` or `reward`."""

    name: str
    measure: Literal["win_rate", "reward"]
    arms: list[ArmResult]
    pairs: list[PairResult]
    target_reward: float | None
    equal_kl: float | None
    runs: list[RunResult]
