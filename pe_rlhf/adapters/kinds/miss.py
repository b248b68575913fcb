"""MiSS, first called Bone (arXiv 2409.15371): the inputs are summed block by block, and one small matrix maps the sum.

    y = W0·x + Dᵀ·(x_1 + x_2 + …)        D _RO, x cut into blocks of r, the last one filled up with zeros

D starts at 0. It is a LoRA whose A is fixed: r×r identities side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import MissConfig
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, Layers, PeftFiles
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors
from pe_rlhf.adapters.lora.anchored import add_low
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive


class MiSSConfig(AdapterConfig):
    """MiSS (Bone): one matrix of r rows, applied to the sum of the input's blocks."""

    rank: Positive = Field(default=64, description="r, the width of a block and the rows of D")


class MiSSLayer(AdapterLayer):
    """`miss_block` is D _RO, `width` the number of inputs."""

    trained = ("miss_block",)
    kept = ("width",)
    miss_block: nn.Parameter
    width: Tensor

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        y, rank = base(x), len(self.miss_block)
        missing = -x.shape[-1] % rank
        whole = F.pad(x, (0, missing)) if missing else x  # padding by nothing copies
        return add_low(y, whole.unflatten(-1, (-1, rank)).sum(dim=-2).to(y.dtype), self.miss_block.T)

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """ΔW[o, i] = D[i mod r, o]."""
        width = weight_OI.shape[1]
        return self.miss_block.detach()[torch.arange(width, device=self.miss_block.device) % len(self.miss_block)].T

    def lora_factors(self) -> LowRankFactors | None:
        D_RO = self.miss_block.detach()
        places_I = torch.arange(int(self.width), device=D_RO.device) % len(D_RO)
        return LowRankFactors(F.one_hot(places_I, len(D_RO)).T.float(), D_RO.T.clone(), 1.0)


class MiSS(AdapterKind[MiSSConfig]):
    """MiSS with the blocks of its paper."""

    settings_type = MiSSConfig
    layer = MiSSLayer

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        out_features, in_features = context.weight_OI.shape
        D_RO = torch.zeros(self.settings.rank, out_features)
        return {"miss_block": D_RO, "width": torch.tensor(in_features)}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return {"miss_block": (self.settings.rank, out_features)}

    def peft(self, layers: Layers) -> PeftFiles | None:
        tensors = {name: {"miss_block": layer.miss_block.detach()} for name, layer in layers.items()}
        return PeftFiles(MissConfig(r=self.settings.rank), tensors)
