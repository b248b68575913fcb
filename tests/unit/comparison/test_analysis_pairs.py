"""Pairs of arms: which are tested, how, and the sentence that says what was found."""

import math
from typing import Any

import pytest
from scipy import stats

from tests.unit.comparison.made_runs import compared, ended, rated, run, sentences


def test_pairs_are_compared_in_win_rates_where_all_finished_runs_have_one() -> None:
    runs = [*rated("a", 0.4, 0.5), *rated("b", 0.6, 0.8), run("b", 3, status="failed", message="killed")]
    result = compared(*runs)
    [pair] = result.pairs
    assert result.measure == "win_rate"
    assert (pair.a, pair.b, pair.difference.value) == ("b", "a", pytest.approx(0.25))
    assert pair.improvement.value == 1.0
    expected: Any = stats.ttest_ind([0.6, 0.8], [0.4, 0.5], equal_var=False)
    assert pair.p_value == pair.p_holm == pytest.approx(expected.pvalue)
    assert compared(*runs, run("b", 4)).measure == "reward"


def test_p_values_are_corrected_for_the_pairs_that_were_tested() -> None:
    pairs = compared(*ended("a", 0.1, 0.2), *ended("b", 0.4, 0.6), *ended("c", 0.9, 0.91), *ended("d", 5.0)).pairs
    assert [pair.a + pair.b for pair in pairs] == ["ba", "ca", "da", "cb", "db", "dc"]
    tested = {pair.a + pair.b: pair.p_value for pair in pairs if "d" not in (pair.a, pair.b)}
    assert all(math.isnan(pair.p_holm) for pair in pairs if pair.a + pair.b not in tested)
    least, middle, most = sorted(tested, key=lambda name: tested[name])
    expected = {least: 3 * tested[least], middle: max(3 * tested[least], 2 * tested[middle])}
    expected[most] = max(expected[middle], tested[most])
    for pair in pairs:
        if pair.a + pair.b in tested:
            assert pair.p_holm == pytest.approx(min(1, expected[pair.a + pair.b]))


def test_the_sentence_of_a_difference() -> None:
    a, b = [0.70, 0.71, 0.72], [0.58, 0.59, 0.60]
    # Means 0.12 apart, both variances 0.0001: standard error √(2·0.0001/3) = 0.008165, t(4) = 2.77645
    low, high = (f"{0.12 + sign * 2.77645 * 0.008165:.3f}" for sign in (-1, 1))
    assert sentences(*rated("pissa", *a), *rated("lora", *b)) == [
        f"lora wins less often than pissa: −0.120 (−{high} to −{low}), p < 0.001."
    ]
    assert sentences(*rated("lora", *b), *rated("pissa", *a)) == [
        f"pissa wins more often than lora: +0.120 (+{low} to +{high}), p < 0.001."
    ]


def test_the_sentence_of_a_difference_in_rewards() -> None:
    [up] = sentences(*ended("lora", 0.58, 0.59, 0.60), *ended("full", 1.70, 1.71, 1.72))
    assert up.startswith("full ends with more reward than lora: +1.12 (+1.10 to +1.14), p < 0.001")
    [down] = sentences(*ended("full", 1.70, 1.71, 1.72), *ended("lora", 0.58, 0.59, 0.60))
    assert down.startswith("lora ends with less reward than full: −1.12 (−1.14 to −1.10)")


def test_the_sentence_of_no_difference_says_what_would_have_been_found() -> None:
    a, b = [0.5, 0.6, 0.7], [0.55, 0.65, 0.75]
    p = stats.ttest_ind(b, a, equal_var=False)[1]
    [text] = sentences(*rated("lora", *a), *rated("pissa", *b))
    assert text.startswith("No difference found between pissa and lora: +0.050 (−0.177 to +0.277), ")
    # Standard error √(2·0.01/3) = 0.08165; a noncentrality of 3.761 gives a power of 0.8 at 4 degrees of freedom.
    assert stats.nct.sf(stats.t.ppf(0.975, 4), 4, 3.761) == pytest.approx(0.8, abs=1e-4)
    assert text.endswith(f"p = {p:.3f}; with 3 runs each only a difference of about 0.31 would have been found.")


def test_the_sentence_counts_the_tests() -> None:
    for text in sentences(*rated("a", 0.5, 0.6), *rated("b", 0.55, 0.6, 0.7), *rated("c", 0.5, 0.7), *rated("d", 0.9)):
        if " d " in f" {text} ":
            assert "cannot be tested: d has one run (difference +" in text
        else:
            assert "after Holm's correction for 3 pairs" in text
            assert ("with 3 and 2 runs" in text) == ("between b and a" in text)
            assert ("with 2 and 3 runs" in text) == ("between c and b" in text)


def test_what_would_have_been_found_is_meant_after_correction() -> None:
    runs = [*rated("a", 0.5, 0.6, 0.7), *rated("b", 0.55, 0.65, 0.75), *rated("c", 0.1, 0.2, 0.3)]
    [text] = [text for text in sentences(*runs) if text.startswith("No difference found between b and a")]
    found = float(text.split("about ")[1].split()[0])
    critical = stats.t.ppf(1 - 0.05 / 3 / 2, 4)
    assert stats.nct.sf(critical, 4, found / math.sqrt(2 * 0.01 / 3)) == pytest.approx(0.8, abs=0.02)


def test_a_win_rate_cannot_differ_by_more_than_one() -> None:
    [text] = sentences(*rated("a", 0.2, 0.9), *rated("b", 0.1, 0.8))
    assert text.endswith("; with 2 runs each hardly any difference would have been found.")


def test_the_sentences_where_there_is_no_test() -> None:
    assert sentences(*rated("a", 0.5), *rated("b", 0.4)) == [
        "b and a cannot be tested: one run each (difference −0.100)."
    ]
    assert sentences(*rated("a", 0.5, 0.5), *rated("b", 0.4, 0.4)) == [
        "b and a cannot be tested: the runs of either do not differ among themselves (difference −0.100)."
    ]
    assert sentences(*rated("a", 0.5, 0.5), *rated("b", 0.5, 0.5)) == [
        "No difference found between b and a: 0.000, p = 1.000."
    ]


def test_the_sentence_says_that_runs_failed() -> None:
    failed = [run("b", seed, status="failed", message="killed") for seed in (7, 8)]
    [text] = sentences(*rated("a", 0.5), *rated("b", 0.4), *failed)
    assert text.endswith(" Not counted, since they failed: 2 of 3 runs of b.")
