"""Sampling from a policy that is routed by task: the engine gets one task's policy after the other.

Each of them is a plain adapter, so that every engine samples from it as from any other: merged, or as a LoRA. What is
drawn for a response follows from its row, whatever the task of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.types import Rollout
from reward.errors import InputError


class RoutedRollout:
    """Has an engine sample the responses of each task from that task's policy; other roles as it does.

    With several ranks the engine is one that shares the work: all ranks come to the same task at the same time.
    """

    def __init__(self, engine: RolloutEngine, backbone: Backbone, role: str) -> None:
        self._engine, self._backbone, self._role, self._version = engine, backbone, role, 0

    def generate(
        self,
        prompts: list[list[int]],
        seed: int,
        rows: Sequence[int] | None = None,
        tasks: Sequence[int] | None = None,
    ) -> Rollout:
        """As of any engine; `tasks` are the numbers of the prompts' tasks, which only a routed role needs."""
        if not self._is_routed:
            return self._engine.generate(prompts, seed, rows)
        if tasks is None:
            message = f"the {self._role} is another one for each task, and the prompts name none"
            raise InputError(message, kind="missing", key="task")
        numbers = range(len(prompts)) if rows is None else rows
        whole = Rollout(prompts, [[]] * len(prompts), [[]] * len(prompts), ["length"] * len(prompts), self._version)
        for task in sorted(set(tasks)):
            own = [i for i, each in enumerate(tasks) if each == task]
            with self._backbone.route(task):
                self._engine.sync(self._version, self._role)
                part = self._engine.generate([prompts[i] for i in own], seed, [numbers[i] for i in own])
            for k, i in enumerate(own):
                whole.responses[i], whole.logprobs[i], whole.finish[i] = (
                    part.responses[k],
                    part.logprobs[k],
                    part.finish[k],
                )
            whole = replace(whole, stop=part.stop)
        return replace(whole, tasks=tuple(tasks))

    def sync(self, version: int, role: str | None = None) -> None:
        """A routed role's weights are handed over task by task, when its responses are asked for."""
        self._version, self._role = version, role or self._role
        if not self._is_routed:
            self._engine.sync(version, role)

    def close(self) -> None:
        self._engine.close()

    @property
    def _is_routed(self) -> bool:
        return bool(self._backbone.tasks_of(self._role))


def sample(engine: RolloutEngine, prompts: list[list[int]], seed: int, tasks: Sequence[int] | None = None) -> Rollout:
    """Responses of an engine; `tasks` for one that plays a routed role."""
    if isinstance(engine, RoutedRollout):
        return engine.generate(prompts, seed, tasks=tasks)
    return engine.generate(prompts, seed)
