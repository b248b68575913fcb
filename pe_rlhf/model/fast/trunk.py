"""The frozen trunk: the blocks below the first adapter, which are the same function in every role and at every step.

With `adapter.last_layers` set, their hidden states can be computed once for a batch and given to every pass over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.layer import WrappedLayer


class FrozenTrunk:
    """What lies between the embeddings and the first block with an adapter, in any role."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        count = getattr(model.config, "num_hidden_layers", None)
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
        self._blocks: list[nn.Module] = list(next(lists, []))
        self._others: int | None = None

    @property
    def depth(self) -> int:
        """How many blocks the trunk has; 0 where an adapter is on the first block or outside of all blocks."""
        counts = [sum(isinstance(module, WrappedLayer) for module in block.modules()) for block in self._blocks]
        outside = sum(isinstance(module, WrappedLayer) for module in self._model.modules()) - sum(counts)
        return 0 if outside else next((i for i, count in enumerate(counts) if count), 0)

    def states(self, run: Callable[[], Any]) -> Tensor:
        """The trunk's hidden states _BTH in the pass `run`, in which no block above it is computed."""
        last, kept = self._blocks[self.depth - 1], []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._others = len(output) - 1 if isinstance(output, tuple) else None
            kept.append(output if self._others is None else output[0])

        hook = last.register_forward_hook(keep)
        try:
            with _replaced(self._blocks[self.depth :], lambda *_, **__: self._output(kept[0])):
                run()
        finally:
            hook.remove()
        return kept[0]

    @contextmanager
    def given(self, hidden_BTH: Tensor | None) -> Iterator[None]:
        """Within it a pass takes the trunk's hidden states, from `states`, and computes the blocks above alone.

        None changes nothing.
        """
        if hidden_BTH is None:
            yield
            return
        with _replaced(self._blocks[: self.depth], lambda *_, **__: self._output(hidden_BTH)):
            yield

    def _output(self, hidden_BTH: Tensor) -> Any:
        """Hidden states in the form that the model's blocks give them: alone, or first in a tuple (GPT-Neo)."""
        return hidden_BTH if self._others is None else (hidden_BTH, *[None] * self._others)


@contextmanager
def _replaced(blocks: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is back
