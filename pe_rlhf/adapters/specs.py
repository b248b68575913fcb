"""Making adapter layers from a spec: fresh, or from saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, kind_of
from pe_rlhf.adapters.layer_statistics import LayerStatistics, StatisticsSource, as_source
from pe_rlhf.adapters.targets import find_targets
from pe_rlhf.config import AdapterConfig
from pe_rlhf.config.adapter import refuse_unknown, settings_of
from pe_rlhf.system.distributed import from_each_rank, own_rows, world_size
from pe_rlhf.system.failures import ElsewhereError
from pe_rlhf.system.processes import is_main
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
        takes_experts = kind_of(settings).takes_experts
        found = find_targets(model, settings.targets, settings.last_layers, settings.exclude, takes_experts)
        return cls(settings, tuple(found))

    @cached_property
    def kind(self) -> AdapterKind[Any]:
        """The kind, with these settings."""
        return kind_of(self.settings)

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
    return AdapterSpec(settings_of(settings.get("kind", "lora"))(**settings), tuple(saved["modules"]))


def adapter_settings(kind: str = "lora", **settings: Any) -> AdapterConfig:
    """Settings of an adapter, as keywords. Raises `InputError` for a name or value that is wrong."""
    schema = settings_of(kind)
    refuse_unknown(f"the kind {kind!r}", "key", settings, schema, below="adapter.")
    try:
        return schema(kind=kind, **settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("adapter", *first["loc"])))
        raise InputError(f"{key}: {first['msg']} (got {first['input']!r})", kind="invalid", key=key) from error


def new_adapters(
    spec: AdapterSpec,
    weight: Callable[[str], Tensor],
    seed: Callable[[str], int],
    statistics: StatisticsSource | Mapping[str, LayerStatistics] | None = None,
) -> dict[str, nn.Module]:
    """Adapters at their initialisation for all layers of a spec, layer after layer, with a progress bar.

    On several ranks each makes a share of the layers and the others get its bits: an SVD of every layer of a 7B model
    takes minutes, and may come out with other signs on another machine. All ranks call this together.

    Args:
        weight, seed: the base weight _OI and the seed of a layer by its name.
        statistics: what the init needs beyond the weights.

    Raises `InputError` for a kind, init or option that does not exist, and where statistics of a layer are needed and
    not given.
    """
    kind, settings = spec.kind, spec.settings
    name_of_start = getattr(settings, "init", settings.kind)
    made: dict[str, nn.Module] = {}
    seen: set[str] = set()
    own = {spec.modules[row] for row in own_rows(len(spec.modules))}
    failure: InputError | None = None
    with progress(f"adapter init {name_of_start}", len(spec.modules), "layers") as advance, torch.no_grad():

        def make(name: str, found: LayerStatistics) -> None:
            nonlocal failure
            seen.add(name)
            weight_OI, generator = weight(name), torch.Generator().manual_seed(seed(name))  # ZeRO-3: from all ranks
            try:
                if name in own and failure is None:
                    tensors = kind.tensors(LayerContext(weight_OI.float(), generator, found))
                    made[name] = kind.build(tensors, weight_OI).to(weight_OI.device)
            except InputError as error:
                failure = error.at(f"the layer {name}")
                if world_size() == 1:
                    raise failure from error
            advance(1)

        if kind.needs is not None and statistics is not None:
            as_source(statistics).visit(spec.modules, kind.needs, make)
        else:
            for name in spec.modules:
                make(name, LayerStatistics())
    if missing := [name for name in spec.modules if name not in seen]:
        raise InputError(
            f"the adapter {name_of_start!r}: there are no statistics for the layer {missing[0]}",
            kind="missing",
            key="statistics",
        )
    if world_size() > 1:
        made = _from_all_ranks(spec, weight, made, failure)
    return {name: made[name] for name in spec.modules}


def _from_all_ranks(
    spec: AdapterSpec, weight: Callable[[str], Tensor], own: dict[str, nn.Module], failure: InputError | None
) -> dict[str, nn.Module]:
    """The adapters of all layers from those that each rank has made.

    Where a rank has failed, rank 0 raises its `InputError` and the others `ElsewhereError`.
    """
    states = {name: {k: v.cpu() for k, v in module.state_dict().items()} for name, module in own.items()}
    shares = from_each_rank((states, failure))
    for _, elsewhere in shares:
        if elsewhere is not None:
            raise elsewhere if is_main() else ElsewhereError(str(elsewhere))
    made = {}
    for row, name in enumerate(spec.modules):
        weight_OI = weight(name)
        made[name] = own[name] if name in own else saved_adapter(spec, weight_OI, shares[row % len(shares)][0][name])
    return made


def layer_sizes(kind: AdapterKind[Any], shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shapes of what a kind trains of a layer of that weight, by name; of fused experts, _EOI, once for each."""
    *experts, out_features, in_features = shape
    return {name: (*experts, *size) for name, size in kind.sizes(out_features, in_features).items()}


def saved_adapter(spec: AdapterSpec, weight_OI: Tensor, state: dict[str, Tensor]) -> nn.Module:
    """An adapter from its `state_dict()` for a layer of that base weight, on the weight's device.

    Raises KeyError where a tensor is missing, ValueError where one does not fit the weight and the settings.
    """
    for name, size in layer_sizes(spec.kind, weight_OI.shape).items():
        if (found := tuple(state[name].shape)) != size:
            raise ValueError(f"{name} has the shape {found}, not {size}")
    return spec.kind.build(state, weight_OI).to(weight_OI.device)
