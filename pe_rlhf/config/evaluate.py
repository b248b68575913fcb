"""The evaluate stage."""

from __future__ import annotations

from pydantic import Field

from pe_rlhf.config.judge import JudgeConfig
from pe_rlhf.config.sampling import SamplingConfig
from pe_rlhf.config.section import Data, Positive, Section, Share


class EvaluateConfig(Section):
    """Compare the policy with the anchor on held-out prompts."""

    prompts: Data
    judge: str | JudgeConfig = Field(
        description="length, llm:MODEL, reward_model:RUN, module:callable, or a section with settings"
    )
    max_invalid_share: Share = Field(
        default=0.05, description="fail if more than this share of the pairs has no valid verdict"
    )
    sampling: SamplingConfig = SamplingConfig()
    samples_per_prompt: Positive = Field(default=1, description="pairs of responses judged for each prompt")
    table_rows: Positive = Field(default=20, description="rows of the side-by-side table samples.md")
