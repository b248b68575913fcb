"""What may differ from the recipe that a run was started with, and the record of what did.

The recipe in a run's directory is the record of what was trained. So a setting of a stage that has finished stays as it
is, except the length of its training: then the stage goes on from its last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pe_rlhf.config import STAGES, Recipe
from pe_rlhf.config.load import FREE_TO_CHANGE, differences, is_below, load_recipe, recipe_keys, refuse_other_recipe
from pe_rlhf.config.ppo import ONLY_FOR, WITH_CRITIC
from pe_rlhf.runs.checkpoint import newest_step
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.metrics import read_summary
from pe_rlhf.system.files import append_jsonl, read_jsonl
from reward.errors import InputError, did_you_mean

# What a stage that is there already means: an error, to go on from it, or to put it aside and run it anew.
Start = Literal["new", "resume", "anew"]

# The length of a stage's training, where one that has finished can go on.
LENGTHS = {"reward": "reward.epochs", "ppo": "ppo.steps"}
# What the tensors of a checkpoint depend on.
SHAPES = ("model", "tuning", "adapter", "backbone.dtype", "backbone.revision", "backbone.quantization")
# What no stage computes with.
LABELS = ("name", "tracking", "compare")

Value = tuple[Any, Any]  # before, after


@dataclass(frozen=True)
class Resumption:
    """How a run goes on: its settings that change, by key, and the finished stage that is to train for longer."""

    changes: dict[str, Value]
    extended: str | None = None


def find_resumption(
    recipe: Recipe, run_dir: Path, stages: list[str], start: Start, may_change: Sequence[str] = ()
) -> Resumption:
    """Compare a recipe with the one that a run was started with; nothing is written.

    Raises `InputError` for a key of `may_change` that is none or does not differ, for a setting that differs and may
    not, and for one of a stage that has finished or of weights that are there.
    """
    saved = RunFiles(run_dir).recipe
    if may_change and (start != "resume" or not saved.is_file()):
        message = f"--may-change is for a run that is resumed; {run_dir} " + (
            "is not resumed" if saved.is_file() else "holds none"
        )
        raise InputError(message, kind="conflict", key="--may-change", file=run_dir, fix="use it with --resume")
    if start == "new" or not saved.is_file():
        return Resumption({})
    changes = differences(load_recipe(saved), recipe)
    if start == "resume":
        _check_keys(recipe, may_change, changes, run_dir)
        refuse_other_recipe(recipe, saved, [*may_change, *_follow(may_change)])
    first = STAGES.index(stages[0])
    kept = [s for s in STAGES if (start == "resume" or STAGES.index(s) < first) and _has_finished(run_dir, s)]
    extended = _extended(changes, [stage for stage in kept if stage in stages], run_dir) if start == "resume" else None
    finished = [stage for stage in kept if stage != extended]
    for key, (before, after) in changes.items():
        _refuse_rewriting(key, before, after, finished, run_dir)
        if start == "resume":
            _refuse_other_weights(key, before, after, run_dir, finished)
    return Resumption(changes, extended)


def note_changes(resumption: Resumption, run_dir: Path, stages: list[str]) -> None:
    """Add the changes to the run's record, with the stage and step that each is in effect from."""
    going_on = next((stage for stage in stages if not _has_finished(run_dir, stage)), None)
    for key, (before, after) in resumption.changes.items():
        section = key.partition(".")[0]
        stage = section if section in STAGES else going_on
        step = newest_step(RunFiles(run_dir).stage(stage).folder) if stage is not None else 0
        row = {"key": key, "before": before, "after": after, "stage": stage, "step": step + 1}
        append_jsonl(RunFiles(run_dir).changes, row)


