"""What a reward model's scores of preference pairs say about it: accuracy, calibration, length bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward.calibration import accuracy_interval, expected_calibration_error, reliability_table
from reward.errors import InputError


@dataclass(frozen=True)
class ScoredPair:
    """Rewards and lengths (characters) of the better and the worse response of a pair."""

    chosen: float
    rejected: float
    len_chosen: int
    len_rejected: int
    subset: str = "all"

    @property
    def margin(self) -> float:
        return self.chosen - self.rejected


def accuracy_metrics(pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """`accuracy` with its Wilson interval, `n` and the mean margin; a tie counts half."""
    correct = sum((math.copysign(1, p.margin) if p.margin else 0) / 2 + 0.5 for p in pairs)
    low, high = accuracy_interval(correct, len(pairs))
    mean = sum(p.margin for p in pairs) / len(pairs)
    return {"accuracy": correct / len(pairs), "ci_low": low, "ci_high": high, "n": len(pairs), "margin": mean}


def reward_metrics(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """The whole summary of a reward model on pairs. Raises `InputError` where there are none."""
    if not pairs:
        raise InputError("there are no pairs to evaluate the reward model on", kind="empty")
    subsets = sorted({pair.subset for pair in pairs})
    margins = [pair.margin for pair in pairs]
    return {
        **accuracy_metrics(pairs),
        "subsets": {name: accuracy_metrics([p for p in pairs if p.subset == name]) for name in subsets},
        "calibration_error": expected_calibration_error(margins),
        "reliability": reliability_table(margins),
        "length": length_bias(pairs),
    }


def length_bias(pairs: Sequence[ScoredPair]) -> dict[str, float | int | None]:
    """How often the longer response wins at equal quality; 1/2 is no bias.

    Where the longer one is the better one, a model prefers it at some rate, and where it is the worse one, at a lower
    rate. The mean of the two weighs both cases alike, so that quality speaks for neither length: `longer_wins`. Its
    standard error is that of two independent shares. None where one of the cases does not occur.

    `correlation`: Spearman's, of the margin and the difference of lengths.
    """
    rates: list[float] = []
    variance = 0.0
    counts = {"longer_is_better": 0, "shorter_is_better": 0}
    for name, sign in (("longer_is_better", 1), ("shorter_is_better", -1)):
        longer = [p for p in pairs if sign * (p.len_chosen - p.len_rejected) > 0]
        counts[name] = len(longer)
        if longer:
            wins = [(np.sign(sign * p.margin) + 1) / 2 for p in longer]
            rates.append(float(np.mean(wins)))
            variance += rates[-1] * (1 - rates[-1]) / len(longer) / 4
    both = len(rates) == 2
    return {
        "longer_wins": sum(rates) / 2 if both else None,
        "standard_error": math.sqrt(variance) if both else None,
        "correlation": _spearman([p.margin for p in pairs], [p.len_chosen - p.len_rejected for p in pairs]),
        **counts,
    }


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    from scipy.stats import spearmanr  # a second to import

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    result: Any = spearmanr(a, b)  # scipy gives its class no type
    return float(result.statistic)
