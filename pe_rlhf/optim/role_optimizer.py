"""Training: backward, clipping, optimizer step, learning-rate schedule, and their state.

Each role is trained by an optimizer of its own, so that policy and critic have learning rates and gradient norms of
their own. Gradients of an adapter are small beside the base: they are summed over the ranks once per step, clipped and
checked here, and then go to AdamW or, under DeepSpeed, to its ZeRO engine. So the numbers do not depend on how the
states are split, and ranks may cut their share of a batch into different numbers of micro-batches. Fully tuned roles
go the same way.

Steps are made in fp32. Adapters and heads are fp32 anyway; weights of a narrower dtype have a master copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, Restart, Time
from pe_rlhf.adapters.layer import AdapterLayer
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.config import OptimizerConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.tensors import with_prefix, without_prefix
from pe_rlhf.optim.adamw import PlainAdamW, flatten, unflatten
from pe_rlhf.optim.sharpness import NoisyBase, take_beside
from pe_rlhf.optim.zero import ZeRO
from pe_rlhf.system.distributed import sum_over_ranks, world_size
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import derive_seed
from reward.errors import InputError

SomeRows = TypeVar("SomeRows", list[int], Tensor)

CHECKPOINT_PREFIX = "engine/"  # of the optimizer's tensors in checkpoints, those of earlier versions too


@dataclass(frozen=True)
class RoleGroup:
    """The parameters of one role by name, and the role's learning rate at full height.

    Attributes:
        starts: what weight decay pulls a parameter to, by name; of one that is not there it is 0.
        kind, layers: the kind of the role's adapter, and its layers by name; empty for weights of its own.
        penalty: a term of the loss that depends on the weights only, beside that of the kind.
        noisy_base: a context in which the base that the role is on has noise, given σ and a seed.
    """

    role: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    kind: AdapterKind[Any] | None = None
    layers: Mapping[str, AdapterLayer] = field(default_factory=dict)
    noisy_base: NoisyBase | None = None
    penalty: Callable[[], Tensor] | None = None

    @classmethod
    def of(cls, backbone: Backbone, role: str, learning_rate: float) -> RoleGroup:
        """A role of a backbone."""
        parameters, starts = backbone.role_parameters(role), backbone.role_starts(role)
        spec = backbone.specs[role]
        if not isinstance(spec, AdapterSpec):
            return cls(role, parameters, learning_rate, starts)
        return cls(role, parameters, learning_rate, starts, spec.kind, backbone.role_layers(role), backbone.noisy_base)

    def by_rate(self, lora_plus_ratio: float) -> list[tuple[float, str, dict[str, nn.Parameter]]]:
        """The parameters by the factor of their learning rate, and by the name that the kind may restart them under.

        The factor is the kind's, and that of LoRA+ (arXiv 2402.12354), which has those of a layer learn faster that are
        behind the bottleneck, whatever the init: `kind.fast`. Raises `InputError` where the kind has none.
        """
        if self.kind is None:
            return [(1.0, "", dict(self.parameters))]
        layer_parts = (name.rpartition(".") for name in self.parameters)
        fast = {part for layer, _, part in layer_parts if layer in self.layers} & set(self.kind.fast)
        if lora_plus_ratio != 1 and not fast:
            raise InputError(
                "lora_plus_ratio: LoRA+ is for factors B and A that both train; those of this kind or init do not",
                kind="conflict",
                key="optimizer.lora_plus_ratio",
                fix="leave it at 1",
            )
        groups: dict[tuple[float, str], dict[str, nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            layer, _, part = name.rpartition(".")
            factor = self.kind.rate(part) if layer in self.layers else 1.0
            if layer in self.layers and part in fast:
                factor *= lora_plus_ratio
            restarts = part if layer in self.layers and part in self.kind.restarted else ""
            groups.setdefault((factor, restarts), {})[name] = parameter
        return [(*key, groups[key]) for key in sorted(groups)]


def schedule_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The factor of the learning rate at an optimizer step (from 0): a linear rise, then constant or linear to 0."""
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    return (total_steps - step) / max(1, total_steps - warmup)


@dataclass
class _Slice:
    """The parameters of a role that share a learning rate, the role's times a factor, and their age.

    Attributes:
        restarts: the name of these parameters in a layer where the kind may start their moments again, else empty.
        steps, momentum_steps: how many steps are in the second moment, and in the momentum.
    """

    role: str
    factor: float
    restarts: str
    optimizer: PlainAdamW | ZeRO
    steps: int = 0
    momentum_steps: int = 0

    def step(self, rate: float, beta: float) -> None:
        """AdamW's step. It corrects the momentum's bias by `steps`; what is missing for a younger one is made up."""
        self.steps, self.momentum_steps = self.steps + 1, self.momentum_steps + 1
        younger = self.momentum_steps != self.steps
        correction = (1 - beta**self.steps) / (1 - beta**self.momentum_steps) if younger else 1.0
        self.optimizer.step(self.factor * rate, correction)

    def restart(self, what: Restart) -> None:
        """Start the moments again from zero: all of them, with a step count of their own, or the momentum only."""
        self.momentum_steps = 0
        self.steps = 0 if what == "moments" else self.steps
        self.optimizer.restart(what)


