"""How the scores of an ensemble become one, and how far its members are apart. Shapes: M members, B responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


def mean(scores_MB: Tensor, k: float) -> Tensor:
    """The mean _B; k is not used."""
    return scores_MB.mean(dim=0)


def mean_minus_std(scores_MB: Tensor, k: float) -> Tensor:
    """mean − k·std _B, with the population's deviation over members."""
    return scores_MB.mean(dim=0) - k * scores_MB.std(dim=0, correction=0)


def worst(scores_MB: Tensor, k: float) -> Tensor:
    """The least _B: worst-case optimisation (arXiv 2310.02743, eq. 3); k is not used."""
    return scores_MB.min(dim=0).values


def uwo(scores_MB: Tensor, k: float) -> Tensor:
    """mean − k·variance _B: uncertainty-weighted optimisation (arXiv 2310.02743, eq. 4, where k is λ)."""
    return scores_MB.mean(dim=0) - k * scores_MB.var(dim=0, correction=0)


COMBINE: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    function.__name__: function for function in (mean, mean_minus_std, worst, uwo)
}


def disagreement(scores_MB: Tensor) -> float:
    """The standard deviation over members, mean over responses."""
    return scores_MB.std(dim=0, correction=0).mean().item()
