"""LoHa (FedPara, arXiv 2108.06098): the elementwise product of two low-rank matrices, of rank up to r².

    ΔW = s·(B1·A1) ∘ (B2·A2)        s = alpha/r

A2 starts at 0, the rest as Kaiming has it. ΔW is also a LoRA of rank r²: its factors are products of the given ones'
rows and columns. It is computed as that, unless r² is so large that a matrix ΔW takes less time.
"""

from __future__ import annotations

import torch
from peft import LoHaConfig as PeftLoHaConfig
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext, Layers, PeftFiles
from pe_rlhf.adapters.kinds.dense_change import add_dense
from pe_rlhf.adapters.layer import AdapterLayer
from pe_rlhf.adapters.lora.anchored import add_product
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
        B1_OR, A1_RI, B2_OR, A2_RI = (getattr(self, name) for name in self.trained)
        rank, out, into = len(A1_RI), len(B1_OR), A1_RI.shape[1]
        if 2 * rank**2 * (out + into) >= out * into:
            return add_dense(x, base, self._change, self._gradients, B1_OR, A1_RI, B2_OR, A2_RI)
        # Row by row of A1 and A2, column by column of B1 and B2: a LoRA of rank r², without a matrix.
        up_QI = (A1_RI[:, None] * A2_RI).flatten(0, 1)
        down_OQ = ((self._scale * B1_OR)[:, :, None] * B2_OR[:, None]).flatten(1)
        return add_product(x, base(x), up_QI, down_OQ)

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        with torch.no_grad():
            return self._change(*(getattr(self, name) for name in self.trained))

    @property
    def _scale(self) -> float:
        return self.settings.alpha / self.settings.rank

    def _change(self, B1_OR: Tensor, A1_RI: Tensor, B2_OR: Tensor, A2_RI: Tensor) -> Tensor:
        return ((self._scale * B1_OR) @ A1_RI) * (B2_OR @ A2_RI)

    def _gradients(
        self, grad_OI: Tensor, B1_OR: Tensor, A1_RI: Tensor, B2_OR: Tensor, A2_RI: Tensor
    ) -> tuple[Tensor, ...]:
        grad_OI = self._scale * grad_OI.to(B1_OR.dtype)
        first_OI, second_OI = grad_OI * (B2_OR @ A2_RI), grad_OI * (B1_OR @ A1_RI)  # of B1·A1, of B2·A2
        return first_OI @ A1_RI.T, B1_OR.T @ first_OI, second_OI @ A2_RI.T, B2_OR.T @ second_OI


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
