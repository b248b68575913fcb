"""RLPO and RLMO (arXiv 2606.31813): an orthonormal A from W's spectrum, B zero, so that B·A = 0.

RLPO takes the principal right singular vectors, RLMO the minor ones: where in its input a layer listens before it has
learnt anything, without PiSSA's and MiLoRA's singular values in the step size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pe_rlhf.adapters.lora.init_registry import InitContext, register_init
from pe_rlhf.adapters.lora.inits.pissa import PissaOptions

if TYPE_CHECKING:
    from torch import Tensor


@register_init("rlpo", options=PissaOptions)
def rlpo(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = Vh[:r], B = 0."""
    from pe_rlhf.adapters.lora.inits.svd import top_directions

    options: PissaOptions = context.options
    top = top_directions(context.weight_OI, context.rank, options.niter, cache=True)
    return top.Vh_KI, context.weight_OI.new_zeros(context.weight_OI.shape[0], context.rank)


@register_init("rlmo")
def rlmo(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = Vh[-r:], B = 0."""
    from pe_rlhf.adapters.lora.inits.svd import bottom_directions

    bottom = bottom_directions(context.weight_OI, context.rank, cache=True)
    return bottom.Vh_KI, context.weight_OI.new_zeros(context.weight_OI.shape[0], context.rank)
