"""The wrapped layer: a frozen base module and one small adapter module per role.

The wrapper knows nothing of LoRA. Which role is active is one shared piece of state per backbone, set by
`Backbone.role`, so that switching a role touches no module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pe_rlhf.system.distributed import gathered, is_sharded
from reward.errors import InputError

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITSANDBYTES = ("Params4bit", "Int8Params")


@dataclass
class RoleState:
    """The active role of a backbone; None is the anchor, the backbone as it was loaded."""

    active: str | None = None


@dataclass(frozen=True)
class LowRankFactors:
    """An adapter's change of the weight as factors: ΔW_OI = scale · B_OR @ A_RI."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float


class Adapter(Protocol):
    """What the wrapper, the roles, the stages and the checkpoints need of an adapter module of any kind."""

    def __call__(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The adapted output for input `x` and base output `y`; exactly `y` at initialisation."""
        ...

    def factors(self) -> LowRankFactors:
        """The change of the weight as plain LoRA factors, computed fresh."""
        ...

    def delta_weight(self) -> Tensor:
        """The change of the weight as a dense fp32 matrix _OI, computed fresh."""
        ...


class WrappedLayer(nn.Module):
    """`y = base(x)`, then the active role's adapter if it has one here; for a merged role one product instead."""

    def __init__(self, base: nn.Module, state: RoleState) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self._state = state
        self._merged: dict[str, Callable[[Tensor], Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        role = self._state.active
        if role in self._merged:
            return self._merged[role](x)
        y = self.base(x)
        if role is None or role not in self.adapters:
            return y
        return self.adapters[role](x, y, self.base)

    def __getattr__(self, name: str) -> Any:
        """What the base has: models ask for `weight.dtype`, `in_features` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def can_merge(self) -> bool:
        """Whether the base is a plain product with a weight that is whole here: not quantised, not split by ZeRO-3."""
        return has_plain_weight(self.base) and has_forward_of_linear(self.base)

    def merge(self, role: str) -> None:
        """Compute the role by `W0 + ΔW` as it is now, a copy beside the base, until it is unmerged."""
        weight_OI = like_out_in(self.base, merged_weight(self, role))
        self._merged[role] = partial(F.linear, weight=weight_OI, bias=getattr(self.base, "bias", None))

    def unmerge(self, role: str) -> None:
        self._merged.pop(role, None)


def weight_out_in(base: nn.Module) -> Tensor:
    """The base weight as _OI (out, in), whichever way round the module stores it (GPT-2's Conv1D is _IO).

    A quantised weight (bitsandbytes' 4 and 8 bit, HQQ, torchao) comes dequantised, a copy of this one layer. Raises
    `InputError` for one that cannot be.
    """
    with gathered(base):
        weight = getattr(base, "weight", None)
        if type(weight) is nn.Parameter and weight.is_floating_point():
            weight = weight.detach().clone() if is_sharded(base) else weight.detach()
        else:
            weight = _dequantised(base)
    return like_out_in(base, weight)


def like_out_in(base: nn.Module, weight: Tensor) -> Tensor:
    """A weight that is laid out as the module's own, as _OI."""
    return weight.T if isinstance(base, Conv1D) else weight


def _dequantised(base: nn.Module) -> Tensor:
    packed: nn.Parameter = base.weight  # type: ignore[assignment]
    try:
        if type(packed).__name__ in BITSANDBYTES:  # PEFT's function for modules moves one on a CPU, which breaks it
            weight = dequantize_bnb_weight(packed, getattr(base, "state", None)).detach()
        else:
            weight = dequantize_module_weight(base).detach()
    except Exception as error:  # it is the quantisation library's, of which there are several: it can raise anything
        raise InputError(
            f"the weight of a {type(base).__name__} cannot be dequantised here: {error}",
            kind="conflict",
            key="backbone.quantization",
        ) from error
    if not weight.is_floating_point():
        raise InputError(
            f"the weight of a {type(base).__name__} is quantised in a way that is not known here",
            kind="conflict",
            key="backbone.quantization",
        )
    return weight


def has_plain_weight(module: nn.Module) -> bool:
    """Whether a module's weight is a matrix of numbers that is whole here: not quantised, not split by ZeRO-3."""
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.dtype in PLAIN_DTYPES and not is_sharded(module)


def has_forward_of_linear(module: nn.Module) -> bool:
    return type(module).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(module)


@torch.no_grad()
def is_wrappable(module: nn.Module) -> bool:
    """Whether adapters can be put on a module: a linear one, one tensor in and one of its output features out.

    A subclass with a forward pass of its own is tried: Falcon's gives a tensor, PhiMoE's router a tuple.
    """
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    if has_forward_of_linear(module) or not has_plain_weight(module):
        return True
    weight_OI = like_out_in(module, module.weight)  # type: ignore[arg-type]  # that it is a tensor was checked
    try:
        y = module(torch.zeros(1, weight_OI.shape[1], dtype=weight_OI.dtype, device=weight_OI.device))
    except Exception:  # whatever it raises for what it does not take
        return False
    return isinstance(y, Tensor) and y.shape == (1, weight_OI.shape[0])


def merged_weight(layer: WrappedLayer, role: str, dtype: torch.dtype | None = None) -> Tensor:
    """`W0 + ΔW` of a role in the base module's own layout, computed fresh; the base is not touched.

    `dtype` is the base's if left out. A narrow one loses what is less than half a step of its grid: most of a small ΔW.
    """
    weight_OI = weight_out_in(layer.base)
    if role in layer.adapters:
        adapter: Adapter = layer.adapters[role]  # type: ignore[assignment]
        merged_OI = (weight_OI.float() + adapter.delta_weight()).to(dtype or weight_OI.dtype)
    else:
        merged_OI = weight_OI.to(dtype or weight_OI.dtype, copy=True)
    return (merged_OI.T if isinstance(layer.base, Conv1D) else merged_OI).contiguous()


def unwrap(model: nn.Module, role: str) -> None:
    """Make a model plain again, with `W0 + ΔW` of a role in its layers; for a copy, never for a backbone's own."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, WrappedLayer):
                if role in layer.adapters:
                    layer.base.weight = nn.Parameter(merged_weight(layer, role))
                setattr(parent, name, layer.base)


@torch.no_grad()
def count_trainable(module: nn.Module) -> int:
    """Number of parameters that an optimizer would train."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
