"""The roles on one frozen model: which adapters and heads there are, which role is active, and what each one trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.anchored import Scaling
from pe_rlhf.adapters.build import AdapterSpec, new_adapters, saved_adapter
from pe_rlhf.adapters.export import export_peft
from pe_rlhf.adapters.statistics import LayerStatistics, StatisticsSource
from pe_rlhf.adapters.targets import Targets, find_targets, linear_modules
from pe_rlhf.adapters.wrapped import RoleState, WrappedLayer, merged_weight, weight_out_in
from pe_rlhf.seeding import derive_seed
from reward.errors import InputError
from reward.head import ScalarHead

ANCHOR = "anchor"
# Roles whose names start so have a scalar head: `reward`, `reward_2`, `value`.
HEAD_ROLES = ("value", "reward")


class ModelWithRoles(nn.Module):
    """A model whose weights are never written to, and the adapters and heads on it by role; none is the anchor."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.heads = nn.ModuleDict()
        self.specs: dict[str, AdapterSpec] = {}
        self._state = RoleState()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def active_role(self) -> str:
        return self._state.active or ANCHOR

    @property
    def roles(self) -> list[str]:
        return [ANCHOR, *self.specs]

    @contextmanager
    def role(self, name: str) -> Iterator[Self]:
        """Play a role: within the block its adapter is on. Roles nest; the one before is back after the block."""
        if name not in self.roles:
            raise InputError(f"there is no role {name!r} on this backbone; there are {', '.join(self.roles)}")
        before = self._state.active
        self._state.active = None if name == ANCHOR else name
        try:
            yield self
        finally:
            self._state.active = before

    def add_adapter(
        self,
        role: str,
        init: str = "lora",
        rank: int = 16,
        alpha: float = 32.0,
        targets: Targets = "all-linear",
        last_layers: int | None = None,
        scaling: Scaling = "standard",
        dropout: float = 0.0,
        seed: int = 0,
        init_options: dict[str, Any] | None = None,
        statistics: StatisticsSource | Mapping[str, LayerStatistics] | None = None,
    ) -> None:
        """Add a role: an anchored adapter on the target layers, and a scalar head for `value` and `reward`.

        Whatever the init, the role starts as the anchor exactly. Raises `InputError` for a role that is there already,
        an unknown init or option, targets that match nothing, or an init that needs `statistics` and has none.
        """
        self._refuse_taken(role)
        modules = tuple(find_targets(self.model, targets, last_layers))
        spec = AdapterSpec(init, rank, alpha, scaling, dropout, modules, init_options or {})
        adapters = new_adapters(spec, self.base_weight, lambda name: derive_seed(seed, role, name), statistics)
        self._install(role, spec, adapters, self._new_head(role))

    def base_weight(self, name: str) -> Tensor:
        """The frozen weight _OI of a layer that adapters can be put on; a quantised one is dequantised."""
        return weight_out_in(self.base_layer(name))

    def base_layer(self, name: str) -> nn.Module:
        """The frozen module of a layer that adapters can be put on."""
        return self._wrap(name).base

    def copy_role(self, source: str, target: str) -> None:
        """Add a role that starts as a copy of another, head and all (the critic from the reward model)."""
        self._refuse_taken(target)
        adapters = {name: copy.deepcopy(layer.adapters[source]) for name, layer in self._layers(source)}
        head = self._new_head(target)
        if head is not None and source in self.heads:
            head.load_state_dict(self.heads[source].state_dict())
        self._install(target, self.specs[source], adapters, head)

    def load_role(self, role: str, spec: AdapterSpec, state: dict[str, Tensor]) -> None:
        """Add a role, or set one that is there, to what `role_state` gave.

        Raises `InputError` where the tensors are not those of such a role on this model.
        """
        try:
            weights = {name: weight_out_in(self._wrap(name).base) for name in spec.modules}
            adapters = {name: saved_adapter(spec, weight, _part(state, name)) for name, weight in weights.items()}
            head = self._new_head(role)
            if head is not None:
                head.load_state_dict(_part(state, "head"))
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"the saved adapter does not fit role {role!r} on {self.name}") from error
        self._install(role, spec, adapters, head)

    def head(self, role: str) -> ScalarHead:
        """The scalar head of a role that has one."""
        head = self.heads[role]
        assert isinstance(head, ScalarHead)
        return head

    def set_role_state(self, role: str, state: dict[str, Tensor]) -> None:
        """Set the tensors of a role that is there in place, so that an optimizer on them stays valid."""
        own = dict(self._named(role, nn.Module.state_dict))
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in state.items()}:
            raise InputError(f"the saved tensors are not those of role {role!r} on {self.name}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def role_state(self, role: str) -> dict[str, Tensor]:
        """All tensors of a role by name: A, B, their initial values, and the head; copies, on the CPU."""
        return {
            name: t.detach().to("cpu", copy=True).contiguous() for name, t in self._named(role, nn.Module.state_dict)
        }

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters of a role that an optimizer trains, by name."""
        named = self._named(role, lambda module: dict(module.named_parameters()))
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def export_adapter(self, role: str, path: str | Path, rank: int | None = None) -> None:
        """Write a role as a plain PEFT LoRA of rank 2r (r where B0 is zero) for the original base; see `export.py`.

        `rank` fills a smaller one up with zeros.
        """
        layers = {name: layer.adapters[role] for name, layer in self._layers(role)}
        head = self.heads[role] if role in self.heads else None  # noqa: SIM401  (a ModuleDict has no get)
        names = list(linear_modules(self.model))
        export_peft(layers, head, role=role, base_model=self.name, all_names=names, path=Path(path), rank=rank)

    def export_rank(self, role: str) -> int:
        """The rank that `export_adapter` writes unless told otherwise."""
        return max(layer.adapters[role].factors().A_RI.shape[0] for _, layer in self._layers(role))  # type: ignore[operator]

    def merged_tensors(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """The base's checkpoint, name by name, with `W0 + ΔW` of a role in it; computed fresh, the base is not touched.

        A tensor that the model has under two names comes once, under the first.
        """
        layers = {} if role == ANCHOR else dict(self._layers(role))
        seen: set[int] = set()
        for name, tensor in self.model.state_dict().items():
            module = name.removesuffix(".base.weight")
            if ".adapters." in name or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            layer = layers.get(module)
            yield name.replace(".base.", "."), tensor if layer is None else merged_weight(layer, role)

    def train(self, mode: bool = True) -> Self:
        """Turn dropout of adapters on or off. The base stays as it is: it has none."""
        super().train(False)
        for module in self.model.modules():
            if isinstance(module, WrappedLayer):
                module.adapters.train(mode)
        self.training = mode
        return self

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _refuse_taken(self, role: str) -> None:
        if role in self.roles or not role.isidentifier():
            raise InputError(f"cannot add a role {role!r}: the name is taken or is not an identifier")

    def _new_head(self, role: str) -> ScalarHead | None:
        if not role.startswith(HEAD_ROLES):
            return None
        size: int = self.model.get_input_embeddings().embedding_dim  # type: ignore[assignment]
        return ScalarHead(size, train_bias=role.startswith("value")).to(self.device)

    def _install(self, role: str, spec: AdapterSpec, adapters: dict[str, nn.Module], head: ScalarHead | None) -> None:
        """Put a role that is complete on the layers, in place of the one of that name."""
        if role in self.specs:
            for _, layer in self._layers(role):
                del layer.adapters[role]
        for name, adapter in adapters.items():
            self._wrap(name).adapters[role] = adapter
        if head is not None:
            self.heads[role] = head
        self.specs[role] = spec
        self.train(self.training)

    def _wrap(self, name: str) -> WrappedLayer:
        parent_name, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        layer = getattr(parent, leaf)
        if not isinstance(layer, WrappedLayer):
            layer = WrappedLayer(layer, self._state)
            setattr(parent, leaf, layer)
        return layer

    def _layers(self, role: str) -> list[tuple[str, WrappedLayer]]:
        if role not in self.specs:
            known = ", ".join(self.specs) or "none"
            raise InputError(f"there is no adapter {role!r} on this backbone; there are {known}")
        named = ((name, module) for name, module in self.model.named_modules() if isinstance(module, WrappedLayer))
        return [(name, layer) for name, layer in named if role in layer.adapters]

    def _named(self, role: str, tensors_of: Any) -> Iterator[tuple[str, Any]]:
        modules = {name: layer.adapters[role] for name, layer in self._layers(role)}
        if role in self.heads:
            modules["head"] = self.heads[role]
        for name, module in modules.items():
            yield from ((f"{name}.{part}", tensor) for part, tensor in tensors_of(module).items())


def _part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
