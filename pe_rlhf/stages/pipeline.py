"""A whole run: the stages of a recipe, one after the other, in one run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pe_rlhf.config import STAGES, Recipe
from pe_rlhf.config.load import load_recipe, save_recipe
from pe_rlhf.data.codec import dated
from pe_rlhf.model.device_plan import refuse_impossible, settle
from pe_rlhf.model.loading import find_device
from pe_rlhf.model.names import resolve_model
from pe_rlhf.optim.zero import init_processes
from pe_rlhf.report.run_page import write_report
from pe_rlhf.runs.changes import Resumption, Start, find_resumption, note_changes
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.metrics import read_summary
from pe_rlhf.stages import evaluate, ppo, preferences, reward, sft
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.preflight import check_inputs, cost_lines
from pe_rlhf.system.determinism import deterministic, is_refused
from pe_rlhf.system.distributed import late_rank, on_main, world_size
from pe_rlhf.system.failures import ElsewhereError, Stopped, TrainingError, failure_noted
from pe_rlhf.system.files import locked
from pe_rlhf.system.memory import is_out_of_memory, reset_peak_memory
from pe_rlhf.system.processes import launched
from pe_rlhf.system.progress import say
from reward.errors import InputError
from reward.judges.user_code import time_limit

RUN: dict[str, Callable[[StageContext[Any]], dict[str, Any]]] = {
    "sft": sft.run,
    "preferences": preferences.run,
    "reward": reward.run,
    "ppo": ppo.run,
    "evaluate": evaluate.run,
}


def run_recipe(
    recipe: Recipe, run_dir: Path, stages: list[str], start: Start = "new", may_change: Sequence[str] = ()
) -> dict[str, Any]:
    """Run stages of a recipe. Returns the summary of every stage that the run directory holds at the end.

    Args:
        start: `new` refuses a stage that is there already. `resume` leaves finished stages as they are and continues an
            unfinished one from its newest checkpoint. `anew` puts the first of the stages and all after it aside
            (`<stage>.old-1`) and runs them again.
        may_change: to resume, keys or starts of keys that differ from the recipe that the run was started with.
            Those that only say where it computes may differ in any case; those of a finished stage may not, except that
            its training may become longer.

    Raises `InputError` for a stage whose predecessor has not finished, and for a run directory that another process is
    using; `TrainingError` for a disk that fails or is full.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    files = RunFiles(run_dir)
    with ExitStack() as held:
        held.enter_context(deterministic(recipe.deterministic))
        init_processes(recipe.deepspeed is not None, recipe.backbone.device, recipe.rank_timeout)
        held.enter_context(time_limit(recipe.function_timeout))
        on_main(lambda: held.enter_context(locked(run_dir)) if run_dir.is_dir() else None)
        # In the lock: what another run is still writing is not read, and for a folder in use nothing is fetched.
        saved = load_recipe(files.recipe) if start != "new" and files.recipe.is_file() else None
        find_device(recipe.backbone.device)  # one that is not here has no memory to plan for
        recipe = with_date(on_main(lambda: settle(recipe, saved, fetch=True)), saved)
        held.enter_context(dated(recipe.date))
        resumption = on_main(lambda: find_resumption(recipe, run_dir, stages, start, may_change))
        # From here on a failure is the run's: before, it was about the command.
        on_main(lambda: held.enter_context(_failure_noted(run_dir)) if run_dir.is_dir() else None)
        again = [] if resumption.extended is None else STAGES[STAGES.index(resumption.extended) :]
        finished = [
            stage
            for stage in stages
            if start != "anew" and stage not in again and read_summary(files.stage(stage)) is not None
        ]
        on_main(lambda: check_inputs(recipe, stages, finished, run_dir))
        if launched() and recipe.sft is None:
            # A model that is made here is made once: transformers saves nothing on other ranks.
            on_main(lambda: resolve_model(recipe.model))
        on_main(lambda: refuse_impossible(recipe, world_size()))
        on_main(lambda: _prepare(held, recipe, run_dir, stages, start, resumption))
        on_main(lambda: files.failure.unlink(missing_ok=True))  # of an earlier try
        # No report before a stage has run: an unfinished one may have a line that a kill left half written.
        for stage in stages:
            if read_summary(files.stage(stage)) is not None:
                say(f"{stage}: finished before, left as it is")
                continue
            run_stage(StageContext(recipe, run_dir, stage), RUN[stage])
            on_main(lambda: write_report(run_dir))
        if set(stages) == set(finished):
            on_main(lambda: write_report(run_dir))
    return {stage: summary for stage in recipe.stages if (summary := read_summary(files.stage(stage))) is not None}


def with_date(recipe: Recipe, saved: Recipe | None) -> Recipe:
    """The recipe with the day that its chat template prints: of the `saved` recipe where there is one, else today.

    A run of a version without that key has none, and stays without.
    """
    today = on_main(lambda: date.today().isoformat())
    day = recipe.date or (today if saved is None else saved.date)
    return recipe.model_copy(update={"date": day})


