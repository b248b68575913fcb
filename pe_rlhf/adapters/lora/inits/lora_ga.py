"""LoRA-GA (arXiv 2407.05000): A and B are singular directions of the gradient G, so that the first step follows it.

With SGD the first change of the weight is −η·s²·(B·Bᵀ·G + G·Aᵀ·A). With A = V[:r]ᵀ and B = U[r:2r], unit vectors times
the same number, the bracket is that number squared times G's best approximation of rank 2r (theorem 3.1): no other A
and B point closer to G. Both are scaled by m^¼/√γ, m the output features (section 3.3): the authors' `stable`.

PEFT's `lora_ga` (0.21) differs: it multiplies the singular values into B and scales only B, and the theorem is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pe_rlhf.adapters.lora.init_registry import InitContext, SampledOptions, register_init
from pe_rlhf.config.section import Positive

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LoraGAOptions(SampledOptions):
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = Field(
        default="ArB2r",
        description="which singular vectors: ArB2r: the first r for A, the next r for B; A2rBr: the other way"
        " round; ArBr: alternating; random: a random split of the first 2r",
    )
    scale: Literal["stable", "unit", "gd", "weightS"] = Field(
        default="stable",
        description="stable: m^¼/√gamma; unit: 1; gd: 1/s; weightS: mean of √(W's first r singular values / s)",
    )
    gamma: float = Field(default=16.0, gt=0, description="γ of the scale `stable`; a larger γ means a smaller start")
    niter: Positive | None = Field(
        default=None,
        description="randomised SVD of the gradient with this number of power iterations; default: exact SVD",
    )


@register_init("lora_ga", options=LoraGAOptions, needs="gradient")
def lora_ga(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = c·Vh[:r], B = c·U[:, r:2r] of G = U·S·Vh; `direction` and `scale` give the authors' other choices."""
    from pe_rlhf.adapters.lora.inits.svd import top_directions

    options: LoraGAOptions = context.options
    r = context.rank
    count = max(r, min(2 * r, *context.gradient_OI.shape))
    top = top_directions(context.gradient_OI, count, options.niter)
    for_A, for_B = _split(count, r, options.direction, context.generator)
    factor = _factor(context, options)
    return factor * top.Vh_KI[for_A], factor * top.U_OK[:, for_B]


def stable_factor(out_features: int, gamma: float) -> float:
    """m^¼/√γ: outputs and updates then neither grow nor vanish with the width (theorem 3.2)."""
    return out_features**0.25 / gamma**0.5


def _split(count: int, rank: int, direction: str, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Which of `count` directions A takes, and which B; where they are fewer than 2r, the two share some."""
    order = list(range(count))
    if direction == "ArBr":
        order = order[1::2] + order[0::2]
    elif direction == "random":
        import torch

        order = torch.randperm(count, generator=generator).tolist()
    first, last = order[:rank], order[-rank:]
    return (last, first) if direction == "A2rBr" else (first, last)


def _factor(context: InitContext, options: LoraGAOptions) -> float:
    if options.scale == "stable":
        return stable_factor(context.weight_OI.shape[0], options.gamma)
    if options.scale == "gd":
        return 1 / context.scale
    if options.scale == "weightS":
        from pe_rlhf.adapters.lora.inits.svd import top_directions

        top = top_directions(context.weight_OI, context.rank, cache=True)
        return float((top.S_K / context.scale).sqrt().mean())
    return 1.0
