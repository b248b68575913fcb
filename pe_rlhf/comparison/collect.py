"""Reading what the runs of a comparison have left behind."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pe_rlhf.comparison.drift import drift_of_run
from pe_rlhf.comparison.plan import Plan, PlannedRun
from pe_rlhf.comparison.run_result import Row, RunResult
from pe_rlhf.comparison.runner import refuse_changed, state_of
from pe_rlhf.comparison.trials import Choice
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.metrics import read_metrics, read_summary
from pe_rlhf.runs.task_table import TaskTable
from pe_rlhf.system.files import read_jsonl

# Of a kind without a rank: how many singular directions of a weight its drift is measured in.
DIRECTIONS = 16


def collect(plan: Plan, choices: Sequence[Choice]) -> list[RunResult]:
    """Every run of every arm. Raises `InputError` for a run that was made with another recipe."""
    results: list[RunResult] = []
    for choice in choices:
        for seed, run in plan.runs(choice.arm, choice.factor or 1.0).items():
            settings = dict(choice.arm.changes)
            if choice.factor is None:  # there is no learning rate to run it with
                results.append(RunResult(choice.arm.name, seed, choice.status, choice.message, settings=settings))
                continue
            if choice.trials and run.recipe.ppo is not None:
                settings["ppo.learning_rate"] = run.recipe.ppo.learning_rate
            refuse_changed([run])
            results.append(_read(run, choice.arm.name, seed, settings, plan.shared))
    return results


def _read(run: PlannedRun, arm: str, seed: int, settings: Row, shared: PlannedRun | None) -> RunResult:
    state = state_of(run)
    is_finished = state.status == "finished"
    tasks = TaskTable.read(run.recipe, run.folder) if run.recipe.tasks else None
    if tasks is not None:
        run = _last_task(run)
    files = RunFiles(run.folder)
    reward = _summary(run, "reward") or (_summary(shared, "reward") if shared else {})
    rank = getattr(run.recipe.adapter_for("ppo"), "rank", DIRECTIONS)
    average = tasks.average if tasks is not None else None
    return RunResult(
        arm,
        seed,
        state.status,
        state.message,
        state.kind,
        folder=run.folder,
        settings=settings,
        reward=reward,
        ppo=_summary(run, "ppo"),
        evaluate=_summary(run, "evaluate") if tasks is None else {"win_rate": average and average.value},
        metrics=read_metrics(files.stage("ppo").metrics, may_be_cut=not is_finished),
        preferences=_preferences(files.stage("evaluate").samples) if is_finished and tasks is None else {},
        drift=drift_of_run(run.folder, run.recipe, rank) if files.role("policy").folder.is_dir() else {},
        tasks=tasks,
    )


def _last_task(run: PlannedRun) -> PlannedRun:
    """The run of the policy that a run with tasks ends with."""
    tasks = run.recipe.tasks or []
    folder = RunFiles(run.folder).task(run.recipe.last_policy).folder
    return PlannedRun(run.name, folder, run.recipe.task_recipe(len(tasks) - 1))


def _summary(run: PlannedRun, stage: str) -> Row:
    """A plain mapping, which `dataclasses.asdict` can copy; empty where the stage has not finished."""
    return dict(read_summary(RunFiles(run.folder).stage(stage)) or {})


def _preferences(path: Path) -> dict[str, list[float]]:
    """The judge's valid verdicts by prompt."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in read_jsonl(path):
        if row["preference"] is not None:
            found[json.dumps(row["prompt"], sort_keys=True, ensure_ascii=False)].append(row["preference"])
    return dict(found)
