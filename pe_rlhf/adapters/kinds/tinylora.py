"""TinyLoRA (arXiv 2602.04118): a few numbers mix fixed random matrices between W0's top singular vectors.

    ΔW = U1 √S1 (Σ_i v_i P_i) √S1 V1ᵀ        v has u numbers and starts at 0; P_i are _RR, random, not trained

The paper has U1 S1 on one side; S1 is shared out evenly here, as in PEFT. Layers may share a vector: with one vector of
13 numbers a whole role has 13 parameters.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from peft import TinyLoraConfig as PeftTinyLoraConfig
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import LayerContext, Layers, PeftFiles
from pe_rlhf.adapters.kinds.spectral import SpectralConfig, SpectralKind, SpectralLayer
from pe_rlhf.adapters.lora.anchored import add_low
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive
from reward.errors import InputError


class TinyLoRAConfig(SpectralConfig):
    """TinyLoRA: a vector of a few numbers for each layer, or for all of them together."""

    rank: Positive = Field(default=2, description="how many singular vectors r of each side")
    size: Positive = Field(default=64, description="u, how many numbers are in a trained vector")
    vectors: Positive | None = Field(
        default=None,
        description="how many vectors the role has: successive layers share one, and 1 is for all layers; default: one"
        " for each layer",
    )


class TinyLoRALayer(SpectralLayer):
    """`tinylora_v` _K is v, maybe that of other layers too; `projections_KRR` are the P_i."""

    trained: ClassVar[tuple[str, ...]] = ("tinylora_v",)
    kept: ClassVar[tuple[str, ...]] = (*SpectralLayer.kept, "projections_KRR")
    tinylora_v: nn.Parameter
    projections_KRR: Tensor

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """`base(x) + U1 (√S1 Σ v_i P_i √S1) V1ᵀ x`: everything but the singular vectors is in the small matrix."""
        y = base(x)
        root_R = self.S_R.sqrt()
        core_RR = root_R[:, None] * self._mixed() * root_R
        low = F.linear(F.linear(x.to(y.dtype), self.Vh_RI.to(y.dtype)), core_RR.to(y.dtype))
        return add_low(y, low, self.U_OR)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(Σ v_i P_i) √S1 V1ᵀ` and `U1 √S1`."""
        up_RI, down_OR = self.frozen_factors()
        return self._mixed() @ up_RI, down_OR

    def frozen_factors(self) -> tuple[Tensor, Tensor]:
        """`√S1 V1ᵀ` and `U1 √S1`."""
        root_R = self.S_R.sqrt()
        return root_R[:, None] * self.Vh_RI, self.U_OR * root_R

    def _mixed(self) -> Tensor:
        """Σ v_i P_i."""
        return (self.tinylora_v @ self.projections_KRR.flatten(1)).view(self.projections_KRR.shape[1:])


class TinyLoRA(SpectralKind[TinyLoRAConfig]):
    """A vector for each layer, or for several."""

    settings_type: ClassVar[type[AdapterConfig]] = TinyLoRAConfig
    layer = TinyLoRALayer

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """Singular vectors, v = 0, and P_i ~ N(0, 1/r)."""
        rank, size = self.settings.rank, self.settings.size
        projections = torch.randn(size, rank, rank, generator=context.generator) * rank**-0.5
        return super().tensors(context) | {"projections_KRR": projections}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return {"tinylora_v": (self.settings.size,)}

    def share(self, layers: Layers) -> None:
        """Successive layers get the vector of the first of them."""
        if self.settings.vectors is not None:
            for group in self._groups(layers):
                for name in group[1:]:
                    layers[name].tinylora_v = layers[group[0]].tinylora_v

    def peft(self, layers: Layers) -> PeftFiles | None:
        """PEFT has the vectors beside the layers, and cuts groups of layers in the same way."""
        groups = self._groups(layers)
        tensors = {}
        for name, layer in layers.items():
            up_RI, down_OR = layer.frozen_factors()
            tensors[name] = {"tinylora_A": up_RI, "tinylora_B": down_OR, "tinylora_P": layer.projections_KRR}
        config = PeftTinyLoraConfig(
            r=self.settings.rank, u=self.settings.size, weight_tying=1 - len(groups) / len(layers), save_projection=True
        )
        shared = {f"tinylora_v.{i}": layers[group[0]].tinylora_v.detach() for i, group in enumerate(groups)}
        return PeftFiles(config, tensors, shared)

    def _groups(self, layers: Layers) -> list[list[str]]:
        """The names of the layers that share a vector; the last group has what the division leaves over."""
        names = list(layers)
        count = self.settings.vectors or len(names)
        if count > len(names):
            raise InputError(
                f"adapter.vectors: {count} is more than the {len(names)} layers that have an adapter",
                kind="conflict",
                key="adapter.vectors",
                fix="lower it, or leave it out for one vector in each layer",
            )
        size = len(names) // count
        return [names[i * size : (i + 1) * size if i + 1 < count else None] for i in range(count)]
