"""A whole run: the stages of a recipe, one after the other, in one run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.config import STAGES, OptimizerConfig, Recipe, SamplerConfig
from pe_rlhf.config.load import load_deepspeed_config, load_recipe, save_recipe
from pe_rlhf.config.reward_source import OWN_STAGE
from pe_rlhf.data.codec import dated, read_template
from pe_rlhf.data.rows import MAX_BAD_SHARE, load_examples, load_preferences, load_prompt_rows
from pe_rlhf.model.device_plan import refuse_impossible, settle
from pe_rlhf.model.loading import find_device
from pe_rlhf.model.names import check_model_name, resolve_model
from pe_rlhf.optim.zero import init_processes
from pe_rlhf.report.run_page import write_report
from pe_rlhf.rollout.make import check_installed
from pe_rlhf.runs.changes import Resumption, Start, find_resumption, note_changes
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.metrics import check_tracking, read_summary
from pe_rlhf.scoring.ensemble import find_ensemble
from pe_rlhf.scoring.judge_scorer import asked_judge, check_against
from pe_rlhf.scoring.model_judges import check_judge
from pe_rlhf.scoring.remote import check_columns
from pe_rlhf.scoring.scorers import find_reward
from pe_rlhf.scoring.weighted import check_where
from pe_rlhf.stages import evaluate, ppo, preferences, reward, sft
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.preflight import check_model
from pe_rlhf.stages.previous_policy import find_previous
from pe_rlhf.stages.reward_members import members_of
from pe_rlhf.system.determinism import deterministic, is_refused
from pe_rlhf.system.distributed import late_rank, on_main, world_size
from pe_rlhf.system.failures import ElsewhereError, Stopped, TrainingError, failure_noted
from pe_rlhf.system.files import locked
from pe_rlhf.system.memory import is_out_of_memory, reset_peak_memory
from pe_rlhf.system.processes import launched
from pe_rlhf.system.progress import say
from reward.errors import InputError
from reward.judges import load_score_function
from reward.judges.user_code import time_limit
from reward.records import Prompt

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
        init_processes(recipe.deepspeed is not None, recipe.rank_timeout)
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


def check_inputs(recipe: Recipe, stages: list[str], finished: Sequence[str] = (), run_dir: Path | None = None) -> None:
    """Look at everything that can be wrong with names, data and functions before a model is loaded.

    Of the `finished` stages the data is still looked at, but they do not run again.
    """
    if recipe.deepspeed is not None:
        load_deepspeed_config(recipe.deepspeed)
    if recipe.chat_template not in ("auto", "none"):
        read_template(recipe.chat_template)
    check_tracking(recipe.tracking)
    if recipe.sft is None or "sft" in stages:
        check_model_name(recipe.model)
    if launched() and "sft" in stages and "sft" not in finished:
        raise InputError(
            "sft: TRL's trainer is for one process",
            kind="conflict",
            key="sft",
            fix="run it first with `pe-rlhf run RECIPE --to sft`, then launch the other stages with --resume",
        )
    check_inits(recipe)
    first: dict[str, Prompt] = {}
    for stage in stages:
        section = getattr(recipe, stage)
        check_installed(getattr(section, "rollout", None) or getattr(section, "sampling", None) or SamplerConfig())
        if (prompts := getattr(section, "prompts", None)) is not None:
            share = getattr(section, "max_bad_share", MAX_BAD_SHARE)
            rows, _ = load_prompt_rows(prompts, f"{stage}.prompts", lambda row: row, share)
            first[stage] = rows[0].prompt
            if recipe.ppo is not None and stage in ("ppo", "evaluate"):
                columns = {name for row in rows for name in row.columns}
                check_where(recipe.ppo.reward, columns)
                for source in recipe.ppo.reward:
                    check_columns(source.server.columns, columns)
                    check_against(source, columns)
                    if source.function is not None:
                        load_score_function(source.function, columns, source.arguments)
        if (judge := getattr(section, "judge", None)) is not None:
            check_judge(judge, run_dir)
    if recipe.sft is not None and "sft" in stages:
        for key in ("data", "eval_data"):
            if (source := getattr(recipe.sft, key)) is not None:
                examples, _ = load_examples(source, f"sft.{key}", recipe.sft.max_bad_share, lambda row: row)
                if examples and examples[0].prompt is not None:
                    first.setdefault("sft", examples[0].prompt)
    if recipe.reward is not None and "reward" in stages:
        for key in ("data", "eval_data"):
            if (source := getattr(recipe.reward, key)) is not None:
                _, records, _ = load_preferences(source, f"reward.{key}", recipe.reward.max_bad_share, lambda row: row)
                first.setdefault("reward", records[0].prompt)
    if recipe.ppo is not None and "ppo" in stages:
        find_previous(recipe, run_dir or Path())
        for source in recipe.ppo.reward:
            if source.model is not None:
                check_model_name(source.model, "ppo.reward.model")
            if source.adapter not in (None, "stage"):
                find_reward(source.adapter, Path())
            if source.judge is not None:
                check_judge(asked_judge(source), run_dir)
            if source.ensemble is not None and source.ensemble not in OWN_STAGE:
                find_ensemble(source.ensemble, Path())
    check_model(recipe, [stage for stage in stages if stage not in finished], first)


def check_inits(recipe: Recipe) -> None:
    """Raise `InputError` for an init of a stage that there is not, or an option that it has not."""
    for stage in recipe.stages:
        kind_of(recipe.adapter_for(stage))
    if recipe.reward is not None:
        for member in members_of(recipe, recipe.reward, 1):
            kind_of(member.adapter)


def cost_lines(recipe: Recipe, stages: Sequence[str]) -> list[str]:
    """What some stages take more of than usual, a sentence each."""
    optimizers = {stage: getattr(getattr(recipe, stage), "optimizer", None) for stage in stages}
    return [f"{name}: {o.cost}" for name, o in optimizers.items() if isinstance(o, OptimizerConfig) and o.cost]


def select_stages(recipe: Recipe, first: str | None, last: str | None) -> list[str]:
    """The recipe's stages from `first` to `last`, both included. Raises `InputError` for one the recipe hasn't got."""
    for name in (first, last):
        if name is not None and name not in recipe.stages:
            has = ", ".join(recipe.stages)
            raise InputError(f"the recipe has no stage {name!r}; it has {has}", kind="unknown", key=name)
    start = STAGES.index(first) if first else 0
    end = STAGES.index(last) if last else len(STAGES) - 1
    if start > end:
        raise InputError(f"--from {first} comes after --to {last}", kind="conflict", key="from")
    return [stage for stage in recipe.stages if start <= STAGES.index(stage) <= end]


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
                fix=f"--resume continues it, --from {stage} runs it anew, another --run-dir leaves it alone",
            )


def _put_aside(run_dir: Path, first: str) -> None:
    """Rename the folders of a stage and of all after it: what came of the old ones is of no use to the new ones."""
    for stage in STAGES[STAGES.index(first) :]:
        folder = RunFiles(run_dir).stage(stage).folder
        if folder.exists():
            aside = next(p for i in range(1, 10_000) if not (p := run_dir / f"{stage}.old-{i}").exists())
            folder.rename(aside)
            say(f"{folder} was put aside as {aside.name}")
