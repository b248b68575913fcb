"""All tasks at once: one PPO on the prompts of all of them, each response scored by the rewards of its own task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.config import PPOConfig, Recipe, RewardSource
from pe_rlhf.config.reward_source import KINDS, OWN_STAGE, source_names
from pe_rlhf.config.section import DataFile
from pe_rlhf.config.tasks import JOINT
from pe_rlhf.data.rows import SOURCE
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.stages.previous_policy import any_layer


def joint_recipe(recipe: Recipe, run_dir: Path) -> Recipe:
    """The PPO that takes the place of the tasks' own: as many steps as they have together, settings of the first.

    A prompt has the name of its task in the column `source`; the tasks' shares are those of their steps. The tasks have
    judges of their own, so none is asked during PPO.
    """
    sections = [(task.name, task.ppo) for task in recipe.tasks or [] if task.ppo is not None]
    first = sections[0][1].model_dump(exclude_unset=True)
    mix = [
        ppo.prompts.model_dump(exclude_unset=True, include=set(DataFile.model_fields))
        | {"label": name, "weight": float(ppo.steps)}
        for name, ppo in sections
    ]
    ppo = first | {
        "prompts": {"mix": mix},
        "steps": sum(own.steps for _, own in sections),
        "reward": [source for name, own in sections for source in _rewards(name, own, run_dir)],
    }
    ppo.pop("eval_every", None)
    if recipe.continual is not None and (route := recipe.continual.route) is not None:
        adapter = recipe.task_recipe(0).adapter_for("ppo").model_dump(exclude_unset=True)
        names = [name for name, _ in sections]
        ppo["adapter"] = adapter | route.model_dump(exclude_unset=True) | {"kind": "routed", "tasks": names}
    tree = recipe.model_dump(exclude_unset=True, exclude={"tasks", "continual", "compare"})
    return Recipe.model_validate(tree | {"name": f"{recipe.name}-{JOINT}", "ppo": ppo})


def check_joint(recipe: Recipe, run_dir: Path) -> None:
    """Raise `InputError` for an adapter that cannot have a part for each task."""
    adapter = joint_recipe(recipe, run_dir).adapter_for("ppo")
    if adapter.routes:
        kind_of(adapter).tensors(any_layer(adapter))


def _rewards(task: str, ppo: PPOConfig, run_dir: Path) -> list[dict[str, Any]]:
    """The sources of a task's reward, for its own prompts only."""
    own = str(RunFiles(run_dir).task(task).stage("reward").folder.absolute())
    word = re.sub(r"\W", "_", task)
    prefix = word if word[0].isalpha() else f"task_{word}"
    return [
        source.model_dump(exclude_unset=True)
        | _at(source, own)
        | {"where": {**source.where, SOURCE: task}, "name": f"{prefix}_{name}"}
        for source, name in zip(ppo.reward, source_names(ppo.reward), strict=True)
    ]


def _at(source: RewardSource, own: str) -> dict[str, str]:
    """Where the reward model of the task's own stage lies."""
    return {kind: own for kind in KINDS if getattr(source, kind) in ("stage", *OWN_STAGE)}
