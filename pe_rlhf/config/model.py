"""The base model and the adapters on it."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from pe_rlhf.config.section import Positive, Section
from reward.errors import InputError

# The options of each adapter init by its name. `pe_rlhf.adapters.lora.inits`, which the package imports first, fills
# it: so an init has its options in its own file, and a recipe is checked before torch is imported.
INIT_OPTIONS: dict[str, type[Section]] = {}


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


class AdapterConfig(Section):
    """The adapter of a role."""

    init: str = Field(default="lora", description="{inits}, one that you registered, or module:function")
    init_options: dict[str, Any] = Field(default_factory=dict, description="options of the init, see below")
    rank: Positive = Field(default=16, description="rank r of B·A; if the init has B0 ≠ 0, the export has rank 2r")
    alpha: float = Field(
        default=32.0, gt=0, description="B·A is scaled by alpha/rank (standard) or alpha/√rank (rslora)"
    )
    scaling: Literal["standard", "rslora"] = Field(
        default="standard", description="standard: alpha/rank; rslora: alpha/√rank"
    )
    targets: str | list[str] = Field(
        default="all-linear",
        description="layers that get an adapter: all-linear, attention, a list of module names or their endings, or a"
        " regular expression over whole names, as PEFT's target_modules",
    )
    exclude: str | list[str] = Field(
        default_factory=list, description="layers that get none: a list of names or endings, or a regular expression"
    )
    last_layers: Positive | None = Field(
        default=None,
        description="put adapters on the last blocks only; less time and memory, since the backward pass ends"
        " there; default: all blocks",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout on the adapter's input; only in the stages sft and reward"
    )

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, given: str | list[str]) -> str | list[str]:
        if not given:
            raise ValueError("name at least one module")
        return given

    @field_validator("init_options")
    @classmethod
    def _options_of_the_init(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Options of an init that is not registered yet, such as module:function, are checked when it is loaded."""
        init = info.data.get("init", "")
        if init in INIT_OPTIONS:
            parse_options(init, INIT_OPTIONS[init], given)
        return given


def parse_options(init: str, schema: type[Section], given: dict[str, Any]) -> Section:
    """The options of an init, complete. Raises `InputError` that names the option and the nearest one that exists."""
    known = list(schema.model_fields)
    for option in given:
        if option not in known:
            close = difflib.get_close_matches(str(option), known, n=1, cutoff=0.5)
            raise InputError(
                f"the init {init!r} has no option {option!r}; it has {', '.join(known) or 'none'}",
                kind="unknown",
                key=f"adapter.init_options.{option}",
                fix=f"did you mean {close[0]!r}?" if close else None,
            )
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{option} of the init {init!r}: {first['msg']} (got {first['input']!r})",
            kind="invalid",
            key=f"adapter.init_options.{option}",
        ) from error
