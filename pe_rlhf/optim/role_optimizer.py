"""Training: backward, clipping, optimizer step, learning-rate schedule, and their state.

Each role is trained by an optimizer of its own, so that policy and critic have learning rates and gradient norms of
their own. Gradients of an adapter are a few MB: they are summed over the ranks once per step, clipped and checked here,
and then go to AdamW or, under DeepSpeed, to its ZeRO engine. So the numbers do not depend on how the states are split,
and ranks may cut their share of a batch into different numbers of micro-batches. Fully tuned roles go the same way.

Steps are made in fp32. Adapters and heads are fp32 anyway; weights of a narrower dtype have a master copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pe_rlhf.adapters.lora.lora_plus import learning_rate_groups
from pe_rlhf.config import OptimizerConfig
from pe_rlhf.model.tensors import with_prefix, without_prefix
from pe_rlhf.optim.adamw import PlainAdamW, flatten, unflatten
from pe_rlhf.optim.zero import ZeRO
from pe_rlhf.system.distributed import sum_over_ranks, world_size
from pe_rlhf.system.failures import TrainingError

CHECKPOINT_PREFIX = "engine/"  # of the optimizer's tensors in checkpoints, those of earlier versions too


@dataclass(frozen=True)
class RoleGroup:
    """The parameters of one role by name, and the role's learning rate at full height.

    starts: what weight decay pulls a parameter to, by name; of one that is not there it is 0.
    """

    role: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    starts: Mapping[str, Tensor] = field(default_factory=dict)


def schedule_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The factor of the learning rate at an optimizer step (from 0): a linear rise, then constant or linear to 0."""
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return (total_steps - step) / max(1, total_steps - warmup)


@dataclass(frozen=True)
class _Slice:
    """The parameters of a role that share a learning rate: the role's, times a factor."""

    role: str
    factor: float
    optimizer: PlainAdamW | ZeRO


class RoleOptimizer:
    """AdamW over the roles of a stage, on one process or many.

    A loss is a rank's share of the loss of the whole batch: the ranks' gradients are added, not averaged.
    `total_steps` is the number of optimizer steps of the whole stage, which the schedule needs. `deepspeed` is a
    DeepSpeed configuration, of which ZeRO and offload are used; None is plain AdamW.
    """

    def __init__(
        self,
        groups: list[RoleGroup],
        config: OptimizerConfig,
        total_steps: int,
        deepspeed: dict[str, Any] | None = None,
    ) -> None:
        self._groups, self._config, self._total_steps = groups, config, total_steps
        self.steps = 0
        self._slices = [
            _Slice(
                group.role,
                factor,
                PlainAdamW(parameters, config, group.starts)
                if deepspeed is None
                else ZeRO(parameters, config, deepspeed, group.starts),
            )
            for group in groups
            for factor, parameters in learning_rate_groups(group.parameters, config.lora_plus_ratio)
        ]

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. Raises `TrainingError` for a loss that is not finite, before it reaches a weight."""
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss is {loss.item()} before optimizer step {self.steps + 1}", kind="not_finite")
        loss.backward()

    def step(self) -> dict[str, float]:
        """Clip, step, and clear the gradients. Returns each role's gradient norm before clipping.

        Raises `TrainingError` for a gradient that is not finite; the weights are then as they were.
        """
        norms = {}
        for group in self._groups:
            _sum_gradients(group)
            norms[group.role] = nn.utils.clip_grad_norm_(group.parameters.values(), self._config.max_grad_norm).item()
        for role, norm in norms.items():
            if not math.isfinite(norm):
                raise TrainingError(
                    f"the gradient of {role} is not finite at optimizer step {self.steps + 1}", kind="not_finite"
                )
        rates = self.learning_rates()
        for part in self._slices:
            part.optimizer.step(part.factor * rates[part.role])
        for group in self._groups:
            for parameter in group.parameters.values():
                parameter.grad = None
        self.steps += 1
        return norms

    def learning_rates(self) -> dict[str, float]:
        """Each role's learning rate at the next step; under LoRA+ it is A's."""
        factor = schedule_factor(self._config, self.steps, self._total_steps)
        return {group.role: group.learning_rate * factor for group in self._groups}

    def state(self, *, copy: bool = True) -> dict[str, Tensor]:
        """The optimizer's moments by role and parameter name, and its step count; whole, on every rank, on the CPU.

        The same tensors with and without DeepSpeed, on any number of ranks. Without `copy` those that are on the CPU
        are the optimizer's own, to be written away before the next step.
        """
        tensors = {"steps": torch.tensor(self.steps)}
        if self.steps:
            for part in self._slices:
                tensors |= with_prefix(f"{part.role}/", part.optimizer.state(copy))
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Set what `state` gave, onto the parameters as they are now."""
        self.steps = int(tensors["steps"])
        for part in self._slices if self.steps else ():
            part.optimizer.load_state(without_prefix(f"{part.role}/", tensors), self.steps)


def _sum_gradients(group: RoleGroup) -> None:
    """Add the ranks' gradients, all of a role in one message; a parameter without one has had no part in the loss."""
    parameters = list(group.parameters.values())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    total = sum_over_ranks(flatten([p.grad for p in parameters if p.grad is not None]))
    for parameter, gradient in zip(parameters, unflatten(total, parameters), strict=True):
        parameter.grad = gradient.to(parameter.dtype)
