"""The weights of a quantised base as they were before, read from where the base came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from pe_rlhf.adapters.layer import weight_out_in
from pe_rlhf.adapters.layer_statistics import LayerStatistics, Need
from reward.errors import InputError


class OriginalWeights:
    """A source of statistics that loads the base once more, not quantised, on the CPU, and keeps it while it lives.

    load: how; None where the base is not quantised, or was loaded elsewhere. Then asking raises `InputError`.
    """

    def __init__(self, load: Callable[[], PreTrainedModel] | None) -> None:
        self._load = load

    @cached_property
    def _model(self) -> PreTrainedModel:
        if self._load is None:
            raise InputError(
                "the init starts from what quantising the base lost, and the base was not quantised when it was loaded",
                kind="conflict",
                key="adapter.init",
                fix="set backbone.quantization, or take another init",
            )
        return self._load()

    def weight(self, module: str) -> Tensor:
        """A layer's weight _OI, fp32."""
        return weight_out_in(self._model.get_submodule(module)).float()

    def visit(self, modules: Sequence[str], need: Need, take: Callable[[str, LayerStatistics], None]) -> None:
        for name in modules:
            take(name, LayerStatistics(original_OI=self.weight(name)))
