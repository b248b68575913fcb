"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pe_rlhf.config.section import Decay, Rate, Section, Share


class OptimizerConfig(Section):
    """AdamW and the learning-rate schedule of one stage."""

    schedule: Literal["constant", "linear"] = Field(default="constant", description="after warm-up; linear ends at 0")
    warmup_ratio: Share = Field(
        default=0.0, description="share of the optimizer steps over which the rate rises from 0"
    )
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), description="AdamW's β1 and β2")
    eps: float = Field(default=1e-5, gt=0, description="AdamW's ε")
    weight_decay: Rate = Field(default=0.0, description="AdamW's, of adapters and heads")
    lora_plus_ratio: float = Field(
        default=1.0, gt=0, description="LoRA+: B's learning rate over A's; its authors take 16"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="clips the gradient norm of each role")


class RewardOptimizerConfig(OptimizerConfig):
    """AdamW for the reward stage: behind a head that starts at zero gradients are small; a larger eps drowns them."""

    schedule: Literal["constant", "linear"] = Field(default="linear", description="after warm-up; linear ends at 0")
    warmup_ratio: Share = Field(
        default=0.05, description="share of the optimizer steps over which the rate rises from 0"
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's ε")
