"""Training: backward, clipping, optimizer step, learning-rate schedule, and their state. The one place with DeepSpeed.

Each role is trained by an optimizer of its own, so that policy and critic have learning rates and gradient norms of
their own. Gradients of an adapter are a few MB: they are summed over the ranks once per step, clipped and checked here,
and then go to AdamW or, under DeepSpeed, to its ZeRO engine. So the numbers do not depend on how the states are split,
and ranks may cut their share of a batch into different numbers of micro-batches. Fully tuned roles go the same way.

Steps are made in fp32. Adapters and heads are fp32 anyway; weights of a narrower dtype have a master copy.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pe_rlhf.adamw import MASTER, MOMENTS, PlainAdamW, adamw, flat, is_wide, split
from pe_rlhf.adapters.lora_plus import learning_rate_groups
from pe_rlhf.config import OptimizerConfig
from pe_rlhf.distributed import sum_over_ranks, world_size
from pe_rlhf.errors import TrainingError
from pe_rlhf.processes import accelerator_environment, launched

LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class RoleGroup:
    """The parameters of one role by name, and the role's learning rate at full height."""

    role: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float


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
    optimizer: PlainAdamW | _ZeRO


class Engine:
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
                PlainAdamW(parameters, config) if deepspeed is None else _ZeRO(parameters, config, deepspeed),
            )
            for group in groups
            for factor, parameters in learning_rate_groups(group.parameters, config.lora_plus_ratio)
        ]

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. Raises `TrainingError` for a loss that is not finite, before it reaches a weight."""
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss is {loss.item()} before optimizer step {self.steps + 1}")
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
                raise TrainingError(f"the gradient of {role} is not finite at optimizer step {self.steps + 1}")
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
                tensors |= {f"{part.role}/{name}": tensor for name, tensor in part.optimizer.state(copy).items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Set what `state` gave, onto the parameters as they are now."""
        self.steps = int(tensors["steps"])
        for part in self._slices if self.steps else ():
            prefix = f"{part.role}/"
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            part.optimizer.load_state(own, self.steps)


def _sum_gradients(group: RoleGroup) -> None:
    """Add the ranks' gradients, all of a role in one message; a parameter without one has had no part in the loss."""
    parameters = list(group.parameters.values())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size() == 1:
        return
    total = sum_over_ranks(flat([p.grad for p in parameters if p.grad is not None]))
    for parameter, gradient in zip(parameters, split(total, parameters), strict=True):
        parameter.grad = gradient.to(parameter.dtype)


