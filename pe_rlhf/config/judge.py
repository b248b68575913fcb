"""Who judges: a name, or a section for a judge that has more to be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pe_rlhf.config.section import Positive, Rate, Section


class JudgeConfig(Section):
    """A judge with its settings. As plain text: `length`, `llm:MODEL`, `reward_model:RUN`, or `module:callable`."""

    kind: str = Field(description="length, function, llm, reward_model, or one registered from Python")
    target: str | None = Field(default=None, description="llm: model; reward_model: run or model; module:callable")
    template: str = Field(
        default="general", description="llm: general, helpfulness, harmlessness, summarization, or a jinja2 file"
    )
    reasoning: bool = Field(default=False, description="llm: reason first, then give the verdict")
    reasoning_tokens: Positive = Field(default=256, description="llm: how long it may reason")
    verdict: Literal["auto", "probabilities", "text"] = Field(
        default="auto", description="llm: from the labels' probabilities, from parsed text, or whichever can be had"
    )
    engine: Literal["hf", "vllm"] = Field(default="hf", description="llm: what runs a local model")
    gpu_memory_share: float = Field(default=0.5, gt=0, lt=1, description="llm with vllm: its share of a GPU's memory")
    base_url: str | None = Field(default=None, description="llm: an OpenAI-compatible server")
    api_key_env: str = Field(default="OPENAI_API_KEY", description="environment variable that holds the server's key")
    top_logprobs: Positive = Field(default=20, description="how many log-probs to ask a server for")
    concurrency: Positive = Field(default=8, description="requests to a server at once")
    timeout: float = Field(default=60.0, gt=0, description="seconds for one request")
    attempts: Positive = Field(default=6, description="tries of a request that fails for a passing reason")
    answer_attempts: Positive = Field(default=3, description="tries of an answer that cannot be understood")
    max_requests: Positive | None = Field(default=None, description="stop after that many requests")
    max_cost: float | None = Field(default=None, gt=0, description="stop at that cost")
    price_in: Rate | None = Field(default=None, description="per million tokens read, for max_cost")
    price_out: Rate | None = Field(default=None, description="per million tokens written, for max_cost")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of a local model")
    device: str = Field(default="auto", description="of a local model")

    @model_validator(mode="after")
    def _one_place(self) -> JudgeConfig:
        if self.engine == "vllm" and self.base_url:
            raise ValueError("engine: vllm is for a local model, base_url for a server: give one of them")
        return self
