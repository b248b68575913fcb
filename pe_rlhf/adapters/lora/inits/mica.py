"""MiCA (arXiv 2604.01694): B holds the r minor left singular vectors of W and stays frozen; A starts at zero.

Only A trains, half of a LoRA's parameters or less. The output changes in directions that W hardly uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pe_rlhf.adapters.lora.init_registry import InitContext, register_init

if TYPE_CHECKING:
    from torch import Tensor


@register_init("mica", frozen=("lora_B",))
def mica(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = 0, B = U[:, -r:] of W = U·S·Vh."""
    from pe_rlhf.adapters.lora.inits.svd import bottom_directions

    bottom = bottom_directions(context.weight_OI, context.rank, cache=True)
    return context.weight_OI.new_zeros(context.rank, context.weight_OI.shape[1]), bottom.U_OK
