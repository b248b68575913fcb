"""The roles on one frozen model: which adapters and heads there are, which role is active, and what each one trains.

A role may also have weights of its own, the whole model trained: the baseline that adapters are measured against.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.experts import wrapped
from pe_rlhf.adapters.layer import AdapterLayer, RoleState, WrappedLayer, weight_out_in
from pe_rlhf.adapters.layer_statistics import LayerStatistics, StatisticsSource
from pe_rlhf.adapters.specs import AdapterSpec, FullSpec, RoleSpec, adapter_settings, new_adapters, saved_adapter
from pe_rlhf.adapters.targets import say_what_is_left_out
from pe_rlhf.config import AdapterConfig
from pe_rlhf.model.original_weights import OriginalWeights
from pe_rlhf.model.own_weights import plain_copy
from pe_rlhf.model.probes import decoder_of
from pe_rlhf.model.tensors import refuse_others, set_tensors, unique_tensors, with_prefix, without_prefix
from pe_rlhf.system.seeding import derive_seed
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
        self.own_models = nn.ModuleDict()
        self.specs: dict[str, RoleSpec] = {}
        self._state = RoleState()
        # How the base is loaded without quantising it, where it was.
        self.load_original: Callable[[], PreTrainedModel] | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def active_role(self) -> str:
        return self._state.active or ANCHOR

    @property
    def active_model(self) -> PreTrainedModel:
        """The model that computes the active role: the shared one, or the role's own. With a head it is a decoder."""
        return self.model if self.active_role not in self.own_models else self._own_model(self.active_role)

    @property
    def roles(self) -> list[str]:
        return [ANCHOR, *self.specs]

    @contextmanager
    def role(self, name: str) -> Iterator[Self]:
        """Play a role: within the block its adapter is on. Roles nest; the one before is back after the block."""
        if name not in self.roles:
            message = f"there is no role {name!r} on this backbone; there are {', '.join(self.roles)}"
            raise InputError(message, kind="unknown", key=name)
        before = self._state.active
        self._state.active = None if name == ANCHOR else name
        try:
            yield self
        finally:
            self._state.active = before

    def can_merge(self, name: str) -> bool:
        """Whether `merged_role` can play a role: plain weights that are whole here, and an adapter with a ΔW."""
        return all(layer.can_merge(name) for layer in self._merged_layers(name))

    def has_delta_weights(self, name: str) -> bool:
        """Whether what an adapter changes is a matrix of each layer, whatever the input: it can be exported merged."""
        return all(layer.adapter(name).has_delta_weight for _, layer in self._layers(name))

    def is_lora(self, name: str) -> bool:
        """Whether a role's adapter has the form of a plain LoRA, which PEFT and vLLM load."""
        return name in self.specs and all(layer.adapter(name).has_lora_factors for _, layer in self._layers(name))

    def merged_bytes(self, name: str) -> int:
        """What the copies of `merged_role` take up."""
        return sum(layer.base.weight.nbytes for layer in self._merged_layers(name))  # type: ignore[operator]

    @contextmanager
    def merged_role(self, name: str) -> Iterator[Self]:
        """Play a role by copies of its layers with `W0 + ΔW` in them, for many passes over few tokens, as in sampling.

        An adapter's own products cost more there than the merging. The copies carry no gradient to the adapter, and are
        gone after the block.
        """
        layers = self._merged_layers(name)
        try:
            for layer in layers:
                layer.merge(name)
            with self.role(name):
                yield self
        finally:
            for layer in layers:
                layer.unmerge(name)

    def add_adapter(
        self,
        role: str,
        settings: AdapterConfig | None = None,
        *,
        seed: int = 0,
        statistics: StatisticsSource | Mapping[str, LayerStatistics] | None = None,
        **named: Any,
    ) -> None:
        """Add a role: an anchored adapter on the target layers, and a scalar head for `value` and `reward`.

        Whatever the init, the role starts as the anchor exactly.

        Args:
            settings: the adapter section of a recipe. Its keys may be given by name instead: `kind="dora", rank=16`.
            statistics: what the kind or init needs beyond the weights; original weights are read from the disk.

        Raises `InputError` for a role that is there already, an unknown kind, init or option, targets that match
        nothing, or where `statistics` are needed and not given.
        """
        self._refuse_taken(role)
        spec = AdapterSpec.on(self.model, settings or adapter_settings(**named))
        given = (spec.settings.targets, spec.settings.last_layers, spec.kind.takes_experts)
        say_what_is_left_out(self.model, spec.modules, *given)
        if statistics is None and spec.kind.needs == "original weight":
            statistics = self.original_weights()
        adapters = new_adapters(spec, self.base_weight, lambda name: derive_seed(seed, role, name), statistics)
        self._install(role, spec, adapters, self._new_head(role))

    def add_own_weights(self, role: str, source: str = ANCHOR) -> None:
        """Add a role that is fully tuned: a plain copy of the model, and its head, that start as another role.

        Raises `InputError` for a role that is there already, and for a base that is quantised or split by ZeRO-3.
        """
        self._refuse_taken(role)
        head = self._new_head(role)
        if head is not None and source in self.heads:
            head.load_state_dict(self.heads[source].state_dict())
        own = self._own_model(source) if source in self.own_models else None
        if own is not None and head is None and source in self.heads:
            message = f"{source} has no language-model head of its own that a copy could start from"
            raise InputError(message, kind="conflict", key=source)
        self._install_own(role, plain_copy(self.model, source, own, whole=head is None), head)

    def original_weights(self) -> OriginalWeights:
        """The weights of the base as they were before it was quantised."""
        return OriginalWeights(self.load_original)

    def base_weight(self, name: str) -> Tensor:
        """The frozen weight _OI of a layer that adapters can be put on; a quantised one is dequantised."""
        return weight_out_in(self.base_layer(name))

    def base_layer(self, name: str) -> nn.Module:
        """The frozen module of a layer that adapters can be put on."""
        return wrapped(self.model, name, self._state).base

    def adapter_spec(self, role: str) -> AdapterSpec:
        """How a role's adapter was made. Raises `InputError` for a role that has none."""
        spec = self.specs.get(role)
        if not isinstance(spec, AdapterSpec):
            raise self._no_adapter(role)
        return spec

    def _no_adapter(self, role: str) -> InputError:
        known = ", ".join(self.specs) or "none"
        return InputError(f"there is no adapter {role!r} on this backbone; there are {known}", kind="unknown", key=role)

    def copy_role(self, source: str, target: str) -> None:
        """Add a role that starts as a copy of another, head and all (the critic from the reward model)."""
        if source in self.own_models:
            return self.add_own_weights(target, source)
        self._refuse_taken(target)
        adapters = {name: copy.deepcopy(layer.adapters[source]) for name, layer in self._layers(source)}
        head = self._new_head(target)
        if head is not None and source in self.heads:
            head.load_state_dict(self.heads[source].state_dict())
        return self._install(target, self.adapter_spec(source), adapters, head)

    def load_role(self, role: str, spec: RoleSpec, state: dict[str, Tensor]) -> None:
        """Add a role, or set one that is there, to what `role_state` gave.

        Raises `InputError` where the tensors are not those of such a role on this model.
        """
        try:
            head = self._new_head(role)
            if head is not None:
                head.load_state_dict(without_prefix("head.", state))
            if isinstance(spec, FullSpec):
                model = plain_copy(self.model, ANCHOR, None, whole=head is None)
                set_tensors(unique_tensors(model), without_prefix("model.", state))
                return self._install_own(role, model, head)
            refuse_others(state, (*spec.modules, "head"))
            # One weight at a time: under ZeRO-3 each is a whole copy, and that of a quantised one is dequantised.
            adapters = {
                name: saved_adapter(spec, self.base_weight(name), without_prefix(f"{name}.", state))
                for name in spec.modules
            }
        except (InputError, torch.OutOfMemoryError):
            raise
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            message = f"what was saved does not fit role {role!r} on {self.name}"
            raise InputError(message, kind="unreadable", key=role) from error
        return self._install(role, spec, adapters, head)

    def head(self, role: str) -> ScalarHead:
        """The scalar head of a role that has one."""
        head = self.heads[role]
        assert isinstance(head, ScalarHead)
        return head

    def set_role_state(self, role: str, state: dict[str, Tensor]) -> None:
        """Set the tensors of a role that is there in place, so that an optimizer on them stays valid."""
        try:
            set_tensors(dict(self._named(role, unique_tensors)), state)
        except ValueError as error:
            message = f"the saved tensors are not those of role {role!r} on {self.name}"
            raise InputError(message, kind="unreadable", key=role) from error

    def role_state(self, role: str, *, copy: bool = True) -> dict[str, Tensor]:
        """All tensors of a role by name, on the CPU: A, B, their initial values or the model's own, and the head.

        Without `copy` those that are on the CPU are the role's own, to be written away before the next step.
        """
        state: dict[str, Tensor] = {}
        places: set[int] = set()
        for name, tensor in self._named(role, unique_tensors):
            found = tensor.detach().to("cpu", copy=copy).contiguous()
            # A file cannot hold a tensor under two names, which layers that share one have.
            state[name] = found.clone() if found.data_ptr() in places else found
            places.add(found.data_ptr())
        return state

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters of a role that an optimizer trains, by name; one that layers share has the first one's."""
        found: dict[nn.Parameter, str] = {}
        for name, parameter in self._named(role, lambda module: dict(module.named_parameters())):
            if parameter.requires_grad:
                found.setdefault(parameter, name)
        return {name: parameter for parameter, name in found.items()}

    def role_starts(self, role: str) -> dict[str, Tensor]:
        """What weight decay pulls a role's parameters to, by name, so that it ends at the anchor; others go to 0."""
        if role in self.own_models:
            return {}
        return {
            f"{name}.{part}": tensor
            for name, layer in self.role_layers(role).items()
            for part, tensor in layer.starts().items()
        }

    def role_layers(self, role: str) -> dict[str, AdapterLayer]:
        """The adapter layers of a role by the names of the modules that they are on; empty for a fully tuned one."""
        return {name: layer.adapter(role) for name, layer in self._layers(role)}

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
            message = f"cannot add a role {role!r}: the name is taken or is not an identifier"
            raise InputError(message, kind="exists", key=role)

    def _new_head(self, role: str) -> ScalarHead | None:
        if not role.startswith(HEAD_ROLES):
            return None
        size: int = self.model.get_input_embeddings().embedding_dim  # type: ignore[assignment]
        return ScalarHead(size, train_bias=role.startswith("value")).to(self.device)

    def _install(self, role: str, spec: AdapterSpec, adapters: dict[str, nn.Module], head: ScalarHead | None) -> None:
        """Put a role that is complete on the layers, in place of the one of that name."""
        spec.kind.share(adapters)
        self._remove(role)
        for name, adapter in adapters.items():
            layer = wrapped(self.model, name, self._state)
            layer.adapters[role] = adapter
            layer.adapter(role).put_on(layer.base)
            layer.adapter(role).follow(self._state)
        if head is not None:
            self.heads[role] = head
        self.specs[role] = spec
        self.train(self.training)

    def _install_own(self, role: str, model: nn.Module, head: ScalarHead | None) -> None:
        self._remove(role)
        self.own_models[role] = model
        if head is not None:
            self.heads[role] = head
        self.specs[role] = FullSpec()

    def _remove(self, role: str) -> None:
        if role in self.specs:
            for _, layer in self._layers(role):
                del layer.adapters[role]
            self.own_models.pop(role) if role in self.own_models else None

    def _own_model(self, role: str) -> PreTrainedModel:
        model = self.own_models[role]
        assert isinstance(model, PreTrainedModel)
        return model

    def _own_tensors(self, role: str) -> dict[str, Tensor]:
        """The tensors of a role's own model under the names that they have in the whole one."""
        decoder = decoder_of(self.model)
        prefix = next(f"{name}." for name, module in self.model.named_modules() if module is decoder)
        prefix = prefix if role in self.heads else ""
        return with_prefix(prefix, unique_tensors(self.own_models[role]))

    def _layers(self, role: str) -> list[tuple[str, WrappedLayer]]:
        if role not in self.specs:
            raise self._no_adapter(role)
        named = ((name, module) for name, module in self.model.named_modules() if isinstance(module, WrappedLayer))
        return [(name, layer) for name, layer in named if role in layer.adapters]

    def _merged_layers(self, role: str) -> list[WrappedLayer]:
        return [layer for _, layer in self._layers(role)] if role in self.specs else []

    def _named(self, role: str, tensors_of: Any) -> Iterator[tuple[str, Any]]:
        modules: dict[str, nn.Module] = {name: layer.adapters[role] for name, layer in self._layers(role)}
        if role in self.own_models:
            modules["model"] = self.own_models[role]
        if role in self.heads:
            modules["head"] = self.heads[role]
        for name, module in modules.items():
            yield from ((f"{name}.{part}", tensor) for part, tensor in tensors_of(module).items())
