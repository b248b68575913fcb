"""Running what a comparison has planned: each run in a process of its own, so that one that dies takes no other along.

A finished run is never run again, and an interrupted one goes on from its checkpoint. A failed run has `failure.json`
in its folder and stays as it is until it is to be tried again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pe_rlhf.comparison.own_process import call
from pe_rlhf.comparison.plan import Plan, PlannedRun, arms_of
from pe_rlhf.comparison.run_result import Status
from pe_rlhf.config.load import changes_since, load_recipe, save_recipe
from pe_rlhf.runs.layout import ComparisonFiles, RunFiles
from pe_rlhf.runs.task_table import has_finished
from pe_rlhf.system.failures import IN_USE, Stopped
from pe_rlhf.system.files import read_json, write_json
from pe_rlhf.system.progress import say
from reward.errors import InputError

SECONDS_BETWEEN_LOOKS = 15.0
# Keys of a comparison that change no run of it: which there are is looked at one by one.
MAY_DIFFER = tuple(f"compare.{key}" for key in ("arms", "grid", "seeds", "target_reward", "collapse", "nodes"))


@dataclass(frozen=True)
class Slice:
    """The k-th of n shares of a list."""

    number: int = 1
    count: int = 1

    def of(self, items: Sequence[PlannedRun]) -> list[PlannedRun]:
        return list(items)[self.number - 1 :: self.count]


@dataclass(frozen=True)
class RunState:
    """Whether a run has finished or failed; a failure has a message and a kind (None: an older version wrote it)."""

    status: Status
    message: str = ""
    kind: str | None = None


def state_of(run: PlannedRun) -> RunState:
    """The state of a run, read from its folder."""
    files = RunFiles(run.folder)
    stages = run.recipe.stages
    if has_finished(run.recipe, files) if run.recipe.tasks else all(files.stage(s).summary.is_file() for s in stages):
        return RunState("finished")
    if not files.failure.is_file():
        return RunState("unfinished")
    with suppress(InputError):  # cut by a kill: not known to have failed
        failure = read_json(files.failure)
        return RunState("failed", str(failure.get("message", "")), failure.get("kind"))
    return RunState("unfinished")


def run_all(runs: Sequence[PlannedRun], *, retry: bool, ending: Callable[[PlannedRun], str] = lambda _: "") -> None:
    """Run what has not finished, one after the other. `ending` describes a finished run in a few words.

    Raises `Stopped` where this process, or a run, was asked to stop; the same command goes on with the rest.
    """
    before = {run.name: state_of(run).status for run in runs}
    wanted = ("unfinished", "failed") if retry else ("unfinished",)
    for status in ("finished", "failed"):
        if status not in wanted and (names := [name for name, found in before.items() if found == status]):
            say(f"{status} before, left as {'they are' if len(names) > 1 else 'it is'}: {'; '.join(names)}")
    todo = [run for run in runs if before[run.name] in wanted]
    for number, run in enumerate(todo, start=1):
        say(f"[{number}/{len(todo)}] {run.name}: running, {run.folder}")
        start = time.monotonic()
        _run(run)
        state = state_of(run)
        took = f"{time.monotonic() - start:.0f} s"
        say(f"[{number}/{len(todo)}] {run.name}: {state.status} after {took}: {state.message or ending(run)}")


def run_to_end(run: PlannedRun, *, retry: bool) -> None:
    """Run one that others need as well; while another process has it, wait for that one."""
    run_all([run], retry=retry)
    while state_of(run).status == "unfinished":
        time.sleep(SECONDS_BETWEEN_LOOKS)
        run_all([run], retry=False)


def _run(run: PlannedRun) -> None:
    """One run, to its end. It leaves `failure.json` itself where it fails; where it was killed, this does."""
    run.folder.mkdir(parents=True, exist_ok=True)
    files = RunFiles(run.folder)
    files.failure.unlink(missing_ok=True)
    recipe = run.folder.with_name(f"{run.folder.name}.yaml")
    save_recipe(run.recipe, recipe)
    code, asked = call(["run", str(recipe), "--run-dir", str(run.folder), "--resume"], files.log)
    if code == 0 and not asked:
        return
    if asked or code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        raise Stopped(f"compare: stopped during {run.name}", asked or code - 128, "the same command goes on from there")
    if code == IN_USE:
        say(f"{run.name}: in use by another process, left to it")
    elif not files.failure.is_file():
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        write_json(files.failure, {"message": f"the run {how}; see {files.log}", "kind": "process", "exit_code": code})


def refuse_other_comparison(plan: Plan) -> None:
    """Raise `InputError` where the folder has a comparison with other settings, or runs that this one lacks.

    Arms and seeds may be added, and what only the report computes with may change.
    """
    saved = ComparisonFiles(plan.root).recipe
    if not saved.is_file():
        return
    before = load_recipe(saved).compare
    lost = [] if before is None else [arm.name for arm in arms_of(before) if arm not in plan.arms]
    lost += [] if before is None else [f"seed {seed}" for seed in before.seeds if seed not in plan.config.seeds]
    changed = changes_since(plan.base, saved, MAY_DIFFER, moved=True)
    if lost or changed:
        what = f"it has {', '.join(lost)}, which this one lacks" if lost else changed
        raise InputError(
            f"{plan.root} holds another comparison: {what}",
            kind="changed",
            key="--dir",
            file=saved,
            fix="give another --dir, or the recipe that the comparison was started with",
        )


def refuse_changed(runs: Sequence[PlannedRun]) -> None:
    """Raise `InputError` where one of the runs was started with another recipe.

    A run that was copied here from another machine may have its files at other places.
    """
    for run in runs:
        recipe = RunFiles(run.folder).recipe
        if recipe.is_file() and (changed := changes_since(run.recipe, recipe, moved=True)):
            raise InputError(
                f"{run.folder} was run with another recipe than this comparison's: {changed}",
                kind="changed",
                file=recipe,
                fix="give another --dir, or the recipe that the comparison was started with",
            )
