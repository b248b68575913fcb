"""Bat, MiSS's kind with W0 in it (arXiv 2409.15371, called Bat there): updates of the blocks are not collinear.

    ΔW block (o, i) = W0 block (o, i)·D_o + D_o        blocks of r×r

D starts at 0. Each pass forms ΔW, at the cost of r products of the weight's size.
"""

from __future__ import annotations

import torch
from peft import MissConfig
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, Layers, PeftFiles
from pe_rlhf.adapters.kinds.dense_change import add_dense
from pe_rlhf.adapters.layer import AdapterLayer, weight_out_in
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive
from reward.errors import InputError


class BatConfig(AdapterConfig):
    """Bat: a matrix of r×r for each r rows of the weight, multiplied with the weight's own blocks."""

    rank: Positive = Field(default=16, description="r, the size of a block; it divides both sides of every target")


class BatLayer(AdapterLayer):
    """`miss_block` is D _KRR, one block for each r outputs."""

    trained = ("miss_block",)
    miss_block: nn.Parameter

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        return add_dense(
            x,
            base,
            lambda D_KRR: _change(D_KRR, weight_out_in(base)),
            lambda grad_OI, D_KRR: (_gradient(grad_OI, D_KRR, weight_out_in(base)),),
            self.miss_block,
        )

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        with torch.no_grad():
            return _change(self.miss_block, weight_OI)


def _change(D_KRR: Tensor, weight_OI: Tensor) -> Tensor:
    D_KRR = D_KRR.to(weight_OI.dtype)
    across = weight_OI.shape[1] // D_KRR.shape[-1]
    own_KPR = D_KRR[:, :, None].expand(-1, -1, across, -1).flatten(1, 2)
    add = Tensor.baddbmm_ if across > 1 else torch.baddbmm  # a single block across is D itself, not a copy
    return add(own_KPR, weight_OI.reshape(own_KPR.shape), D_KRR).view(weight_OI.shape)


def _gradient(grad_OI: Tensor, D_KRR: Tensor, weight_OI: Tensor) -> Tensor:
    """Of D: Σ over the blocks across, of W0 blockᵀ·grad block + grad block."""
    blocks = len(D_KRR), -1, D_KRR.shape[-1]
    grad_KPR = grad_OI.to(weight_OI.dtype).reshape(blocks)
    own_KRR = grad_KPR.view(*D_KRR.shape[:2], -1, D_KRR.shape[-1]).sum(2)
    return torch.baddbmm(own_KRR, weight_OI.reshape(blocks).mT, grad_KPR)


class Bat(AdapterKind[BatConfig]):
    """Bat with the blocks of its paper."""

    settings_type = BatConfig
    layer = BatLayer

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        rank = self.settings.rank
        out_features, in_features = context.weight_OI.shape
        if out_features % rank or in_features % rank:
            raise InputError(
                f"bat cuts a weight into blocks of rank {rank}, which does not divide {out_features} × {in_features}",
                kind="conflict",
                key="adapter.rank",
                fix="choose a rank that divides both sides of every target, or leave layers out by adapter.exclude",
            )
        return {"miss_block": torch.zeros(out_features // rank, rank, rank)}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        rank = self.settings.rank
        return {"miss_block": (out_features // rank, rank, rank)}

    def peft(self, layers: Layers) -> PeftFiles | None:
        tensors = {name: {"miss_block": layer.miss_block.detach()} for name, layer in layers.items()}
        return PeftFiles(MissConfig(r=self.settings.rank, init_weights="bat"), tensors)
