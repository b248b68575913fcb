"""Making adapter modules from a spec: fresh from an init, or as they were saved. The one place that knows the kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pe_rlhf.adapters.layer_statistics import LayerStatistics, StatisticsSource, as_source
from pe_rlhf.adapters.lora import inits as _registers_the_inits  # noqa: F401
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, Scaling, lora_scale
from pe_rlhf.adapters.lora.init_registry import InitContext, get_init
from pe_rlhf.system.progress import progress
from reward.errors import InputError


@dataclass(frozen=True)
class AdapterSpec:
    """How a role's adapter is made; `modules` are the names of the layers it is on."""

    init: str
    rank: int
    alpha: float
    scaling: Scaling
    dropout: float
    modules: tuple[str, ...]
    init_options: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return lora_scale(self.alpha, self.rank, self.scaling)


@dataclass(frozen=True)
class FullSpec:
    """A role with weights of its own, all of them trained."""

    tuning: Literal["full"] = "full"


RoleSpec = AdapterSpec | FullSpec


def spec_from_json(saved: dict[str, Any]) -> RoleSpec:
    """The spec that `dataclasses.asdict` gave. Raises KeyError or TypeError for what is none."""
    if saved.get("tuning") == "full":
        return FullSpec()
    return AdapterSpec(**{**saved, "modules": tuple(saved["modules"])})


def new_adapters(
    spec: AdapterSpec,
    weight: Callable[[str], Tensor],
    seed: Callable[[str], int],
    statistics: StatisticsSource | Mapping[str, LayerStatistics] | None = None,
) -> dict[str, nn.Module]:
    """Adapters at their initialisation for all layers of a spec, layer after layer, with a progress bar.

    Args:
        weight, seed: the base weight _OI and the seed of a layer by its name.
        statistics: what the init needs beyond the weights. Raises `InputError` where it needs some and there are none.
    """
    init = get_init(spec.init)
    made: dict[str, nn.Module] = {}
    with progress(f"adapter init {spec.init}", len(spec.modules), "layers") as advance:

        def make(name: str, found: LayerStatistics) -> None:
            made[name] = new_adapter(spec, weight(name), seed(name), found)
            advance(1)

        if init.needs is not None and statistics is not None:
            as_source(statistics).visit(spec.modules, init.needs, make)
        else:
            for name in spec.modules:
                make(name, LayerStatistics())
    if missing := [name for name in spec.modules if name not in made]:
        raise InputError(f"the init {spec.init!r}: there are no statistics for the layer {missing[0]}")
    return {name: made[name] for name in spec.modules}


@torch.no_grad()
def new_adapter(
    spec: AdapterSpec, weight_OI: Tensor, seed: int, statistics: LayerStatistics | None = None
) -> nn.Module:
    """An adapter at its initialisation for a layer of that base weight, on the weight's device."""
    init = get_init(spec.init)
    generator = torch.Generator().manual_seed(seed)
    options = init.parse(spec.init_options)
    found = statistics or LayerStatistics()
    context = InitContext(weight_OI.float(), spec.rank, spec.scale, generator, options, found)
    return AnchoredLoRA(*init(context), scale=spec.scale, dropout=spec.dropout).to(weight_OI.device)


def saved_adapter(spec: AdapterSpec, weight_OI: Tensor, state: dict[str, Tensor]) -> nn.Module:
    """An adapter from its `state_dict()` for a layer of that base weight, on the weight's device.

    Raises KeyError where a tensor is missing, ValueError where A and B do not fit the weight.
    """
    out_features, in_features = weight_OI.shape
    if state["lora_A"].shape[1] != in_features or state["lora_B"].shape[0] != out_features:
        raise ValueError(f"the factors do not fit a weight of shape {tuple(weight_OI.shape)}")
    return AnchoredLoRA.from_state(state, scale=spec.scale, dropout=spec.dropout).to(weight_OI.device)