@contextmanager
def _failure_noted(run_dir: Path) -> Iterator[None]:
    """Where the run fails, leave `failure.json` and a page that says so."""
    try:
        with failure_noted(RunFiles(run_dir).failure):
            yield
    except (Stopped, ElsewhereError):
        raise
    except Exception:
        with suppress(Exception):  # what is wrong with the page must not hide the error
            write_report(run_dir)
        raise


def _prepare(
    held: ExitStack, recipe: Recipe, run_dir: Path, stages: list[str], start: Start, resumption: Resumption
) -> None:
    """Make the run directory, where it is not there yet, and make sure that what is in it stays whole."""
    if not run_dir.is_dir():
        run_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(run_dir))
        held.enter_context(_failure_noted(run_dir))
    saved = RunFiles(run_dir).recipe
    _refuse_overwriting(recipe, run_dir, stages, start)
    if start == "anew":
        _put_aside(run_dir, stages[0])
    if (stage := resumption.extended) is not None:
        RunFiles(run_dir).stage(stage).summary.unlink()  # without it the stage goes on from its last checkpoint
        for following in STAGES[STAGES.index(stage) + 1 :][:1]:
            _put_aside(run_dir, following)
    if saved.is_file() and all(read_summary(RunFiles(run_dir).stage(stage)) is not None for stage in stages):
        return  # nothing is run, so that the record stays what was run
    note_changes(resumption, run_dir, stages)
    save_recipe(recipe, saved)


def run_stage(context: StageContext[Any], run: Callable[[StageContext[Any]], dict[str, Any]]) -> None:
    """Run one stage in its folder. Raises what it raises with the stage's name; `TrainingError` for a full disk."""
    context.folder.mkdir(exist_ok=True)
    save_recipe(context.recipe, context.files.recipe)
    reset_peak_memory()
    for line in cost_lines(context.recipe, [context.stage]):
        say(line)
    try:
        with context.resources:
            summary = run(context)
    except TrainingError as error:
        raise error.at(context.stage) from error
    except OSError as error:
        message = f"{context.stage}: {context.folder} cannot be written or read: {error}"
        raise TrainingError(message, kind="disk", file=error.filename or context.folder) from error
    except (RuntimeError, MemoryError) as error:
        if (failure := _known(context.stage, error)) is None:
            raise
        raise failure from error
    for warning in summary.get("warnings", []):
        say(f"warning: {context.stage}: {warning}")
    say(f"{context.stage}: done in {summary['seconds']:.0f} s, {context.folder}")


def _known(stage: str, error: BaseException) -> TrainingError | None:
    """The failure of a stage that an error of torch means, where it is one that has a remedy."""
    if is_out_of_memory(error):
        return _out_of_memory(stage, error)
    if is_refused(error):
        said = str(error).partition(",")[0]
        return TrainingError(
            f"{stage}: {said}", kind="conflict", key="deterministic", fix="go on with --resume deterministic=false"
        )
    return None if (late := late_rank(error)) is None else late.at(stage)


def _out_of_memory(stage: str, error: BaseException) -> TrainingError:
    """What to lower first, stage by stage; what was saved is whole, so the run can be resumed with it."""
    lower = {
        "sft": "sft.micro_batch_size",
        "preferences": "preferences.sampling.batch_size",
        "reward": "reward.micro_batch_tokens",
        "ppo": "ppo.micro_batch_tokens (updates) or ppo.rollout.batch_size (sampling)",
        "evaluate": "evaluate.sampling.batch_size",
    }
    said = str(error).partition("\n")[0] or type(error).__name__
    return TrainingError(
        f"{stage}: out of memory: {said}",
        kind="memory",
        key=lower[stage].partition(" ")[0],
        fix=f"lower {lower[stage]}, set backbone.gradient_checkpointing: true, and go on with --resume",
    )


def _refuse_overwriting(recipe: Recipe, run_dir: Path, stages: list[str], start: Start) -> None:
    """Raise `InputError` where running these stages would mix runs or run over one. Nothing is touched before."""
    for stage in recipe.stages[: recipe.stages.index(stages[0])]:
        if read_summary(RunFiles(run_dir).stage(stage)) is None:
            raise InputError(
                f"{run_dir} holds no finished {stage} stage, which {stages[0]} needs",
                kind="unfinished",
                key=stage,
                file=run_dir,
                fix=f"run it first, by --from {stage}",
            )
    for stage in stages if start == "new" else ():
        if (folder := RunFiles(run_dir).stage(stage).folder).exists():
            raise InputError(
                f"{folder} is there already",
                kind="exists",
                key=stage,
                file=folder,
                fix=f"--resume continues it, --from {stage} runs it anew, another --run-dir leaves it as it is",
            )


def _put_aside(run_dir: Path, first: str) -> None:
    """Rename the folders of a stage and of all after it: what came of the old ones is of no use to the new ones."""
    for stage in STAGES[STAGES.index(first) :]:
        folder = RunFiles(run_dir).stage(stage).folder
        if folder.exists():
            aside = next(p for i in range(1, 10_000) if not (p := run_dir / f"{stage}.old-{i}").exists())
            folder.rename(aside)
            say(f"{folder} was put aside as {aside.name}")
