"""LoRA-Dash (arXiv 2409.01035): a LoRA that later also scales the directions of W0 that it turned out to need.

    steps 1 … t:  W0 + ΔW,                       ΔW = s(BA − B0A0)
    afterwards:   W0 + ΔW + Σ Δσ_i u_i v_iᵀ      over the s directions of W0 = Σ σ_i u_i v_iᵀ with the
                                                 greatest |u_iᵀ ΔW v_i| / (σ_i + ε) at step t

Δσ and the directions have their sizes from the start, the directions as zeros: Δσ gets no gradient until they are
chosen, at step 0 every term is exactly zero, and choosing them changes no output. They are buffers, so a run that is
resumed, or a role that starts from another's end, has them and does not choose again.

AdamW counts the steps of Δσ from the choice on: its first steps are those of a fresh parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import LayerContext, Layers, Restart, Time
from pe_rlhf.adapters.layer import LowRankFactors, weight_out_in
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, LoRA, add_product
from pe_rlhf.adapters.lora.init_registry import refuse_rank
from pe_rlhf.adapters.lora.inits.svd import full_svd
from pe_rlhf.config.adapter import AdapterConfig, LowRankConfig
from pe_rlhf.config.section import Positive
from pe_rlhf.system.distributed import from_main

EPSILON = 1e-6  # beside σ, which may be zero


class LoRADashConfig(LowRankConfig):
    """A LoRA, and after some steps scales of the weight's directions that it changed most."""

    warmup_steps: Positive = Field(
        default=100,
        description="optimizer steps of LoRA before the directions are chosen; a shorter stage has LoRA only",
    )
    directions: Positive = Field(default=8, description="how many directions of each weight are scaled")


class LoRADashLayer(AnchoredLoRA):
    """AnchoredLoRA with `delta_sigma` _S and the kept `dash_U_OS` and `dash_Vh_SI`, zeros until they are chosen."""

    trained = (*AnchoredLoRA.trained, "delta_sigma")
    kept: ClassVar[tuple[str, ...]] = ("dash_U_OS", "dash_Vh_SI")
    delta_sigma: nn.Parameter
    dash_U_OS: Tensor
    dash_Vh_SI: Tensor
    _base: weakref.ref[nn.Module] | None = None

    def put_on(self, base: nn.Module) -> None:
        """Know the weight whose directions are chosen."""
        self._base = weakref.ref(base)

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        return add_product(x, self.add_low_rank(x, base(x)), self.dash_Vh_SI, self.dash_U_OS * self.delta_sigma)

    @torch.no_grad()
    def choose(self) -> bool:
        """Take the directions that ΔW changes most for their size, unless there are some already: whether it did."""
        base = self._base() if self._base else None
        low_rank = AnchoredLoRA.lora_factors(self)
        if bool(self.dash_U_OS.any()) or base is None or low_rank is None:
            return False
        U_OK, S_K, Vh_KI = full_svd(weight_out_in(base))
        along_K = low_rank.scale * ((U_OK.T @ low_rank.B_OR) * (Vh_KI @ low_rank.A_RI.T)).sum(1)
        chosen = (along_K.abs() / (S_K + EPSILON)).topk(len(self.delta_sigma)).indices
        # GPUs may differ in the last bits of a decomposition, and in a sign.
        U_OS, Vh_SI = from_main((U_OK[:, chosen].cpu(), Vh_KI[chosen].cpu()))
        self.dash_U_OS.copy_(U_OS)
        self.dash_Vh_SI.copy_(Vh_SI)
        return True

    @torch.no_grad()
    def lora_factors(self) -> LowRankFactors | None:
        """Plain LoRA factors, of LoRA's rank and one more for each direction."""
        low_rank = super().lora_factors()
        assert low_rank is not None
        scaled_OS = self.dash_U_OS * (self.delta_sigma / low_rank.scale)
        up, down = torch.cat([low_rank.A_RI, self.dash_Vh_SI]), torch.cat([low_rank.B_OR, scaled_OS], dim=1)
        return LowRankFactors(up, down, low_rank.scale)

    @torch.no_grad()
    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """s · (B·A − B0·A0) + Σ Δσ_i u_i v_iᵀ, fp32."""
        low_rank_OI = super().delta_weight(weight_OI)
        assert low_rank_OI is not None
        return low_rank_OI + (self.dash_U_OS * self.delta_sigma) @ self.dash_Vh_SI


class LoRADash(LoRA):
    """LoRA, then also scales of the weight's own directions."""

    settings: LoRADashConfig
    settings_type: ClassVar[type[AdapterConfig]] = LoRADashConfig
    layer = LoRADashLayer
    restarted: ClassVar[Mapping[str, Restart]] = {"delta_sigma": "moments"}

    @property
    def changes_parameters(self) -> bool:
        """It writes into buffers only."""
        return False

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """A and B as the init makes them, and zeros."""
        (out_features, in_features), count = context.weight_OI.shape, self.settings.directions
        refuse_rank(count, min(out_features, in_features), key="adapter.directions")
        zeros = {"dash_U_OS": torch.zeros(out_features, count), "dash_Vh_SI": torch.zeros(count, in_features)}
        return super().tensors(context) | {"delta_sigma": torch.zeros(count)} | zeros

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return super().sizes(out_features, in_features) | {"delta_sigma": (self.settings.directions,)}

    def after_step(self, layers: Layers, time: Time) -> set[str]:
        """Choose the directions once LoRA has trained for the warm-up."""
        if time.step != self.settings.warmup_steps:
            return set()
        chosen = [layer.choose() for layer in layers.values()]
        return {"delta_sigma"} if any(chosen) else set()
