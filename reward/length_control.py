"""The length-controlled win rate of AlpacaEval 2: what would the judge say if both answers were equally long?

A logistic model explains the preferences, arXiv 2404.04475 eq. 2:

    logit p = φ · tanh((len_baseline − len_candidate) / sd) + ψ · difficulty + θ

and the length-controlled win rate is its mean prediction with the length term at zero. φ is what length itself buys
(negative where the judge likes long answers), ψ how the candidate takes to instructions that are hard for the baseline.

As in AlpacaEval, the fit is regularised twice. An L1 penalty is chosen by five-fold cross-validation. And where the
difficulty of the instructions is known, there is a prior on φ and ψ, which tells length from quality where a candidate
is always the longer one. AlpacaEval's prior are anchor rows: verdicts on the baseline itself, told to be verbose or
concise, with θ = 0. Here it is the normal approximation of their likelihood, which moves the result by some hundredths
of a point.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from reward.errors import InputError
from reward.winrate import checked_preferences, cluster_codes, normal_quantile, win_rate

Numbers = Sequence[float] | np.ndarray

# φ and ψ where AlpacaEval's anchor rows are likeliest, and the curvature of their negative log-likelihood there.
PRIOR_MODE = np.array([-1.8298, 0.7422])
PRIOR_CURVATURE = np.array([[11.402, 7.301], [7.301, 44.218]])
PENALTIES = np.logspace(-4, 4, 10)  # C, the weight of the likelihood against the L1 norm
FOLDS = 5


@dataclass(frozen=True)
class LengthControl:
    """A length-controlled win rate in [0, 1], its standard error and interval, and the coefficients φ, ψ and θ.

    standard_error: delta method with a cluster-robust covariance, for these prompts; NaN where there is one cluster.
    difficulty: None where the model has no such term.
    """

    win_rate: float
    ci_low: float
    ci_high: float
    standard_error: float
    length: float
    difficulty: float | None
    intercept: float


@dataclass(frozen=True)
class RegressionRows:
    """Rows of a weighted logistic regression: features _NK, targets _N in [0, 1], weights _N."""

    x_NK: np.ndarray
    y_N: np.ndarray
    weight_N: np.ndarray

    def take(self, keep_N: np.ndarray) -> RegressionRows:
        return RegressionRows(self.x_NK[keep_N], self.y_N[keep_N], self.weight_N[keep_N])

    def scaled(self, factor: float) -> RegressionRows:
        return RegressionRows(self.x_NK, self.y_N, factor * self.weight_N)

    def joined(self, other: RegressionRows) -> RegressionRows:
        pairs = ((self.x_NK, other.x_NK), (self.y_N, other.y_N), (self.weight_N, other.weight_N))
        return RegressionRows(*(np.concatenate(pair) for pair in pairs))

    def loss(self, coefficient_K: np.ndarray) -> float:
        """Weighted negative log-likelihood."""
        logit_N = self.x_NK @ coefficient_K
        return float(self.weight_N @ (np.logaddexp(0, logit_N) - self.y_N * logit_N))

    def gradient_and_hessian(self, coefficient_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p_N = sigmoid(self.x_NK @ coefficient_K)
        gradient_K = self.x_NK.T @ (self.weight_N * (p_N - self.y_N))
        return gradient_K, self.x_NK.T @ (self.x_NK * (self.weight_N * p_N * (1 - p_N))[:, None])


def length_controlled_win_rate(
    preferences: Numbers,
    len_candidate: Numbers,
    len_baseline: Numbers,
    difficulty: Numbers | None = None,
    clusters: Sequence[Hashable] | None = None,
    *,
    prior: bool | None = None,
    level: float = 0.95,
) -> LengthControl:
    """Fit the model of this module to one candidate's verdicts and predict at equal length.

    preferences: probability that the candidate wins, per prompt. NaN: not judged; such a prompt has no part in the fit,
    but in the spread of lengths and in the mean prediction, as in AlpacaEval.
    len_*: lengths in any one unit. difficulty: of each prompt, on AlpacaEval's scale. clusters: as in `win_rate`.
    prior: use AlpacaEval's prior; by default exactly where difficulties are given.
    Raises `InputError` for numbers that are missing, of different count or not finite. Where all answers are equally
    long there is nothing to control, and the result is the plain win rate.
    """
    preference_N = np.asarray(preferences, dtype=np.float64)
    judged_N = ~np.isnan(preference_N)
    y_N = checked_preferences(preference_N[judged_N])
    x_NK = _features(len_candidate, len_baseline, difficulty, len(preference_N))
    names = None if clusters is None else [c for c, kept in zip(clusters, judged_N, strict=True) if kept]
    if not x_NK[:, 0].any():
        plain = win_rate(y_N, names, level)
        return LengthControl(plain.win_rate, plain.ci_low, plain.ci_high, plain.standard_error, 0.0, None, math.nan)

    own = RegressionRows(x_NK[judged_N], y_N, np.ones(len(y_N)))
    uses_prior = difficulty is not None if prior is None else prior
    extra = _prior_rows(x_NK.shape[1]) if uses_prior else own.take(np.zeros(len(y_N), dtype=bool))
    both = own.joined(extra)
    coefficient_K = fit_l1(both, _cross_validated(own, extra))

    x_NK = x_NK.copy()
    x_NK[:, 0] = 0
    p_N = sigmoid(x_NK @ coefficient_K)
    mean = float(p_N.mean().clip(1e-12, 1 - 1e-12))
    slope_K = x_NK.T @ (p_N * (1 - p_N)) / len(p_N)
    error = _standard_error(own, both, coefficient_K, slope_K, names)
    # Symmetric on the scale of logits, so that the interval stays in [0, 1].
    half_width = normal_quantile(level) * error / (mean * (1 - mean))
    centre = math.log(mean / (1 - mean))
    low, high = sigmoid(np.array([centre - half_width, centre + half_width]))
    middle = float(coefficient_K[1]) if difficulty is not None else None
    if (y_N == y_N[0]).all():  # the clusters do not differ, so their spread says nothing of how sure this is
        plain = win_rate(y_N, names, level)
        low, high, error = plain.ci_low, plain.ci_high, plain.standard_error
    return LengthControl(
        mean, float(low), float(high), error, float(coefficient_K[0]), middle, float(coefficient_K[-1])
    )


def fit_l1(rows: RegressionRows, penalty: float, start_K: np.ndarray | None = None) -> np.ndarray:
    """Minimise penalty · loss + |b|₁ by proximal Newton steps: coordinate descent on the quadratic model each time."""
    b_K = np.zeros(rows.x_NK.shape[1]) if start_K is None else start_K
    value = penalty * rows.loss(b_K) + np.abs(b_K).sum()
    for _ in range(50):
        gradient_K, hessian_KK = (penalty * part for part in rows.gradient_and_hessian(b_K))
        step_K = _l1_quadratic(gradient_K, hessian_KK, b_K) - b_K
        size, before = 1.0, value
        while size > 1e-8:
            value = penalty * rows.loss(b_K + size * step_K) + np.abs(b_K + size * step_K).sum()
            if value <= before:
                break
            size /= 2
        else:
            return b_K
        b_K = b_K + size * step_K
        if before - value <= 1e-10 * max(1.0, abs(before)):
            break
    return b_K


def _l1_quadratic(gradient_K: np.ndarray, hessian_KK: np.ndarray, b_K: np.ndarray) -> np.ndarray:
    """Minimise g·(c − b) + (c − b)H(c − b)/2 + |c|₁ over c; a coordinate without curvature stays at 0."""
    # Two or three coordinates: plain numbers take a tenth of the time of numpy's.
    g, H, b = gradient_K.tolist(), hessian_KK.tolist(), b_K.tolist()
    c = list(b)
    for _ in range(200):
        moved = 0.0
        for k, row in enumerate(H):
            new = 0.0
            if row[k] > 0:
                slope = g[k] + sum(h * (c_j - b_j) for h, c_j, b_j in zip(row, c, b, strict=True)) - row[k] * c[k]
                new = -math.copysign(max(abs(slope) - 1, 0.0), slope) / row[k]
            moved, c[k] = max(moved, abs(new - c[k])), new
        if moved < 1e-10:
            break
    return np.array(c)


def _cross_validated(own: RegressionRows, prior: RegressionRows) -> float:
    """The penalty with the best held-out log-likelihood; the prior is in every fold, a share of its weight held out.

    AlpacaEval spreads its anchor rows over the folds, which is the same on average.
    """
    n = len(own.y_N)
    folds = min(FOLDS, n)
    if folds < 2:
        return 1.0
    fold_N = (n - 1 - np.arange(n)) % folds
    loss_C = np.zeros(len(PENALTIES))
    for fold in range(folds):
        train = own.take(fold_N != fold).joined(prior.scaled(1 - 1 / folds))
        held_out = own.take(fold_N == fold).joined(prior.scaled(1 / folds))
        b_K = None
        for i, penalty in enumerate(PENALTIES):
            b_K = fit_l1(train, penalty, b_K)
            loss_C[i] += held_out.loss(b_K)
    return float(PENALTIES[loss_C.argmin()])


def _standard_error(
    own: RegressionRows, both: RegressionRows, b_K: np.ndarray, slope_K: np.ndarray, clusters: Sequence[Hashable] | None
) -> float:
    """Delta method: the clusters' scores are the spread, the curvature of own rows and prior says what it moves."""
    code_N = cluster_codes(clusters, len(own.y_N))
    groups = int(code_N.max()) + 1
    if groups < 2:
        return math.nan
    score_NK = own.x_NK * (sigmoid(own.x_NK @ b_K) - own.y_N)[:, None]
    score_GK = np.zeros((groups, len(b_K)))
    np.add.at(score_GK, code_N, score_NK)
    score_GK -= score_GK.mean(axis=0)  # with a prior and a penalty they do not sum to zero
    _, hessian_KK = both.gradient_and_hessian(b_K)
    moved_K = np.linalg.pinv(hessian_KK, hermitian=True) @ slope_K
    return math.sqrt(groups / (groups - 1) * float(np.square(score_GK @ moved_K).sum()))


