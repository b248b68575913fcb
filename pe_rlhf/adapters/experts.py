"""Adapters on experts that a model holds fused: one parameter _EOI for all experts of a block, and no modules.

    W_e = W0_e + s · (B_e·A_e − B0_e·A0_e)

Each expert has factors of its own, anchored as those of a linear layer. A pass is that of transformers' `grouped_mm`
with the adapter's products beside the base's, so a role starts with the anchor's bits, and no dense ΔW is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from pe_rlhf.adapters.layer import FusedWeight, RoleState, WrappedLayer, Wrapper, merged_weight
from pe_rlhf.adapters.lora.anchored import ExpertLoRA
from pe_rlhf.system.distributed import is_sharded

IMPLEMENTATION = "grouped_mm"
FUSED = ("gate_up_proj", "up_proj", "down_proj")


def fused_parameters(module: nn.Module) -> list[str]:
    """The names of a module's fused expert weights that adapters can be put on, in the module's order; often none.

    It has to be an experts module of transformers' interface, computed by `grouped_mm`, not quantised.
    """
    if isinstance(module, WrappedExperts):
        return module.names
    if not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        return []
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    weights = {name: weight for name, weight in module._parameters.items() if name in FUSED}
    plain = all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in weights.values())
    return list(weights) if implementation == IMPLEMENTATION and plain else []


class ExpertWeight(WrappedLayer):
    """One fused weight of wrapped experts, and the adapters on it by role; the experts compute it, it is not called."""

    base: FusedWeight

    def __init__(self, experts: nn.Module, name: str, state: RoleState) -> None:
        super().__init__(FusedWeight(experts, name), state)

    def can_merge(self, role: str) -> bool:
        return not is_sharded(self.base)

    def active(self, role: str | None) -> ExpertLoRA | None:
        """The adapter of a role that has one here."""
        if role is None or role not in self.adapters:
            return None
        found = self.adapter(role)
        assert isinstance(found, ExpertLoRA)
        return found


class WrappedExperts(Wrapper):
    """Experts, and the adapters on their fused weights; without an active one they compute what they did."""

    def __init__(self, base: nn.Module, state: RoleState) -> None:
        super().__init__(base)
        self.names, self._state = fused_parameters(base), state
        # Straight into the table: `add_module` finds the base's parameter of that name, and refuses.
        self._modules.update({name: ExpertWeight(base, name, state) for name in self.names})

    def weight(self, name: str) -> ExpertWeight:
        found = self.get_submodule(name)
        assert isinstance(found, ExpertWeight)
        return found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the base's: states _NH, and the experts of each token and their weights, _NK."""
        role, layers = self._state.active, {name: self.weight(name) for name in self.names}
        given = (hidden_states, top_k_index, top_k_weights)
        merged = {name: weight for name, layer in layers.items() if (weight := layer.merged(role)) is not None}
        if merged:
            return self._with_weights(merged, *given)
        adapters = {name: found for name, layer in layers.items() if (found := layer.active(role)) is not None}
        if not adapters:
            return self.base(*given)
        # Within the base's own call: ZeRO-3 gathers a module's weights for it.
        self.base.forward = lambda *inputs: adapted_experts(self.base, adapters, *inputs)
        try:
            return self.base(*given)
        finally:
            del self.base.forward

    def _with_weights(self, weights: Mapping[str, Tensor], *given: Tensor) -> Tensor:
        own = {name: self.base._parameters[name] for name in weights}
        try:
            self.base._parameters.update({n: nn.Parameter(w, requires_grad=False) for n, w in weights.items()})
            return self.base(*given)
        finally:
            self.base._parameters.update(own)

    def plain(self, role: str) -> nn.Module:
        for name in self.names:
            if role in (layer := self.weight(name)).adapters:
                self.base.register_parameter(name, nn.Parameter(merged_weight(layer, role)))
        return self.base


def wrapped(model: nn.Module, name: str, state: RoleState) -> WrappedLayer:
    """The place of a layer or fused weight of that name for adapters, made where it is not there yet."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    layer = getattr(parent, leaf)
    if isinstance(layer, WrappedLayer):
        return layer
    if leaf in fused_parameters(parent):
        experts = WrappedExperts(parent, state)
        model.set_submodule(parent_name, experts)
        return experts.weight(leaf)
    layer = WrappedLayer(layer, state)
    setattr(parent, leaf, layer)
    return layer


def adapted_experts(
    experts: Any, adapters: Mapping[str, ExpertLoRA], hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor
) -> Tensor:
    """`grouped_mm_experts_forward` of transformers, operation by operation, with adapters on its products.

    S rows are the pairs of a token and one of its K experts, sorted by expert.
    """
    count = index_NK.shape[-1]
    expert_S, order_S = torch.sort(index_NK.reshape(-1))
    ends_E = torch.searchsorted(
        expert_S.contiguous(), torch.arange(experts.num_experts, device=expert_S.device), right=True
    ).int()

    def linear(name: str, x_SI: Tensor) -> Tensor:
        bias_SO = getattr(experts, f"{name}_bias")[expert_S] if experts.has_bias else None
        weight = experts._parameters[name]
        y_SO = _grouped_linear(x_SI, weight, ends_E, bias=bias_SO, is_transposed=experts.is_transposed)
        return adapters[name].add_to_rows(x_SI, y_SO, ends_E) if name in adapters else y_SO

    up_SO = linear("gate_up_proj" if experts.has_gate else "up_proj", hidden_NH[order_S // count])
    inner_SI = experts._apply_gate(up_SO) if experts.has_gate else experts.act_fn(up_SO)
    weighted_SH = linear("down_proj", inner_SI) * weights_NK.reshape(-1)[order_S, None]
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return weighted_SH[place_S].view(len(hidden_NH), count, -1).sum(dim=1).to(hidden_NH.dtype)
