"""What scores of pairs say about a reward model: accuracy and length bias by hand, on pairs written out."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from reward.pair_metrics import ScoredPair, accuracy_metrics, length_bias, reward_metrics
from tests.failures import raises

# Rewards and lengths of the better and the worse response. Margins 1, −1, 0 where the better one is longer,
# 1, −2, −1 where it is shorter, and 1 at equal lengths.
PAIRS = [
    ScoredPair(2.0, 1.0, 10, 5, "x"),
    ScoredPair(0.0, 1.0, 8, 4, "x"),
    ScoredPair(3.0, 3.0, 9, 2, "y"),
    ScoredPair(1.0, 0.0, 3, 7, "y"),
    ScoredPair(0.0, 2.0, 2, 6, "y"),
    ScoredPair(0.0, 1.0, 1, 5, "y"),
    ScoredPair(1.0, 0.0, 4, 4, "y"),
]


def test_a_tie_is_half_right() -> None:
    found = accuracy_metrics(PAIRS)
    assert (found["n"], found["accuracy"], found["margin"]) == (7, 3.5 / 7, pytest.approx(-1 / 7))
    assert accuracy_metrics(PAIRS[2:3])["accuracy"] == 0.5
    assert accuracy_metrics([PAIRS[i] for i in (0, 1, 2, 3)])["accuracy"] == 2.5 / 4
    wilson = binomtest(1, 2).proportion_ci(method="wilson")
    two = accuracy_metrics(PAIRS[:2])
    assert (two["ci_low"], two["ci_high"]) == pytest.approx((wilson.low, wilson.high))


def test_subsets_are_split_and_the_whole_is_all_of_them() -> None:
    found = reward_metrics(PAIRS)
    assert {name: (of["n"], of["accuracy"]) for name, of in found["subsets"].items()} == {"x": (2, 0.5), "y": (5, 0.5)}
    assert (found["n"], found["accuracy"]) == (7, 0.5)
    assert sum(row["count"] for row in found["reliability"]) == 7
    # Of all pairs at margin 0: confidence 1/2, and half of them right.
    assert reward_metrics(PAIRS[2:3])["calibration_error"] == 0
    assert found["length"] == length_bias(PAIRS)
    with raises("empty"):
        reward_metrics([])


def test_how_often_the_longer_one_wins_by_hand() -> None:
    """Where it is the better one: 1, 0 and a half of 3. Where it is the worse one: 0, 1 and 1 of 3."""
    found = length_bias(PAIRS)
    assert (found["longer_is_better"], found["shorter_is_better"]) == (3, 3)
    assert found["longer_wins"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    variances = (1 / 2 * 1 / 2 / 3, 2 / 3 * 1 / 3 / 3)
    assert found["standard_error"] == pytest.approx(math.sqrt(sum(variances)) / 2)


def test_without_one_of_the_cases_there_is_no_rate() -> None:
    found = length_bias(PAIRS[:2])
    assert (found["longer_is_better"], found["shorter_is_better"]) == (2, 0)
    assert found["longer_wins"] is None
    assert found["standard_error"] is None


def test_the_correlation_is_of_ranks() -> None:
    rising = [ScoredPair(margin, 0.0, length, 0) for margin, length in ((1.0, 1), (10.0, 2), (11.0, 90))]
    assert [length_bias(pairs)["correlation"] for pairs in (rising, rising[:2])] == pytest.approx([1, 1])
    # Ranks 1, 2, 3 and 1, 3, 2: 1 − 6·(0 + 1 + 1) / (3·8).
    turned = [ScoredPair(margin, 0.0, length, 0) for margin, length in ((1.0, 1), (10.0, 90), (11.0, 2))]
    assert length_bias(turned)["correlation"] == pytest.approx(0.5)
    for same in ([ScoredPair(1.0, 0.0, 3, 2)] * 2, [ScoredPair(m, 0.0, 3, 2) for m in (1.0, 2.0)]):
        assert length_bias(same)["correlation"] is None
