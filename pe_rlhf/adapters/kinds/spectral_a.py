"""Additive spectral adapter (arXiv 2405.13952): the top r singular vectors of W0 = U S Vᵀ are moved.

    W = [U1 + A_U, U2] S [V1 + A_V, V2]ᵀ,    ΔW = A_U S1 V1ᵀ + (U1 + A_U) S1 A_Vᵀ

It has as many parameters as a LoRA of rank r, and ΔW may have rank 2r. A_U and A_V start at zero, so at step 0 each
term has a factor that is exactly zero. U1, S1 and V1 are kept beside the base, which is not touched.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors
from pe_rlhf.adapters.lora.anchored import add_product
from pe_rlhf.adapters.lora.inits.svd import top_directions
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive


class SpectralAConfig(AdapterConfig):
    """The top singular vectors of each weight are moved."""

    rank: Positive = Field(default=16, description="how many singular vectors r of each side; the export has rank 2r")
    niter: Positive | None = Field(
        default=None, description="randomised SVD with this number of power iterations; default: exact SVD"
    )


class SpectralALayer(AdapterLayer):
    """`base(x) + ΔW x`; the tensors are `move_U` _OR, `move_V` _RI and the kept `U_OR`, `S_R`, `Vh_RI`."""

    trained: ClassVar[tuple[str, ...]] = ("move_U", "move_V")
    kept: ClassVar[tuple[str, ...]] = ("U_OR", "S_R", "Vh_RI")
    move_U: nn.Parameter
    move_V: nn.Parameter
    U_OR: Tensor
    S_R: Tensor
    Vh_RI: Tensor

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        return add_product(x, base(x), *self._factors())

    def _factors(self) -> tuple[Tensor, Tensor]:
        """`[S1 V1ᵀ; S1 A_Vᵀ]` and `[A_U, U1 + A_U]`."""
        up_RI = self.S_R[:, None] * torch.cat([self.Vh_RI, self.move_V]).unflatten(0, (2, -1))
        return up_RI.flatten(0, 1), torch.cat([self.move_U, self.U_OR + self.move_U], dim=1)

    @torch.no_grad()
    def lora_factors(self) -> LowRankFactors | None:
        """Plain LoRA factors of rank 2r."""
        return LowRankFactors(*self._factors(), 1.0)

    @torch.no_grad()
    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """ΔW_OI, fp32."""
        up, down = self._factors()
        return down @ up


class SpectralA(AdapterKind[SpectralAConfig]):
    """Singular vectors of the weight with something added."""

    settings_type: ClassVar[type[AdapterConfig]] = SpectralAConfig
    rank_of_weight = True
    layer = SpectralALayer

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """The top singular vectors, and zeros."""
        top = top_directions(context.weight_OI, self.settings.rank, self.settings.niter, cache=True)
        kept = {"U_OR": top.U_OK, "S_R": top.S_K, "Vh_RI": top.Vh_KI}
        return {"move_U": torch.zeros_like(top.U_OK), "move_V": torch.zeros_like(top.Vh_KI), **kept}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        rank = self.settings.rank
        return {"move_U": (out_features, rank), "move_V": (rank, in_features)}
