"""Making adapter modules from a spec: fresh from an init, or from saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.layer_statistics import LayerStatistics, StatisticsSource, as_source
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, lora_scale
from pe_rlhf.adapters.lora.init_registry import InitContext, init_of
from pe_rlhf.adapters.targets import find_targets
from pe_rlhf.config import AdapterConfig
from pe_rlhf.system.progress import progress
from reward.errors import InputError


@dataclass(frozen=True)
class AdapterSpec:
    """The adapter of a role: its settings, and the names of the layers that it is on."""

    settings: AdapterConfig
    modules: tuple[str, ...]

    @classmethod
    def on(cls, model: PreTrainedModel, settings: AdapterConfig) -> AdapterSpec:
        """The adapter that these settings describe on a model. Raises `InputError` where no layer matches."""
        found = find_targets(model, settings.targets, settings.last_layers, settings.exclude)
        return cls(settings, tuple(found))

    @property
    def scale(self) -> float:
        """The factor s of B·A."""
        return lora_scale(self.settings.alpha, self.settings.rank, self.settings.scaling)

    def as_json(self) -> dict[str, Any]:
        """For `role.json` and checkpoints."""
        return {**self.settings.model_dump(mode="json"), "modules": list(self.modules)}


@dataclass(frozen=True)
class FullSpec:
    """A role with weights of its own, all of them trained."""

    tuning: Literal["full"] = "full"

    def as_json(self) -> dict[str, Any]:
        """For `role.json` and checkpoints."""
        return {"tuning": self.tuning}


RoleSpec = AdapterSpec | FullSpec


def spec_from_json(saved: dict[str, Any]) -> RoleSpec:
    """The spec that `as_json` gave. Raises KeyError, TypeError or ValueError for anything that is not one."""
    if saved.get("tuning") == "full":
        return FullSpec()
    settings = {key: value for key, value in saved.items() if key != "modules"}
    return AdapterSpec(AdapterConfig(**settings), tuple(saved["modules"]))


def adapter_settings(**settings: Any) -> AdapterConfig:
    """Settings of an adapter, as keywords. Raises `InputError` for a name or value that is wrong."""
    try:
        return AdapterConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("adapter", *first["loc"])))
        kind = "unknown" if first["type"] == "extra_forbidden" else "invalid"
        raise InputError(f"{key}: {first['msg']} (got {first['input']!r})", kind=kind, key=key) from error


def new_adapters(
    spec: AdapterSpec,
    weight: Callable[[str], Tensor],
    seed: Callable[[str], int],
    statistics: StatisticsSource | Mapping[str, LayerStatistics] | None = None,
) -> dict[str, nn.Module]:
    """Adapters at their initialisation for all layers of a spec, layer after layer, with a progress bar.

    Args:
        weight, seed: the base weight _OI and the seed of a layer by its name.
        statistics: what the init needs beyond the weights.

    Raises `InputError` for an init or option that does not exist, and where the init needs statistics of a layer that
    are not given.
    """
    settings = spec.settings
    init, options = init_of(settings)
    made: dict[str, nn.Module] = {}
    with progress(f"adapter init {init.name}", len(spec.modules), "layers") as advance, torch.no_grad():

        def make(name: str, found: LayerStatistics) -> None:
            weight_OI, generator = weight(name), torch.Generator().manual_seed(seed(name))
            context = InitContext(weight_OI.float(), settings.rank, spec.scale, generator, options, found)
            try:
                factors = init(context)
            except InputError as error:
                raise error.at(f"the layer {name}") from error
            adapter = AnchoredLoRA(*factors, scale=spec.scale, dropout=settings.dropout)
            made[name] = adapter.to(weight_OI.device)
            advance(1)

        if init.needs is not None and statistics is not None:
            as_source(statistics).visit(spec.modules, init.needs, make)
        else:
            for name in spec.modules:
                make(name, LayerStatistics())
    if missing := [name for name in spec.modules if name not in made]:
        raise InputError(
            f"the init {init.name!r}: there are no statistics for the layer {missing[0]}",
            kind="missing",
            key="statistics",
        )
    return {name: made[name] for name in spec.modules}


def saved_adapter(spec: AdapterSpec, weight_OI: Tensor, state: dict[str, Tensor]) -> nn.Module:
    """An adapter from its `state_dict()` for a layer of that base weight, on the weight's device.

    Raises KeyError where a tensor is missing, ValueError where A and B do not fit the weight.
    """
    out_features, in_features = weight_OI.shape
    if state["lora_A"].shape[1] != in_features or state["lora_B"].shape[0] != out_features:
        raise ValueError(f"the factors do not fit a weight of shape {tuple(weight_OI.shape)}")
    if (rank := state["lora_A"].shape[0]) != spec.settings.rank:  # the scale is alpha over the settings' rank
        raise ValueError(f"the factors are of rank {rank}, not {spec.settings.rank}")
    return AnchoredLoRA.from_state(state, scale=spec.scale, dropout=spec.settings.dropout).to(weight_OI.device)
