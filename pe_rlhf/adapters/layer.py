"""The wrapped layer: a frozen base module and one small adapter layer per role.

The wrapper knows nothing of kinds. Which role is active is one shared piece of state per backbone, set by
`Backbone.role`, so that switching a role touches no module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pe_rlhf.system.distributed import gathered, is_sharded
from reward.errors import InputError

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITSANDBYTES = ("Params4bit", "Int8Params")


@dataclass
class RoleState:
    """What a backbone plays now.

    Attributes:
        active: the role; None is the anchor, the backbone as it was loaded.
        task: for roles that are routed by task: the number of the task, or that of each token of the pass, _BT, or of
            each row, _B1; None: no task was chosen.
    """

    active: str | None = None
    task: int | Tensor | None = None


@dataclass(frozen=True)
class LowRankFactors:
    """An adapter's change of the weight as factors: ΔW_OI = scale · B_OR @ A_RI."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float


class AdapterLayer(nn.Module):
    """One role's adapter on one layer: the base of all kinds.

    Parameters and buffers are what the kind's `tensors` gave, or what was saved of them; numbers are fp32 whatever the
    base's dtype. Everything that hooks of the kind keep is in buffers, so that checkpoints have it.

    Attributes:
        trained: the names of the tensors that are parameters.
        kept: the names of those that are buffers; of `optional` buffers, one that is not given is None.
        settings: the recipe's section.

    Raises KeyError for a tensor that is missing, ValueError for one that it has not.
    """

    trained: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tensors: Mapping[str, Tensor], settings: Any) -> None:
        super().__init__()
        self.settings = settings
        for name in self.trained:
            self.register_parameter(name, nn.Parameter(_own(tensors[name])))
        for name in self.kept:
            self.register_buffer(name, _own(tensors[name]))
        for name in self.optional:
            self.register_buffer(name, _own(tensors[name]) if name in tensors else None)
        if others := sorted(tensors.keys() - {*self.trained, *self.kept, *self.optional}):
            raise ValueError(f"a {type(self).__name__} has no {others[0]}")

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """The adapted output for input `x`; exactly `base(x)` at initialisation. It calls the base itself."""
        raise NotImplementedError  # a layer on fused experts has none: its wrapper computes each expert

    def put_on(self, base: nn.Module) -> None:
        """Told of the base that it is put on. Whoever needs it keeps a weak reference: a layer is copied without it."""

    def follow(self, state: RoleState) -> None:
        """Told of what the backbone plays, for a layer that computes something else for each task."""

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """The change of a base weight (fp32) as a dense fp32 matrix _OI, computed fresh; None: there is no such one."""
        return None

    def lora_factors(self) -> LowRankFactors | None:
        """The change of the weight as plain LoRA factors, computed fresh; None: it has no such form."""
        return None

    def starts(self) -> dict[str, Tensor]:
        """What weight decay pulls parameters to, by name, so that the end of the pull is the anchor; others go to 0."""
        return {}

    @property
    def has_delta_weight(self) -> bool:
        """Whether it can be merged: its change is a matrix, whatever the input."""
        return type(self).delta_weight is not AdapterLayer.delta_weight

    @property
    def has_lora_factors(self) -> bool:
        """Whether PEFT and vLLM can load it as a plain LoRA."""
        return type(self).lora_factors is not AdapterLayer.lora_factors


