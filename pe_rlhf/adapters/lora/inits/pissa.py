"""PiSSA (arXiv 2404.02948): A and B hold the r principal singular directions of W, s·B·A = U_r S_r V_rᵀ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pe_rlhf.adapters.lora.init_registry import InitContext, register_init
from pe_rlhf.config.section import Positive, Section

if TYPE_CHECKING:
    from torch import Tensor


class PissaOptions(Section):
    niter: Positive | None = Field(
        default=None, description="randomised SVD with this number of power iterations; default: exact SVD"
    )


@register_init("pissa", options=PissaOptions)
def pissa(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = sqrt(S[:r]/s)·Vh[:r], B = U[:, :r]·sqrt(S[:r]/s) (equations 2 and 3); `niter` as in section 3's fast SVD."""
    from pe_rlhf.adapters.lora.inits.svd import balanced_factors, top_directions

    options: PissaOptions = context.options
    top = top_directions(context.weight_OI, context.rank, options.niter, cache=True)
    return balanced_factors(top, context.scale)
