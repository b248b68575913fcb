"""LoftQ (arXiv 2310.08659): the main directions of what quantising the base lost.

LoftQ has the base quantised anew, so that Q + s·B·A is near the original W. Here the base is not written to and a role
starts as the anchor, which is Q: the anchored layer subtracts s·B0·A0. So the error stays as it is at the start, and
training has the directions in which it can be mended. It is LoftQ's first step, whose Q is the quantised W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pe_rlhf.adapters.lora.init_registry import InitContext, register_init
from pe_rlhf.config.adapter import OptionsOnQuantised
from reward.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@register_init("loftq", options=OptionsOnQuantised, needs="original weight")
def loftq(context: InitContext) -> tuple[Tensor, Tensor]:
    """s·B·A = the first r directions of W − Q, split evenly (algorithm 1)."""
    from pe_rlhf.adapters.lora.inits.svd import balanced_factors, top_directions

    lost_OI = context.original_OI - context.weight_OI
    if not bool(lost_OI.any()):
        raise InputError(
            "the init 'loftq': the base's weight is the original one",
            kind="conflict",
            key="adapter.init",
            fix="set backbone.quantization, or take another init",
        )
    return balanced_factors(top_directions(lost_OI, context.rank), context.scale)
