"""The evaluate stage."""

from __future__ import annotations

from pydantic import Field

from pe_rlhf.config.sampling import SamplingConfig
from pe_rlhf.config.section import Data, Positive, Section


class EvaluateConfig(Section):
    """Compare the policy with the anchor on held-out prompts."""

    prompts: Data
    judge: str = Field(description="module:callable, (prompts, responses) → scores; the higher score wins")
    sampling: SamplingConfig = SamplingConfig()
    samples_per_prompt: Positive = 1
    table_rows: Positive = Field(default=20, description="rows of the side-by-side table")