class Wrapper(nn.Module, ABC):
    """What stands in the place of a module of the model, which it holds as `base`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @abstractmethod
    def plain(self, role: str) -> nn.Module:
        """The module with `W0 + ΔW` of a role written into it; for a copy, never for a backbone's own."""

    def __getattr__(self, name: str) -> Any:
        """What the base has: models ask for `weight.dtype`, `in_features` and the like."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class WrappedLayer(Wrapper):
    """The active role's adapter if it has one here, else the base; for a merged role one product instead."""

    def __init__(self, base: nn.Module, state: RoleState) -> None:
        super().__init__(base)
        self.adapters = nn.ModuleDict()
        self._state = state
        self._merged: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        role = self._state.active
        if (merged := self.merged(role)) is not None:
            return F.linear(x, like_out_in(self.base, merged), getattr(self.base, "bias", None))
        if role is None or role not in self.adapters:
            return self.base(x)
        return self.adapters[role](x, self.base)

    def adapter(self, role: str) -> AdapterLayer:
        """The adapter layer of a role that has one here."""
        found = self.adapters[role]
        assert isinstance(found, AdapterLayer)
        return found

    def change(self, role: str) -> Tensor:
        """ΔW_OI of a role that can be merged, fp32, computed fresh."""
        delta_OI = self.adapter(role).delta_weight(weight_out_in(self.base).float())
        assert delta_OI is not None
        return delta_OI

    def plain(self, role: str) -> nn.Module:
        if role in self.adapters:
            self.base.weight = nn.Parameter(merged_weight(self, role))
        return self.base

    def can_merge(self, role: str) -> bool:
        """Whether `W0 + ΔW` is a plain product: a base that is whole here, not quantised, and an adapter with a ΔW."""
        plain = has_plain_weight(self.base) and has_forward_of_linear(self.base)
        return plain and (role not in self.adapters or self.adapter(role).has_delta_weight)

    def merge(self, role: str) -> None:
        """Compute the role by `W0 + ΔW` as it is now, a copy beside the base, until it is unmerged."""
        self._merged[role] = merged_weight(self, role)

    def merged(self, role: str | None) -> Tensor | None:
        """`W0 + ΔW` of a role that is merged now, in the base's own layout."""
        return self._merged.get(role) if role is not None else None

    def unmerge(self, role: str) -> None:
        self._merged.pop(role, None)


class FusedWeight(nn.Module):
    """One parameter _EOI of a module that holds the weights of all its experts, as if it were a layer's weight."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.name, self.is_transposed = name, bool(getattr(experts, "is_transposed", False))
        self._of = (experts,)  # in a tuple, so that it is no part of this module

    @property
    def weight(self) -> Tensor:
        found = self._of[0]._parameters[self.name]
        assert found is not None
        return found

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the experts, which ZeRO-3 splits and gathers as one."""
        return self._of[0].parameters(recurse)


def weight_out_in(base: nn.Module) -> Tensor:
    """The base weight as _OI (out, in), whichever way round the module stores it (GPT-2's Conv1D is _IO).

    That of fused experts is _EOI.

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
    return weight.mT if _is_in_out(base) else weight


def _is_in_out(base: nn.Module) -> bool:
    """Whether a module stores its weight as (in, out)."""
    return isinstance(base, Conv1D) or (isinstance(base, FusedWeight) and base.is_transposed)


def _dequantised(base: nn.Module) -> Tensor:
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight  # it takes a second to import

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


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's weight is packed, and `weight_out_in` dequantises it."""
    weight = module._parameters.get("weight")
    return weight is not None and not weight.is_floating_point()


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
        merged_OI = (weight_OI.float() + layer.change(role)).to(dtype or weight_OI.dtype)
    else:
        merged_OI = weight_OI.to(dtype or weight_OI.dtype, copy=True)
    return like_out_in(layer.base, merged_OI).contiguous()


def unwrap(model: nn.Module, role: str) -> None:
    """Make a model plain again, with `W0 + ΔW` of a role in its layers; for a copy, never for a backbone's own."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Wrapper) and not isinstance(parent, Wrapper):
                setattr(parent, name, layer.plain(role))


def _own(tensor: Tensor) -> Tensor:
    """A copy, numbers in fp32, row after row in memory: columns of an SVD are not, and round differently once saved."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


@torch.no_grad()
def count_trainable(module: nn.Module) -> int:
    """Number of parameters that an optimizer would train."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
