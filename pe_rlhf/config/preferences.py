"""The preferences stage."""

from __future__ import annotations

from pydantic import Field

from pe_rlhf.config.sampling import SamplingConfig
from pe_rlhf.config.section import Data, Positive, Rate, Section


class PreferencesConfig(Section):
    """Sample two responses for each prompt and have a judge label them."""

    prompts: Data
    judge: str = Field(description="module:callable, (prompts, responses) → scores; the higher score is chosen")
    sampling: SamplingConfig = SamplingConfig()
    pairs_per_prompt: Positive = 1
    min_margin: Rate = Field(default=0.0, description="drop pairs whose scores differ by no more than this")
