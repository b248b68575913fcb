"""The settings of a judge, and of any model behind a server: declared here for recipes, commands and Python."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from reward.errors import InputError
from reward.settings import Positive, Section, refusal

GONE = ("max_cost", "price_in", "price_out")


class ServerSettings(Section):
    """How a model behind an OpenAI-compatible server is asked."""

    api_key_env: str = Field(default="OPENAI_API_KEY", description="environment variable with the server's API key")
    concurrency: Positive = Field(default=8, description="requests that a server gets at the same time")
    timeout: float = Field(default=60.0, gt=0, description="seconds for one request")
    attempts: Positive = Field(default=6, description="tries of a request that fails for a temporary reason")
    max_requests: Positive | None = Field(
        default=None, description="stop after this number of requests; default: no limit"
    )

    @model_validator(mode="before")
    @classmethod
    def _requests_are_counted_not_their_cost(cls, tree: Any) -> Any:
        """Recipes that earlier versions saved have these keys as null."""
        if not isinstance(tree, dict):
            return tree
        if priced := [key for key in GONE if tree.get(key) is not None]:
            raise refusal(priced[0], "costs are no longer counted; limit the requests with max_requests", "unknown")
        return {key: value for key, value in tree.items() if key not in GONE}


class JudgeSettings(ServerSettings):
    """A judge with its settings. As plain text: `length`, `llm:MODEL`, `reward_model:RUN`, or `module:callable`."""

    kind: str = Field(
        description="length, function, llm, reward_model, or a judge registered from Python; or KIND:TARGET"
    )
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
    top_logprobs: Positive = Field(default=20, description="log-probs to ask a server for")
    answer_attempts: Positive = Field(default=3, description="tries of an answer that cannot be parsed")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="dtype of a local model")
    device: str = Field(default="auto", description="device of a local model")

    @model_validator(mode="after")
    def _one_place(self) -> JudgeSettings:
        if self.engine == "vllm" and self.base_url:
            raise refusal("engine", "vllm is for a local model, base_url for a server; give one of them")
        return self

    def needed_target(self, fix: str) -> str:
        """The target. Raises `InputError`, which says what to do, where there is none."""
        if not self.target:
            raise InputError(f"judge: {self.kind} has no target", kind="missing", key="judge.target", fix=fix)
        return self.target


def _string_is_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


# A section, or its `kind` as plain text.
NamedJudge = Annotated[JudgeSettings, BeforeValidator(_string_is_kind)]
