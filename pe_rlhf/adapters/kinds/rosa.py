"""RoSA (arXiv 2401.04679): W0 + s(BA − B0A0) + S, a LoRA for what is of low rank and a sparse S for outliers.

S has its entries where the squared gradient of the stage's own loss is greatest, and starts at zero; the LoRA is
anchored, whatever its init. So both parts add exact zeros at step 0. S's cost follows its density.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import LayerContext
from pe_rlhf.adapters.layer import AdapterLayer
from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, LoRA
from pe_rlhf.adapters.sparse import Density, SparseLayer, entry_count, sparse_tensors
from pe_rlhf.config.adapter import AdapterConfig, LowRankConfig
from pe_rlhf.config.section import Positive
from reward.errors import InputError

if TYPE_CHECKING:
    from pe_rlhf.adapters.layer_statistics import Need


class RoSAConfig(LowRankConfig):
    """A LoRA, and some entries of each weight, those with the greatest squared gradient."""

    density: Density = Field(default=0.006, description="share of each weight's entries that is trained beside B·A")
    sparse_rate: float = Field(default=1.0, gt=0, description="learning rate of those entries, divided by that of A")
    batch_size: Positive = Field(
        default=8,
        description="sequences, or pairs, in the batch that chooses the entries; an init that reads data has its own"
        " batch_size for both",
    )


class RoSALayer(AnchoredLoRA, SparseLayer):
    """`base(x) + s·[B−B0, B0]([A; A−A0] x) + S x`; dropout is on the LoRA's input only."""

    trained = (*AnchoredLoRA.trained, *SparseLayer.trained)
    lora_factors = AdapterLayer.lora_factors  # with S it has none

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        return self.add_sparse(x, self.add_low_rank(x, base(x)))

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """s · (B·A − B0·A0) + S, fp32."""
        low_rank_OI = super().delta_weight(weight_OI)
        assert low_rank_OI is not None
        return low_rank_OI + self.sparse_change()


class RoSA(LoRA):
    """LoRA and a sparse part."""

    settings: RoSAConfig
    settings_type: ClassVar[type[AdapterConfig]] = RoSAConfig
    layer = RoSALayer

    def __init__(self, settings: RoSAConfig) -> None:
        super().__init__(settings)
        if self.init.needs not in (None, "gradient", "two gradients"):
            raise InputError(
                f"rosa chooses its entries by gradients, and the init {self.init.name} reads something else",
                kind="conflict",
                key="adapter.init",
                fix="take an init that reads no data, or gradients",
            )

    @property
    def needs(self) -> Need | None:
        return self.init.needs or "gradient"

    @property
    def batch_size(self) -> int:
        return getattr(self._options, "batch_size", self.settings.batch_size)

    def rate(self, name: str) -> float:
        return self.settings.sparse_rate if name == "values" else 1.0

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """A and B as the init makes them, zeros of S, and their places."""
        return super().tensors(context) | sparse_tensors(context.statistics, self.settings.density)

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        values = (entry_count(self.settings.density, out_features, in_features),)
        return super().sizes(out_features, in_features) | {"values": values}
