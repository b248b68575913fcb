"""LoRA with a normal A: A ~ N(0, 1/r), variance 1/r, and B zero, so that B·A = 0.

PEFT's init of that name takes 1/r as the standard deviation instead: `init_options: {std: …}` gives that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pe_rlhf.adapters.lora.init_registry import InitContext, register_init
from pe_rlhf.config.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class GaussianOptions(Section):
    std: float | None = Field(
        default=None, gt=0, description="standard deviation of A's entries; default: r^-½ (PEFT uses 1/r)"
    )


@register_init("gaussian", options=GaussianOptions)
def gaussian(context: InitContext) -> tuple[Tensor, Tensor]:
    """A ~ N(0, std²), std = 1/sqrt(r) unless given; B = 0."""
    import torch

    options: GaussianOptions = context.options
    out_features, in_features = context.weight_OI.shape
    A_RI = torch.randn(context.rank, in_features, generator=context.generator)
    A_RI *= options.std or context.rank**-0.5
    return A_RI.to(context.weight_OI.device), context.weight_OI.new_zeros(out_features, context.rank)
