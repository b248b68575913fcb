"""`pe-rlhf run`: the stages of a recipe, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reward.errors import InputError

if TYPE_CHECKING:
    from pe_rlhf.config import Recipe


def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's file, or the name of one that comes along: quickstart, smoke.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: ppo.kl.beta=0.1 adapter.init=pissa seed=1 …")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where everything of this run goes; runs/<recipe's name> if left out.")
    ] = None,
    first: Annotated[
        str | None, typer.Option("--from", help="Start at this stage; it and later ones that are there are put aside.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", help="Stop after this stage.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue: finished stages stay, the next one goes on.")
    ] = False,
    may_change: Annotated[
        list[str] | None,
        typer.Option(help="With --resume: a key that may differ from the recipe the run was started with; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data and functions; print the plan.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run the stages of a recipe one after the other.

    Each stage writes a folder in the run directory (recipe.yaml, metrics.jsonl, summary.json, its adapter) and the next
    one reads it from there. The run ends with a table and report.html.
    """
    loaded, target, stages = plan(recipe, overrides, run_dir, first, last)

    from pe_rlhf.model.device_plan import plan_lines, refuse_impossible, settle
    from pe_rlhf.runs.layout import STAGE_INFO, RunFiles
    from pe_rlhf.stages.outcome_table import outcome_table
    from pe_rlhf.stages.pipeline import check_inputs, cost_lines, run_recipe
    from pe_rlhf.system.processes import is_main
    from pe_rlhf.system.progress import console
    from reward.judges.user_code import time_limit

    if dry_run:
        with time_limit(loaded.function_timeout):
            check_inputs(loaded, stages, run_dir=target)
        typer.echo(f"{loaded.name}: {' → '.join(stages)} with {loaded.model}, into {target}; the recipe is valid")
        for stage in stages:
            typer.echo(f"  {stage}: {STAGE_INFO[stage].sentence}")
        settled = settle(loaded)
        typer.echo("\n".join([*cost_lines(settled, stages), *plan_lines(settled, stages)]))
        refuse_impossible(settled)
        return
    start = "resume" if resume else "new" if first is None else "anew"
    summaries = run_recipe(loaded, target, stages, start, may_change or ())
    if not is_main():
        return
    console.print(outcome_table(loaded.name, summaries))
    typer.echo(f"report: {RunFiles(target).report.resolve()}")


def plan(
    recipe: str, overrides: list[str] | None, run_dir: Path | None, first: str | None, last: str | None
) -> tuple[Recipe, Path, list[str]]:
    """The recipe, the run's directory and the stages to run. Raises `InputError` for a recipe that cannot be run."""
    from pe_rlhf.config.load import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe), overrides)
    if loaded.compare is not None:
        fix = f"run it with `pe-rlhf compare {recipe}`"
        raise InputError(f"{recipe} is a comparison", kind="conflict", key="compare", file=recipe, fix=fix)

    # Imported here: torch and transformers take seconds, and a mistake in the recipe should be told at once.
    from pe_rlhf.stages.pipeline import select_stages

    return loaded, run_dir or Path("runs") / loaded.name, select_stages(loaded, first, last)
