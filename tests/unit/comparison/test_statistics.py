"""Against numbers worked by hand, every possible resample of small cases, naive loops, and scipy's own tests."""

import math
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pe_rlhf.comparison.run_result import IntervalEstimate
from pe_rlhf.comparison.run_statistics import (
    detectable_difference,
    difference_estimate,
    holm,
    interquartile_estimate,
    interquartile_mean,
    preference_table,
    probability_of_improvement,
    seeds_estimate,
    two_way_estimate,
    welch,
)
from reward.winrate import bootstrap_interval

NAN = math.nan


def bounds(estimate: IntervalEstimate) -> tuple[float, float]:
    return estimate.low, estimate.high


def has_no_bounds(estimate: IntervalEstimate) -> bool:
    return math.isnan(estimate.low) and math.isnan(estimate.high)


def assert_quantiles_of(estimate: IntervalEstimate, outcomes: list[float]) -> None:
    """The bounds are 2.5 % and 97.5 % quantiles of equally likely outcomes, except the noise of 10 000 draws."""
    for bound, tail in zip(bounds(estimate), (0.025, 0.975), strict=True):
        low, high = np.quantile(outcomes, [tail - 0.006, tail + 0.006], method="inverted_cdf")
        assert low - 1e-12 <= bound <= high + 1e-12


# --- means -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.4], 0.4),
        ([1.0, 5.0, 0.0], 2.0),  # below 4 the mean
        ([10.0, 0.0, 1.0, 2.0], 1.5),
        ([3.0, 2.0, 100.0, 1.0, 0.0], 2.0),  # a quarter of 5, rounded down, is 1
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 80.0], 4.5),
    ],
)
def test_interquartile_mean_by_hand(values: list[float], expected: float) -> None:
    assert interquartile_mean(values) == pytest.approx(expected)


