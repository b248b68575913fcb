"""LoRA (arXiv 2106.09685): A Kaiming-uniform, B zero, so that B·A = 0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pe_rlhf.adapters.lora.init_registry import InitContext, register_init

if TYPE_CHECKING:
    from torch import Tensor


@register_init("lora")
def lora(context: InitContext) -> tuple[Tensor, Tensor]:
    """A ~ U(−1/sqrt(in), 1/sqrt(in)), which is Kaiming-uniform with a = sqrt(5); B = 0."""
    import torch

    out_features, in_features = context.weight_OI.shape
    bound = 1 / math.sqrt(in_features)
    # Drawn on the CPU, where the generator lives, so that a seed means the same numbers on every device.
    A_RI = torch.empty(context.rank, in_features).uniform_(-bound, bound, generator=context.generator)
    return A_RI.to(context.weight_OI.device), context.weight_OI.new_zeros(out_features, context.rank)
