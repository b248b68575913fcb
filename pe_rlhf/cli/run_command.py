"""`pe-rlhf run`: the stages of a recipe, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reward.errors import InputError

if TYPE_CHECKING:
    from pe_rlhf.config import Recipe
    from pe_rlhf.runs.changes import Start


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
        str | None,
        typer.Option("--from", help="Start at this stage, or task; it and later ones that are there are put aside."),
    ] = None,
    last: Annotated[str | None, typer.Option("--to", help="Stop after this stage, or task.")] = None,
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
    start = "resume" if resume else "new" if first is None else "anew"
    if loaded.tasks is not None:
        _run_tasks(loaded, target, (first, last), start, dry_run=dry_run, may_change=may_change)
        return

    if dry_run:
        _show(loaded, target, stages)
        return
    from pe_rlhf.runs.layout import RunFiles
    from pe_rlhf.stages.outcome_table import outcome_table
    from pe_rlhf.stages.pipeline import run_recipe
    from pe_rlhf.system.processes import is_main
    from pe_rlhf.system.progress import console

    summaries = run_recipe(loaded, target, stages, start, may_change or ())
    if not is_main():
        return
    console.print(outcome_table(loaded.name, summaries))
    typer.echo(f"report: {RunFiles(target).report.resolve()}")


def _show(recipe: Recipe, target: Path, stages: list[str]) -> None:
    """Check the inputs of the stages, and say what they would do and take."""
    from pe_rlhf.runs.layout import STAGE_INFO

    parts = checked(recipe, target, stages)
    typer.echo(f"{recipe.name}: {' → '.join(stages)} with {recipe.model}, into {target}; the recipe is valid")
    for stage in stages:
        typer.echo(f"  {stage}: {STAGE_INFO[stage].sentence}")
    show_cost(parts)


def checked(
    recipe: Recipe,
    target: Path,
    stages: list[str],
    between: tuple[str | None, str | None] = (None, None),
    *,
    wait: bool = False,
) -> list[tuple[Recipe, list[str]]]:
    """The recipe and its stages, or those of each of its tasks, after a look at all that can be wrong with them.

    wait: whether a vLLM server that is not there may still come up, within its `start_timeout`.
    """
    from reward.judges.user_code import time_limit

    with time_limit(recipe.function_timeout):
        if recipe.tasks is None:
            from pe_rlhf.stages.preflight import check_inputs

            check_inputs(recipe, stages, run_dir=target, wait=wait)
            return [(recipe, stages)]
        from pe_rlhf.stages.tasks import check_tasks, select_tasks, task_recipes

        every = list(task_recipes(recipe, target))
        recipes = [every[number] for number in select_tasks(recipe, *between)]
        check_tasks(recipe, recipes, target, wait=wait)
        return [(own, own.stages) for own in recipes]


def show_cost(parts: list[tuple[Recipe, list[str]]], ranks: int = 1, *, err: bool = False) -> None:
    """Say what each part takes of the memory, on stdout unless `err`, and refuse what cannot fit."""
    # torch and transformers, which take seconds, are imported when the cheap checks have passed.
    from pe_rlhf.model.device_plan import plan_lines, refuse_impossible, settle
    from pe_rlhf.stages.preflight import cost_lines

    for recipe, stages in parts:
        settled = settle(recipe)
        name = [f"  {recipe.name}: {' → '.join(stages)}"] if len(parts) > 1 else []
        lines = [*name, *cost_lines(settled, stages), *plan_lines(settled, stages, ranks)]
        typer.echo("\n".join(lines), err=err)
        refuse_impossible(settled, ranks)


def _run_tasks(
    recipe: Recipe,
    target: Path,
    between: tuple[str | None, str | None],
    start: Start,
    *,
    dry_run: bool,
    may_change: list[str] | None,
) -> None:
    """The same for a recipe with tasks, of which --from and --to name the first and the last."""
    from pe_rlhf.runs.layout import RunFiles
    from pe_rlhf.stages.outcome_table import task_outcome_table
    from pe_rlhf.stages.tasks import run_tasks
    from pe_rlhf.system.processes import is_main
    from pe_rlhf.system.progress import console

    if may_change:
        raise InputError(
            "--may-change: the tasks of a run have one recipe",
            kind="conflict",
            key="--may-change",
            fix="--from TASK runs that task and all after it anew with another",
        )
    if dry_run:
        parts = checked(recipe, target, [], between)
        names = " → ".join(task.name for task in recipe.tasks or [])
        typer.echo(f"{recipe.name}: tasks {names} with {recipe.model}, into {target}; the recipe is valid")
        show_cost(parts)
        return
    table = run_tasks(recipe, target, *between, start)
    if is_main():
        console.print(task_outcome_table(recipe.name, table))
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

    from pe_rlhf.runs.own_output import claim_run
    from pe_rlhf.stages.preflight import check_inits, select_stages

    check_inits(loaded)
    target = run_dir or Path("runs") / loaded.name
    claim_run(target)
    # Of a recipe with tasks, --from and --to name some of them.
    return loaded, target, [] if loaded.tasks is not None else select_stages(loaded, first, last)
