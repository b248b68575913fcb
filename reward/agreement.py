"""How well a judge agrees with people, or with another judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reward.errors import InputError
from reward.winrate import win_rate


@dataclass(frozen=True)
class Agreement:
    """accuracy: share of right verdicts, with its interval. kappa: Cohen's, NaN where chance agrees fully.

    equal: share of equal verdicts, in which a tie beside a win is not half right.
    """

    accuracy: float
    ci_low: float
    ci_high: float
    kappa: float
    n: int
    equal: float


def agreement(judge: Sequence[float], gold: Sequence[float]) -> Agreement:
    """Compare two lists of preferences on the same pairs by what they decide: win, tie or loss.

    Where gold has decided, a judge's tie counts half in the accuracy; where gold is a tie, only a tie is right. Kappa
    takes the three verdicts as categories (Cohen 1960). Raises `InputError` for lists that are empty or of different
    length.
    """
    if len(judge) != len(gold) or not judge:
        kind = "invalid" if judge else "empty"
        raise InputError(f"{len(judge)} verdicts cannot be compared with {len(gold)}", kind=kind, key="preference")
    judge_N, gold_N = (np.sign(np.asarray(values, dtype=np.float64) - 0.5) for values in (judge, gold))
    equal_N = judge_N == gold_N
    right = win_rate(np.where(equal_N, 1.0, np.where((judge_N == 0) & (gold_N != 0), 0.5, 0.0)))
    chance = sum(float((judge_N == v).mean() * (gold_N == v).mean()) for v in (-1, 0, 1))
    kappa = (float(equal_N.mean()) - chance) / (1 - chance) if chance < 1 else math.nan
    return Agreement(right.win_rate, right.ci_low, right.ci_high, kappa, right.n, float(equal_N.mean()))
