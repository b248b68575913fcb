"""Several tasks, one policy: what a later task does with what the earlier ones left."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pe_rlhf.config.section import Positive, Rate, Section, refusal

NEW, SAME = ("olora", "nlora"), ("ewc",)  # the methods that need an adapter of each task's own, or one for all


class ContinualConfig(Section):
    """How a policy goes on from that of the task before (docs/continual.md)."""

    method: Literal["sequential", "olora", "nlora", "ewc", "separate", "joint"] = Field(
        default="sequential",
        description="sequential: nothing against forgetting; olora: the new A orthogonal to earlier ones; nlora: a"
        " sparse new B·A; ewc: weights that mattered stay; separate: each of `tasks` has a policy of its own; joint:"
        " one policy learns all of `tasks` at once",
    )
    strength: Rate = Field(
        default=0.5, description="olora, nlora, ewc: λ, weight of the penalty in the policy's loss; 0: no penalty"
    )
    adapter: Literal["new", "same"] | None = Field(
        default=None,
        description="new: a new adapter on top of the earlier ones, which are frozen; same: the earlier one is trained"
        " on; default: new for olora and nlora, same for sequential and ewc",
    )
    anchor: Literal["base", "previous"] = Field(
        default="base", description="what the KL of PPO is measured to: the base, or the policy before the task"
    )
    previous: str | None = Field(
        default=None,
        description="the run whose policy this one goes on from, beside this run's directory or by its path; default:"
        " none, this is the first task",
    )
    fisher: Literal["summed", "per_task"] = Field(
        default="summed",
        description="ewc: earlier tasks' Fisher information is around the last weights (summed), or that of each task"
        " around the weights after it (per_task)",
    )
    fisher_samples: Positive = Field(
        default=64, description="ewc: responses of the policy that its Fisher information is estimated from"
    )

    @model_validator(mode="after")
    def _fits(self) -> ContinualConfig:
        for methods, adapter in ((NEW, "new"), (SAME, "same")):
            if self.method in methods and self.adapter not in (None, adapter):
                raise refusal("adapter", f"{self.method} is for adapter: {adapter}; leave it out")
        return self

    def refuse_for_one_task(self) -> None:
        """Refuse what is about several tasks, or about the policy before the task where there is none."""
        if self.method in ("separate", "joint"):
            raise refusal("continual.method", f"{self.method} is for a recipe with tasks; leave continual out")
        if self.previous is None and (self.anchor == "previous" or self.adapter):
            key = "continual.anchor" if self.anchor == "previous" else "continual.adapter"
            raise refusal(key, "nothing comes before this task; name the earlier run in previous", "missing")

    def after(self, previous: str | None) -> dict[str, Any]:
        """These settings for the task after `previous`; for a first task, those that it can have."""
        if self.method in ("separate", "joint"):
            return {}
        tree = {**self.model_dump(exclude_unset=True), "previous": previous}
        return tree if previous is not None else {k: v for k, v in tree.items() if k not in ("anchor", "adapter")}

    @property
    def stacks(self) -> bool:
        """Whether a task has an adapter of its own on top of the earlier ones."""
        return (self.adapter or ("new" if self.method in NEW else "same")) == "new"
