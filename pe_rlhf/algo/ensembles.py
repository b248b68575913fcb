"""How the scores of an ensemble become one, how far its members are apart, and what keeps them apart.

Shapes: M members, B responses; R·I is a factor of a low-rank adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

SMALLEST = 1e-6  # of the largest singular value: what is below it is rounding


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


def diversity(factors_LMRI: Sequence[Sequence[Tensor]]) -> Tensor:
    """How many directions the members' factors A span: mean over layers of ‖A‖_* / ‖A‖_F, a scalar.

    A, _(M·R)I, has the factors of a layer's M members below one another; ‖A‖_* is the sum of its singular values.
    The quotient is √R for members that are alike with orthogonal rows of one length, and √(M·R), its largest value,
    where all rows of all members are. A layer whose factors are all zero counts as 0. The loss gets −λ times this
    (UP-RLHF, arXiv 2401.00243, eq. 12, which prints the sum without its signs).
    """
    # The squared singular values are the eigenvalues of A·Aᵀ, which has one size in all layers: one batched problem,
    # small whatever the model's width. In fp64 the square costs no digit that fp32 factors have.
    stacks = [torch.cat(list(members)).double() for members in factors_LMRI]
    squares_LK = torch.linalg.eigvalsh(torch.stack([A @ A.T for A in stacks]))
    # The least subgradient: directions that no member has, of which there are many, are not chosen by rounding.
    is_there_LK = squares_LK > SMALLEST**2 * squares_LK[:, -1:]
    nuclear_L = torch.where(is_there_LK, squares_LK, 1.0).sqrt().mul(is_there_LK).sum(dim=1)
    frobenius_L = torch.where(is_there_LK, squares_LK, 0.0).sum(dim=1).clamp_min(1e-30).sqrt()
    return (nuclear_L / frobenius_L).mean()
