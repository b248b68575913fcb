"""What leaves a role: PEFT's files, merged weights, and the change of each layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pe_rlhf.adapters.layer import WrappedLayer, like_out_in, merged_weight, weight_out_in
from pe_rlhf.adapters.peft_export import export_peft, peft_refusal
from pe_rlhf.adapters.targets import linear_modules, module_names, shared_weights
from pe_rlhf.model.roles import ANCHOR, ModelWithRoles
from pe_rlhf.model.tensors import unique_tensors
from reward.errors import InputError


class RolesToExport(ModelWithRoles):
    """Roles, and what is written of them for others. Nothing here changes a weight of the model."""

    def export_adapter(self, role: str, path: str | Path, rank: int | None = None) -> None:
        """Write a role as a plain PEFT LoRA of rank 2r (r where B0 is zero) for the original base; see `export.py`.

        `rank` fills a smaller one up with zeros. Raises `InputError` for a role with weights of its own.
        """
        if role in self.own_models:
            message = f"the {role} was fully tuned and is no adapter; it can be exported as a merged checkpoint"
            raise InputError(message, kind="conflict", key="format")
        layers = {name: layer.adapters[role] for name, layer in self._layers(role)}
        head = self.heads[role] if role in self.heads else None  # noqa: SIM401  (a ModuleDict has no get)
        names = module_names(self.model)
        export_peft(layers, head, role=role, base_model=self.name, all_names=names, path=Path(path), rank=rank)

    def peft_refusal(self, role: str) -> str | None:
        """Why `export_adapter` would write what PEFT loads as something else, or None."""
        layers = {name: layer.adapters[role] for name, layer in self._layers(role)}
        return peft_refusal(layers, self.model, all_names=module_names(self.model))

    def export_rank(self, role: str) -> int:
        """The rank that `export_adapter` writes unless told otherwise."""
        return max(layer.adapters[role].factors().A_RI.shape[0] for _, layer in self._layers(role))  # type: ignore[operator]

    def merged_tensors(self, role: str, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The base's checkpoint, name by name, with `W0 + ΔW` of a role in it; computed fresh, the base is not touched.

        A tensor that the model has under two names comes once, under the first. `dtype` is the base's if left out.
        """
        own = {} if role not in self.own_models else self._own_tensors(role)
        layers = {} if role == ANCHOR else dict(self._layers(role))
        if shared := shared_weights(self.model).intersection(layers):
            raise InputError(
                f"the {role} cannot be merged: {min(shared)} shares its weight with layers that have other adapters",
                kind="conflict",
                key="adapter.targets",
                fix="sample and export it as an adapter, or leave these layers out by adapter.exclude",
            )
        for name, tensor in unique_tensors(self.model).items():
            plain, layer = name.replace(".base.", "."), layers.get(name.removesuffix(".base.weight"))
            if ".adapters." in name:
                continue
            if layer is not None:
                yield plain, merged_weight(layer, role, dtype)
            else:
                whole = own.get(plain, tensor)
                yield plain, whole if dtype is None or not whole.is_floating_point() else whole.to(dtype)

    def merged_share(self, role: str, dtype: torch.dtype | None = None) -> float:
        """Share of a role's change that is left in `merged_tensors` of that dtype: Σ⟨kept, ΔW⟩ / Σ‖ΔW‖²; 1 without one.

        In bf16 a quarter may be left after one step of a LoRA, and all but a tenth after twenty.
        """
        kept, whole = 0.0, 0.0
        for _, layer in self._layers(role) if role in self.specs else []:
            change_OI = layer.adapters[role].delta_weight().double()  # type: ignore[operator]
            base_OI = weight_out_in(layer.base).double()
            merged_OI = like_out_in(layer.base, merged_weight(layer, role, dtype)).double()
            kept += float(((merged_OI - base_OI) * change_OI).sum())
            whole += float((change_OI**2).sum())
        return kept / whole if whole else 1.0

    def weight_changes(self, role: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Base weight _OI and change ΔW_OI, fp32, of each linear layer that a role may have changed, layer by layer."""
        for _, layer in self._layers(role):
            yield weight_out_in(layer.base), layer.adapters[role].delta_weight()  # type: ignore[operator]
        if role in self.own_models:
            own = self._own_tensors(role)
            for name, module in linear_modules(self.model).items():
                base = module.base if isinstance(module, WrappedLayer) else module
                if (trained := own.get(f"{name}.weight")) is not None:
                    yield weight_out_in(base), like_out_in(base, trained).float() - weight_out_in(base).float()
