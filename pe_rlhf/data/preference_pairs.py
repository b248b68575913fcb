"""Preference pairs as token ids."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.cuts import Cuts
from pe_rlhf.data.row_table import Ragged, RowTable
from pe_rlhf.model.micro_batches import pair_cost
from pe_rlhf.types import Sequences
from reward.errors import InputError
from reward.records import PreferenceRecord


@dataclass(frozen=True)
class PairTokens:
    """One preference pair: a prompt, two responses to it, and by how much their scores should differ at least."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0


class PairTable:
    """Preference pairs, four bytes a token."""

    def __init__(self) -> None:
        self._tokens, self._margins = Ragged(), array("d")

    def append(self, pair: PairTokens) -> int:
        """Returns the pair's number."""
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            self._tokens.append(ids)
        self._margins.append(pair.margin)
        return len(self._margins) - 1

    def __getitem__(self, number: int) -> PairTokens:
        prompt, chosen, rejected = self._tokens[3 * number : 3 * number + 3]
        return PairTokens(prompt, chosen, rejected, self._margins[number])

    def take(self, numbers: Sequence[int]) -> RowTable[PairTokens]:
        """The pairs of those numbers."""
        return RowTable(len(numbers), lambda i: self[numbers[i]])


@dataclass(frozen=True)
class Responses:
    """Prompts and a response to each, not padded: a whole data set would be as long as its longest row everywhere."""

    rows: Sequence[tuple[list[int], list[int]]]
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: Responses) -> Responses:
        return Responses(RowTable.joined([self.rows, other.rows]), self.pad_id)

    @property
    def lengths_B(self) -> Tensor:
        return torch.tensor([len(prompt) + len(response) for prompt, response in self.rows])

    def all(self) -> Sequences:
        """All rows, padded."""
        return Sequences.pack([prompt for prompt, _ in self.rows], [response for _, response in self.rows], self.pad_id)

    def take(self, index: Tensor) -> Sequences:
        """The rows of that index."""
        return Responses([self.rows[i] for i in index.tolist()], self.pad_id).all()


@dataclass(frozen=True)
class Pairs:
    """Preference pairs, to be cut into micro-batches; row i is pair i."""

    pairs: Sequence[PairTokens]
    pad_id: int

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, index: Tensor) -> Sequences:
        """The chosen responses of those pairs with their prompts, then the rejected ones with theirs."""
        return self.subset(index.tolist()).responses().all()

    def responses(self) -> Responses:
        """The chosen responses with their prompts, then the rejected ones with theirs."""
        pairs = RowTable(len(self.pairs), self.pairs.__getitem__, lambda: self.pairs)
        chosen = pairs.map(lambda pair: (pair.prompt, pair.chosen))
        return Responses(RowTable.joined([chosen, pairs.map(lambda pair: (pair.prompt, pair.rejected))]), self.pad_id)

    def subset(self, rows: Sequence[int]) -> Pairs:
        """The pairs of those rows."""
        return Pairs(RowTable(len(rows), lambda i: self.pairs[rows[i]]), self.pad_id)

    def margins(self, index: Tensor) -> Tensor:
        """The margins _B of the pairs of that index."""
        return torch.tensor([self.pairs[i].margin for i in index.tolist()])

    def costs(self, *, packed: bool) -> Tensor:
        """How many tokens _B of a budget each pair takes."""
        lengths = ((len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in self.pairs)
        return torch.tensor([pair_cost(*length, packed=packed) for length in lengths])


def encode_pair(record: PreferenceRecord, codec: TextCodec, limit: int, cuts: Cuts | None = None) -> PairTokens:
    """Token ids of a record, a prompt and its longer response at most `limit` tokens.

    Raises `InputError` where nothing can be learnt from them: the template refuses the prompt, a side is empty, or both
    are the same.
    """
    responses = [(record.chosen, record.chosen_truncated), (record.rejected, record.rejected_truncated)]
    prompt, (chosen, rejected) = codec.encode_within(record.prompt, responses, limit, cuts)
    for column, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not ids or ids == [codec.end_token_id]:
            raise InputError(f"the {column} is empty as tokens", kind="empty", key=column)
    if chosen == rejected:
        message = f"the chosen and the rejected response are equal, cut to {limit} tokens with their prompt"
        raise InputError(message, kind="conflict", key="rejected")
    return PairTokens(prompt, chosen, rejected, record.margin or 0.0)
