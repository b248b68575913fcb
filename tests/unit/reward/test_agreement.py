"""Agreement, sign test and bootstrap: numbers worked by hand, scipy, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from reward.agreement import agreement
from reward.winrate import bootstrap_interval, sign_test
from tests.failures import raises


def test_agreement_worked_by_hand() -> None:
    """Judge AAAB, gold AABB: 3 of 4 equal; by chance 3/4 · 1/2 + 1/4 · 1/2 = 1/2, so kappa = (3/4 − 1/2) / (1/2)."""
    result = agreement([0.9, 0.8, 0.7, 0.2], [1.0, 1.0, 0.0, 0.0])
    assert (result.accuracy, result.kappa, result.n) == (0.75, pytest.approx(0.5), 4)
    expected = binomtest(3, 4).proportion_ci(method="wilson")
    assert (result.ci_low, result.ci_high) == pytest.approx((expected.low, expected.high))
    assert agreement([0.5, 1.0], [1.0, 1.0]).accuracy == 0.75  # a tie counts half
    assert math.isnan(agreement([1.0, 0.9], [1.0, 1.0]).kappa)  # by chance, too, they always agree
    for judge, gold, kind in (([1.0, 0.0], [1.0], "invalid"), ([], [], "empty"), ([], [1.0], "empty")):
        with raises(kind, key="preference"):  # type: ignore[arg-type]
            agreement(judge, gold)


def test_agreement_with_ties_worked_by_hand() -> None:
    """Judge T A B T A, gold T A B B T: 3 of 5 equal, a tie beside a loss half right, a win beside a tie not right."""
    result = agreement([0.5, 0.8, 0.1, 0.5, 1.0], [0.5, 1.0, 0.2, 0.0, 0.5])
    assert (result.accuracy, result.equal, result.n) == (3.5 / 5, 3 / 5, 5)
    chance = (2 * 2 + 2 * 1 + 1 * 2) / 25  # ties, A, B
    assert result.kappa == pytest.approx((3 / 5 - chance) / (1 - chance))


def test_sign_test_is_the_binomial_tail() -> None:
    differences = [0.3] * 9 + [-0.1] * 2 + [0.0] * 5
    assert sign_test(differences) == pytest.approx(2 * binom.sf(8, 11, 0.5))
    assert sign_test([0.0, 0.0]) == 1.0


def test_paired_intervals_cover_95_percent_and_are_narrower_than_unpaired_ones() -> None:
    """Two policies that share how hard a prompt is: the truth of their difference is 0.1."""
    rng = np.random.default_rng(2)
    covered, widths = 0, []
    for _ in range(1200):
        hard_N = rng.random(150) < 0.5
        a_N = np.where(hard_N, rng.random(150) < 0.3, rng.random(150) < 0.9).astype(float)
        b_N = np.where(hard_N, rng.random(150) < 0.2, rng.random(150) < 0.8).astype(float)
        low, high = bootstrap_interval(a_N - b_N, resamples=600)
        covered += low <= 0.1 <= high
        widths.append(high - low)
    assert 0.935 <= covered / 1200 <= 0.965
    assert np.mean(widths) < 2 * 1.96 * math.sqrt((0.6 * 0.4 + 0.5 * 0.5) / 150)


def test_bootstrap_draws_whole_clusters() -> None:
    rng = np.random.default_rng(3)
    means_G = rng.binomial(1, 0.4, 60).astype(float)
    low, high = bootstrap_interval(np.repeat(means_G, 10), np.repeat(np.arange(60), 10).tolist(), seed=1)
    single = bootstrap_interval(means_G, seed=1)
    assert (low, high) == pytest.approx(single)


@pytest.mark.parametrize("part", [1, 40, 7_000])
def test_the_parts_of_a_bootstrap_do_not_change_it(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    values_N = np.random.default_rng(3).random(41)
    means_R = values_N[np.random.default_rng(0).integers(0, 41, size=(600, 41))].mean(axis=1)
    monkeypatch.setattr("reward.winrate.PART", part)
    assert bootstrap_interval(values_N, resamples=600) == pytest.approx(tuple(np.quantile(means_R, [0.025, 0.975])))
