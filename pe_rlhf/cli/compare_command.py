"""`pe-rlhf compare`: run the arms of a comparison and compare them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reward.errors import InputError

if TYPE_CHECKING:
    from pe_rlhf.comparison.plan import Plan
    from pe_rlhf.comparison.runner import Slice

PARTS = ("shared", "trials", "runs", "report")


@dataclass(frozen=True)
class Only:
    """The parts of a comparison to do, and the share of the trials and of the runs."""

    parts: tuple[str, ...]
    share: Slice


def compare(
    recipe: Annotated[str, typer.Argument(help="A recipe with a compare section: its file, or compare_inits_small, …")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: model=… compare.seeds=[4,5] ppo.steps=20 …")
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--dir", help="Where all runs go; comparisons/<recipe's name> if left out.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="A part: shared, trials, runs, report; a share K/N of trials and runs; or both: runs:K/N."),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try runs that failed once more.")] = False,
    submit: Annotated[
        str | None, typer.Option(help="slurm: submit all parts as job arrays; print: show the commands for a shell.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data and functions; list the runs.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run the arms of a comparison with every seed, and write report.html, summary.json and results.csv.

    Every run is an ordinary run directory and a process of its own. After an interruption the same command goes on:
    finished runs are not run again, and failed runs only with --retry. If several machines run a share each, with
    --only, copy (rsync) their directories into one and make the report there with --only report.
    """
    from pe_rlhf.comparison.plan import load_plan
    from pe_rlhf.comparison.runner import refuse_other_comparison
    from pe_rlhf.config.load import find_recipe, save_recipe
    from pe_rlhf.runs.layout import ComparisonFiles
    from pe_rlhf.runs.own_output import claim_comparison

    path = find_recipe(recipe)
    plan = load_plan(path, root, overrides or [])
    chosen = _parse_only(only)
    claim_comparison(plan.root)
    refuse_other_comparison(plan)
    if dry_run:
        _check(plan)
        _show(plan)
        return
    if submit is not None:
        _submit(plan, submit)
        return
    plan.root.mkdir(parents=True, exist_ok=True)
    save_recipe(plan.base, ComparisonFiles(plan.root).recipe)
    if chosen.parts != ("report",):
        _check(plan)
        _run_parts(plan, chosen, retry)
    if "report" in chosen.parts:
        _report(plan)


def _parse_only(text: str | None) -> Only:
    """Raises `InputError` for a text that is neither a part nor a share."""
    from pe_rlhf.comparison.runner import Slice

    if text is None:
        return Only(PARTS, Slice())
    match = re.fullmatch(r"(?:(shared|trials|runs|report)|(?:(trials|runs):)?(\d+)/(\d+))", text)
    if match is None:
        raise InputError(
            f"--only {text}: no such part",
            kind="unknown",
            key="--only",
            fix="give shared, trials, runs, report, K/N, trials:K/N or runs:K/N",
        )
    part, of_part, number, count = match.groups()
    if part:
        return Only((part,), Slice())
    if not 1 <= int(number) <= int(count):
        raise InputError(f"--only {text}: K must be between 1 and N", kind="invalid", key="--only")
    return Only((of_part,) if of_part else ("trials", "runs"), Slice(int(number), int(count)))


def _check(plan: Plan) -> None:
    """Check all arms before anything runs, so that a mistake in the last arm is reported at once."""
    from pe_rlhf.stages.preflight import check_inits, check_inputs

    arms = [next(iter(plan.runs(arm).values())).recipe for arm in plan.arms]
    for recipe in arms:
        check_inits(recipe)
    if plan.base.tasks is not None:
        from pe_rlhf.stages.joint_task import check_joint
        from pe_rlhf.stages.tasks import check_tasks, task_recipes

        check_tasks(plan.base, list(task_recipes(plan.base, plan.root)), plan.root)
        for recipe in arms:
            for each in task_recipes(recipe, plan.root):
                check_inits(each)
            if recipe.is_joint:
                check_joint(recipe, plan.root)
    check_inputs(plan.base, plan.base.stages)


def _run_parts(plan: Plan, chosen: Only, retry: bool) -> None:
    from pe_rlhf.comparison.sweep import need_shared, run_arms, run_shared, run_trials

    if "shared" in chosen.parts:
        run_shared(plan)
    if "trials" in chosen.parts or "runs" in chosen.parts:
        need_shared(plan)
    if "trials" in chosen.parts:
        run_trials(plan, chosen.share, retry=retry)
    if "runs" in chosen.parts:
        run_arms(plan, chosen.share, retry=retry)


def _report(plan: Plan) -> None:
    """Write the results so far: a page, JSON, and a table.

    Raises `TrainingError` if runs have failed, after everything is written.
    """
    from pe_rlhf.comparison.results import write_results
    from pe_rlhf.system.failures import TrainingError
    from pe_rlhf.system.progress import console

    result = write_results(plan)
    console.print(result.table)
    typer.echo(f"report: {plan.root / 'report.html'}")
    if result.unfinished:
        typer.echo(f"{len(result.unfinished)} runs have not finished: {'; '.join(result.unfinished)}", err=True)
    if result.failed:
        raise TrainingError(
            f"compare: {len(result.failed)} runs failed: {'; '.join(result.failed)}",
            kind="unfinished",
            file=plan.root,
            fix="--retry runs them again",
        )


def _show(plan: Plan) -> None:
    if plan.shared:
        typer.echo(f"once for all: {' → '.join(plan.shared.recipe.stages)}")
    for arm in plan.arms:
        typer.echo(f"{arm.name}: {', '.join(f'{key}={value}' for key, value in arm.changes.items())}")
    trials = sum(len(plan.trials(arm)) for arm in plan.arms)
    runs = len(plan.arms) * len(plan.config.seeds)
    seeds = ", ".join(map(str, plan.config.seeds))
    typer.echo(f"{len(plan.arms)} arms, seeds {seeds}: {trials} trials and {runs} runs, into {plan.root}")


def _submit(plan: Plan, how: str) -> None:
    from pe_rlhf.comparison.submit import slurm_script, submit

    if how not in ("slurm", "print"):
        raise InputError(f"--submit {how}: no such way", kind="unknown", key="--submit", fix="give slurm or print")
    script = slurm_script(plan)
    typer.echo(script if how == "print" else submit(script))
