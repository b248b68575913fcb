"""Bradley–Terry: one strength per policy from comparisons between any of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components

from reward.errors import InputError
from reward.winrate import cluster_codes, normal_quantile


@dataclass(frozen=True)
class Strength:
    """A policy's strength in nats against the mean of all: exp of a difference is the odds to win. n: comparisons."""

    policy: str
    strength: float
    ci_low: float
    ci_high: float
    n: int


def bradley_terry(
    comparisons: Sequence[tuple[str, str, float]], clusters: Sequence[Hashable] | None = None, level: float = 0.95
) -> list[Strength]:
    """Rank policies, the strongest first: P(a beats b) = σ(s_a − s_b), Bradley and Terry 1952; ties count half.

    comparisons: (a, b, probability that a wins). clusters: as in `win_rate`; the intervals are cluster-robust.
    Each pair of policies that met also counts as having drawn once, so that one that has always won has a finite
    strength. Raises `InputError` where the comparisons fall into groups that never met.
    """
    names = sorted({name for a, b, _ in comparisons for name in (a, b)})
    if len(names) < 2:
        raise InputError("a ranking needs comparisons between at least two policies")
    index = {name: i for i, name in enumerate(names)}
    first_N = np.array([index[a] for a, _, _ in comparisons])
    second_N = np.array([index[b] for _, b, _ in comparisons])
    met = sorted({(min(i, j), max(i, j)) for i, j in zip(first_N.tolist(), second_N.tolist(), strict=True)})
    adjacency = np.zeros((len(names), len(names)))
    adjacency[tuple(np.array(met).T)] = 1
    if (groups := connected_components(adjacency, directed=False)[0]) > 1:
        raise InputError(f"the comparisons fall into {groups} groups that never met: there is no common ranking")

    x_NP = np.zeros((len(comparisons) + len(met), len(names)))
    a_N, b_N = (np.concatenate([own, [pair[side] for pair in met]]) for side, own in enumerate((first_N, second_N)))
    x_NP[np.arange(len(a_N)), a_N] += 1
    x_NP[np.arange(len(b_N)), b_N] -= 1
    y_N = np.concatenate([[p for _, _, p in comparisons], np.full(len(met), 0.5)])
    strength_P, inverse_PP = _newton(x_NP, y_N)

    code_N = cluster_codes(clusters, len(comparisons))
    code_N = np.concatenate([code_N, code_N.max() + 1 + np.arange(len(met))])
    score_GP = np.zeros((int(code_N.max()) + 1, len(names)))
    np.add.at(score_GP, code_N, x_NP * (y_N - _sigmoid(x_NP @ strength_P))[:, None])
    moved_GP = score_GP @ inverse_PP
    correction = len(score_GP) / max(len(score_GP) - 1, 1)
    half_P = normal_quantile(level) * np.sqrt(correction * np.square(moved_GP).sum(axis=0))
    counts = np.bincount(np.concatenate([first_N, second_N]), minlength=len(names))
    rows = [
        Strength(name, float(s), float(s - h), float(s + h), int(n))
        for name, s, h, n in zip(names, strength_P, half_P, counts, strict=True)
    ]
    return sorted(rows, key=lambda row: -row.strength)


def _newton(x_NP: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths of mean 0 that maximise the likelihood, and the pseudo-inverse of its curvature there."""
    strength_P = np.zeros(x_NP.shape[1])
    inverse_PP = np.zeros((len(strength_P), len(strength_P)))
    for _ in range(100):
        p_N = _sigmoid(x_NP @ strength_P)
        inverse_PP = np.linalg.pinv(x_NP.T @ (x_NP * (p_N * (1 - p_N))[:, None]), hermitian=True)
        step_P = inverse_PP @ (x_NP.T @ (y_N - p_N))
        # A full step can overshoot where almost all comparisons went one way.
        step_P *= min(1.0, 2.0 / max(float(np.abs(step_P).max()), math.ulp(1.0)))
        strength_P = strength_P + step_P
        if np.abs(step_P).max() < 1e-10:
            break
    return strength_P - strength_P.mean(), inverse_PP


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
