"""The settings of a judge, and of any model behind a server: declared here for recipes, commands and Python."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from reward.errors import InputError
from reward.settings import Positive, Section, Share, refusal

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
    """A judge with its settings. As text: `length`, `llm:MODEL`, `rating:MODEL`, `reward_model:RUN`, or a function."""

    kind: str = Field(
        description="length, function, llm, rating (keys as llm), reward_model, jury, or a judge registered from"
        " Python; or KIND:TARGET"
    )
    target: str | None = Field(
        default=None,
        description="llm, rating: the model; reward_model: a run or a model; function: module:callable; jury: its"
        " judges, separated by commas",
    )
    template: str = Field(
        default="general", description="llm: general, helpfulness, harmlessness, summarization, or a Jinja file"
    )
    reasoning: bool = Field(default=False, description="llm: ask for reasoning before the verdict")
    reasoning_tokens: Positive = Field(default=256, description="llm: longest reasoning, tokens")
    verdict: Literal["auto", "probabilities", "text"] = Field(
        default="auto",
        description="llm: probabilities (of the labels), text (parsed), or auto: probabilities if there are log-probs"
        " and the labels have min_label_mass, otherwise text",
    )
    min_label_mass: Share = Field(
        default=0.5,
        description="llm: least p(A) + p(B) at which the labels' probabilities are a verdict; rating: the same of all"
        " ratings together",
    )
    answer_tokens: Positive = Field(
        default=4096, description="llm: longest answer in text, tokens; a reasoning model's thoughts are part of it"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="llm: arguments of the chat template, such as {enable_thinking: false}"
    )
    engine: Literal["hf", "vllm"] = Field(default="hf", description="llm: engine for a local model")
    gpu_memory_share: float = Field(
        default=0.5, gt=0, lt=1, description="llm with engine: vllm: most of the GPU's memory that it takes"
    )
    members: list[str | dict[str, Any]] = Field(
        default_factory=list, description="jury: its judges, as text or as sections"
    )
    vote: Literal["mean", "majority"] = Field(
        default="mean", description="jury: mean of the verdicts, or 1, 0.5 or 0 by the majority of them"
    )
    base_url: str | None = Field(
        default=None, description="llm: address of an OpenAI-compatible server; default: a local model"
    )
    top_logprobs: Positive = Field(default=20, description="log-probs to ask a server for")
    answer_attempts: Positive = Field(default=3, description="tries of an answer that cannot be parsed")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="dtype of a local model")
    device: str = Field(default="auto", description="device of a local model")
    trust_remote_code: bool = Field(default=False, description="run the Python code that comes with a local model")

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is not None and (wrong := wrong_address(url)):
            raise refusal("", f"{url!r} {wrong}", "invalid")
        return url

    @model_validator(mode="after")
    def _one_place(self) -> JudgeSettings:
        if self.engine == "vllm" and self.base_url:
            raise refusal("engine", "vllm is for a local model, base_url for a server; give one of them")
        if self.trust_remote_code and self.base_url:
            raise refusal("trust_remote_code", "it is for a local model, base_url for a server; give one of them")
        return self

    @field_validator("members")
    @classmethod
    def _are_judges(cls, members: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
        for member in members:
            cls.model_validate(_string_is_kind(member))
        return members

    @property
    def judges(self) -> list[JudgeSettings]:
        """The settings of a jury's members."""
        named = [name.strip() for name in (self.target or "").split(",") if name.strip()]
        return [type(self).model_validate(_string_is_kind(member)) for member in [*named, *self.members]]

    def needed_target(self, fix: str) -> str:
        """The target. Raises `InputError`, which says what to do, where there is none."""
        if not self.target:
            raise InputError(f"judge: {self.kind} has no target", kind="missing", key="judge.target", fix=fix)
        return self.target


def wrong_address(url: str) -> str | None:
    """What is wrong with the address of a server, and how it is right; None if it can be one."""
    try:
        parts = urlsplit(url)
        usable = parts.port is None or parts.port > 0
    except ValueError as error:
        return f"is not an address: {error}"
    if parts.scheme not in ("http", "https"):
        return f"has no http:// or https:// in front; use http://{url.rpartition('://')[2].removeprefix('//')}"
    return None if parts.hostname and usable else "names no server; use http://HOST:PORT/v1"


def api_key(base_url: str, variable: str) -> str:
    """The key of a server from the environment.

    Raises `InputError` where the address is none, the key can't be sent, or there is none for a server elsewhere.
    """
    if wrong := wrong_address(base_url):
        raise InputError(f"{base_url!r} {wrong}", kind="invalid", key="base_url")
    key = key_in(variable)
    if not key and (urlsplit(base_url).hostname or "") not in ("localhost", "127.0.0.1", "::1"):
        raise InputError(
            f"the environment variable {variable} with the key for {base_url} is not set",
            kind="missing",
            key="api_key_env",
            fix="set it, or name another one by api_key_env; for a server without keys any text will do",
        )
    return key or "none"  # a server on this machine needs no key, but the client library insists on one


def key_in(variable: str, setting: str = "api_key_env") -> str:
    """The key in an environment variable, "" for none. Raises `InputError` for one that can't be sent.

    A client library that was given such a key would quote it in its error.
    """
    key = os.environ.get(variable, "").strip()  # a file that a secret comes from often ends in a newline
    if not (key.isascii() and key.isprintable()):
        message = f"the key in {variable} has characters that no HTTP header can have"
        raise InputError(message, kind="invalid", key=setting)
    return key


def _string_is_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


# A section, or its `kind` as plain text.
NamedJudge = Annotated[JudgeSettings, BeforeValidator(_string_is_kind)]