def _features(len_candidate: Numbers, len_baseline: Numbers, difficulty: Numbers | None, n: int) -> np.ndarray:
    columns = {"len_candidate": len_candidate, "len_baseline": len_baseline, "difficulty": difficulty}
    array = {name: np.asarray(c, dtype=np.float64) for name, c in columns.items() if c is not None}
    for name, values in array.items():
        if len(values) != n:
            raise InputError(f"there are {n} preferences but {len(values)} values of {name}", kind="invalid", key=name)
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            raise InputError(f"{name} {row} is not a finite number", kind="not_finite", key=name, row=row + 1)
    delta_N = array["len_baseline"] - array["len_candidate"]
    spread = float(delta_N.std(ddof=1)) if n > 1 else 0.0
    length_N = np.tanh(delta_N / spread) if spread > 0 else np.sign(delta_N)
    middle = [array["difficulty"]] if "difficulty" in array else []
    return np.stack([length_N, *middle, np.ones(n)], axis=1)


def _prior_rows(features: int) -> RegressionRows:
    """Rows whose likelihood has the prior's mode and curvature: one along each axis of the curvature.

    A model without difficulty has the prior of φ at ψ = 0, and the intercept has none.
    """
    weight_2, axis_22 = np.linalg.eigh(PRIOR_CURVATURE)
    x_22 = axis_22.T
    p_2 = sigmoid(x_22 @ PRIOR_MODE)
    columns = [x_22[:, 0], *([x_22[:, 1]] if features == 3 else []), np.zeros(2)]
    return RegressionRows(np.stack(columns, axis=1), p_2, weight_2 / (p_2 * (1 - p_2)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
