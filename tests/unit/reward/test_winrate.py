"""Win rates: textbook intervals, coverage by simulation, and the published numbers of a leaderboard."""

import csv
import gzip
import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest, sem

from reward.errors import Kind
from reward.winrate import WinRate, win_rate
from tests.failures import raises
from tests.paths import SHARED_DATA

ALPACA_FOLDER = SHARED_DATA / "alpaca_eval"


@pytest.mark.parametrize(("wins", "n"), [(0, 7), (7, 7), (1, 1), (3, 10), (130, 200)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wins_and_losses_have_the_textbook_wilson_interval(wins: int, n: int, level: float) -> None:
    result = win_rate([1.0] * wins + [0.0] * (n - wins), level=level)
    expected = binomtest(wins, n).proportion_ci(confidence_level=level, method="wilson")
    assert (result.ci_low, result.ci_high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (result.win_rate, result.n, result.wins, result.ties, result.losses) == (wins / n, n, wins, 0, n - wins)


def test_counts_and_standard_error_with_soft_preferences() -> None:
    preferences = [1.0, 0.5, 0.5, 0.2, 0.51, 0.0]
    result = win_rate(preferences)
    assert (result.n, result.wins, result.ties, result.losses) == (6, 2, 2, 2)
    assert result.win_rate == pytest.approx(2.71 / 6)
    assert result.standard_error == pytest.approx(sem(preferences))


def test_cluster_robust_standard_error_against_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 12, size=50).tolist()
    preferences = rng.random(50).tolist()
    mean = sum(preferences) / 50
    total_of: dict[int, float] = defaultdict(float)
    for preference, cluster in zip(preferences, clusters, strict=True):
        total_of[cluster] += preference - mean
    expected = math.sqrt(12 / 11 * sum(total**2 for total in total_of.values())) / 50
    assert len(total_of) == 12
    assert win_rate(preferences, clusters).standard_error == pytest.approx(expected)


def test_one_cluster_has_no_standard_error_and_an_interval_as_wide_as_one_comparisons() -> None:
    result = win_rate([1.0, 1.0, 1.0], ["a", "a", "a"])
    single = binomtest(1, 1).proportion_ci(method="wilson")
    assert math.isnan(result.standard_error)
    assert (result.ci_low, result.ci_high) == pytest.approx((single.low, single.high), abs=1e-12)


def interval(result: WinRate) -> tuple[float, float]:
    return result.ci_low, result.ci_high


def test_clusters_of_one_change_nothing() -> None:
    preferences = [1.0, 0.5, 0.0, 1.0, 0.3]
    assert win_rate(preferences, ["v", 1, ("w", 2), None, 1.5]) == win_rate(preferences)


def test_repeating_every_comparison_changes_no_interval() -> None:
    preferences = [1.0, 0.0, 1.0, 1.0, 0.5, 0.0]
    repeated = win_rate(preferences * 10, list(range(6)) * 10)
    assert interval(repeated) == pytest.approx(interval(win_rate(preferences)))
    all_won = win_rate([1.0] * 60, list(range(6)) * 10)
    expected = binomtest(6, 6).proportion_ci(method="wilson")
    assert interval(all_won) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_equal_clusters_are_worth_their_means() -> None:
    rng = np.random.default_rng(0)
    preference_GM = rng.integers(0, 3, size=(9, 4)) / 2
    clustered = win_rate(preference_GM.ravel().tolist(), np.repeat(np.arange(9), 4).tolist())
    means = win_rate(preference_GM.mean(axis=1).tolist())
    assert interval(clustered) == pytest.approx(interval(means))
    assert clustered.standard_error == pytest.approx(means.standard_error)


def test_ties_alone_are_no_certainty() -> None:
    # Worked by hand: V̂ = 0, so V = z²·(1/4)/n / (n + z²); n = 4, z² = 3.841459: n_eff = (1/4)/V = 4·7.841459/3.841459.
    low, high = interval(win_rate([0.5] * 4))
    n_eff = 8.165086
    half_width = math.sqrt(3.841459 * (0.25 / n_eff + 3.841459 / (4 * n_eff**2))) / (1 + 3.841459 / n_eff)
    assert (low, high) == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=1e-6)
    assert 0.25 < half_width < 0.3


def test_interval_is_symmetric_in_candidate_and_baseline() -> None:
    preferences, clusters = [1.0, 0.5, 0.9, 1.0, 0.0], [0, 0, 1, 2, 2]
    result, mirrored = win_rate(preferences, clusters), win_rate([1 - p for p in preferences], clusters)
    assert (1 - mirrored.ci_high, 1 - mirrored.ci_low) == pytest.approx(interval(result))


# --- coverage ------------------------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray | None]]


def draw_binary(rng: np.random.Generator) -> tuple[np.ndarray, None]:
    return rng.binomial(1, 0.6, size=100).astype(float), None


def draw_with_ties(rng: np.random.Generator) -> tuple[np.ndarray, None]:
    return rng.choice([0.0, 0.5, 1.0], size=100, p=[0.15, 0.5, 0.35]), None


def draw_clustered(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """60 prompts, each with its own win rate, of 1 to 7 samples each."""
    sizes_G = rng.integers(1, 8, size=60)
    rate_N = np.repeat(rng.beta(0.6, 0.4, size=60), sizes_G)
    return rng.binomial(1, rate_N).astype(float), np.repeat(np.arange(60), sizes_G)


@pytest.mark.parametrize("draw", [draw_binary, draw_with_ties, draw_clustered])
def test_95_percent_intervals_cover_95_percent(draw: Draw) -> None:
    """The true win rate is 0.6 in every design.

    The coverage of 4,000 intervals has a standard error of 0.35 points. Counting ties as decided comparisons would
    give above 99 %, taking the samples of one prompt for independent about 75 %.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(4000):
        preferences, clusters = draw(rng)
        result = win_rate(preferences.tolist(), None if clusters is None else clusters.tolist())
        covered += result.ci_low <= 0.6 <= result.ci_high
    assert 0.94 <= covered / 4000 <= 0.965


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preferences", "clusters", "kind", "key", "row"),
    [
        ([], None, "empty", "preference", None),
        ([0.5, float("nan")], None, "invalid", "preference", 2),
        ([1.2], None, "invalid", "preference", 1),
        ([0.5, 0.5, -0.1], None, "invalid", "preference", 3),
        ([0.5, 1.0], ["a"], "invalid", "clusters", None),
    ],
)
def test_refusals(preferences: list[float], clusters: list[str] | None, kind: Kind, key: str, row: int | None) -> None:
    with raises(kind, key=key, row=row):
        win_rate(preferences, clusters)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_that_is_no_probability_is_refused(level: float) -> None:
    with raises("invalid", key="level"):
        win_rate([1.0], level=level)


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_alpaca_eval_leaderboard() -> None:
    """Win rate, standard error and counts of 15 models are the published ones, from the judge's own verdicts."""
    if not ALPACA_FOLDER.exists():
        pytest.skip("needs the AlpacaEval verdicts in ../shared/data, which are not here")
    preferences_of: dict[str, list[float]] = defaultdict(list)
    with gzip.open(ALPACA_FOLDER / "preferences.csv.gz", "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            preferences_of[row["model"]].append(float(row["preference"]) - 1)  # 1: baseline, 2: candidate
    with (ALPACA_FOLDER / "leaderboard.csv").open(encoding="utf-8") as lines:
        published = {row[""]: row for row in csv.DictReader(lines)}

    assert len(preferences_of) == 15
    for model, preferences in preferences_of.items():
        result, expected = win_rate(preferences), published[model]
        assert 100 * result.win_rate == pytest.approx(float(expected["win_rate"]), abs=1e-6)
        assert 100 * result.standard_error == pytest.approx(float(expected["standard_error"]), abs=1e-6)
        assert result.wins == int(expected["n_wins"])
        assert result.ties == int(expected["n_draws"])
        assert result.losses == int(expected["n_wins_base"])
        assert result.n == int(expected["n_total"])
