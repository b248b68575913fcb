"""Several tasks, one policy: an ordinary run for each, one after the other, and every policy on every task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pe_rlhf.config import STAGES, Recipe
from pe_rlhf.config.load import load_recipe, refuse_other_recipe, save_recipe
from pe_rlhf.config.tasks import JOINT
from pe_rlhf.model.device_plan import settle
from pe_rlhf.optim.zero import init_processes
from pe_rlhf.report.tasks_page import write_tasks_report
from pe_rlhf.runs.changes import Start
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.metrics import read_summary
from pe_rlhf.runs.task_table import TaskTable
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.evaluate import evaluate_policy
from pe_rlhf.stages.joint_task import check_joint, joint_recipe
from pe_rlhf.stages.pipeline import run_recipe, run_stage, with_date
from pe_rlhf.stages.preflight import check_inputs
from pe_rlhf.stages.previous_policy import check_adapter
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.failures import failure_noted
from pe_rlhf.system.files import csv_text, locked, write_json, write_whole
from pe_rlhf.system.progress import say
from pe_rlhf.system.seeding import derive_seed
from reward.errors import InputError

BEFORE_PPO = STAGES[: STAGES.index("ppo")]
COLUMNS = ("after", "on", "win_rate", "ci_low", "ci_high", "n", "kl", "gold")


def run_tasks(recipe: Recipe, run_dir: Path, first: str | None, last: str | None, start: Start = "new") -> TaskTable:
    """Run a recipe's tasks from `first` to `last`. Returns every task after every task that has been run.

    Args:
        start: as of `run_recipe`; `anew` puts the runs of `first` and of all tasks after it aside.

    Raises `InputError` as `run_recipe`, and where the run was started with another recipe.
    """
    files = RunFiles(run_dir)
    numbers = select_tasks(recipe, first, last)
    init_processes(recipe.deepspeed is not None, recipe.backbone.device, recipe.rank_timeout)
    with ExitStack() as held:
        on_main(lambda: held.enter_context(locked(run_dir)) if run_dir.is_dir() else None)
        saved = load_recipe(files.recipe) if files.recipe.is_file() else None
        on_main(lambda: _refuse(recipe, files, saved, start, numbers))
        recipe = with_date(recipe, saved)
        recipes = list(task_recipes(recipe, run_dir))
        on_main(lambda: check_tasks(recipe, [recipes[number] for number in numbers], run_dir))
        on_main(lambda: _prepare(held, recipe, files, numbers if start == "anew" else []))
        names = [task.name for task in recipe.tasks or []]
        for number in numbers:
            say(f"task {number + 1} of {len(names)}: {names[number]}")
            own = recipes[number]
            _run(own, files.task(names[number]), [s for s in own.stages if not recipe.is_joint or s in BEFORE_PPO])
            if not recipe.is_joint:
                _measure(recipe, files, names[number], recipes)
        if recipe.is_joint and numbers[-1] == len(names) - 1:
            say(f"all {len(names)} tasks at once")
            _run(joint_recipe(recipe, run_dir), files.task(JOINT), ["ppo"])
            _measure(recipe, files, JOINT, recipes)
    return TaskTable.read(recipe, run_dir)


def select_tasks(recipe: Recipe, first: str | None, last: str | None) -> list[int]:
    """The numbers of the tasks from `first` to `last`. Raises `InputError` for one that the recipe has not."""
    names = [task.name for task in recipe.tasks or []]
    for name in (first, last):
        if name is not None and name not in names:
            has = ", ".join(names)
            raise InputError(f"the recipe has no task {name!r}; it has {has}", kind="unknown", key=name)
    start, end = names.index(first) if first else 0, names.index(last) if last else len(names) - 1
    if start > end:
        raise InputError(f"--from {first} comes after --to {last}", kind="conflict", key="from")
    return list(range(start, end + 1))


def task_recipes(recipe: Recipe, run_dir: Path) -> Iterator[Recipe]:
    """The recipe of each task; a later one has a seed of its own, or all would draw the same first adapter."""
    for number, task in enumerate(recipe.tasks or []):
        own = recipe.task_recipe(number)
        if number:
            own.seed = derive_seed(recipe.seed, "task", task.name) % 2**31
        elif own.continual is not None and own.continual.previous is not None:
            beside = run_dir.absolute().parent / own.continual.previous  # of the whole run, not of its first task
            own.continual.previous = str(beside) if beside.is_dir() else own.continual.previous
        yield own


def check_tasks(whole: Recipe, recipes: Sequence[Recipe], run_dir: Path, *, wait: bool = True) -> None:
    """Look at everything that `check_inputs` does in each of these tasks of a recipe, before the first one runs."""
    for number, own in enumerate(recipes):
        later = {"continual": None} if number else {}  # the run before it is not there yet
        folder = RunFiles(run_dir).tasks / own.name
        check_inputs(own.model_copy(update=later), own.stages, run_dir=folder, wait=wait)
        check_adapter(own)
    if whole.is_joint:
        check_joint(whole, run_dir)


def _run(recipe: Recipe, files: RunFiles, stages: list[str]) -> None:
    if stages:
        run_recipe(recipe, files.folder, stages, "resume" if files.folder.is_dir() else "new")


def _measure(recipe: Recipe, files: RunFiles, policy: str, recipes: Sequence[Recipe]) -> None:
    """Evaluate a policy on every other task, by that task's own judge, and write what is known so far."""
    own = files.task(policy)
    for task, other in zip(recipe.tasks or [], recipes, strict=True):
        place = own.on_task(task.name)
        if task.name == policy or other.evaluate is None or read_summary(place.stage("evaluate")) is not None:
            continue
        on_main(lambda place=place: place.folder.mkdir(parents=True, exist_ok=True))
        evaluate = partial(evaluate_policy, policy=own.role("policy").folder, with_reward=False, task=task.name)
        run_stage(StageContext(other, place.folder, "evaluate"), evaluate)
    table = TaskTable.read(recipe, files.folder)
    on_main(lambda: _write(files, table))


