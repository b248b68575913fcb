"""Whether the judge turned down while the reward still rose."""

from __future__ import annotations

import math
from typing import Any

Row = dict[str, Any]


def judge_turned_down(rows: list[Row]) -> tuple[Row, Row] | None:
    """The judge's best step and the last, where it has turned down in between while the reward rose; rows have both.

    It has where Newcombe's interval for the difference of the two win-rates lies above zero (Newcombe 1998, method 10):
    39 of 40 after 40 of 40 is no turn.
    """
    best, last = max(rows, key=lambda row: row["judge_win_rate"]), rows[-1]
    down = best["judge_win_rate"] - best["judge_ci_low"], last["judge_ci_high"] - last["judge_win_rate"]
    fell = best["judge_win_rate"] - last["judge_win_rate"] > math.hypot(*down)
    return (best, last) if fell and last["reward_shaped"] > best["reward_shaped"] else None
