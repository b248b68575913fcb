"""How the base model is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pe_rlhf.config.section import Section


class BackboneConfig(Section):
    """How the base model is loaded."""

    # Not float16: its gradients underflow, the more so the more tokens a batch has.
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the frozen base model; default: on a GPU bfloat16"
    )
    quantization: Literal["none", "4bit", "8bit"] = Field(
        default="none",
        description="quantise the frozen base with bitsandbytes: 4bit (NF4) or 8bit (LLM.int8); only with tuning:"
        " adapter",
    )
    device: str = Field(default="auto", description="auto (the GPU if there is one), cpu, cuda, cuda:1, …")
    attention: str = Field(default="sdpa", description="attention implementation of transformers")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with a hub model")
    trunk_cache_mib: Annotated[int, Field(ge=0)] = Field(
        default=1024,
        description="with adapter.last_layers: memory for the hidden states below the adapters, which are then"
        " computed once per batch; 0: no cache",
    )
    packing: bool = Field(
        default=True,
        description="pack batches: no padding is computed, and a prefix that rows share (a system prompt, the"
        " prompt of a preference pair) is computed once, in sampling too; needs sdpa attention",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="compute activations again in the backward pass: less memory, about a third more time in updates",
    )
