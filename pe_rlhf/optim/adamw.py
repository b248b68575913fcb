"""AdamW on the parameters of a role, with steps in fp32: by itself, or inside the ZeRO of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pe_rlhf.adapters.kind import Restart
from pe_rlhf.config import OptimizerConfig

MOMENTUM = "exp_avg"
MOMENTS = (MOMENTUM, "exp_avg_sq")
MASTER = "master"
RESTARTS: dict[Restart, tuple[str, ...]] = {"momentum": (MOMENTUM,), "moments": (*MOMENTS, "step")}


class PlainAdamW:
    """torch's AdamW on the parameters themselves, or on fp32 copies of those that are narrower.

    starts: what weight decay pulls a parameter to, by name; 0 without one.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        config: OptimizerConfig,
        starts: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._parameters = parameters
        self._masters = {name: p if is_wide(p) else nn.Parameter(p.detach().float()) for name, p in parameters.items()}
        self._adamw = adamw(list(self._masters.values()), config)
        self._decay = decay = config.weight_decay
        self._pulls = [(self._masters[n], start, decay) for n, start in starts.items() if decay and n in parameters]

    def step(self, rate: float, correction: float = 1.0) -> None:
        """A step of AdamW with the moments' part, but not the decay, times `correction`."""
        narrow = [(p, self._masters[name]) for name, p in self._parameters.items() if p is not self._masters[name]]
        for parameter, master in narrow:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        set_rate(self._adamw.param_groups[0], rate, self._decay, correction)
        for master, start, decay in self._pulls:
            pull(master, start, rate * decay)
        self._adamw.step()
        for parameter, master in narrow:
            parameter.data.copy_(master)
            master.grad = None

    def take_over(self) -> None:
        """Go on from the parameters as they are now, which were written to."""

    def restart(self, what: Restart) -> None:
        """Start the moments again from zero, all of them with their step count, or the momentum only."""
        for state in self._adamw.state.values():
            for name in RESTARTS[what]:
                state[name].zero_()

    def state(self, copy: bool) -> dict[str, Tensor]:
        moments = {
            f"{name}/{moment}": self._adamw.state[master][moment].detach().to("cpu", copy=copy)
            for name, master in self._masters.items()
            for moment in MOMENTS
        }
        return moments | {
            f"{name}/{MASTER}": self._masters[name].detach().to("cpu", copy=copy)
            for name, parameter in self._parameters.items()
            if not is_wide(parameter)
        }

    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if not is_wide(parameter):
                master.data.copy_(tensors[f"{name}/{MASTER}"])
            moments = {m: tensors[f"{name}/{m}"].to(master.device, copy=True) for m in MOMENTS}
            step = torch.tensor(float(steps), device=master.device)  # where a fused AdamW reads it
            self._adamw.state[master] = {"step": step, **moments}


def set_rate(group: dict[str, Any], rate: float, decay: float, correction: float) -> None:
    """Set the rate of AdamW's next step so that the moments' part is times `correction`, and the decay is not."""
    group["lr"], group["weight_decay"] = rate * correction, decay / correction


def pull(parameter: Tensor, start: Tensor, share: float) -> None:
    """Make the decay of AdamW's next step one towards `start`: (p + c)·(1 − share) = p − share·(p − start)."""
    with torch.no_grad():
        parameter.add_(start, alpha=share / (1 - share))


def adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer as a recipe describes it; the rate is set before each step."""
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over weights and moments instead of one per operation
    )


def is_wide(parameter: nn.Parameter) -> bool:
    """Whether a step can be made on the parameter itself."""
    return parameter.dtype == torch.float32


def flatten(tensors: list[Tensor] | list[nn.Parameter]) -> Tensor:
    """All elements, one tensor after the other."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def unflatten(flat_P: Tensor, like: list[nn.Parameter]) -> Iterator[Tensor]:
    """What `flatten` gave, cut up again: views of it in the shapes of the parameters."""
    parts = flat_P.split([parameter.numel() for parameter in like])
    return (part.view_as(parameter) for part, parameter in zip(parts, like, strict=True))
