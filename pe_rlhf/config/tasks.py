"""Several tasks that one policy learns one after the other: what each has of its own (docs/continual.md)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pe_rlhf.config.evaluate import EvaluateConfig
from pe_rlhf.config.ppo import PPOConfig
from pe_rlhf.config.preferences import PreferencesConfig
from pe_rlhf.config.reward import RewardConfig
from pe_rlhf.config.section import Section

JOINT = "joint"  # the folder of a policy that learns all tasks at once
TASK_STAGES = ("preferences", "reward", "ppo", "evaluate")


class TaskConfig(Section):
    """One of several tasks. Its sections name what differs from the recipe's sections, which all tasks share."""

    name: str = Field(pattern=r"^\w[\w.-]*$", description="name of the task; its folder is tasks/<name>")
    preferences: PreferencesConfig | None = None
    reward: RewardConfig | None = None
    ppo: PPOConfig | None = None
    evaluate: EvaluateConfig | None = Field(
        default=None, description="how the task is measured: after it, and after every other task"
    )


def with_common_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe's tree with the sections that its tasks share in each of them instead of beside them."""
    common = {stage: tree.get(stage) for stage in TASK_STAGES}
    tasks = [
        {**task, **{stage: merged(common[stage], task.get(stage)) for stage in TASK_STAGES}}
        if isinstance(task, dict)
        else task
        for task in tree["tasks"]
    ]
    return {**tree, **dict.fromkeys(TASK_STAGES), "tasks": tasks}


def merged(common: Any, own: Any) -> Any:
    """`own` over `common`: sections key by key, anything else as a whole."""
    if own is None:
        return common
    if isinstance(common, dict) and isinstance(own, dict):
        return {**common, **{key: merged(common.get(key), value) for key, value in own.items()}}
    return own
