"""PiSSA (arXiv 2404.02948): A and B hold the r principal singular directions of W, s·B·A = U_r S_r V_rᵀ."""

from __future__ import annotations

from torch import Tensor

from pe_rlhf.adapters.lora.init_registry import InitContext
from pe_rlhf.adapters.lora.inits.svd import balanced_factors, top_directions
from pe_rlhf.config.init_options import PissaOptions


def pissa(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = sqrt(S[:r]/s)·Vh[:r], B = U[:, :r]·sqrt(S[:r]/s) (equations 2 and 3); `niter` as in section 3's fast SVD."""
    options: PissaOptions = context.options
    top = top_directions(context.weight_OI, context.rank, options.niter, cache=True)
    return balanced_factors(top, context.scale)
