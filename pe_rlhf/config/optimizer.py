"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pe_rlhf.config.section import Decay, Rate, Section, Share


class OptimizerConfig(Section):
    """AdamW and the learning-rate schedule of one stage."""

    schedule: Literal["constant", "linear"] = Field(
        default="constant", description="constant, or linear decay to 0, after the warm-up"
    )
    warmup_ratio: Share = Field(
        default=0.0, description="share of the optimizer steps over which the learning rate rises from 0"
    )
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="β1 and β2 of AdamW")
    eps: float = Field(default=1e-5, gt=0, description="ε of AdamW")
    weight_decay: Rate = Field(
        default=0.0,
        description="weight decay of AdamW, towards the anchor: of an adapter towards its initial A and B (towards 0"
        " where B starts at 0), of a head towards 0; in the stage sft towards 0",
    )
    lora_plus_ratio: float = Field(
        default=1.0, gt=0, description="LoRA+: learning rate of B divided by that of A; its paper uses 16"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="clip the gradient norm of each role to this")


class RewardOptimizerConfig(OptimizerConfig):
    """AdamW for the reward stage. Its eps is small, since the head starts at zero and so gradients start small."""

    schedule: Literal["constant", "linear"] = Field(
        default="linear", description="constant, or linear decay to 0, after the warm-up"
    )
    warmup_ratio: Share = Field(
        default=0.05, description="share of the optimizer steps over which the learning rate rises from 0"
    )
    eps: float = Field(default=1e-8, gt=0, description="ε of AdamW")
