"""EVA (arXiv 2410.07170): A's rows are the first r right singular vectors of the layer's inputs, B zero.

They are the eigenvectors of the inputs' second moment, which is summed over the batch exactly. The paper's other half,
moving ranks from layer to layer by explained variance, is left out: every layer here has the recipe's rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pe_rlhf.adapters.lora.init_registry import InitContext
from pe_rlhf.config.init_options import EvaOptions
from reward.errors import InputError


def eva(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = V[:, :r]ᵀ of X = U·S·Vᵀ, X one input per row (section 3.1); B = 0. With `center` of X less its mean."""
    options: EvaOptions = context.options
    second_II = context.inputs.second_II
    if context.rank > len(second_II):
        raise InputError(f"adapter.rank: {context.rank} is more than the {len(second_II)} inputs of a target")
    if options.center:
        second_II = second_II - torch.outer(context.inputs.mean_I, context.inputs.mean_I)
    _, vectors_IK = torch.linalg.eigh(second_II)
    A_RI = vectors_IK[:, -context.rank :].flip(1).T
    return A_RI, context.weight_OI.new_zeros(context.weight_OI.shape[0], context.rank)
