"""LoHa (FedPara, arXiv 2108.06098): the elementwise product of two low-rank matrices, of rank up to r².

    ΔW = s·(B1·A1) ∘ (B2·A2)        s = alpha/r

A2 starts at 0, the rest as Kaiming has it. Each pass forms ΔW.
"""

from __future__ import annotations

import torch
from peft import LoHaConfig as PeftLoHaConfig
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, Layers, PeftFiles
from pe_rlhf.adapters.kinds.dense_change import add_dense
from pe_rlhf.adapters.layer import AdapterLayer
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive


class LoHaConfig(AdapterConfig):
    """LoHa: the elementwise product of two low-rank matrices."""

    rank: Positive = Field(default=8, description="rank r of each of the two products")
    alpha: float = Field(default=8.0, gt=0, description="the change is scaled by alpha/rank")


class LoHaLayer(AdapterLayer):
    """`hada_w1_a`, `hada_w2_a` are B1, B2 _OR; `hada_w1_b`, `hada_w2_b` are A1, A2 _RI."""

    trained = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        return add_dense(base(x), x, self._change)

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        with torch.no_grad():
            return self._change()

    def _change(self) -> Tensor:
        scale = self.settings.alpha / self.settings.rank
        return scale * (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)


class LoHa(AdapterKind[LoHaConfig]):
    """LoHa as PEFT starts it."""

    settings_type = LoHaConfig
    layer = LoHaLayer

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        made = {name: torch.empty(size) for name, size in self.sizes(*context.weight_OI.shape).items()}
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a"):
            nn.init.kaiming_uniform_(made[name], a=5**0.5, generator=context.generator)
        return made | {"hada_w2_b": torch.zeros_like(made["hada_w2_b"])}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        rank = self.settings.rank
        out, into = (out_features, rank), (rank, in_features)
        return {"hada_w1_a": out, "hada_w1_b": into, "hada_w2_a": out, "hada_w2_b": into}

    def peft(self, layers: Layers) -> PeftFiles | None:
        tensors = {name: {k: p.detach() for k, p in layer.named_parameters()} for name, layer in layers.items()}
        return PeftFiles(PeftLoHaConfig(r=self.settings.rank, alpha=self.settings.alpha), tensors)  # type: ignore[arg-type]
