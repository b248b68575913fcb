"""KL estimators and the adaptive KL coefficient."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, anchor_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Per-token estimates of KL(policy ‖ anchor) in nats, from tokens that the policy sampled.

    With d = log π − log π_anchor: k1 = d (unbiased), k2 = d²/2 (biased, low variance), k3 = e^−d − 1 + d (unbiased,
    never negative). Schulman, "Approximating KL Divergence", 2020.
    """
    d = logprobs - anchor_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d**2
    return (-d).expm1() + d


def best_of_kl(n: int) -> float:
    """KL in nats of the best of n samples from the distribution of one: log n − (n − 1)/n.

    It is the most that it can be, and what it is where no two responses are the same (arXiv 2401.01879, theorem 1).
    """
    return math.log(n) - (n - 1) / n


def adapt_beta(
    beta: float, kl: float, target: float, horizon: float, episodes: int, *, highest: float = math.inf
) -> float:
    """The next KL coefficient of the adaptive controller (arXiv 1909.08593, equation 4).

    β ← β · (1 + clip(KL/target − 1, −0.2, 0.2) · episodes / horizon), at most `highest`. A batch of
    more episodes than the horizon counts as the horizon: β would change its sign.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return min(highest, beta * (1 + error * min(1.0, episodes / horizon)))
