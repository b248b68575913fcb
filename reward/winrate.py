"""Win rates of a candidate against a baseline, and how far to trust them."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from reward.errors import InputError

PART = 2_000_000  # numbers that a bootstrap draws at a time: 16 MB


@dataclass(frozen=True)
class WinRate:
    """A win rate in [0, 1] with its interval.

    standard_error: of the win rate, cluster-robust; NaN where there is one cluster only (or one comparison).
    n: number of comparisons, of which `wins` are above 0.5, `ties` at 0.5 and `losses` below.
    """

    win_rate: float
    ci_low: float
    ci_high: float
    standard_error: float
    n: int
    wins: int
    ties: int
    losses: int


def win_rate(
    preferences: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None, level: float = 0.95
) -> WinRate:
    """Mean preference for the candidate, with a confidence interval of the given level.

    preferences: for each comparison the probability that the candidate wins (0.5: a tie).
    clusters: for each comparison what it shares with others, e.g. its prompt, where one prompt has several samples or
    is judged in both orders; by default each comparison is a cluster of its own.
    Raises `InputError` where there are no preferences, one is not in [0, 1], or the lengths differ.

    The interval is Wilson's for the mean p and an effective number of comparisons n_eff = p(1 − p) / V, where V is the
    variance of the mean, estimated in two ways:

    - V̂ = Σ_g (Σ_{i∈g} (p_i − p))² / n², cluster-robust (Liang and Zeger 1986), g over the G clusters. It sees that
      comparisons of one prompt go together, and that ties and soft preferences vary less than wins and losses.
    - V_max = p(1 − p)·Σ_g n_g²/n², the largest there can be: no ties, and each cluster decided as one.

    V̂ is not enough in small samples (three ties give 0), so V = (G·V̂ + z²·V_max) / (G + z²): z² is the
    number of observations that Wilson's interval adds, too. Where p is 0 or 1, V̂ says nothing and V = V_max, so that
    n_eff is the number of clusters (Kish's number where their sizes differ).

    What follows: wins and losses without clusters have V̂ = V_max and n_eff = n, Wilson's interval as in the textbook;
    clusters of one size have the interval of their means taken as single comparisons.
    """
    value_N = checked_preferences(preferences)
    cluster_N = cluster_codes(clusters, len(value_N))
    n, mean = len(value_N), float(value_N.mean())
    size_G = np.bincount(cluster_N)
    deviation_G = np.bincount(cluster_N, weights=value_N - mean)
    variance = float(np.square(deviation_G).sum()) / n**2
    concentration = float(np.square(size_G).sum()) / n**2  # 1/n without clusters, 1/G with clusters of one size

    effective_n = _effective_n(mean, variance, concentration, len(size_G), normal_quantile(level))
    low, high = wilson_interval(mean, effective_n, level)
    correction = len(size_G) / (len(size_G) - 1) if len(size_G) > 1 else math.nan
    return WinRate(
        win_rate=mean,
        ci_low=low,
        ci_high=high,
        standard_error=math.sqrt(correction * variance),
        n=n,
        wins=int((value_N > 0.5).sum()),
        ties=int((value_N == 0.5).sum()),
        losses=int((value_N < 0.5).sum()),
    )


def wilson_interval(share: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share observed in n trials, n not necessarily whole (Wilson 1927)."""
    z = normal_quantile(level)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # In exact arithmetic it lies in [0, 1] and holds the share; rounding must not change that.
    return min(max(0.0, centre - half_width), share), max(min(1.0, centre + half_width), share)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a mean: whole clusters are drawn with replacement (Efron and Tibshirani 1993, ch. 13).

    The same seed gives the same interval. For a paired interval give the differences of two policies on each prompt.
    """
    value_N = np.asarray(values, dtype=np.float64)
    code_N = cluster_codes(clusters, len(value_N))
    size_G, sum_G = np.bincount(code_N), np.bincount(code_N, weights=value_N)
    rng = np.random.default_rng(seed)
    # A part at a time: all of them are gigabytes where there are many clusters. The parts do not change what is drawn.
    part = min(500, max(1, PART // len(size_G)))
    drawn = (
        rng.integers(0, len(size_G), size=(min(part, resamples - i), len(size_G))) for i in range(0, resamples, part)
    )
    mean_R = np.concatenate([sum_G[index].sum(axis=1) / size_G[index].sum(axis=1) for index in drawn])
    tail = (1 - _checked_level(level)) / 2
    low, high = np.quantile(mean_R, [tail, 1 - tail])
    return float(low), float(high)


def sign_test(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of the exact sign test that positive and negative are equally likely; zeros are left out.

    For preferences, give their differences from 1/2. Independent comparisons only: take the mean of each cluster first.
    """
    array = np.asarray(differences, dtype=np.float64)
    positive, negative = int((array > 0).sum()), int((array < 0).sum())
    if not positive + negative:
        return 1.0
    from scipy.stats import binomtest  # it takes a second to import

    return float(binomtest(positive, positive + negative).pvalue)


def _effective_n(mean: float, variance: float, concentration: float, n_clusters: int, z: float) -> float:
    bernoulli = mean * (1 - mean)
    if bernoulli == 0:
        return 1 / concentration
    blended = (n_clusters * variance + z**2 * bernoulli * concentration) / (n_clusters + z**2)
    return bernoulli / blended


def normal_quantile(level: float) -> float:
    """How many standard errors an interval of that level reaches to each side."""
    return NormalDist().inv_cdf((1 + _checked_level(level)) / 2)


def _checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise InputError(f"the level of an interval is {level}, not between 0 and 1", kind="invalid", key="level")
    return level


def checked_preferences(preferences: Sequence[float] | np.ndarray) -> np.ndarray:
    """As an array. Raises `InputError` where there are none or one is no probability."""
    value_N = np.asarray(preferences, dtype=np.float64)
    if value_N.size == 0:
        raise InputError("there are no preferences to take a win rate of", kind="empty", key="preference")
    bad_N = ~((value_N >= 0) & (value_N <= 1))  # also true for NaN
    if bad_N.any():
        index = int(np.argmax(bad_N))
        raise InputError(
            f"preference {index} is {value_N[index]}, not a probability in [0, 1]",
            kind="invalid",
            key="preference",
            row=index + 1,
        )
    return value_N


def cluster_codes(clusters: Sequence[Hashable] | None, n: int) -> np.ndarray:
    """Number the clusters 0, 1, … in order of appearance; without clusters every comparison is one of its own."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise InputError(f"there are {n} preferences but {len(clusters)} cluster names", kind="invalid", key="clusters")
    code_of: dict[Hashable, int] = {}
    return np.array([code_of.setdefault(cluster, len(code_of)) for cluster in clusters])
