"""What the kinds on the top singular vectors of W0 = U S Vᵀ have in common.

A role keeps U1, S1 and V1 beside the base, which is not touched. ΔW is a product of two factors that are computed from
them and from what is trained, which starts at zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors
from pe_rlhf.adapters.lora.anchored import add_product
from pe_rlhf.adapters.lora.inits.svd import top_directions
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive


class SpectralConfig(AdapterConfig):
    """The keys of kinds on the top singular vectors of each weight."""

    rank: Positive = Field(default=16, description="how many singular vectors r of each side")
    niter: Positive | None = Field(
        default=None, description="randomised SVD with this number of power iterations; default: exact SVD"
    )


S = TypeVar("S", bound=SpectralConfig)


class SpectralLayer(AdapterLayer, ABC):
    """`base(x) + ΔW x`, ΔW by `factors`. The kept tensors are `U_OR`, `S_R` and `Vh_RI`."""

    kept: ClassVar[tuple[str, ...]] = ("U_OR", "S_R", "Vh_RI")
    U_OR: Tensor
    S_R: Tensor
    Vh_RI: Tensor

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of ΔW = B·A, with a gradient; one of them is exactly zero at step 0, or each term has a zero."""

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        return add_product(x, base(x), *self.factors())

    @torch.no_grad()
    def lora_factors(self) -> LowRankFactors | None:
        """Plain LoRA factors."""
        up, down = self.factors()
        return LowRankFactors(up, down.clone(), 1.0)

    @torch.no_grad()
    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """ΔW_OI, fp32."""
        up, down = self.factors()
        return down @ up


class SpectralKind(AdapterKind[S]):
    """Makes layers of the top singular vectors, and zeros."""

    rank_of_weight = True

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        top = top_directions(context.weight_OI, self.settings.rank, self.settings.niter, cache=True)
        kept = {"U_OR": top.U_OK, "S_R": top.S_K, "Vh_RI": top.Vh_KI}
        return {name: torch.zeros(size) for name, size in self.sizes(*context.weight_OI.shape).items()} | kept
