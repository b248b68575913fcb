"""The preferences stage."""

from __future__ import annotations

from pydantic import Field

from pe_rlhf.config.sampling import SamplingConfig
from pe_rlhf.config.section import Data, Positive, Rate, Section, Share
from reward.judges.judge_settings import NamedJudge


class PreferencesConfig(Section):
    """Sample two responses for each prompt and have a judge label them."""

    prompts: Data
    max_bad_share: Share = Field(default=0.05, description="fail if more than this share of the prompts is unusable")
    judge: NamedJudge = Field(
        description="length, llm:MODEL, rating:MODEL, reward_model:RUN, module:callable, or a section with settings"
    )
    max_invalid_share: Share = Field(
        default=0.05, description="fail if more than this share of the pairs has no valid verdict"
    )
    sampling: SamplingConfig = SamplingConfig()
    pairs_per_prompt: Positive = Field(default=1, description="pairs of responses sampled for each prompt")
    min_margin: Rate = Field(
        default=0.0,
        description="drop pairs whose margin is at most this: the difference of the scores, or |2·P(first wins) −"
        " 1| if the judge gives no scores",
    )
