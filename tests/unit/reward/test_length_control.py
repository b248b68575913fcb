"""The length-controlled win rate: the published numbers, scipy's optimum, planted biases, coverage."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from reward.errors import Kind
from reward.length_control import RegressionRows, fit_l1, length_controlled_win_rate, sigmoid
from reward.winrate import win_rate
from tests.failures import raises


@pytest.mark.shared
def test_alpaca_eval_leaderboard_within_two_tenths_of_a_point(shared_data: Path) -> None:
    folder = shared_data / "alpaca_eval"
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    with gzip.open(folder / "preferences.csv.gz", "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            rows[row["model"]].append(row)
    with (folder / "instruction_difficulty_recovered.csv").open(encoding="utf-8") as lines:
        difficulty = [float(row["instruction_difficulty"]) for row in csv.DictReader(lines)]
    with (folder / "leaderboard.csv").open(encoding="utf-8") as lines:
        published = {row[""]: float(row["length_controlled_winrate"]) for row in csv.DictReader(lines)}
    assert len(rows) == 15
    for model, verdicts in rows.items():
        result = length_controlled_win_rate(
            [float(v["preference"]) - 1 for v in verdicts],
            [float(v["len_output_2"]) for v in verdicts],
            [float(v["len_output_1"]) for v in verdicts],
            [difficulty[int(v["position"])] for v in verdicts],
        )
        assert 100 * result.win_rate == pytest.approx(published[model], abs=0.2), model


@pytest.mark.parametrize("penalty", [1e-3, 0.05, 1.0, 1e3])
def test_the_l1_fit_is_the_optimum_that_scipy_finds(penalty: float) -> None:
    """scipy has no L1: coefficients are split into their positive and negative parts, which makes it smooth."""
    rng = np.random.default_rng(0)
    x_NK = np.column_stack([rng.normal(size=(200, 2)), np.ones(200)])
    y_N, weight_N = rng.random(200), rng.random(200)

    def objective(parts: np.ndarray) -> float:
        logit_N = x_NK @ (parts[:3] - parts[3:])
        return penalty * float(weight_N @ (np.log1p(np.exp(logit_N)) - y_N * logit_N)) + float(parts.sum())

    best = minimize(objective, np.zeros(6), bounds=[(0, None)] * 6, method="L-BFGS-B", options={"ftol": 1e-15})
    found_K = fit_l1(RegressionRows(x_NK, y_N, weight_N), penalty)
    assert found_K == pytest.approx(best.x[:3] - best.x[3:], abs=2e-4)
    assert found_K.any() == (penalty > 0.1)


def simulated(
    rng: np.random.Generator, n: int, length: float, quality: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wins and losses whose logit is −length · tanh(Δ) + quality, with candidates that are longer on average."""
    len_candidate, len_baseline = rng.integers(50, 400, n), rng.integers(50, 300, n)
    delta_N = len_baseline - len_candidate
    p_N = 1 / (1 + np.exp(length * np.tanh(delta_N / delta_N.std(ddof=1)) - quality))
    return rng.binomial(1, p_N).astype(float), len_candidate, len_baseline


def test_a_planted_length_bias_is_taken_out() -> None:
    preferences, len_candidate, len_baseline = simulated(np.random.default_rng(0), 4000, length=3.0, quality=0.0)
    assert win_rate(preferences).win_rate > 0.6
    result = length_controlled_win_rate(preferences, len_candidate, len_baseline)
    assert result.win_rate == pytest.approx(0.5, abs=0.03)
    assert result.length == pytest.approx(-3.0, abs=0.35)


def test_what_difficulty_and_length_are_worth_is_reported() -> None:
    """Wins whose logit is 1.5 · difficulty + 0.25, at lengths that say nothing; without difficulties there is no ψ."""
    rng = np.random.default_rng(5)
    difficulty, mine, theirs = rng.normal(size=3000), rng.integers(50, 300, 3000), rng.integers(50, 300, 3000)
    preferences = rng.binomial(1, sigmoid(1.5 * difficulty + 0.25)).astype(float)
    found = length_controlled_win_rate(preferences, mine, theirs, difficulty, prior=False)
    assert found.difficulty == pytest.approx(1.5, abs=0.15)
    assert found.intercept == pytest.approx(0.25, abs=0.1)
    assert found.length == pytest.approx(0, abs=0.15)
    assert length_controlled_win_rate(preferences[:50], mine[:50], theirs[:50]).difficulty is None
    # The prior is on by default where difficulties are given, and draws φ to where AlpacaEval's judge has it.
    few = (preferences[:50], mine[:50], theirs[:50], difficulty[:50])
    assert length_controlled_win_rate(*few) == length_controlled_win_rate(*few, prior=True)
    assert length_controlled_win_rate(*few).length < length_controlled_win_rate(*few, prior=False).length