def _check_keys(recipe: Recipe, may_change: Sequence[str], changes: dict[str, Value], run_dir: Path) -> None:
    """Raise `InputError` for what --may-change cannot mean."""
    known = recipe_keys(recipe) | changes.keys()
    for key in may_change:
        if "=" in key:
            name = key.partition("=")[0]
            raise InputError(
                f"--may-change {key}: it takes a key without a value",
                kind="invalid",
                key=name,
                fix=f"write --may-change {name} {key}",
            )
        if not any(is_below(each, key) for each in known):
            fix = did_you_mean(key, known) or "docs/recipe.md has the keys"
            raise InputError(f"--may-change {key}: a recipe has no such key", kind="unknown", key=key, fix=fix)
        earlier = read_jsonl(RunFiles(run_dir).changes, may_be_cut=True)
        # The same command once more, as a cluster runs it, has nothing left to change.
        if not any(is_below(each, key) for each in changes) and not any(is_below(row["key"], key) for row in earlier):
            raise InputError(
                f"--may-change {key}: its value is the one that {run_dir} was started with",
                kind="conflict",
                key=key,
                fix=f"give the new one, too: {key}=VALUE",
            )


def _follow(may_change: Sequence[str]) -> list[str]:
    """Keys that go, or get another default, with one that may change."""
    return [f"ppo.{key}" for key in (*ONLY_FOR, "whiten_advantages")] if "ppo.advantage" in may_change else []


def _has_finished(run_dir: Path, stage: str) -> bool:
    return read_summary(RunFiles(run_dir).stage(stage)) is not None


def _extended(changes: dict[str, Value], kept: list[str], run_dir: Path) -> str | None:
    """The first finished stage that is to train for longer. Raises `InputError` where it cannot go on."""
    for stage in kept:
        if (key := LENGTHS.get(stage)) not in changes:
            continue
        before, after = changes[key]
        summary = read_summary(RunFiles(run_dir).stage(stage)) or {}
        if not isinstance(before, int) or not isinstance(after, int) or after < before:
            return None  # shorter than it was: refused below as every other setting
        if newest_step(RunFiles(run_dir).stage(stage).folder) != summary.get("steps", math.nan):
            raise InputError(
                f"{key}: {stage} has finished, and the checkpoint of its last step is not there any more",
                kind="missing",
                key=key,
                file=RunFiles(run_dir).stage(stage).checkpoints,
                fix=f"--from {stage} runs it anew",
            )
        return stage
    return None


def _refuse_rewriting(key: str, before: Any, after: Any, finished: list[str], run_dir: Path) -> None:
    """Raise `InputError` for a setting that one of the finished stages was run with."""
    section = key.partition(".")[0]
    if any(is_below(key, free) for free in (*FREE_TO_CHANGE, *LABELS)):
        return
    touched = [stage for stage in finished if section not in STAGES or section == stage]
    if touched:
        stage = touched[0]
        raise InputError(
            f"{key}: {stage} has finished in {run_dir} with {before!r}, so it cannot become {after!r}",
            kind="changed",
            key=key,
            file=RunFiles(run_dir).recipe,
            fix=f"--from {stage} runs it and all after it anew, another --run-dir leaves it as it is",
        )


def _refuse_other_weights(key: str, before: Any, after: Any, run_dir: Path, finished: list[str]) -> None:
    """Raise `InputError` for a setting that the checkpoints of an unfinished stage depend on."""
    section, _, rest = key.partition(".")
    for stage in (s for s in STAGES if s not in finished):
        own = rest if section == stage else key
        other_roles = own == "advantage" and (before in WITH_CRITIC) != (after in WITH_CRITIC)
        other_weights = other_roles or any(is_below(own, shape) for shape in SHAPES)
        if other_weights and RunFiles(run_dir).stage(stage).checkpoints_there():
            raise InputError(
                f"{key}: the checkpoints of {stage} were made with {before!r} and do not fit {after!r}",
                kind="changed",
                key=key,
                file=RunFiles(run_dir).recipe,
                fix=f"--from {stage} runs it anew, another --run-dir leaves it as it is",
            )
