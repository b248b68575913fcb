"""Results of runs made by hand, and what a comparison makes of them."""

from typing import Any

from pe_rlhf.comparison.analysis import analyse
from pe_rlhf.comparison.run_result import Analysis, ArmResult, RunResult
from pe_rlhf.config.compare import CompareConfig

Row = dict[str, Any]


def lines(rewards: list[Any], kls: list[Any] | None = None) -> list[Row]:
    """A step per reward, penalties included, of 2 + 1 + 4 seconds; the KL rises by 1 a step from 0 unless it is given.

    The reward before penalties falls, so that whatever takes it for the other finds something else.
    """
    kls = list(range(len(rewards))) if kls is None else kls
    seconds = {"seconds_rollout": 2.0, "seconds_score": 1.0, "seconds_update": 4.0}
    return [
        {
            "step": step,
            "episodes": 64 * step,
            "reward": None if r is None else 90.0 - step,
            "reward_shaped": r,
            "reward_std": 9.0,
        }
        | {"kl": kl, "entropy": 2.0, **seconds}
        for step, (r, kl) in enumerate(zip(rewards, kls, strict=True), 1)
    ]


def run(arm: str, seed: int = 1, metrics: list[Row] | None = None, **changes: Any) -> RunResult:
    metrics = lines([0.1, 0.2, 0.3, 0.4]) if metrics is None else metrics
    return RunResult(arm, seed, **{"status": "finished", "metrics": metrics, **changes})


def rated(arm: str, *rates: float, **changes: Any) -> list[RunResult]:
    return [run(arm, seed, evaluate={"win_rate": rate}, **changes) for seed, rate in enumerate(rates, 1)]


def ended(arm: str, *rewards: float) -> list[RunResult]:
    return [run(arm, seed, lines([0.0, 0.0, 0.0, reward])) for seed, reward in enumerate(rewards, 1)]


def compared(*runs: RunResult, **config: Any) -> Analysis:
    return analyse("test", CompareConfig(arms=[{}], **config), list(runs))


def only_arm(*runs: RunResult, **config: Any) -> ArmResult:
    [arm] = compared(*runs, **config).arms
    return arm


def sentences(*runs: RunResult) -> list[str]:
    return [pair.sentence for pair in compared(*runs).pairs]


def value(estimate: Any) -> float:
    assert estimate is not None
    return estimate.value
