"""Penalties against forgetting, and how far two tasks' changes get in each other's way.

A is _RI, B is _OR; what comes from earlier tasks is P ranks wide.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Named = Mapping[str, Tensor]


def orthogonality(earlier_PI: Tensor, own_RI: Tensor) -> Tensor:
    """Σ_i ‖A_i A_tᵀ‖² over the rows of all earlier A (O-LoRA, arXiv 2310.14152), or of all earlier Bᵀ."""
    return (earlier_PI @ own_RI.T).square().sum()


def sparsity(own_RI: Tensor, own_OR: Tensor) -> Tensor:
    """‖B A‖₁ (N-LoRA, arXiv 2410.10179). Holds one dense matrix of the layer."""
    return (own_OR @ own_RI).abs().sum()


def elastic(parameters: Named, fisher: Named, centre: Named) -> Tensor:
    """½ Σ F_j (θ_j − θ*_j)² (EWC, arXiv 1612.00796, eq. 3)."""
    terms = [(fisher[name] * (p - centre[name]).square()).sum() for name, p in parameters.items() if name in fisher]
    return 0.5 * torch.stack(terms).sum()


def joined_quadratics(
    fisher: Named, centre: Named, own_fisher: Named, own: Named, *, per_task: bool
) -> tuple[Named, Named]:
    """Fisher and centre of the earlier tasks and of one more, as one pair.

    Per task the quadratics around several centres are one around their mean, weighted by F, and a constant; so the
    gradient is that of their sum. Otherwise all are moved to the last weights.
    """
    total = {name: fisher[name] + f if name in fisher else f for name, f in own_fisher.items()}
    if not per_task:
        return total, own
    moved = {
        name: torch.where(f > 0, (total[name] - own_fisher[name]) * centre.get(name, own[name]), 0.0)
        + own_fisher[name] * own[name]
        for name, f in total.items()
    }
    return total, {name: torch.where(f > 0, moved[name] / f, own[name]) for name, f in total.items()}


def collision_rate(first_OI: Tensor, second_OI: Tensor, size: float) -> float:
    """The share of entries that both changes have, each larger than `size`."""
    return ((first_OI.abs() > size) & (second_OI.abs() > size)).float().mean().item()