def test_a_judge_of_length_alone_says_nothing_about_quality() -> None:
    rng = np.random.default_rng(1)
    len_candidate, len_baseline = rng.integers(50, 400, 800), rng.integers(50, 300, 800)
    preferences = (len_candidate > len_baseline) + 0.5 * (len_candidate == len_baseline)
    result = length_controlled_win_rate(preferences, len_candidate, len_baseline)
    assert 0.4 < result.win_rate < 0.6
    assert 0 <= result.ci_low <= result.win_rate <= result.ci_high <= 1


def test_intervals_cover_95_percent() -> None:
    """The coverage of 500 intervals has a standard error of 1 point; the bounds are 95 % ± 2."""
    rng = np.random.default_rng(2)
    truth = float(sigmoid(np.array(0.4)))
    results = [length_controlled_win_rate(*simulated(rng, 300, 1.5, 0.4)) for _ in range(500)]
    covered = sum(r.ci_low <= truth <= r.ci_high for r in results)
    assert 0.93 <= covered / 500 <= 0.97
    errors = np.array([r.win_rate for r in results])
    assert np.mean([r.standard_error for r in results]) == pytest.approx(errors.std(), rel=0.1)


def test_repeated_comparisons_of_a_prompt_are_not_independent() -> None:
    preferences, len_candidate, len_baseline = simulated(np.random.default_rng(3), 200, 1.0, 0.5)
    single = length_controlled_win_rate(preferences, len_candidate, len_baseline)
    fourfold = np.tile(preferences, 4), np.tile(len_candidate, 4), np.tile(len_baseline, 4)
    clustered = length_controlled_win_rate(*fourfold, clusters=list(range(200)) * 4)
    assert clustered.standard_error == pytest.approx(single.standard_error, rel=0.05)


@pytest.mark.parametrize("preference", [0.0, 0.5, 1.0])
def test_verdicts_that_are_all_the_same_have_the_plain_interval(preference: float) -> None:
    found = length_controlled_win_rate([preference] * 6, [3, 5, 2, 8, 4, 4], [4, 2, 2, 6, 4, 3])
    plain = win_rate([preference] * 6)
    assert (found.ci_low, found.ci_high) == (plain.ci_low, plain.ci_high)
    assert found.ci_high - found.ci_low > 0.3


def test_equal_lengths_leave_the_plain_win_rate() -> None:
    preferences = [1.0, 1.0, 0.0, 0.5]
    result = length_controlled_win_rate(preferences, [10] * 4, [10] * 4, [0.1, 0.2, -0.3, 0.4])
    assert (result.win_rate, result.length) == (0.625, 0.0)
    assert length_controlled_win_rate([0.5], [7], [7]).win_rate == 0.5


def test_a_prompt_that_was_not_judged_has_no_part_in_the_fit() -> None:
    rng = np.random.default_rng(4)
    preferences, len_candidate, len_baseline = simulated(rng, 100, 1.0, 0.5)
    preferences[::7] = np.nan
    result = length_controlled_win_rate(preferences, len_candidate, len_baseline)
    assert 0 < result.ci_low < result.win_rate < result.ci_high < 1


@pytest.mark.parametrize(
    ("arguments", "kind", "key", "row"),
    [
        (([0.5, 1.0], [1], [1, 2]), "invalid", "len_candidate", None),
        (([0.5, 1.0], [1, 2], [1, float("nan")]), "not_finite", "len_baseline", 2),
        (([0.5, 1.2], [1, 2], [2, 2]), "invalid", "preference", 2),
        (([float("nan")], [1], [2]), "empty", "preference", None),
    ],
)
def test_refusals(
    arguments: tuple[list[float], list[float], list[float]], kind: Kind, key: str, row: int | None
) -> None:
    with raises(kind, key=key, row=row):
        length_controlled_win_rate(*arguments)
