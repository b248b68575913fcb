"""Several tasks, one policy: what a later task does with what the earlier ones left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from pe_rlhf.config.section import Positive, Rate, Section, refusal

NEW, SAME = ("olora", "nlora"), ("ewc",)  # the methods that need an adapter of each task's own, or one for all
FACTORS = {"olora": ("A", "B"), "nlora": ("BA", "B")}  # what a penalty may be on; the first is the default
# The weight of one task's part: of the whole part, of each of its rank-one parts, or by a pattern of layers' names.
PartWeight = float | list[float] | dict[str, float]
FORMS = {"task": (float, "a number"), "subspace": (list, "a list of numbers"), "layer": (dict, "numbers by layer")}


class RouteConfig(Section):
    """A part of the adapter for each task: B·diag(k)·A, where k depends on the prompt's task."""

    weights: Literal["task", "subspace", "layer", "learned"] = Field(
        default="task",
        description="what k has a number for: each task's part, each of its rank-one parts, or each part in each"
        " layer; learned: a softmax over the parts, trained for each task in each layer",
    )
    shared_rank: int = Field(default=0, ge=0, description="rank of a part for all tasks, beside those of the tasks")
    values: dict[str, dict[str, PartWeight]] = Field(
        default_factory=dict,
        description="the numbers: task → part (by its task) → a number, a list of them (subspace), or numbers by"
        " pattern of layers' names (layer); what is not named is 0; default: a task's own part has 1",
    )
    rate: float = Field(
        default=10.0, gt=0, description="learned: learning rate of the softmax's logits over that of the adapter"
    )

    def refuse_misfits(self, key: str, tasks: Sequence[str], rank: int) -> None:
        """Refuse values that are not of these tasks, not of the form that `weights` says, or of another rank."""
        if len(tasks) < 2:
            raise refusal(key, f"there is nothing to route: there is {len(tasks) or 'no'} task; leave it out")
        if self.values and self.weights == "learned":
            raise refusal(f"{key}.values", "learned weights are trained; leave values out")
        for task, own in self.values.items():
            for name in (task, *own):
                if name not in tasks:
                    raise refusal(
                        f"{key}.values", f"there is no task {name!r}; there are {', '.join(tasks)}", "unknown"
                    )
            kind, form = FORMS[self.weights]
            for part, weight in own.items():
                place = f"{key}.values.{task}.{part}"
                listed = _numbers(weight)
                if not isinstance(weight, kind) or not all(map(math.isfinite, listed)):
                    raise refusal(place, f"{self.weights} weights are {form} (got {weight!r})", "invalid")
                if isinstance(weight, list) and len(weight) != rank:
                    raise refusal(place, f"it has {len(weight)} numbers, and the adapter has rank {rank}", "invalid")
            if not any(number for weight in own.values() for number in _numbers(weight)):
                raise refusal(f"{key}.values.{task}", "all its weights are 0", "empty")


def _numbers(weight: PartWeight) -> list[float]:
    if isinstance(weight, Mapping):
        return [*weight.values()]
    return [*weight] if isinstance(weight, list) else [weight]


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
    penalty_on: Literal["A", "B", "BA"] | None = Field(
        default=None,
        description="olora: the rows of A (default) or the columns of B are orthogonal to the earlier ones; nlora: the"
        " product BA (default) or B is sparse",
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

    route: RouteConfig | None = Field(
        default=None, description="joint: each task has a part of its own in the adapter, chosen by the prompt's task"
    )

    @model_validator(mode="after")
    def _fits(self) -> ContinualConfig:
        if self.route is not None and self.method != "joint":
            raise refusal("route", f"routes are learnt by method: joint, all tasks at once; this is {self.method}")
        if self.penalty_on not in (None, *(own := FACTORS.get(self.method, ()))):
            choice = (
                f"{self.method} has {' or '.join(own)}" if own else f"{self.method} has no such penalty; leave it out"
            )
            raise refusal("penalty_on", choice)
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
    def penalised(self) -> str:
        """The factor that the penalty of olora or nlora is on."""
        return self.penalty_on or FACTORS[self.method][0]

    @property
    def stacks(self) -> bool:
        """Whether a task has an adapter of its own on top of the earlier ones."""
        return (self.adapter or ("new" if self.method in NEW else "same")) == "new"
