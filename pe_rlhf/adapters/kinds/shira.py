"""SHiRA (arXiv 2406.13175): W0 + S, S sparse, of high rank, with few entries trained.

The entries are those where the squared gradient of the stage's own loss is greatest. They start at zero: at step 0 the
base's output gets exact zeros added, so its bits do not change. Cost follows the density: `pe_rlhf/adapters/sparse.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, LayerContext
from pe_rlhf.adapters.sparse import Density, SparseLayer, entry_count, sparse_tensors
from pe_rlhf.config.adapter import AdapterConfig
from pe_rlhf.config.section import Positive

if TYPE_CHECKING:
    from pe_rlhf.adapters.layer_statistics import Need


class ShiRAConfig(AdapterConfig):
    """Some entries of each weight are trained, those with the greatest squared gradient."""

    density: Density = Field(default=0.01, description="share of each weight's entries that is trained")
    batch_size: Positive = Field(default=8, description="sequences, or pairs, in the batch that chooses the entries")


class ShiRALayer(SparseLayer):
    """`base(x) + S x`."""

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        return self.add_sparse(x, base(x))

    def delta_weight(self, weight_OI: Tensor) -> Tensor | None:
        """S as a dense _OI."""
        return self.sparse_change()


class ShiRA(AdapterKind[ShiRAConfig]):
    """Entries of the weight where the gradient is greatest."""

    settings_type: ClassVar[type[AdapterConfig]] = ShiRAConfig
    layer = ShiRALayer

    @property
    def needs(self) -> Need | None:
        return "gradient"

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size

    def tensors(self, context: LayerContext) -> dict[str, Tensor]:
        """Zeros, and their places."""
        return sparse_tensors(context.statistics, self.settings.density)

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        return {"values": (entry_count(self.settings.density, out_features, in_features),)}
