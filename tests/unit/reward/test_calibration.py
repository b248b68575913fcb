"""Calibration against tables worked by hand, a naive loop, and scipy's Wilson interval."""

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binomtest, norm

from reward.calibration import accuracy_interval, expected_calibration_error, reliability_table
from reward.errors import Kind
from tests.failures import raises


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_table_worked_by_hand() -> None:
    # Two bins, [0.5, 0.75) and [0.75, 1]. Confidences 0.6 (right), 0.7 (wrong), 0.5 (tie) | 0.9 (right), 0.8 (wrong).
    margins = [logit(0.6), -logit(0.7), 0.0, logit(0.9), -logit(0.8)]
    low, high = reliability_table(margins, bins=2)
    assert (low["lower"], low["upper"], low["count"]) == (0.5, 0.75, 3)
    assert (high["lower"], high["upper"], high["count"]) == (0.75, 1.0, 2)
    assert low["mean_confidence"] == pytest.approx(0.6)
    assert low["accuracy"] == pytest.approx(0.5)  # (1 + 0 + 1/2) / 3
    assert high["mean_confidence"] == pytest.approx(0.85)
    assert high["accuracy"] == pytest.approx(0.5)
    assert expected_calibration_error(margins, bins=2) == pytest.approx(3 / 5 * 0.1 + 2 / 5 * 0.35)


def test_against_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    margins = [*rng.normal(0.5, 2.0, size=500).tolist(), 0.0, 0.0]
    error = 0.0
    for index, row in enumerate(reliability_table(margins, bins=7)):
        lower, upper = 0.5 + index / 14, 0.5 + (index + 1) / 14
        inside = [m for m in margins if lower <= max(expit(m), 1 - expit(m)) < upper]
        correct = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in inside]
        assert row["count"] == len(inside)
        assert row["lower"] == pytest.approx(lower)
        assert row["upper"] == pytest.approx(upper)
        assert row["accuracy"] == pytest.approx(np.mean(correct))
        assert row["mean_confidence"] == pytest.approx(np.mean([expit(abs(m)) for m in inside]))
        error += len(inside) / len(margins) * abs(np.mean(correct) - np.mean([expit(abs(m)) for m in inside]))
    assert expected_calibration_error(margins, bins=7) == pytest.approx(error)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large_one() -> None:
    rng = np.random.default_rng(0)
    strength = np.abs(rng.normal(0, 1.5, size=20_000))
    margins = np.where(rng.random(20_000) < expit(strength), strength, -strength)
    assert expected_calibration_error(margins.tolist()) < 0.015
    assert expected_calibration_error((4 * margins).tolist()) > 0.1


def test_empty_bins_stay_in_the_table_and_certainty_is_in_the_last() -> None:
    rows = reliability_table([1000.0, -1000.0], bins=10)
    assert [row["count"] for row in rows] == [0] * 9 + [2]
    assert rows[0]["mean_confidence"] is None
    assert rows[0]["accuracy"] is None
    assert rows[9]["mean_confidence"] == 1.0
    assert expected_calibration_error([1000.0, -1000.0]) == pytest.approx(0.5)


def test_an_edge_belongs_to_the_bin_above_it() -> None:
    margin = math.log(3)
    assert 1 / (1 + np.exp(-margin)) == 0.75  # exactly, in binary floating point too
    below = margin - 1e-9
    for bins, expected in ((2, [1, 2]), (4, [0, 1, 2, 0])):
        assert [row["count"] for row in reliability_table([below, margin, -margin], bins)] == expected


@pytest.mark.parametrize(
    ("margins", "bins", "kind", "key", "row"),
    [
        ([], 10, "empty", "margins", None),
        ([0.1, float("nan")], 10, "not_finite", "margins", 2),
        ([float("inf")], 10, "not_finite", "margins", 1),
        ([0.1], 0, "invalid", "bins", None),
    ],
)
def test_refusals(margins: list[float], bins: int, kind: Kind, key: str, row: int | None) -> None:
    with raises(kind, key=key, row=row):
        expected_calibration_error(margins, bins)


@pytest.mark.parametrize(("correct", "n"), [(0, 5), (5, 5), (7, 10), (300, 457)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_accuracy_interval_is_scipys_wilson_interval(correct: int, n: int, level: float) -> None:
    expected = binomtest(correct, n).proportion_ci(confidence_level=level, method="wilson")
    assert accuracy_interval(correct, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_accuracy_interval_takes_half_points() -> None:
    # The bounds of a Wilson interval are the x that lie z standard errors from the share: (s − x)² = z²·x(1 − x)/n.
    z2_n = float(norm.ppf(0.975)) ** 2 / 7
    low, high = sorted(np.roots([1 + z2_n, -(2 * 4.5 / 7 + z2_n), (4.5 / 7) ** 2]))
    assert accuracy_interval(4.5, 7) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (6, 5), (-1, 5), (float("nan"), 5)])
def test_accuracy_interval_refuses_what_is_no_accuracy(correct: float, n: int) -> None:
    with raises("invalid", key="correct"):
        accuracy_interval(correct, n)
