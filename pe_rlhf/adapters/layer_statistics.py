"""What an init may read of a layer beyond its weight: gradients, moments of inputs, the weight before quantising."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from reward.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# What an init needs: the gradient of one batch, of two batches (or tasks), moments of the layer's inputs, or the weight
# as it was before it was quantised.
Need = Literal["gradient", "two gradients", "inputs", "original weight"]


@dataclass(frozen=True)
class InputMoments:
    """Of the `tokens` inputs x that a layer saw, padding left out: the mean of x·xᵀ and of x, fp32."""

    second_II: Tensor
    mean_I: Tensor
    tokens: int


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's statistics; what its init does not need is absent. `gradients_OI` has one per batch or task, fp32."""

    gradients_OI: tuple[Tensor, ...] = ()
    inputs: InputMoments | None = None
    original_OI: Tensor | None = None


class StatisticsSource(Protocol):
    """A source of statistics. It hands over each layer's as soon as it has them, so that one is held at a time."""

    def visit(self, modules: Sequence[str], need: Need, take: Callable[[str, LayerStatistics], None]) -> None:
        """Call `take(module, statistics)` once for each of the modules, in any order."""
        ...


@dataclass(frozen=True)
class GivenStatistics:
    """Statistics that are known already, by module name."""

    layers: Mapping[str, LayerStatistics]

    def visit(self, modules: Sequence[str], need: Need, take: Callable[[str, LayerStatistics], None]) -> None:
        for name in modules:
            if name not in self.layers:
                raise InputError(f"statistics: there are none for the layer {name}", kind="missing", key="statistics")
            take(name, self.layers[name])


def as_source(statistics: StatisticsSource | Mapping[str, LayerStatistics]) -> StatisticsSource:
    """A source of statistics, from a source or a mapping."""
    return GivenStatistics(statistics) if isinstance(statistics, Mapping) else statistics
