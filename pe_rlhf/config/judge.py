"""Who judges: a name, or a section for a judge that has more to be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pe_rlhf.config.section import Positive, Rate, Section


class JudgeConfig(Section):
    """A judge with its settings. As plain text: `length`, `llm:MODEL`, `reward_model:RUN`, or `module:callable`."""

    kind: str = Field(description="length, function, llm, reward_model, or a judge registered from Python")
    target: str | None = Field(
        default=None, description="llm: the model; reward_model: a run or a model; function: module:callable"
    )
    template: str = Field(
        default="general", description="llm: general, helpfulness, harmlessness, summarization, or a Jinja file"
    )
    reasoning: bool = Field(default=False, description="llm: ask for reasoning before the verdict")
    reasoning_tokens: Positive = Field(default=256, description="llm: longest reasoning, tokens")
    verdict: Literal["auto", "probabilities", "text"] = Field(
        default="auto",
        description="llm: probabilities (of the labels), text (parsed), or auto: probabilities if the server"
        " gives log-probs",
    )
    engine: Literal["hf", "vllm"] = Field(default="hf", description="llm: engine for a local model")
    gpu_memory_share: float = Field(
        default=0.5, gt=0, lt=1, description="llm with engine: vllm: share of the GPU's memory"
    )
    base_url: str | None = Field(
        default=None, description="llm: address of an OpenAI-compatible server; default: a local model"
    )
    api_key_env: str = Field(default="OPENAI_API_KEY", description="environment variable with the server's API key")
    top_logprobs: Positive = Field(default=20, description="log-probs to ask a server for")
    concurrency: Positive = Field(default=8, description="requests that a server gets at the same time")
    timeout: float = Field(default=60.0, gt=0, description="seconds for one request")
    attempts: Positive = Field(default=6, description="tries of a request that fails for a temporary reason")
    answer_attempts: Positive = Field(default=3, description="tries of an answer that cannot be parsed")
    max_requests: Positive | None = Field(
        default=None, description="stop after this number of requests; default: no limit"
    )
    max_cost: float | None = Field(default=None, gt=0, description="stop at that cost")
    price_in: Rate | None = Field(default=None, description="per million tokens read, for max_cost")
    price_out: Rate | None = Field(default=None, description="per million tokens written, for max_cost")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="dtype of a local model")
    device: str = Field(default="auto", description="device of a local model")

    @model_validator(mode="after")
    def _one_place(self) -> JudgeConfig:
        if self.engine == "vllm" and self.base_url:
            raise ValueError("engine: vllm is for a local model, base_url for a server: give one of them")
        return self
