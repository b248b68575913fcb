"""Preference pairs as token ids."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pe_rlhf.data.codec import TextCodec, cut_pair
from pe_rlhf.model.fast.packing import kept_tokens
from pe_rlhf.types import Sequences
from reward.records import PreferenceRecord


@dataclass(frozen=True)
class Pairs:
    """Tokenised preference pairs; row i of both is one pair."""

    chosen: list[tuple[list[int], list[int]]]
    rejected: list[tuple[list[int], list[int]]]
    margins: list[float]
    chosen_trunks: list[Tensor] = field(default_factory=list)
    rejected_trunks: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.chosen)

    def tokens(self) -> int:
        """Tokens of all prompts and responses."""
        return sum(len(prompt) + len(response) for prompt, response in self.chosen + self.rejected)

    def budget_lengths(self, rows: list[int], packed: bool) -> Tensor:
        """How many tokens _B of a budget each of those pairs takes up: all, or the prompt once and both responses."""
        found = []
        for (prompt, chosen), (other, rejected) in ((self.chosen[i], self.rejected[i]) for i in rows):
            both = len(prompt) + len(chosen), len(other) + len(rejected)
            if not packed:
                found.append(2 * max(both))
            elif prompt == other:
                shared = len(prompt) - 1
                found.append(sum(both) - shared + 2 * kept_tokens(shared))
            else:
                found.append(sum(both))
        return torch.tensor(found)

    def pack(self, rows: list[int], pad_id: int) -> Sequences:
        """Chosen responses of those rows, then the rejected ones, with their trunks where they were kept."""
        both = [self.chosen[i] for i in rows] + [self.rejected[i] for i in rows]
        trunks = None
        if self.chosen_trunks:
            trunks = [self.chosen_trunks[i] for i in rows] + [self.rejected_trunks[i] for i in rows]
        return Sequences.pack([prompt for prompt, _ in both], [response for _, response in both], pad_id, trunks)


def encode_pairs(records: list[PreferenceRecord], codec: TextCodec, limit: int) -> Pairs:
    """Token ids of all records, each response with its prompt cut to `limit` tokens."""
    chosen, rejected = [], []
    for record in records:
        chosen.append(cut_pair(*codec.encode_pair(record.prompt, record.chosen, record.chosen_truncated), limit))
        rejected.append(cut_pair(*codec.encode_pair(record.prompt, record.rejected, record.rejected_truncated), limit))
    return Pairs(chosen, rejected, [record.margin or 0.0 for record in records])
