"""The frozen trunk: the blocks below the first adapter, which are the same function in every role and at every step.

With `adapter.last_layers` set, the hidden states that leave it are computed once for a batch, and every pass over rows
of that batch starts from them. The backbone asks the cache; whoever makes a pass need not know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pe_rlhf.adapters.layer import WrappedLayer
from pe_rlhf.model.fast.packing import Packing
from pe_rlhf.model.micro_batches import micro_batches
from pe_rlhf.types import Sequences


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of the language model, in their order; none where they are no list of the length that it says."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    modules = model.get_decoder().modules()
    lists = (module for module in modules if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, []))


class FrozenTrunk:
    """What lies between the embeddings and the first block with an adapter, in any role."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._blocks = blocks_of(model)
        self._others: int | None = None

    @property
    def depth(self) -> int:
        """How many blocks the trunk has; 0 where an adapter is on the first block or outside of all blocks."""
        counts = [sum(isinstance(module, WrappedLayer) for module in block.modules()) for block in self._blocks]
        # An adapter outside of the blocks may be on the embeddings, and so change what enters the first block.
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
    def given(self, hidden_BTH: Tensor) -> Iterator[None]:
        """Within it a pass takes the trunk's hidden states, from `states`, and computes only the blocks above."""
        with _replaced(self._blocks[: self.depth], lambda *_, **__: self._output(hidden_BTH)):
            yield

    def _output(self, hidden_BTH: Tensor) -> Any:
        """Hidden states in the form that the model's blocks give them: as they are, or first in a tuple (GPT-Neo)."""
        return hidden_BTH if self._others is None else (hidden_BTH, *[None] * self._others)


class TokenRows(Protocol):
    """Rows that are to be kept: `Sequences`, or rows that are not padded yet."""

    @property
    def lengths_B(self) -> Tensor: ...

    def take(self, index: Tensor) -> Sequences: ...


class TrunkCache:
    """The trunk's hidden states of the rows of one batch, by the rows' token ids.

    The whole batch is computed at once, and not each row in the first pass that has it: which other rows a row is
    computed with must not depend on where a run was interrupted, or one that goes on has other numbers in the last bit.

    Args:
        mib: how much memory the states may take; those of a batch that needs more are not kept.
    """

    def __init__(self, model: PreTrainedModel, mib: int) -> None:
        self._trunk, self._bytes = FrozenTrunk(model), mib * 2**20
        size: int = model.get_input_embeddings().embedding_dim  # type: ignore[assignment]
        self._bytes_of_a_token = size * model.dtype.itemsize
        self._rows: dict[bytes, Tensor] = {}
        self._depth = 0
        self._sound: dict[int, bool] = {}  # by depth

    def __len__(self) -> int:
        """How many rows are kept."""
        return len(self._rows)

    def has_room(self, tokens: int) -> bool:
        """Whether there is a trunk, and the states of that many tokens may be kept."""
        return tokens * self._bytes_of_a_token <= self._bytes and self._trunk.depth > 0

    @torch.no_grad()
    def fill(
        self,
        rows: TokenRows,
        token_budget: int,
        run: Callable[[Sequences], Any],
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Keep the states of these rows, in the place of those before; `run` makes a padded pass over some of them."""
        self._rows, self._depth = {}, self._trunk.depth
        for index in micro_batches(rows.lengths_B, token_budget, padded=True):
            part = rows.take(index)
            if self._depth not in self._sound:
                self._sound[self._depth] = self._is_sound(lambda part=part: run(part))
            if not self._sound[self._depth]:
                return
            states_BTH = self._trunk.states(lambda part=part: run(part))
            for key, hidden_TH, length in zip(_keys(part), states_BTH, part.lengths_B.tolist(), strict=True):
                self._rows[key] = hidden_TH[:length].clone()
            advance(len(index))

    def _is_sound(self, run: Callable[[], Any]) -> bool:
        """Whether a pass that is given the states has the hidden states of a whole one.

        Not where blocks hand on more than these: Gemma 3n has several streams, and some blocks share keys.
        """
        try:
            expected_BTH, states_BTH = run(), self._trunk.states(run)
            if not isinstance(states_BTH, Tensor) or states_BTH.shape[:-1] != expected_BTH.shape[:-1]:
                return False
            with self._trunk.given(states_BTH):
                found_BTH = run()
            return torch.allclose(found_BTH, expected_BTH, rtol=1e-2, atol=1e-4)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model's blocks raise for what they do not expect
            return False

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within it no states are given: those of a base that is another for a while are others."""
        rows, self._rows = self._rows, {}
        try:
            yield
        finally:
            self._rows = rows

    def one_pass(self, sequences: Sequences, packing: Packing | None) -> AbstractContextManager[None]:
        """Within it the states of these rows are given, where all of them are kept; otherwise nothing changes."""
        if not self._rows or self._trunk.depth != self._depth:  # another adapter may reach further down
            return nullcontext()
        rows = [self._rows.get(key) for key in _keys(sequences)]
        kept = [row for row in rows if row is not None]
        if len(kept) < len(rows):
            return nullcontext()
        hidden_BTH = pad_sequence(kept, batch_first=True)
        return self._trunk.given(hidden_BTH if packing is None else packing.take(hidden_BTH)[None])


def _keys(sequences: Sequences) -> list[bytes]:
    rows = zip(sequences.ids_BT, sequences.lengths_B.tolist(), strict=True)
    return [ids_T[:length].numpy().tobytes() for ids_T, length in rows]


@contextmanager
def _replaced(blocks: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is back
