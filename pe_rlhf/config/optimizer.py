"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pe_rlhf.config.section import Decay, Rate, Section, Share, refusal

# The keys of each method of `sharpness`; one that has no effect is refused, unless it has its default.
SHARPNESS_KEYS = {
    "rho": ("sam", "asam"),
    "noise": ("rwp",),
    "noise_weight": ("rwp",),
    "noise_on": ("rwp",),
    "sharpness_batches": ("sam", "asam", "rwp"),
}


class AdamWConfig(Section):
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


class OptimizerConfig(AdamWConfig):
    """AdamW and the learning-rate schedule of one stage."""

    sharpness: Literal["none", "sam", "asam", "rwp"] = Field(
        default="none",
        description="take the gradient beside the weights, for a flat minimum (docs/continual.md): sam and asam at the"
        " worst point nearby, rwp on average over random ones; twice the time of an update",
    )
    rho: Rate = Field(
        default=0.05, description="sam, asam: the distance ρ of that point, over all trained weights of a role; 0: none"
    )
    noise: Rate = Field(
        default=0.01, description="rwp: σ, deviation of the noise of a weight divided by the norm of its row; 0: none"
    )
    noise_weight: Share = Field(
        default=0.5, description="rwp: λ, share of the noisy gradient in the step; the rest is the usual one; 0: none"
    )
    noise_on: Literal["adapter", "model"] = Field(
        default="adapter",
        description="rwp: what gets noise: the weights that are trained, or those of the frozen base too (a noisy copy"
        " beside the base, which is never written to)",
    )
    sharpness_batches: Literal["one", "two"] = Field(
        default="one",
        description="one: both gradients of a step are of its whole batch; two: each is of a half of it, which takes no"
        " more time than plain AdamW",
    )

    @model_validator(mode="after")
    def _keys_of_the_method(self) -> OptimizerConfig:
        for key, methods in SHARPNESS_KEYS.items():
            if self.sharpness not in methods and getattr(self, key) != type(self).model_fields[key].default:
                reason = f"it is for sharpness: {' or '.join(methods)}, and this is {self.sharpness}"
                raise refusal(key, reason, "conflict")
        return self

    @property
    def is_perturbed(self) -> bool:
        """Whether a step takes a second gradient; without a perturbation it is AdamW's, to the bit."""
        return self.sharpness != "none" and bool(
            self.noise * self.noise_weight if self.sharpness == "rwp" else self.rho
        )

    @property
    def noises_base(self) -> bool:
        return self.is_perturbed and self.noise_on == "model"

    @property
    def cost(self) -> str | None:
        """What the second gradient costs, as a sentence; None where there is none."""
        if not self.is_perturbed:
            return None
        each = "each of half the batch, as long as without" if self.sharpness_batches == "two" else "twice as long"
        memory = ", a noisy copy of the base in memory" if self.noises_base else ""
        return f"optimizer.sharpness {self.sharpness}: two gradients in each optimizer step, {each}{memory}"


class RewardOptimizerConfig(OptimizerConfig):
    """AdamW for the reward stage. Its eps is small, since the head starts at zero and so gradients start small."""

    schedule: Literal["constant", "linear"] = Field(
        default="linear", description="constant, or linear decay to 0, after the warm-up"
    )
    warmup_ratio: Share = Field(
        default=0.05, description="share of the optimizer steps over which the learning rate rises from 0"
    )
    eps: float = Field(default=1e-8, gt=0, description="ε of AdamW")
