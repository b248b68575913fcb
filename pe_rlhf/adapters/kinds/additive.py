"""Additive adapter (J. Su, "LoRA from the gradient's point of view"): ΔW is a sum of two tiled factors, not a product.

    r = 1:  ΔW = a·1ᵀ + 1·bᵀ            a _O, b _I: their gradients are the row and column sums of W's
    r > 1:  ΔW[o, i] = A[o, i mod r] + B[o mod r, i]

A _OR is tiled along the inputs and B _RI along the outputs, both by r×r identities; where r does not divide a side, the
last tile is cut. A and B start at zero and their gradients do not vanish there: at step 0 both terms add exact zeros.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors
from pe_rlhf.adapters.lora.init_registry import refuse_rank
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive


class AdditiveConfig(AdapterConfig):
    """A sum of two tiled factors is trained."""

    rank: Positive = Field(default=16, description="width r of a tile; the export has rank 2r")


class AdditiveLayer(AdapterLayer):
    """`base(x) + A·fold(x) + tile(B x)`: fold adds up every r-th input, tile repeats r numbers along the outputs."""

    trained: ClassVar[tuple[str, ...]] = ("additive_A", "additive_B")
    additive_A: nn.Parameter
    additive_B: nn.Parameter

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        y = base(x)
        x, rank = x.to(y.dtype), len(self.additive_B)
        A_OR, B_RI = self.additive_A.to(y.dtype), self.additive_B.to(y.dtype)
        tiles = F.pad(x, (0, -x.shape[-1] % rank)).unflatten(-1, (-1, rank))
        tiled = F.linear(x, B_RI)[..., None, :].expand(*y.shape[:-1], -(-y.shape[-1] // rank), rank).flatten(-2)
        return y + (F.linear(tiles.sum(-2), A_OR) + tiled[..., : y.shape[-1]])

    @torch.no_grad()
    def lora_factors(self) -> LowRankFactors | None:
        """Plain LoRA factors of rank 2r: [tiles of I; B] and [A, tiles of I]."""
        A_OR, B_RI = self.additive_A.detach(), self.additive_B.detach()
        places = torch.arange(max(len(A_OR), B_RI.shape[1]), device=A_OR.device) % len(B_RI)
        tiles_PR = F.one_hot(places, len(B_RI)).float()
        up_RI = torch.cat([tiles_PR[: B_RI.shape[1]].T, B_RI])
        return LowRankFactors(up_RI, torch.cat([A_OR, tiles_PR[: len(A_OR)]], dim=1), 1.0)

    @torch.no_grad()
    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """ΔW_OI, fp32."""
        A_OR, B_RI = self.additive_A.detach(), self.additive_B.detach()
        outputs, inputs = (torch.arange(n, device=A_OR.device) % len(B_RI) for n in (len(A_OR), B_RI.shape[1]))
        return A_OR[:, inputs] + B_RI[outputs]


class Additive(AdapterKind[AdditiveConfig]):
    """Tiles along the inputs, and along the outputs."""

    settings_type: ClassVar[type[AdapterConfig]] = AdditiveConfig
    layer = AdditiveLayer

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """Zeros."""
        refuse_rank(self.settings.rank, min(context.weight_OI.shape))
        return {name: torch.zeros(size) for name, size in self.sizes(*context.weight_OI.shape).items()}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        rank = self.settings.rank
        return {"additive_A": (out_features, rank), "additive_B": (rank, in_features)}
