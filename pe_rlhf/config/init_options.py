"""The options of the adapter inits, `adapter.init_options` of a recipe: known without torch, so a slip is told at once.

An init that someone registered brings a schema of its own (`adapters/registry.py`); it is checked when a run starts.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, ValidationError

from pe_rlhf.config.section import Positive, Rate, Section


class NoOptions(Section):
    """An init without options."""


class SampledOptions(Section):
    """What every init that looks at data has."""

    batch_size: Positive = Field(default=8, description="sequences, or pairs, in a batch that the init reads")


class GaussianOptions(Section):
    std: float | None = Field(
        default=None, gt=0, description="standard deviation of A's entries; default: r^-½ (PEFT uses 1/r)"
    )


class PissaOptions(Section):
    niter: Positive | None = Field(
        default=None, description="randomised SVD with this number of power iterations; default: exact SVD"
    )


class RlpoOptions(PissaOptions):
    pass


class LoraGAOptions(SampledOptions):
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = Field(
        default="ArB2r",
        description="which singular vectors: ArB2r: the first r for A, the next r for B; A2rBr: the other way"
        " round; ArBr: alternating; random: a random split of the first 2r",
    )
    scale: Literal["stable", "unit", "gd", "weightS"] = Field(
        default="stable",
        description="stable: m^¼/√gamma; unit: 1; gd: 1/s; weightS: mean of √(W's first r singular values / s)",
    )
    gamma: float = Field(default=16.0, gt=0, description="γ of the scale `stable`; a larger γ means a smaller start")
    niter: Positive | None = Field(
        default=None,
        description="randomised SVD of the gradient with this number of power iterations; default: exact SVD",
    )


class CordaOptions(SampledOptions):
    mode: Literal["kpm", "ipm"] = Field(
        default="kpm",
        description="kpm: the r smallest directions, which keeps what the model knows; ipm: the r largest, which"
        " learns the data",
    )
    damping: Rate = Field(
        default=0.01,
        description="share of the covariance's mean diagonal that is added to it; doubled until the inverse is"
        " accurate",
    )


class EvaOptions(SampledOptions):
    center: bool = Field(default=False, description="subtract the mean from the layer's inputs, as PEFT does")


class CrossTaskOptions(SampledOptions):
    diversity: float | None = Field(
        default=None,
        gt=0,
        description="δ of the term δ·log det, which keeps the r directions apart; default: no bound on δ, so the"
        " directions are orthonormal",
    )
    scale: Literal["stable", "unit"] = Field(default="stable", description="stable: m^¼/√gamma; unit: 1")
    gamma: float = Field(default=16.0, gt=0, description="γ of the scale `stable`; a larger γ means a smaller start")


INIT_OPTIONS: dict[str, type[Section]] = {
    "lora": NoOptions,
    "gaussian": GaussianOptions,
    "orthogonal": NoOptions,
    "olora": NoOptions,
    "pissa": PissaOptions,
    "milora": NoOptions,
    "lora_ga": LoraGAOptions,
    "rlpo": RlpoOptions,
    "rlmo": NoOptions,
    "corda": CordaOptions,
    "eva": EvaOptions,
    "cross_task": CrossTaskOptions,
}


def parse_options(init: str, schema: type[Section], given: dict[str, Any]) -> Section:
    """The options of an init, complete. Raises ValueError with one sentence that names the option and the nearest."""
    known = list(schema.model_fields)
    for option in given:
        if option not in known:
            close = difflib.get_close_matches(str(option), known, n=1, cutoff=0.5)
            listed = f"it has {', '.join(known)}" if known else "it has none"
            hint = f"did you mean {close[0]!r}?" if close else listed
            raise ValueError(f"the init {init!r} has no option {option!r}; {hint}")
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key} of the init {init!r}: {first['msg']} (got {first['input']!r})") from error
