"""The preferences stage."""

from __future__ import annotations

from pydantic import Field

from pe_rlhf.config.judged import JudgedConfig
from pe_rlhf.config.section import Positive, Rate


class PreferencesConfig(JudgedConfig):
    """Sample two responses for each prompt and have a judge label them."""

    pairs_per_prompt: Positive = Field(default=1, description="pairs of responses sampled for each prompt")
    min_margin: Rate = Field(
        default=0.0,
        description="drop pairs whose margin is at most this: the difference of the scores, or |2·P(first wins) −"
        " 1| if the judge gives no scores",
    )