class _ZeRO:
    """AdamW in a DeepSpeed engine, which splits its state over the ranks and keeps it where the configuration says.

    The engine trains one flat copy of the parameters, made when it is first needed: a run that goes on sets the
    parameters before that. It gets the gradient, which is complete already, through the loss ⟨copy, gradient⟩: a way in
    that every ZeRO stage supports.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimizerConfig, deepspeed: dict[str, Any]) -> None:
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._config, self._deepspeed = config, deepspeed

    @cached_property
    def _copy(self) -> nn.Parameter:
        return nn.Parameter(flat(self._parameters).float())

    @cached_property
    def _engine(self) -> Any:
        engine, *_ = _deepspeed().initialize(
            model=nn.ParameterList([self._copy]),
            optimizer=adamw([self._copy], self._config),
            config=_role_config(self._deepspeed),
        )
        return engine

    def step(self, rate: float) -> None:
        self._step(rate, flat([p.grad for p in self._parameters if p.grad is not None]).float())
        for parameter, value in zip(self._parameters, split(self._copy.detach(), self._parameters), strict=True):
            parameter.data.copy_(value)

    def state(self, copy: bool) -> dict[str, Tensor]:
        tensors = {}
        for kind in (*MOMENTS, MASTER):
            parts = split(self._copy if kind == MASTER else self._moment(kind), self._parameters)
            for name, parameter, part in zip(self._names, self._parameters, parts, strict=True):
                if kind != MASTER or not is_wide(parameter):
                    tensors[f"{name}/{kind}"] = part.detach().to("cpu", copy=copy).contiguous()
        return tensors

    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        # Before the engine is made, which may keep a copy of its own: what the parameters were rounded from.
        for name, own in zip(self._names, split(self._copy.data, self._parameters), strict=True):
            if (master := tensors.get(f"{name}/{MASTER}")) is not None:
                own.copy_(master)
        # The state exists from the first step on: one with rate 0 and gradient 0 makes it and changes no weight.
        self._step(0.0, torch.zeros_like(self._copy))
        for moment in MOMENTS:
            self._set_moment(moment, flat([tensors[f"{name}/{moment}"] for name in self._names]))
        for state in self._adamw.state.values():
            state["step"].fill_(steps)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """The optimizer inside ZeRO's, or the engine's own where there is no ZeRO."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _step(self, rate: float, gradient: Tensor) -> None:
        self._engine.optimizer.param_groups[0]["lr"] = rate
        self._engine.backward((self._copy * gradient).sum())
        self._engine.step()

    def _moment(self, moment: str) -> Tensor:
        """The whole moment, flat; every rank calls this."""
        if not hasattr(self._copy, "_hp_mapping"):
            return self._adamw.state[self._copy][moment]
        return _deepspeed().utils.safe_get_full_optimizer_state(self._copy, moment)

    def _set_moment(self, moment: str, value: Tensor) -> None:
        if not hasattr(self._copy, "_hp_mapping"):
            self._adamw.state[self._copy][moment].copy_(value)
        else:
            _deepspeed().utils.safe_set_full_optimizer_state(self._copy, value.to(self._copy.device), moment)


# ---- DeepSpeed ------------------------------------------------------------------------------------------------------


def _deepspeed() -> Any:
    for name, value in accelerator_environment().items():
        os.environ.setdefault(name, value)
    try:
        import deepspeed
    except ImportError as error:
        raise TrainingError(
            "training on several processes needs DeepSpeed: pip install 'pe-rlhf[deepspeed]'"
        ) from error
    # Its own reduction for CPUs, which nothing here asks for, is compiled at the first start, under a lock file that
    # stays when the process is killed: every later start would wait for it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_processes(wants_deepspeed: bool) -> None:
    """Join the other processes, where a launcher has started this one; alone, be a group of one for DeepSpeed."""
    if torch.distributed.is_initialized() or not (launched() or wants_deepspeed):
        return
    # gloo carries what lies on the CPU (counts, texts, experience), whatever the weights are on.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # A rank may wait for hours while rank 0 asks a judge; one that has died is noticed by its closed connection.
        torch.distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented all the same
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    _deepspeed().init_distributed(verbose=False)


def shard_base(model: nn.Module, deepspeed: dict[str, Any]) -> None:
    """Split a frozen base over the ranks by ZeRO-3; each layer's weights are gathered when a pass reaches it."""
    config = {**_common(deepspeed), "zero_optimization": dict(deepspeed.get("zero_optimization", {}))}
    config["zero_optimization"].pop("offload_optimizer", None)
    _deepspeed().initialize(model=model, config=config)


def _role_config(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """ZeRO-3 shards the base; the few MB of a role are whole on each rank, with their states split as in ZeRO-2."""
    zero = dict(deepspeed.get("zero_optimization", {}))
    zero["stage"] = min(2, zero.get("stage", 0))
    zero = {key: value for key, value in zero.items() if not key.startswith(("stage3", "offload_param"))}
    if zero["stage"] == 0:
        zero.pop("offload_optimizer", None)
    return {**_common(deepspeed), "zero_optimization": zero}


def _common(deepspeed: dict[str, Any]) -> dict[str, Any]:
    own = {"optimizer", "scheduler", "train_batch_size", "gradient_clipping", "bf16", "fp16"}
    return {key: value for key, value in deepspeed.items() if key not in own} | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # gradients come clipped; DeepSpeed's own default may clip them once more
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