def _refuse(recipe: Recipe, files: RunFiles, saved: Recipe | None, start: Start, numbers: Sequence[int]) -> None:
    """Raise `InputError` where running these tasks would mix runs or run over one. Nothing is touched before."""
    names = [task.name for task in recipe.tasks or []]
    if start == "new" and (saved is not None or files.tasks.exists()):
        raise InputError(
            f"{files.folder} holds a run already",
            kind="exists",
            file=files.folder,
            fix=f"--resume continues it, --from {names[0]} runs it anew, another --run-dir leaves it as it is",
        )
    if saved is not None and start == "resume":
        refuse_other_recipe(recipe, files.recipe)
    for name, own in zip(names[: numbers[0]], task_recipes(recipe, files.folder), strict=False):
        # What has been trained stays as it was, also in the record: --from may change later tasks only.
        if (path := files.task(name).recipe).is_file():
            refuse_other_recipe(settle(own, load_recipe(path)), path)
        if not recipe.is_joint and read_summary(files.task(name).stage("ppo")) is None:
            raise InputError(
                f"{files.folder} holds no finished task {name}, on which {names[numbers[0]]} goes on",
                kind="unfinished",
                key=name,
                file=files.folder,
                fix=f"run it first, by --from {name}",
            )


def _prepare(held: ExitStack, recipe: Recipe, files: RunFiles, anew: Sequence[int]) -> None:
    """Make the run's directory, where it is not there yet, and put aside what is to be run anew."""
    if not files.folder.is_dir():
        files.folder.mkdir(parents=True)
        held.enter_context(locked(files.folder))
    held.enter_context(failure_noted(files.failure))
    again = [task.name for task in (recipe.tasks or [])[anew[0] :]] if anew else []
    for name in [*again, *([JOINT] if again and recipe.is_joint else [])]:
        if (folder := files.task(name).folder).exists():
            aside = next(p for i in range(1, 10_000) if not (p := folder.with_name(f"{name}.old-{i}")).exists())
            folder.rename(aside)
            say(f"{folder} was put aside as {aside.name}")
    files.tasks.mkdir(exist_ok=True)
    save_recipe(recipe, files.recipe)
    files.failure.unlink(missing_ok=True)


def _write(files: RunFiles, table: TaskTable) -> None:
    rows = ({column: getattr(cell, column) for column in COLUMNS} for cell in table.cells)
    write_whole(files.task_table, csv_text(COLUMNS, rows))
    write_json(files.summary, table.as_json())
    write_tasks_report(files.folder, table)
