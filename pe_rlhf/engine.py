"""Training: backward, clipping, optimizer step, learning-rate schedule, and their state.

Only adapters and heads are trained, one optimizer group per role, so that policy and critic have learning rates and
gradient norms of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pe_rlhf.adapters.lora_plus import learning_rate_groups
from pe_rlhf.config import OptimizerConfig
from pe_rlhf.errors import TrainingError


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


class Engine:
    """AdamW over the roles of a stage.

    `total_steps` is the number of optimizer steps of the whole stage, which the schedule needs.
    """

    def __init__(self, groups: list[RoleGroup], config: OptimizerConfig, total_steps: int) -> None:
        self._groups, self._config, self._total_steps = groups, config, total_steps
        self.steps = 0
        self._optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "lr": factor * group.learning_rate, "role": group.role, "factor": factor}
                for group in groups
                for factor, parameters in learning_rate_groups(group.parameters, config.lora_plus_ratio)
            ],
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. Raises `TrainingError` for a loss that is not finite, before it reaches a weight."""
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss is {loss.item()} before optimizer step {self.steps + 1}")
        loss.backward()

    def step(self) -> dict[str, float]:
        """Clip, step, and clear the gradients. Returns each role's gradient norm before clipping.

        Raises `TrainingError` for a gradient that is not finite; the weights are then as they were.
        """
        norms = {
            group.role: nn.utils.clip_grad_norm_(group.parameters.values(), self._config.max_grad_norm).item()
            for group in self._groups
        }
        for role, norm in norms.items():
            if not math.isfinite(norm):
                raise TrainingError(f"the gradient of {role} is not finite at optimizer step {self.steps + 1}")
        rates = self.learning_rates()
        for settings in self._optimizer.param_groups:
            settings["lr"] = settings["factor"] * rates[settings["role"]]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return norms

    def learning_rates(self) -> dict[str, float]:
        """Each role's learning rate at the next step; under LoRA+ it is A's."""
        factor = schedule_factor(self._config, self.steps, self._total_steps)
        return {group.role: group.learning_rate * factor for group in self._groups}

    def state(self) -> dict[str, Tensor]:
        """The optimizer's moments by role and parameter name, and its step count."""
        tensors = {"steps": torch.tensor(self.steps)}
        for group in self._groups:
            for name, parameter in group.parameters.items():
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    tensors[f"{group.role}/{name}/{key}"] = value.detach().to("cpu", copy=True)
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Set what `state` gave, onto the parameters as they are now."""
        self.steps = int(tensors["steps"])
        for group in self._groups:
            for name, parameter in group.parameters.items():
                prefix = f"{group.role}/{name}/"
                moments = {k.removeprefix(prefix): t.clone() for k, t in tensors.items() if k.startswith(prefix)}
                for key, value in moments.items():
                    moments[key] = value if key == "step" else value.to(parameter.device)
                if moments:
                    self._optimizer.state[parameter] = moments
