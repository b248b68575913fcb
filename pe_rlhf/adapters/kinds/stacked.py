"""A LoRA on top of the frozen adapters of earlier tasks: W0 + Σ_i s_i·B_i·A_i + s·(B·A − B0·A0).

A run with several tasks makes it. The role has everything that it computes in its own tensors, so it is saved, resumed,
merged and exported (as one LoRA of rank Σ r_i) without the earlier runs. Without earlier tasks it is a LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, LoRA, add_frozen, writable
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.config.adapter import AdapterConfig, LoRAConfig, LowRankConfig
from reward.errors import InputError

Tensors = dict[str, Tensor]


class StackedConfig(LoRAConfig):
    """A LoRA on top of earlier tasks' adapters, made by `continual: {adapter: new}`."""


class StackedLoRA(AnchoredLoRA):
    """`earlier_A_PI` and `earlier_B_OP` are the earlier factors, task after task; `ranks_T` and `scales_T` of each."""

    optional = (*AnchoredLoRA.optional, "earlier_A_PI", "earlier_B_OP", "ranks_T", "scales_T")
    earlier_A_PI: Tensor | None
    earlier_B_OP: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], settings: LowRankConfig) -> None:
        super().__init__(tensors, settings)
        self._ranks, self._scales = (tensors[n].tolist() if n in tensors else [] for n in ("ranks_T", "scales_T"))

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """Task after task, as the earlier policies computed it: at its start it is the last of them to the bit."""
        y = writable(base(x))
        for part in self.earlier():
            y = add_frozen(x.to(y.dtype), y, part.A_RI.to(y.dtype), part.B_OR.to(y.dtype), part.scale)
        return self.add_low_rank(x, y)

    def earlier(self) -> Iterator[LowRankFactors]:
        """The factors of each earlier task."""
        if self.earlier_A_PI is None or self.earlier_B_OP is None:
            return iter(())
        ups, downs = self.earlier_A_PI.split(self._ranks), self.earlier_B_OP.split(self._ranks, dim=1)
        return (LowRankFactors(*part) for part in zip(ups, downs, self._scales, strict=True))

    def own(self) -> LowRankFactors:
        """The factors of this task."""
        up, down = self._difference()
        return LowRankFactors(up.clone(), down.clone(), self.scale)

    @torch.no_grad()
    def lora_factors(self) -> LowRankFactors | None:
        parts = [*self.earlier(), self.own()]
        downs = [part.B_OR * (part.scale / self.scale) for part in parts]
        return LowRankFactors(torch.cat([part.A_RI for part in parts]), torch.cat(downs, dim=1), self.scale)

    @torch.no_grad()
    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        return torch.stack([p.scale * (p.B_OR @ p.A_RI) for p in (*self.earlier(), self.own())]).sum(dim=0)


class Stacked(LoRA):
    """A LoRA with any init on top of what earlier tasks left."""

    settings_type: ClassVar[type[AdapterConfig]] = StackedConfig
    layer: ClassVar[type[AdapterLayer]] = StackedLoRA


def _earlier(parts: list[LowRankFactors]) -> Tensors:
    return {
        "earlier_A_PI": torch.cat([part.A_RI for part in parts]),
        "earlier_B_OP": torch.cat([part.B_OR for part in parts], dim=1),
        "ranks_T": torch.tensor([len(part.A_RI) for part in parts], dtype=torch.long),
        "scales_T": torch.tensor([part.scale for part in parts], dtype=torch.float32),
    }


def parts_of(layer: AdapterLayer) -> list[LowRankFactors]:
    """What a layer of a policy is made of, a part for each task. Raises `InputError` where it is no LoRA."""
    if isinstance(layer, StackedLoRA):
        return [*layer.earlier(), layer.own()]
    if (factors := layer.lora_factors()) is None:
        raise InputError(
            "continual.previous: its adapter has not the form of a LoRA, on which a new one could be put",
            kind="conflict",
            key="continual.previous",
            fix="use continual: {adapter: same}",
        )
    return [factors]


def refuse_other_kind(settings: AdapterConfig) -> None:
    """Raise `InputError` for an adapter that cannot be put on top of others."""
    if type(settings) is not LoRAConfig:
        raise InputError(
            f"continual: an adapter of the kind {settings.kind} cannot be put on top of another",
            kind="conflict",
            key="adapter.kind",
            fix="use adapter: {kind: lora}, or continual: {adapter: same}",
        )


def stacked(
    spec: AdapterSpec, state: Mapping[str, Tensor], below: Mapping[str, AdapterLayer]
) -> tuple[AdapterSpec, Tensors]:
    """Spec and tensors of a new LoRA (its own are `state`) on top of the layers of a policy.

    Raises `InputError` for another kind of adapter, and where the two are on other layers.
    """
    refuse_other_kind(spec.settings)
    if other := sorted(set(spec.modules) ^ below.keys()):
        raise InputError(
            f"continual: the policy before this task has its adapter on other layers, such as {other[0]}",
            kind="conflict",
            key="adapter.targets",
            fix="give all tasks the same targets, exclude and last_layers",
        )
    tensors = dict(state)
    for name in spec.modules:
        tensors |= {f"{name}.{part}": tensor for part, tensor in _earlier(parts_of(below[name])).items()}
    settings: dict[str, Any] = spec.settings.model_dump() | {"kind": "stacked"}
    return AdapterSpec(StackedConfig(**settings), spec.modules), tensors
