"""What leaves a role: PEFT's files, merged weights, and the change of each layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pe_rlhf.adapters.kind import PeftFiles
from pe_rlhf.adapters.layer import is_quantised, like_out_in, merged_weight, weight_out_in
from pe_rlhf.adapters.peft_export import export_peft, peft_forms, peft_refusal, plain_lora
from pe_rlhf.adapters.targets import expert_weights, linear_modules, module_names, shared_weights
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.model.routing import RoutedRoles
from pe_rlhf.model.tensors import unique_tensors
from reward.errors import InputError


class RolesToExport(RoutedRoles):
    """Roles, and what is written of them for others. Nothing here changes a weight of the model."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__(model, name)
        self._peft_refusals: dict[tuple[object, ...], str | None] = {}

    def export_adapter(
        self, role: str, path: str | Path, rank: int | None = None, form: PeftFiles | None = None
    ) -> None:
        """Write a role as PEFT has its kind, else as a plain LoRA, for the original base; see `peft_export.py`.

        `rank` asks for a plain LoRA, with a smaller rank filled up with zeros; `form` is what `peft_form` gave.
        Raises `InputError` for a role with weights of its own, and for an adapter that PEFT has no form for.
        """
        if role in self.own_models:
            message = f"the {role} was fully tuned and is no adapter; it can be exported as a merged checkpoint"
            raise InputError(message, kind="conflict", key="format")
        files = form or (self.peft_form(role) if rank is None else plain_lora(self.role_layers(role), rank))
        if not isinstance(files, PeftFiles):
            raise InputError(f"the {role} is no adapter of PEFT's: {files}", kind="conflict", key="format")
        head = self.heads[role] if role in self.heads else None  # noqa: SIM401  (a ModuleDict has no get)
        names = module_names(self.model)
        export_peft(files, head, role=role, base_model=self.name, all_names=names, path=Path(path))

    def peft_form(self, role: str) -> PeftFiles | str:
        """What `export_adapter` writes of a role: the first form that PEFT loads as what it is, or why not one."""
        if self._is_many(role):
            return "it is an adapter for each task"
        refusal = f"PEFT has no adapter of the kind {self.adapter_spec(role).settings.kind}"
        names = module_names(self.model)
        for form in peft_forms(self.adapter_spec(role).kind, self.role_layers(role)):
            # Names and shapes decide, and trying it makes a model and a file: too much for every checkpoint of a run.
            shapes = ((name, part, t.shape) for name, parts in form.tensors.items() for part, t in parts.items())
            if (key := (type(form.config), *shapes)) not in self._peft_refusals:
                self._peft_refusals[key] = peft_refusal(form, self.model, all_names=names)
            if (found := self._peft_refusals[key]) is None:
                return form
            refusal = found
        return refusal

    def export_rank(self, role: str) -> int:
        """The rank of a role as a plain LoRA; where no task is played, of the task with the largest."""
        ranks: list[int] = []
        for task in range(len(self.tasks_of(role))) if self._is_many(role) else [self._state.task]:
            with self.route(task):
                factors = (layer.lora_factors() for layer in self.role_layers(role).values())
                ranks += [len(found.A_RI) for found in factors if found is not None]
        return max(ranks)

    def _is_many(self, role: str) -> bool:
        """Whether a role is one adapter for each task, and no task is played."""
        return bool(self.tasks_of(role)) and self._state.task is None

    def merged_tensors(self, role: str, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The base's checkpoint, name by name, with `W0 + ΔW` of a role in it; computed fresh, the base is not touched.

        A tensor that the model has under two names comes once, under the first. `dtype` is the base's if left out.
        Quantised weights come dequantised: they, and not those before quantising, are what the role was trained on.
        """
        own = {} if role not in self.own_models else self._own_tensors(role)
        layers = {} if role == ANCHOR else dict(self._layers(role))
        if layers and not self.has_delta_weights(role):
            raise InputError(
                f"the {role} cannot be merged: what {self.adapter_spec(role).settings.kind} adds depends on the input",
                kind="conflict",
                key="format",
            )
        if shared := shared_weights(self.model).intersection(layers):
            raise InputError(
                f"the {role} cannot be merged: {min(shared)} shares its weight with layers that have other adapters",
                kind="conflict",
                key="adapter.targets",
                fix="sample and export it as an adapter, or leave these layers out by adapter.exclude",
            )
        packed = {f"{name}.weight": module for name, module in self.model.named_modules() if is_quantised(module)}
        # A state has what a quantised weight is unpacked with, too; that is no parameter.
        weights = {n for n, _ in (*self.model.named_parameters(), *self.model.named_buffers()) if ".adapters." not in n}
        for name, tensor in unique_tensors(self.model).items():
            plain = name.replace(".base.", ".")
            layer = layers.get(plain.removesuffix(".weight")) or layers.get(plain)
            if name not in weights:
                continue
            if layer is not None:
                yield plain, merged_weight(layer, role, dtype)
            else:
                whole = weight_out_in(packed[name]) if name in packed else own.get(plain, tensor)
                yield plain, whole if dtype is None or not whole.is_floating_point() else whole.to(dtype)

    def merged_share(self, role: str, dtype: torch.dtype | None = None) -> float:
        """Share of a role's change that is left in `merged_tensors` of that dtype: Σ⟨kept, ΔW⟩ / Σ‖ΔW‖²; 1 without one.

        In bf16 a quarter may be left after one step of a LoRA, and all but a tenth after twenty.
        """
        kept, whole = 0.0, 0.0
        for _, layer in self._layers(role) if role in self.specs and self.has_delta_weights(role) else ():
            change_OI = layer.change(role).double()
            base_OI = weight_out_in(layer.base).double()
            merged_OI = like_out_in(layer.base, merged_weight(layer, role, dtype)).double()
            kept += float(((merged_OI - base_OI) * change_OI).sum())
            whole += float((change_OI**2).sum())
        return kept / whole if whole else 1.0

    def weight_changes(self, role: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Base weight _OI and change ΔW_OI, fp32, of each linear layer, or expert, that a role may have changed.

        None for an adapter whose change depends on the input.
        """
        for _, layer in self._layers(role) if self.has_delta_weights(role) else ():
            yield from _matrices(weight_out_in(layer.base), layer.change(role))
        if role in self.own_models:
            own = self._own_tensors(role)
            for name in [*linear_modules(self.model), *expert_weights(self.model)]:
                base = self.base_layer(name)
                trained = own.get(f"{name}.weight", own.get(name))
                if trained is not None:
                    changed = like_out_in(base, trained).float() - weight_out_in(base).float()
                    yield from _matrices(weight_out_in(base), changed)


def _matrices(weight_OI: Tensor, change_OI: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A weight and its change; of fused experts, _EOI, one after the other."""
    yield from [(weight_OI, change_OI)] if weight_OI.dim() == 2 else zip(weight_OI, change_OI, strict=True)