class RoleOptimizer:
    """AdamW over the roles of a stage, on one process or many.

    A loss is a rank's share of the loss of the whole batch: the ranks' gradients are added, not averaged.
    `total_steps` is the number of optimizer steps of the whole stage, which the schedule needs. `deepspeed` is a
    DeepSpeed configuration, of which ZeRO and offload are used; None is plain AdamW. `seed` is that of the noise of
    `sharpness: rwp`.
    """

    def __init__(
        self,
        groups: list[RoleGroup],
        config: OptimizerConfig,
        total_steps: int,
        deepspeed: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self._groups, self._config, self._total_steps, self._seed = groups, config, total_steps, seed
        self.steps = 0
        self._slices = [
            _Slice(
                group.role,
                factor,
                restarts,
                PlainAdamW(parameters, config, group.starts)
                if deepspeed is None
                else ZeRO(parameters, config, deepspeed, group.starts),
            )
            for group in groups
            for factor, restarts, parameters in group.by_rate(config.lora_plus_ratio)
        ]

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. Raises `TrainingError` for a loss that is not finite, before it reaches a weight."""
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss is {loss.item()} before optimizer step {self.steps + 1}", kind="not_finite")
        loss.backward()

    def batches(self, rows: SomeRows) -> tuple[SomeRows, SomeRows]:
        """The rows of a batch that the first and the second gradient of a step are of: all of them, or a half each.

        Without `sharpness` the second one is not asked for. A half counts as a batch: its loss is a mean over it.
        """
        half = len(rows) // 2
        if self._config.is_perturbed and self._config.sharpness_batches == "two" and half:
            return rows[:half], rows[half:]
        return rows, rows

    def step(self, again: Callable[[], object] | None = None) -> dict[str, float]:
        """Clip, step, and clear the gradients. Returns each role's gradient norm before clipping.

        again: accumulates the gradients a second time, of the second of `batches`; only `sharpness` calls it.

        Raises `TrainingError` for a gradient that is not finite; the weights are then as they were.
        """
        norms = {}
        time = Time(self.steps + 1, self._total_steps)
        self._sum_gradients()
        if self._config.is_perturbed:
            if again is None:
                raise ValueError(f"sharpness {self._config.sharpness} needs the gradients a second time")
            roles = {group.role: group.parameters for group in self._groups}
            noisy = next((group.noisy_base for group in self._groups if group.noisy_base is not None), None)
            seed = derive_seed(self._seed, "sharpness", self.steps)
            take_beside(roles, self._config, seed, again, self._sum_gradients, noisy)
        for group in self._groups:
            # A penalty is of weights only, which are the same on all ranks: its gradient is added once.
            if group.penalty is not None:
                self.backward(group.penalty())
            if group.kind is not None:
                if (penalty := group.kind.penalty(group.layers)) is not None:
                    self.backward(penalty)
                group.kind.after_backward(group.layers, time)
            # The whole role at once, before LoRA+ and ZeRO cut it into slices: the norm is the role's.
            norms[group.role] = nn.utils.clip_grad_norm_(group.parameters.values(), self._config.max_grad_norm).item()
        # All norms before the first step: where one role has diverged, the other must not be a step ahead of it.
        for role, norm in norms.items():
            if not math.isfinite(norm):
                message = f"the gradient of {role} is not finite at optimizer step {self.steps + 1}"
                raise TrainingError(message, kind="not_finite", key=role)
        rates = self.learning_rates()
        for part in self._slices:
            part.step(rates[part.role], self._config.betas[0])
        for group in self._groups:
            if group.kind is not None:
                self._let_kind_change(group, group.kind, time)
        for group in self._groups:
            for parameter in group.parameters.values():
                parameter.grad = None  # not zero: what the next loss does not reach is seen to have none
        self.steps += 1
        return norms

    def _let_kind_change(self, group: RoleGroup, kind: AdapterKind[Any], time: Time) -> None:
        """What the kind does after a step; what it writes into parameters goes on to where the optimizer keeps them."""
        with torch.no_grad():
            again = kind.after_step(group.layers, time)
        if unknown := sorted(again - kind.restarted.keys()):
            message = f"the kind {kind.settings.kind} starts {unknown[0]} again, which is not in its `restarted`"
            raise InputError(message, kind="user_code", key="adapter.kind")
        for part in self._slices:
            if part.role == group.role and kind.changes_parameters:
                part.optimizer.take_over()
            if part.role == group.role and part.restarts in again:
                part.restart(kind.restarted[part.restarts])

    def _sum_gradients(self) -> None:
        for group in self._groups:
            _sum_gradients(group)

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
                if part.restarts:
                    tensors[f"{part.role}/{part.restarts}/steps"] = torch.tensor([part.steps, part.momentum_steps])
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Set what `state` gave, onto the parameters as they are now."""
        self.steps = int(tensors["steps"])
        for part in self._slices if self.steps else ():
            ages = tensors.get(f"{part.role}/{part.restarts}/steps", torch.tensor([self.steps, self.steps]))
            part.steps, part.momentum_steps = ages.tolist()
            part.optimizer.load_state(without_prefix(f"{part.role}/", tensors), part.steps)


def _sum_gradients(group: RoleGroup) -> None:
    """Add the ranks' gradients, all of a role in one message; a parameter without one has had no part in the loss."""
    parameters = list(group.parameters.values())
    for parameter in parameters:
        if parameter.grad is None:  # filled in, so that the message is as long on every rank
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    total = sum_over_ranks(flatten([p.grad for p in parameters if p.grad is not None]))
    for parameter, gradient in zip(parameters, unflatten(total, parameters), strict=True):
        parameter.grad = gradient.to(parameter.dtype)
