"""The evaluate stage, and the settings of `pe-rlhf evaluate`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pe_rlhf.config.judged import JudgedConfig
from pe_rlhf.config.sampling import SamplingConfig
from pe_rlhf.config.section import FUNCTION_TIMEOUT, TEMPLATE_DATE, Data, Day, Positive, Section, Share
from reward.judges.judge_settings import NamedJudge, ServerSettings


class BaselineConfig(Section):
    """What is judged beside the trained policy."""

    best_of: int | None = Field(
        default=None,
        ge=2,
        description="the anchor's best of so many responses by ppo.reward, against the anchor; default: not judged",
    )


class EvaluateConfig(JudgedConfig):
    """Compare the policy with the anchor on held-out prompts."""

    samples_per_prompt: Positive = Field(default=1, description="pairs of responses judged for each prompt")
    policy: BaselineConfig = BaselineConfig()
    table_rows: Positive = Field(default=20, description="rows of the side-by-side table samples.md")


class RewardEvaluationSettings(Section):
    """The settings of `pe-rlhf evaluate-reward`, as `pairs.format=hh_rlhf pairs.columns.chosen=good`."""

    pairs: Data = Field(description="as PAIRS; its settings are those of reward.data")
    max_bad_share: Share = Field(default=0.05, description="fail if more than this share of the pairs is unusable")


class ResponseSampling(Section):
    """How a local candidate or baseline, or one behind a server, is sampled from."""

    max_new_tokens: Positive = Field(default=256, description="longest response; it is cut there")
    temperature: float = Field(default=1.0, gt=0, description="divides the logits")
    batch_size: Positive = Field(default=32, description="responses of a local model sampled at the same time")
    stop: list[str] = Field(default_factory=list, description="texts that end a response of a local model")


class EvaluationSettings(Section):
    """The settings of `pe-rlhf evaluate`, as `judge.max_requests=2000 sampling.temperature=0.7 seed=1`."""

    judge: NamedJudge = Field(description="as --judge; its settings are judge.concurrency, judge.template, …")
    prompts: Data | None = Field(
        default=None,
        description="as --prompts; its settings are prompts.columns.prompt, prompts.format, prompts.split, …",
    )
    max_bad_share: Share = Field(default=0.05, description="fail if more than this share of the prompts is unusable")
    sampling: ResponseSampling = ResponseSampling()
    policy: BaselineConfig = BaselineConfig()
    server: ServerSettings = Field(
        default=ServerSettings(), description="how a candidate or baseline behind a server is asked"
    )
    candidate_template: str = Field(
        default="auto",
        description="chat template of a local candidate: auto (its own), none (plain text), a template or its file",
    )
    baseline_template: str = Field(default="auto", description="chat template of a local baseline, likewise")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="arguments of the chat template, for both local sides; default: those of a run's recipe",
    )
    date: Day | None = TEMPLATE_DATE
    different_templates: bool = Field(default=False, description="compare two sides that are prompted differently")
    seed: int = Field(default=0, ge=0, description="seed of the responses")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="dtype of a local candidate or baseline; a run is loaded as its recipe says"
    )
    device: str = Field(default="auto", description="device of a local candidate or baseline")
    max_invalid_share: Share = Field(
        default=0.05, description="fail if more than this share of the pairs has no valid verdict"
    )
    function_timeout: float | None = FUNCTION_TIMEOUT
    level: float = Field(default=0.95, gt=0, lt=1, description="level of the intervals")

    @property
    def sampler(self) -> SamplingConfig:
        """The sampling of local models: by transformers, in this process."""
        return SamplingConfig(**self.sampling.model_dump())
