"""Does a reward model know how sure it may be? Calibration of its pairwise predictions, and the error of an accuracy.

A reward model says that the chosen response wins with probability p = σ(margin), margin = chosen − rejected reward. The
outcome is the same in every pair (chosen has won), so the prediction is folded: the confidence max(p, 1 − p) in
[1/2, 1] belongs to the response the model prefers, and the model is correct where that is the chosen one. A tie
(margin 0) has confidence 1/2 and counts as half correct.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from reward.errors import InputError
from reward.winrate import wilson_interval


class ReliabilityRow(TypedDict):
    """One bin of confidences, lower ≤ confidence < upper (the last bin holds 1 too); no means where count is 0."""

    lower: float
    upper: float
    count: int
    mean_confidence: float | None
    accuracy: float | None


def reliability_table(margins: Sequence[float], bins: int = 10) -> list[ReliabilityRow]:
    """Compare confidence and accuracy in `bins` bins of equal width over [1/2, 1]; empty bins are kept.

    margins: chosen minus rejected reward of each pair. Raises `InputError` where there are none, where one is not
    finite, and where bins < 1. Source: arXiv 1706.04599 §2.
    """
    if bins < 1:
        raise InputError(f"bins must be at least 1, not {bins}", kind="invalid", key="bins")
    margin_N = np.asarray(margins, dtype=np.float64)
    if margin_N.size == 0:
        raise InputError("there are no margins to calibrate on", kind="empty", key="margins")
    if not np.isfinite(margin_N).all():
        first = int(np.argmin(np.isfinite(margin_N)))
        raise InputError(f"margin {first} is not finite", kind="not_finite", key="margins", row=first + 1)

    confidence_N = 1 / (1 + np.exp(-np.abs(margin_N)))
    correct_N = (np.sign(margin_N) + 1) / 2
    edges = np.linspace(0.5, 1.0, bins + 1)
    bin_N = np.clip(np.searchsorted(edges, confidence_N, side="right") - 1, 0, bins - 1)

    rows: list[ReliabilityRow] = []
    for index in range(bins):
        inside_N = bin_N == index
        count = int(inside_N.sum())
        rows.append(
            {
                "lower": float(edges[index]),
                "upper": float(edges[index + 1]),
                "count": count,
                "mean_confidence": float(confidence_N[inside_N].mean()) if count else None,
                "accuracy": float(correct_N[inside_N].mean()) if count else None,
            }
        )
    return rows


def expected_calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """Mean over pairs of |accuracy − confidence| of their bin, in [0, 1]; arXiv 1706.04599 eq. 3.

    Arguments and errors are those of `reliability_table`.
    """
    error = 0.0
    for row in reliability_table(margins, bins):
        if row["accuracy"] is not None and row["mean_confidence"] is not None:
            error += row["count"] * abs(row["accuracy"] - row["mean_confidence"])
    return error / len(margins)


def accuracy_interval(correct: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of the accuracy correct / n, where ties may count half.

    Raises `InputError` where n < 1 or `correct` is not in [0, n].
    """
    if n < 1 or not 0 <= correct <= n:
        raise InputError(f"{correct} correct of {n} is not an accuracy", kind="invalid", key="correct")
    return wilson_interval(correct / n, n, level)
