"""Roles that compute something else for each task: which tasks there are, and which one is played."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from pe_rlhf.adapters.kinds.routed import RoutedLoRA
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.model.roles import ModelWithRoles


class RoutedRoles(ModelWithRoles):
    """Roles, and the task that they are played for."""

    def tasks_of(self, role: str) -> tuple[str, ...]:
        """The names of the tasks that a role is routed by; none for any other role."""
        spec = self.specs.get(role)
        return spec.settings.routes if isinstance(spec, AdapterSpec) else ()

    def task_weights(self, role: str) -> dict[str, dict[str, float]]:
        """What each task's policy is made of: task → part → its weight, the mean over layers; empty without a route."""
        if not (tasks := self.tasks_of(role)):
            return {}
        routed = [layer for layer in self.role_layers(role).values() if isinstance(layer, RoutedLoRA)]
        mean_TT = torch.stack([layer.weights_TT().float() for layer in routed]).mean(dim=0)
        return {task: dict(zip(tasks, row, strict=True)) for task, row in zip(tasks, mean_TT.tolist(), strict=True)}

    @contextmanager
    def route(self, task: int | Tensor | None) -> Iterator[Self]:
        """Play routed roles for a task, or for the task of each token _BT or row _B1. Other roles are as ever."""
        before = self._state.task
        self._state.task = task.to(self.device) if isinstance(task, Tensor) else task
        try:
            yield self
        finally:
            self._state.task = before

    @contextmanager
    def playing(self, role: str, task: int | Tensor | None) -> Iterator[Self]:
        """Play a role for a task."""
        with self.role(role), self.route(task):
            yield self
