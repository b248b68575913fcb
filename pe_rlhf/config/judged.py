"""What the sections of stages have in common that sample responses and have a judge compare them."""

from __future__ import annotations

from pydantic import Field

from pe_rlhf.config.sampling import SamplingConfig
from pe_rlhf.config.section import Data, Section, Share
from reward.judges.judge_settings import NamedJudge


class JudgedConfig(Section):
    """Prompts, a judge of the responses, and how those are sampled."""

    prompts: Data
    max_bad_share: Share = Field(default=0.05, description="fail if more than this share of the prompts is unusable")
    judge: NamedJudge = Field(
        description="length, llm:MODEL, rating:MODEL, reward_model:RUN, module:callable, or a section with settings"
    )
    max_invalid_share: Share = Field(
        default=0.05, description="fail if more than this share of the pairs has no valid verdict"
    )
    sampling: SamplingConfig = SamplingConfig()
