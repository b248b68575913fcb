"""Made-up analyses of a comparison, for the tests of its page and its plots."""

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

from pe_rlhf.comparison.run_result import Analysis, ArmResult, IntervalEstimate, PairResult, Row, RunResult, Status

NAN = math.nan
STEPS = range(1, 41)
TWELVE = [
    "full",
    "lora",
    "pissa",
    "milora",
    "lora_ga",
    "rlpo",
    "rlmo",
    "eva",
    "corda",
    "olora",
    "dora",
    "rank 64, lr 1e-3",
]


def metrics(arm: int, seed: int, steps: range = STEPS, kl: float = 0.1) -> list[Row]:
    """Curves that rise with the arm's position; seeds lie 0.02 apart in reward."""
    rows: list[Row] = []
    for step in steps:
        row: Row = {
            "step": step,
            "reward": 90.0 - step,
            "reward_shaped": 0.3 + 0.01 * step + 0.03 * arm + 0.02 * seed,
            "kl": kl * step * (1 + 0.1 * arm) + 0.05 * seed,
            "entropy": 2.5 - 0.02 * step - 0.05 * arm,
        }
        if step % 10 == 0:
            row["judge_win_rate"] = 0.5 + 0.004 * step + 0.01 * seed
        rows.append(row)
    return rows


def run_result(arm: str, position: int, seed: int, status: Status = "finished", **changes: Any) -> RunResult:
    drift = {
        "update_norm": 0.012,
        "principal_share": 0.5 - 0.03 * position,
        "minor_share": 0.02 + 0.03 * position,
        "spectrum": [math.exp(-0.3 * i / (1 + 0.2 * position)) for i in range(16)],
    }
    return replace(
        RunResult(arm, seed, status, drift=drift, metrics=metrics(position, seed)),
        **changes,
    )


def arm_result(name: str, position: int = 0, seeds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> ArmResult:
    share = 0.5 + 0.02 * position
    result = ArmResult(
        arm=name,
        settings={"tuning": "full"} if name == "full" else {"adapter.init": name, "ppo.learning_rate": 2e-4},
        seeds=list(seeds),
        failed=[],
        reward_accuracy=0.6875,
        win_rate=IntervalEstimate(share, share - 0.1, share + 0.08),
        win_rate_iqm=IntervalEstimate(share - 0.01, share - 0.05, share + 0.05),
        gold=IntervalEstimate(0.551, 0.502, 0.598),
        reward=IntervalEstimate(0.714, 0.655, 0.773),
        kl=IntervalEstimate(4.25, 3.9, 4.6),
        at_equal_kl=IntervalEstimate(0.611, 0.578, 0.644),
        judge_at_equal_kl=IntervalEstimate(0.583, 0.541, 0.625),
        peak_mib=6144.0 if name == "full" else 2048.0 + 64 * position,
        seconds_per_step=20.0 if name == "full" else 12.5 + position,
        trainable_parameters=134515008 if name == "full" else 1843201,
        steps_to_target=17.0,
        seconds_to_target=204.4,
        reward_peak_mib=4096.0 if name == "full" else 1536.0,
        reward_seconds_per_step=8.0 if name == "full" else 3.25,
    )
    return replace(result, **changes)


def pair_result(a: str, b: str, p: float = 0.2) -> PairResult:
    verdict = "wins more often than" if p < 0.05 else "cannot be told from"
    return PairResult(
        a,
        b,
        IntervalEstimate(-0.042, -0.113, 0.029),
        p,
        min(1.0, 2 * p),
        IntervalEstimate(0.333, 0.111, 0.667),
        f"{a} {verdict} {b}.",
    )


def analysis_of(*names: str, seeds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Analysis:
    whole = Analysis(
        name="inits at rank 8",
        measure="win_rate",
        arms=[arm_result(name, i, seeds) for i, name in enumerate(names)],
        pairs=[pair_result(a, b) for a, b in combinations(names, 2)] if len(seeds) > 1 else [],
        target_reward=0.55,
        equal_kl=3.2,
        runs=[run_result(name, i, seed) for i, name in enumerate(names) for seed in seeds],
    )
    return replace(whole, **changes)
