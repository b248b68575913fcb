"""RLPO and RLMO (arXiv 2606.31813): an orthonormal A from W's spectrum, B zero, so that B·A = 0.

RLPO takes the principal right singular vectors, RLMO the minor ones: where in its input a layer listens before it has
learnt anything, without PiSSA's and MiLoRA's singular values in the step size.
"""

from __future__ import annotations

from torch import Tensor

from pe_rlhf.adapters.lora.init_registry import InitContext
from pe_rlhf.adapters.lora.inits.svd import bottom_directions, top_directions
from pe_rlhf.config.init_options import RlpoOptions


def rlpo(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = Vh[:r], B = 0."""
    options: RlpoOptions = context.options
    top = top_directions(context.weight_OI, context.rank, options.niter, cache=True)
    return top.Vh_KI, context.weight_OI.new_zeros(context.weight_OI.shape[0], context.rank)


def rlmo(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = Vh[-r:], B = 0."""
    bottom = bottom_directions(context.weight_OI, context.rank, cache=True)
    return bottom.Vh_KI, context.weight_OI.new_zeros(context.weight_OI.shape[0], context.rank)
