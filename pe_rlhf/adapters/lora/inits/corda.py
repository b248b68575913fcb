"""CorDA (arXiv 2406.05223): the singular directions of W·C, C the covariance of the layer's inputs.

W·C = U·S·Vᵀ weighs the weight's directions by how much the data uses them; W = U·S·(Vᵀ·C⁻¹) brings the weight back. In
the knowledge-preserving mode (`kpm`) the adapter takes the r least of these directions, so that what the data shows the
model to know stays; in the instruction-previewing one (`ipm`) the r first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pe_rlhf.adapters.lora.init_registry import InitContext, SampledOptions, register_init
from pe_rlhf.config.section import Rate
from reward.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

INVERSE_ERROR = 0.05


class CordaOptions(SampledOptions):
    mode: Literal["kpm", "ipm"] = Field(
        default="kpm",
        description="kpm: the r smallest directions, which keeps what the model knows; ipm: the r largest, which"
        " learns the data",
    )
    damping: Rate = Field(
        default=0.01,
        description="share of the covariance's mean diagonal that is added to it; doubled until the inverse is"
        " accurate",
    )


@register_init("corda", options=CordaOptions, needs="inputs")
def corda(context: InitContext) -> tuple[Tensor, Tensor]:
    """s·B·A = U_r·S_r·(Vᵀ·C⁻¹)_r, split evenly by √(S/s) (section 3.2)."""
    from pe_rlhf.adapters.lora.inits.svd import Directions, balanced_factors, bottom_directions, top_directions

    options: CordaOptions = context.options
    covariance_II, inverse_II = damped_inverse(context.inputs.second_II, options.damping)
    weighted_OI = context.weight_OI @ covariance_II
    part = top_directions if options.mode == "ipm" else bottom_directions
    U_OK, S_K, Vh_KI = part(weighted_OI, context.rank)
    return balanced_factors(Directions(U_OK, S_K, Vh_KI @ inverse_II), context.scale)


def damped_inverse(covariance_II: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The covariance with a share of its mean diagonal added until it can be inverted, and the inverse.

    As the authors do it: the share is doubled until ‖C·C⁻¹ − I‖ is below 0.05. The scale of C does not matter.
    """
    import torch

    eye_II = torch.eye(len(covariance_II), device=covariance_II.device)
    for _ in range(40):
        damped_II = covariance_II + damping * covariance_II.diagonal().mean() * eye_II
        inverse_II, failed = torch.linalg.inv_ex(damped_II)
        if not failed and torch.dist(damped_II @ inverse_II, eye_II) < INVERSE_ERROR:
            return damped_II, inverse_II
        damping = 2 * damping or 1e-6
    raise InputError(
        "the init 'corda': the covariance of a layer's inputs cannot be inverted",
        kind="not_finite",
        key="adapter.init_options.damping",
        fix="raise init_options.damping or init_options.batch_size",
    )