def test_mean_over_seeds_has_students_interval() -> None:
    estimate = seeds_estimate([1.0, 2.0, 3.0])
    half_width = 4.302653 / math.sqrt(3)  # s = 1, and t of 2 degrees of freedom from the table
    assert estimate.value == pytest.approx(2)
    assert bounds(estimate) == pytest.approx((2 - half_width, 2 + half_width), abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_mean_over_seeds_agrees_with_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(3, 2, size=n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert bounds(seeds_estimate(values)) == pytest.approx((expected.low, expected.high))


def test_shares_stay_shares() -> None:
    assert bounds(seeds_estimate([0.9, 0.5, 1.0], (0, 1)))[1] == 1.0
    assert bounds(seeds_estimate([0.1, 0.5, 0.0], (0, 1)))[0] == 0.0


@pytest.mark.parametrize("function", [seeds_estimate, interquartile_estimate])
def test_one_run_has_no_interval(function: Callable[[list[float]], IntervalEstimate]) -> None:
    assert function([0.7]).value == 0.7
    assert has_no_bounds(function([0.7]))


@pytest.mark.parametrize("values", [[], [0.1, NAN], [math.inf]])
def test_what_is_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        seeds_estimate(values)


def test_interquartile_interval_of_few_runs_is_the_means() -> None:
    assert interquartile_estimate([0.5, 0.7, 0.4]) == seeds_estimate([0.5, 0.7, 0.4])


@pytest.mark.parametrize("values", [[0.1, 0.5, 0.6, 2.0], [0.0, 0.2, 0.3, 0.7, 5.0]])
def test_interquartile_interval_is_that_of_all_resamples(values: list[float]) -> None:
    def middle(drawn: tuple[float, ...]) -> float:  # of 4 or 5: all but the least and the largest
        return sum(sorted(drawn)[1:-1]) / (len(drawn) - 2)

    estimate = interquartile_estimate(values)
    assert estimate.value == pytest.approx(middle(tuple(values)))
    assert_quantiles_of(estimate, [middle(drawn) for drawn in product(values, repeat=len(values))])
    assert estimate == interquartile_estimate(values)


# --- win-rates ---------------------------------------------------------------------------------------------------


def test_preference_table_is_ragged_where_the_runs_are() -> None:
    table = preference_table([{"a": [1.0, 0.5], "b": [0.0]}, {"c": [0.2, NAN], "b": [NAN], "a": []}])
    np.testing.assert_allclose(table, [[0.75, NAN], [0.0, NAN], [NAN, 0.2]])


def test_two_way_value_is_the_mean_of_the_runs_means() -> None:
    table = np.array([[1.0, 0.0, NAN], [0.5, NAN, NAN], [0.0, 0.5, NAN], [NAN, NAN, NAN]])
    assert two_way_estimate(table).value == pytest.approx((0.5 + 0.25) / 2)  # the third run has said nothing


def test_two_way_interval_is_that_of_all_resamples() -> None:
    table = np.array([[1.0, 0.0], [0.5, 1.0], [0.0, 0.25]])
    outcomes = [
        float(np.mean([[table[p, s] for s in seeds] for p in prompts]))
        for prompts in product(range(3), repeat=3)
        for seeds in product(range(2), repeat=2)
    ]
    assert_quantiles_of(two_way_estimate(table), outcomes)


def test_two_way_interval_with_gaps_against_a_naive_loop() -> None:
    rng = np.random.default_rng(3)
    table = rng.random((12, 4)) < rng.random((12, 1))
    table = np.where(rng.random(table.shape) < 0.3, NAN, table)
    outcomes = []
    for _ in range(6000):
        prompts, seeds = rng.integers(0, 12, 12), rng.integers(0, 4, 4)
        means = []
        for seed in seeds:
            said = [table[p, seed] for p in prompts if not math.isnan(table[p, seed])]
            if said:
                means.append(sum(said) / len(said))
        outcomes.append(sum(means) / len(means))
    assert bounds(two_way_estimate(table)) == pytest.approx(tuple(np.quantile(outcomes, [0.025, 0.975])), abs=0.015)


def test_two_way_interval_of_one_run_is_over_prompts() -> None:
    column = np.random.default_rng(1).random(60)
    expected = bootstrap_interval(column, resamples=40_000)
    assert bounds(two_way_estimate(column[:, None])) == pytest.approx(expected, abs=0.005)
    # Equal runs tell no more than one.
    assert bounds(two_way_estimate(np.column_stack([column] * 3))) == pytest.approx(expected, abs=0.005)


def test_two_way_interval_of_one_prompt_is_over_runs() -> None:
    values = [0.1, 0.5, 0.75]
    outcomes = [sum(drawn) / 3 for drawn in product(values, repeat=3)]
    assert_quantiles_of(two_way_estimate(np.array([values])), outcomes)


def test_two_way_interval_grows_with_the_spread_of_the_runs() -> None:
    verdicts = np.random.default_rng(0).random((200, 1)) < 0.5
    same = two_way_estimate(np.column_stack([verdicts] * 3))
    apart = two_way_estimate(np.column_stack([verdicts, verdicts * 0.5, verdicts * 0.0]))
    assert apart.high - apart.low > 2 * (same.high - same.low)


def test_two_way_with_too_little() -> None:
    assert has_no_bounds(two_way_estimate(np.array([[NAN, 0.5]])))
    for nothing in (np.array([[NAN, NAN]]), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="no verdicts"):
            two_way_estimate(nothing)


# --- improvement -------------------------------------------------------------------------------------------------


def test_improvement_by_hand() -> None:
    # 1 beats none; 2 ties with 2 and 2; 3 beats 2 and 2.
    assert probability_of_improvement([1, 2, 3], [2, 2, 5]).value == pytest.approx((0 + 1 + 2) / 9)


def test_improvement_is_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 8, 7), rng.integers(2, 8, 5)
    expected = stats.mannwhitneyu(a, b).statistic / 35
    assert probability_of_improvement(a, b).value == pytest.approx(expected)
    assert probability_of_improvement(b, a).value == pytest.approx(1 - expected)


def test_improvement_interval_is_that_of_all_resamples() -> None:
    a, b = [1.0, 2.0, 4.0], [2.0, 3.0, 0.5]
    outcomes = [
        sum((x > y) + 0.5 * (x == y) for x in drawn_a for y in drawn_b) / 9
        for drawn_a in product(a, repeat=3)
        for drawn_b in product(b, repeat=3)
    ]
    assert_quantiles_of(probability_of_improvement(a, b), outcomes)


def test_improvement_of_runs_that_are_wholly_apart_has_the_binomials_bound() -> None:
    expected = stats.binomtest(3, 3).proportion_ci(method="exact")
    up = probability_of_improvement([5, 6, 7, 8], [1, 2, 3])
    assert (up.value, up.low, up.high) == pytest.approx((1, expected.low, 1))
    down = probability_of_improvement([1, 2, 3], [5, 6, 7, 8])
    assert (down.value, down.low, down.high) == pytest.approx((0, 0, 1 - expected.low))


def test_improvement_with_one_run() -> None:
    assert probability_of_improvement([2], [1, 3]).value == 0.5
    assert has_no_bounds(probability_of_improvement([2], [1, 3]))


# --- tests -------------------------------------------------------------------------------------------------------


def test_welch_by_hand() -> None:
    # Means 2 and 11/3, variances 1 and 7/3: t = −(5/3)/√(1/3 + 7/9), ν = (10/9)²/((1/3)²/2 + (7/9)²/2)
    expected = 2 * stats.t.sf(5 / 3 / math.sqrt(10 / 9), (10 / 9) ** 2 / ((1 / 9 + 49 / 81) / 2))
    assert welch([1, 2, 3], [2, 5, 4]) == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [(3, 3), (2, 5), (10, 4)])
