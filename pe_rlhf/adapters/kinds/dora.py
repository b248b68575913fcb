"""DoRA (arXiv 2402.09353): the length of each row of the weight is trained apart from its direction.

    W_role = m ⊙ (W0 + sΔ) / ‖W0 + sΔ‖        Δ = B·A − B0·A0, ‖·‖ per output row, m starts as ‖W0‖

Computed as `z + (m/‖·‖ − 1)(z − bias)` with z the output of the anchored LoRA: at step 0 the ratio is exactly 1 and z
is exactly the base's output. The norm needs no dense sum: ‖w + s·b·A‖² = ‖w‖² + 2s·(w·Aᵀ)·b + s²·b·(A·Aᵀ)·b. With a
4-bit base this is QDoRA.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import LayerContext, Layers, PeftFiles
from pe_rlhf.adapters.layer import AdapterLayer, weight_out_in
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, LoRA
from pe_rlhf.adapters.peft_export import as_plain_lora
from pe_rlhf.config.adapter import LowRankConfig

SMALLEST = 1e-30  # of a squared norm: a row of zeros keeps a ratio


class DoRAConfig(LowRankConfig):
    """DoRA: a LoRA, and the length of each row of the weight."""

    norm_gradient: bool = Field(
        default=False, description="let the gradient through the norm; the paper holds it constant, which saves memory"
    )


class DoRALayer(AnchoredLoRA):
    """Beside A and B: `magnitude` _O, and `row_squares` _O, the squared norms of the rows of W0."""

    trained = (*AnchoredLoRA.trained, "magnitude")
    kept = ("row_squares",)
    magnitude: nn.Parameter
    row_squares: Tensor
    lora_factors = AdapterLayer.lora_factors  # the ratio makes it no LoRA

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        z = self.add_low_rank(x, base(x))
        excess_O = (self.magnitude / self._norms(weight_out_in(base)) - 1).to(z.dtype)
        bias = getattr(base, "bias", None)
        return torch.addcmul(z, z if bias is None else z - bias, excess_O)

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """(m/‖W0 + sΔ‖)·(W0 + sΔ) − W0, fp32."""
        with torch.no_grad():
            up, down = self._difference()
            moved_OI = weight_OI + self.scale * (down @ up)
            return (self.magnitude / self._norms(weight_OI))[:, None] * moved_OI - weight_OI

    def starts(self) -> dict[str, Tensor]:
        return super().starts() | {"magnitude": _root(self.row_squares)}

    def _norms(self, weight_OI: Tensor) -> Tensor:
        """‖W0 + sΔ‖ _O of each row, fp32; products with W0 are in its dtype."""
        with torch.set_grad_enabled(self.settings.norm_gradient and torch.is_grad_enabled()):
            up_RI, down_OR = self._factors()
            cross_OR = (weight_OI @ up_RI.to(weight_OI.dtype).T).float()
            square_OR = down_OR @ (up_RI @ up_RI.T)
            s = self.scale
            return _root(self.row_squares + ((2 * s * cross_OR + s * s * square_OR) * down_OR).sum(dim=1))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """`[A; A−A0]` and `[B−B0, B0]` with a gradient."""
        if self.initial_A_RI is None or self.initial_B_OR is None:
            return self.lora_A, self.lora_B
        down = torch.cat([self.lora_B - self.initial_B_OR, self.initial_B_OR], dim=1)
        return torch.cat([self.lora_A, self.lora_A - self.initial_A_RI]), down


class DoRA(LoRA):
    """DoRA with any init of a LoRA."""

    settings_type = DoRAConfig
    layer = DoRALayer

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        row_squares = context.weight_OI.square().sum(dim=1)
        return super().tensors(context) | {"magnitude": _root(row_squares), "row_squares": row_squares}

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return super().sizes(out_features, in_features) | {"magnitude": (out_features,)}

    def peft(self, layers: Layers) -> PeftFiles | None:
        factors = {name: AnchoredLoRA.lora_factors(layer) for name, layer in layers.items()}
        files = as_plain_lora({name: found for name, found in factors.items() if found is not None})
        assert isinstance(files.config, LoraConfig)
        files.config.use_dora = True
        for name, layer in layers.items():
            files.tensors[name]["lora_magnitude_vector"] = layer.magnitude.detach()
        return files


def _root(squares_O: Tensor) -> Tensor:
    return squares_O.clamp(min=SMALLEST).sqrt()
