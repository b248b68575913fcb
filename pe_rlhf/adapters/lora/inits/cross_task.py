"""Cross-task: A and B span the directions that the gradients of two batches, or two tasks, share.

If only the adapter is trained, learning from sample 1 moves the loss of sample 2 by the kernel
k(x1, x2) = ⟨Bᵀ·G1, Bᵀ·G2⟩ + ⟨G1·Aᵀ, G2·Aᵀ⟩, the inner products of what B and A let through. (Where a weight's change
is written A·B instead of B·A, the letters are swapped.) So B maximises ⟨B·Bᵀ·G1, G2⟩ and A ⟨G1·Aᵀ·A, G2⟩ for
G1 and G2 of two batches: what helps one helps the other.

Without more the maximum under a norm is one direction r times over. The diversity term δ·log det(BᵀB) forbids that:

    maximise over B:  tr(Bᵀ·M·B)/‖M‖₂ + δ·log det(BᵀB)   with ‖B‖² = r,   M = (G1·G2ᵀ + G2·G1ᵀ)/2

whose solution is M's first r eigenvectors, the i-th with squared length δ/(μ − λᵢ/‖M‖₂), μ such that they add up to r.
δ → ∞, the default, makes them orthonormal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pe_rlhf.adapters.lora.init_registry import InitContext, SampledOptions, refuse_rank, register_init
from pe_rlhf.adapters.lora.inits.lora_ga import stable_factor

if TYPE_CHECKING:
    from torch import Tensor


class CrossTaskOptions(SampledOptions):
    diversity: float | None = Field(
        default=None,
        gt=0,
        description="δ of the term δ·log det, which keeps the r directions apart; default: no bound on δ, so the"
        " directions are orthonormal",
    )
    scale: Literal["stable", "unit"] = Field(default="stable", description="stable: m^¼/√gamma; unit: 1")
    gamma: float = Field(default=16.0, gt=0, description="γ of the scale `stable`; a larger γ means a smaller start")


@register_init("cross_task", options=CrossTaskOptions, needs="two gradients")
def cross_task(context: InitContext) -> tuple[Tensor, Tensor]:
    """A from G1ᵀ·G2, B from G1·G2ᵀ, both times LoRA-GA's m^¼/√γ (`scale: unit` leaves that out)."""
    options: CrossTaskOptions = context.options
    refuse_rank(context.rank, min(context.weight_OI.shape))
    first_OI, second_OI = (gradient / gradient.norm() for gradient in context.statistics.gradients_OI[:2])
    factor = stable_factor(context.weight_OI.shape[0], options.gamma) if options.scale == "stable" else 1.0
    A_RI = shared_directions(first_OI.T @ second_OI, context.rank, options.diversity).T
    return factor * A_RI, factor * shared_directions(first_OI @ second_OI.T, context.rank, options.diversity)


def shared_directions(product: Tensor, rank: int, diversity: float | None) -> Tensor:
    """The maximiser described above, one direction per column, for M the symmetric part of `product`."""
    import torch

    eigenvalues, vectors = torch.linalg.eigh((product + product.T) / 2)
    strongest = vectors[:, -rank:].flip(1)
    if diversity is None:
        return strongest
    strengths = (eigenvalues / eigenvalues.abs().max())[-rank:].flip(0).double()
    return strongest * squared_lengths(strengths.tolist(), diversity).sqrt().to(product)


def squared_lengths(strengths: list[float], diversity: float) -> Tensor:
    """δ/(μ − λᵢ), with μ > λ₁ such that they add up to their number: from where the derivative is zero."""
    import torch
    from scipy.optimize import root_scalar

    count, highest = len(strengths), max(strengths)

    def excess(distance: float) -> float:
        return sum(diversity / (distance + highest - strength) for strength in strengths) - count

    # At δ/r the first term by itself makes the sum, at δ every term is at most 1.
    distance = diversity
    if count > 1:
        distance = root_scalar(excess, bracket=[diversity / count, diversity], xtol=1e-15).root
    return torch.tensor([diversity / (distance + highest - strength) for strength in strengths])
