"""What a policy that learns several tasks can do on each of them after each of them, and what that comes to.

a[t, j] is the win-rate over the base on task j's prompts after task t, of T tasks in their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scipy.stats import norm

from pe_rlhf.config import Recipe
from pe_rlhf.config.tasks import JOINT
from pe_rlhf.runs.layout import RunFiles, StageFiles
from pe_rlhf.runs.metrics import read_summary

LEVEL = 0.95
WIDE = float(norm.ppf((1 + LEVEL) / 2))  # half of an interval, in standard errors
EVEN = 0.5  # the win-rate of the base over itself


class Bounded(NamedTuple):
    """A metric with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """The policy after one task on the prompts of one. kl: nats per response; gold: the judge's mean score, if any."""

    after: str
    on: str
    win_rate: float
    ci_low: float
    ci_high: float
    n: int
    kl: float
    gold: float | None

    @classmethod
    def of(cls, after: str, on: str, summary: Mapping[str, Any]) -> Measured | None:
        """From the summary of an evaluate stage; None where no verdict was valid."""
        if summary.get("win_rate") is None:
            return None
        names = ("win_rate", "ci_low", "ci_high", "n", "kl")
        return cls(after, on, *(summary[name] for name in names), gold=summary.get("gold_policy"))


@dataclass(frozen=True)
class TaskTable:
    """All that was measured so far. `tasks` in the order they are learnt, with those that are not measured.

    how: the tasks are learnt in turn; or each has a policy of its own, so that at the end a task is what its own policy
    does; or all are learnt at once.
    """

    tasks: Sequence[str]
    cells: Sequence[Measured]
    how: Literal["in turn", "separate", "joint"] = "in turn"

    @property
    def policies(self) -> Sequence[str]:
        """What is measured: the policy after each task, or the one that learns all at once."""
        return [JOINT] if self.how == "joint" else self.tasks

    @classmethod
    def read(cls, recipe: Recipe, run_dir: Path) -> TaskTable:
        """What a run's directory holds."""
        files, names = RunFiles(run_dir), [task.name for task in recipe.tasks or []]
        how = "joint" if recipe.is_joint else "in turn"
        if recipe.continual is not None and recipe.continual.method == "separate":
            how = "separate"
        found = cls(names, [], how)
        cells: list[Measured] = []
        for after in found.policies:
            for on in names:
                if (summary := read_summary(evaluation_of(files, after, on))) is not None:
                    cells += filter(None, [Measured.of(after, on, summary)])
        return replace(found, cells=cells)

    def cell(self, after: str, on: str) -> Measured | None:
        return next((cell for cell in self.cells if (cell.after, cell.on) == (after, on)), None)

    @property
    def average(self) -> Bounded | None:
        """1/T · Σ_j a[T, j]."""
        last = [self._last(task) for task in self._measured()]
        return _mean([[(1, cell)] for cell in last])

    @property
    def forgetting(self) -> Bounded | None:
        """1/(T − 1) · Σ_{j<T} (max_{t<T} a[t, j] − a[T, j]) (arXiv 1801.10112, eq. 3).

        The maximum of noisy metrics is too high, so a policy that forgets nothing has a little above 0.
        """
        pairs: list[list[tuple[float, Measured | None]]] = []
        for task in self._measured()[:-1]:
            before = [cell for after in self.tasks[:-1] if (cell := self.cell(after, task)) is not None]
            best = max(before, key=lambda cell: cell.win_rate, default=None)
            pairs.append([(1, best), (-1, self._last(task))])
        return _mean(pairs) if self.how == "in turn" else None

    @property
    def forward_transfer(self) -> Bounded | None:
        """1/(T − 1) · Σ_{j>1} (a[j − 1, j] − ½): what a task has from the earlier ones before it is learnt."""
        if self.how != "in turn":
            return None
        pairs = zip(self.tasks, self.tasks[1:], strict=False)
        known = self._measured()
        found = _mean([[(1, self.cell(before, task))] for before, task in pairs if task in known])
        return None if found is None else Bounded(*(value - EVEN for value in found))

    def as_json(self) -> dict[str, Any]:
        """For `summary.json`; a metric that is not known yet is None."""
        names = ("average", "forgetting", "forward_transfer")
        metrics = {name: value and value._asdict() for name in names for value in [getattr(self, name)]}
        return {"tasks": list(self.tasks), **metrics, "cells": [asdict(cell) for cell in self.cells]}

    def _measured(self) -> list[str]:
        on = {cell.on for cell in self.cells}
        return [task for task in self.tasks if task in on]

    def _last(self, task: str) -> Measured | None:
        return self.cell(task if self.how == "separate" else self.policies[-1], task)


def evaluation_of(files: RunFiles, after: str, on: str) -> StageFiles:
    """Where the policy after one task is evaluated on one."""
    place = files.task(after) if on == after else files.task(after).on_task(on)
    return place.stage("evaluate")


def has_finished(recipe: Recipe, files: RunFiles) -> bool:
    """Whether all tasks of a recipe have been learnt, and measured after each of them."""
    tasks = recipe.tasks or []
    policies = [JOINT] if recipe.is_joint else [task.name for task in tasks]
    trained = (files.task(name).stage("ppo") for name in policies)
    measured = (evaluation_of(files, after, on.name) for after in policies for on in tasks if on.evaluate is not None)
    return all(stage.summary.is_file() for stage in (*trained, *measured))


def _mean(sums: Iterable[Sequence[tuple[float, Measured | None]]]) -> Bounded | None:
    """The mean of sums of weighted win-rates, with the interval of independent ones; None where one is not known.

    Those of one task share their prompts, which makes their differences surer than this says.
    """
    listed = list(sums)
    value, variance = 0.0, 0.0
    for terms in listed:
        for weight, cell in terms:
            if cell is None:
                return None
            value += weight * cell.win_rate / len(listed)
            variance += ((cell.ci_high - cell.ci_low) / (2 * WIDE) / len(listed)) ** 2
    half = WIDE * math.sqrt(variance)
    return Bounded(value, value - half, value + half) if listed else None
