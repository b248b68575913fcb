"""Additive spectral adapter (arXiv 2405.13952): the top r singular vectors of W0 = U S Vᵀ are moved.

    W = [U1 + A_U, U2] S [V1 + A_V, V2]ᵀ,    ΔW = A_U S1 V1ᵀ + (U1 + A_U) S1 A_Vᵀ

It has as many parameters as a LoRA of rank r, and ΔW may have rank 2r. A_U and A_V start at zero, so at step 0 each
term has a factor that is exactly zero.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kinds.spectral import SpectralConfig, SpectralKind, SpectralLayer
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive


class SpectralAConfig(SpectralConfig):
    """The top singular vectors of each weight are moved."""

    rank: Positive = Field(default=16, description="how many singular vectors r of each side; the export has rank 2r")


class SpectralALayer(SpectralLayer):
    """The trained tensors are `move_U` _OR and `move_V` _RI."""

    trained: ClassVar[tuple[str, ...]] = ("move_U", "move_V")
    move_U: nn.Parameter
    move_V: nn.Parameter

    def factors(self) -> tuple[Tensor, Tensor]:
        """`[S1 V1ᵀ; S1 A_Vᵀ]` and `[A_U, U1 + A_U]`."""
        up_RI = self.S_R[:, None] * torch.cat([self.Vh_RI, self.move_V]).unflatten(0, (2, -1))
        return up_RI.flatten(0, 1), torch.cat([self.move_U, self.U_OR + self.move_U], dim=1)


class SpectralA(SpectralKind[SpectralAConfig]):
    """Singular vectors of the weight with something added."""

    settings_type: ClassVar[type[AdapterConfig]] = SpectralAConfig
    layer = SpectralALayer

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        rank = self.settings.rank
        return {"move_U": (out_features, rank), "move_V": (rank, in_features)}
