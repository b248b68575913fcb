"""GeoRA (arXiv 2601.09361): the main directions of the part of W that reinforcement learning changes.

That part are the entries that are small in W itself, or in its best approximation of rank r; the rest is masked out
before the SVD. The mask is of the start only: A and B are free to leave it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pe_rlhf.adapters.lora.init_registry import InitContext, register_init
from pe_rlhf.config.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class GeoraOptions(Section):
    share: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="ρ: the share of the weight's entries, the smallest ones, that each of the two masks lets through",
    )


@register_init("geora", options=GeoraOptions)
def geora(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = √S·Vh, B = U·√S, the first r of U·S·Vh = W ⊙ (M_spec ∪ M_euc) (equations 1 to 8).

    M_euc are the ρ smallest entries of |W|, M_spec those of |W_r|, the best approximation of rank r.
    """
    from pe_rlhf.adapters.lora.inits.svd import balanced_factors, top_directions

    options: GeoraOptions = context.options
    weight_OI = context.weight_OI
    U_OK, S_K, Vh_KI = top_directions(weight_OI, context.rank, cache=True)
    mask_OI = _smallest(weight_OI, options.share) | _smallest((U_OK * S_K) @ Vh_KI, options.share)
    # As in the paper the product is not divided by the scale: it starts at s times that part of W.
    return balanced_factors(top_directions(weight_OI * mask_OI, context.rank, cache=True), scale=1.0)


def _smallest(matrix_OI: Tensor, share: float) -> Tensor:
    """Where a share of the entries, at least one, is that has the smallest absolute values."""
    sizes_OI = matrix_OI.abs()
    count = max(1, round(share * sizes_OI.numel()))
    return sizes_OI <= sizes_OI.flatten().kthvalue(count).values
