"""EVA (arXiv 2410.07170): A's rows are the first r right singular vectors of the layer's inputs, B zero.

They are the eigenvectors of the inputs' second moment, which is summed over the batch exactly. The paper's other half,
moving ranks from layer to layer by explained variance, is left out: every layer here has the recipe's rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pe_rlhf.adapters.lora.init_registry import InitContext, SampledOptions, refuse_rank, register_init

if TYPE_CHECKING:
    from torch import Tensor


class EvaOptions(SampledOptions):
    center: bool = Field(default=False, description="subtract the mean from the layer's inputs, as PEFT does")


@register_init("eva", options=EvaOptions, needs="inputs")
def eva(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = V[:, :r]ᵀ of X = U·S·Vᵀ, X one input per row (section 3.1); B = 0. With `center` of X less its mean."""
    import torch

    options: EvaOptions = context.options
    second_II = context.inputs.second_II
    refuse_rank(context.rank, len(second_II))
    if options.center:
        second_II = second_II - torch.outer(context.inputs.mean_I, context.inputs.mean_I)
    _, vectors_IK = torch.linalg.eigh(second_II)
    A_RI = vectors_IK[:, -context.rank :].flip(1).T
    return A_RI, context.weight_OI.new_zeros(context.weight_OI.shape[0], context.rank)