def test_welch_agrees_with_scipy(sizes: tuple[int, int]) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(0, 1, sizes[0]), rng.normal(1, 3, sizes[1])
        result: Any = stats.ttest_ind(a, b, equal_var=False)
        assert welch(a, b) == pytest.approx(result.pvalue)
        difference, expected = difference_estimate(a, b), result.confidence_interval(0.95)
        assert difference.value == pytest.approx(a.mean() - b.mean())
        assert bounds(difference) == pytest.approx((expected.low, expected.high))
        assert (welch(a, b) < 0.05) == (not difference.low <= 0 <= difference.high)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1], [2], NAN),
        ([1], [2, 3], NAN),
        ([1], [1], NAN),
        ([0.3, 0.3], [0.5, 0.5], NAN),  # no spread: an infinite t is no evidence
        ([0.1 + 0.2, 0.3], [0.5, 0.5], NAN),  # no spread except rounding
        ([0.3, 0.3], [0.3, 0.1 + 0.2], 1.0),
        ([0.0, 0.0], [0.0, 0.0, 0.0], 1.0),
    ],
)
def test_welch_where_there_is_no_test(a: list[float], b: list[float], expected: float) -> None:
    assert welch(a, b) == pytest.approx(expected, nan_ok=True)
    assert has_no_bounds(difference_estimate(a, b))
    assert math.isnan(detectable_difference(a, b))


def test_welch_where_one_side_has_no_spread_is_a_test_of_the_other() -> None:
    expected: Any = stats.ttest_1samp([1.0, 2.0, 4.0], 0.5)
    assert welch([1.0, 2.0, 4.0], [0.5, 0.5]) == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 15])
@pytest.mark.parametrize("n", [3, 5, 20])
def test_the_detectable_difference_is_found_in_four_cases_of_five(n: int, alpha: float) -> None:
    """With equal spreads Welch's test is Student's, whose power is a probability of the noncentral t distribution."""
    values = np.random.default_rng(n).normal(size=n)
    found = detectable_difference(values, values + 1, alpha)
    freedom, noncentrality = 2 * n - 2, found / (values.std(ddof=1) * math.sqrt(2 / n))
    assert stats.nct.sf(stats.t.ppf(1 - alpha / 2, freedom), freedom, noncentrality) == pytest.approx(0.8)


def test_holm_by_hand() -> None:
    # 0.01·3 = 0.03; 0.02·2 = 0.04; 0.03·1 is less than the one before.
    assert holm([0.02, NAN, 0.01, 0.03]) == pytest.approx([0.04, NAN, 0.03, 0.04], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []
    assert math.isnan(holm([NAN])[0])


def test_holm_is_the_closure_of_bonferroni() -> None:
    """A hypothesis falls when every set of hypotheses that holds it does, each set by Bonferroni's test."""
    for seed in range(20):
        p_values = (np.random.default_rng(seed).random(7) ** 3).tolist()
        p_values[2] = p_values[5]
        sets = [chosen for size in range(1, 8) for chosen in combinations(range(7), size)]
        expected = [max(min(1, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in range(7)]
        assert holm(p_values) == pytest.approx(expected)
