"""How responses are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pe_rlhf.config.section import Positive, Section


class SamplingConfig(Section):
    """How responses are sampled where the distribution must be the policy's own."""

    engine: Literal["hf"] = Field(default="hf", description="hf: transformers' generate in this process")
    max_new_tokens: Positive = 64
    temperature: float = Field(default=1.0, gt=0, description="divides the logits, in every log-prob too")
    batch_size: Positive = Field(default=64, description="how many responses are generated at once")


class RolloutConfig(SamplingConfig):
    """Sampling for PPO. Truncating the distribution makes the log-probs of PPO wrong, so it has to be asked for."""

    samples_per_prompt: Positive = 1
    top_k: int = Field(default=0, ge=0, description="0: off")
    top_p: float = Field(default=1.0, gt=0, le=1, description="1: off")
    allow_truncated_sampling: bool = Field(default=False, description="let top_k and top_p bias the rollouts")
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        default="auto", description="whose log-probs are π_old; auto: the sampler's in fp32, else computed again"
    )
    correction: Literal["none", "truncated_is"] = Field(
        default="none", description="weigh tokens by trainer/sampler, capped"
    )
    correction_cap: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _no_biased_sampling(self) -> RolloutConfig:
        if (self.top_k or self.top_p < 1) and not self.allow_truncated_sampling:
            raise ValueError(
                "top_k and top_p change the distribution that the log-probs are of;"
                " leave them off or set allow_truncated_sampling: true"
            )
        return self
