"""`pe-rlhf export`: what a run has trained, for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class ExportFormat(StrEnum):
    """The forms that a role is exported in."""

    lora = "lora"
    merged = "merged"


class ExportDtype(StrEnum):
    """The dtypes of a merged checkpoint."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    run: Annotated[Path, typer.Argument(help="The directory of a run, of a stage in it, or of an adapter.")],
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="lora: PEFT's files, for the original base; merged: a full checkpoint."),
    ] = ExportFormat.lora,
    to: Annotated[Path | None, typer.Option(help="Where to; <run>/export/<role>-<format> if left out.")] = None,
    role: Annotated[str | None, typer.Option(help="policy (default), value or reward.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="best, newest or a step's number; what the stage ended with if left out.")
    ] = None,
    dtype: Annotated[
        ExportDtype | None,
        typer.Option(help="merged: dtype of the weights; the base's if left out. Narrow ones lose some of the update."),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(help="Of a run with tasks: TASK=WEIGHT, repeatable; a policy of the tasks' parts, weighted."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a trained role for PEFT, vLLM and transformers.

    Any adapter init becomes a plain LoRA of rank 2r (r where B starts at zero) on the unmodified base, or is merged
    into fresh base weights. A model card comes with it.
    """
    from pe_rlhf.config.load import apply_overrides
    from pe_rlhf.runs.layout import refuse_without_roles, wanted_roles

    # Before torch and transformers are imported, which takes seconds.
    (refuse_without_roles if checkpoint is None else wanted_roles)(run, role)

    from pe_rlhf.runs.export import export_role

    weights: dict[str, Any] | None = {} if mix else None
    for each in mix or ():
        name, equals, value = each.partition("=")
        apply_overrides(found := {}, [f"weight={value}" if equals else each])
        assert weights is not None
        weights[name] = found["weight"]
    typer.echo(export_role(run, form.value, to, role, checkpoint, None if dtype is None else dtype.value, weights))
