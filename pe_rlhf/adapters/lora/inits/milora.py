"""MiLoRA (arXiv 2406.09044): A and B hold the r minor singular directions of W, s·B·A = U_−r S_−r V_−rᵀ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pe_rlhf.adapters.lora.init_registry import InitContext, register_init

if TYPE_CHECKING:
    from torch import Tensor


@register_init("milora")
def milora(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = sqrt(S[-r:]/s)·Vh[-r:], B = U[:, -r:]·sqrt(S[-r:]/s), from the exact SVD (section 3)."""
    from pe_rlhf.adapters.lora.inits.svd import balanced_factors, bottom_directions

    return balanced_factors(bottom_directions(context.weight_OI, context.rank, cache=True), context.scale)
