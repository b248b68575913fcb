"""Bradley–Terry and agreement against statsmodels and numbers worked by hand; paired comparisons by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import binom, binomtest

from reward.agreement import agreement
from reward.errors import InputError
from reward.ranking import bradley_terry
from reward.winrate import bootstrap_interval, compare_policies, sign_test


def test_strengths_are_those_of_a_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    true = {"a": 0.8, "b": 0.0, "c": -0.5, "d": 0.1}
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")]
    comparisons = [
        (x, y, float(rng.random() < 1 / (1 + math.exp(true[y] - true[x])))) for x, y in pairs for _ in range(150)
    ]
    ranking = {row.policy: row for row in bradley_terry(comparisons)}
    # The oracle: statsmodels on the same rows and the one draw per pair, with "b" as the reference.
    rows = [*comparisons, *((x, y, 0.5) for x, y in pairs)]
    design = np.array([[(x == n) - (y == n) for n in "acd"] for x, y, _ in rows], dtype=float)
    fitted = sm.GLM([p for *_, p in rows], design, family=sm.families.Binomial()).fit()
    for name, expected in zip("acd", fitted.params, strict=True):
        assert ranking[name].strength - ranking["b"].strength == pytest.approx(expected, abs=1e-6)
    assert sum(row.strength for row in ranking.values()) == pytest.approx(0, abs=1e-9)
    assert next(row.policy for row in bradley_terry(comparisons)) == "a"
    assert ranking["a"].n == 300


def test_intervals_of_strengths_cover_95_percent() -> None:
    rng = np.random.default_rng(1)
    true = np.array([0.6, 0.0, -0.6])
    covered = 0
    for _ in range(700):
        comparisons = [
            (str(i), str(j), float(rng.random() < 1 / (1 + math.exp(true[j] - true[i]))))
            for i, j in ((0, 1), (1, 2), (0, 2))
            for _ in range(120)
        ]
        covered += sum(row.ci_low <= true[int(row.policy)] <= row.ci_high for row in bradley_terry(comparisons))
    assert 0.935 <= covered / 2100 <= 0.965


def test_a_policy_that_always_wins_has_a_finite_strength() -> None:
    first, last = bradley_terry([("a", "b", 1.0)] * 50)
    assert (first.policy, last.policy) == ("a", "b")
    assert first.strength - last.strength == pytest.approx(math.log(50.5 / 0.5), abs=1e-6)


def test_groups_that_never_met_have_no_ranking() -> None:
    with pytest.raises(InputError, match="2 groups that never met"):
        bradley_terry([("a", "b", 1.0), ("c", "d", 0.0)])


def test_agreement_worked_by_hand() -> None:
    """Judge AAAB, gold AABB: 3 of 4 equal; by chance 3/4 · 1/2 + 1/4 · 1/2 = 1/2, so kappa = (3/4 − 1/2) / (1/2)."""
    result = agreement([0.9, 0.8, 0.7, 0.2], [1.0, 1.0, 0.0, 0.0])
    assert (result.accuracy, result.kappa, result.n) == (0.75, pytest.approx(0.5), 4)
    expected = binomtest(3, 4).proportion_ci(method="wilson")
    assert (result.ci_low, result.ci_high) == pytest.approx((expected.low, expected.high))
    assert agreement([0.5, 1.0], [1.0, 1.0]).accuracy == 0.75  # a tie counts half
    with pytest.raises(InputError, match="2 verdicts cannot be compared with 1"):
        agreement([1.0, 0.0], [1.0])


def test_sign_test_is_the_binomial_tail() -> None:
    differences = [0.3] * 9 + [-0.1] * 2 + [0.0] * 5
    assert sign_test(differences) == pytest.approx(2 * binom.sf(8, 11, 0.5))
    assert sign_test([0.0, 0.0]) == 1.0


def test_policies_are_compared_on_the_prompts_they_share() -> None:
    a = {0: [1.0], 1: [1.0, 0.0], 2: [0.5], 9: [0.0]}
    b = {0: [0.0], 1: [0.5], 2: [0.0], 8: [1.0]}
    result = compare_policies(a, b)
    assert (result.difference, result.n) == (pytest.approx(0.5), 3)  # 1, 0 and ½
    with pytest.raises(InputError, match="not compared on any prompt"):
        compare_policies({0: [1.0]}, {1: [1.0]})


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
    alone = bootstrap_interval(means_G, seed=1)
    assert (low, high) == pytest.approx(alone)
