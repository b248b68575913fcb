"""Passes without gradients over all rows of a batch: micro-batch by micro-batch, shared by the ranks.

Loops with gradients go over `own_micro_batches` themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.micro_batches import all_micro_batches, own_micro_batches, sequence_costs
from pe_rlhf.system.distributed import sum_over_ranks
from pe_rlhf.types import Sequences

# A pass without gradients needs the activations of one layer, not of all layers, so it may have so many times the
# tokens of the recipe's budget, which is for passes with gradients.
LARGER_WITHOUT_GRADIENTS = 4


class RowBatch(Protocol):
    """A batch that can be cut: `Sequences`, or preference pairs, where a row is two sequences."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> Sequences:
        """The sequences of the rows of that index."""
        ...


@torch.no_grad()
def for_each_row(
    backbone: Backbone,
    role: str,
    rows: RowBatch,
    token_budget: int,
    compute: Callable[[Sequences], Tensor],
    *,
    costs_B: Tensor | None = None,
    this_rank_only: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Compute numbers for each row under a role, micro-batch by micro-batch; the ranks share the rows.

    Args:
        token_budget: the recipe's, of a pass with gradients; these passes are larger.
        compute: from the sequences of some rows to _B, or to _B… for several numbers a row.
        costs_B: the tokens that each row takes of the budget; default: `sequence_costs`, for rows that are `Sequences`.
        this_rank_only: compute all rows here, with no other rank taking part.
        advance: gets the number of rows computed.

    Returns:
        What `compute` gave, for all rows and in their order; fp32, on the CPU, whole on every rank.
    """
    if costs_B is None:
        assert isinstance(rows, Sequences)
        costs_B = sequence_costs(rows, packed=backbone.packs)
    cut = own_micro_batches if not this_rank_only else all_micro_batches
    result: Tensor | None = None
    for index, counts in cut(costs_B, LARGER_WITHOUT_GRADIENTS * token_budget, padded=not backbone.packs):
        with backbone.role(role):
            part = compute(rows.take(index)).float().cpu()
        if result is None:
            result = torch.zeros(len(rows), *part.shape[1:])
        if counts:
            result[index] = part
            advance(len(index))
    if result is None:
        return torch.zeros(0)
    return result if this_rank_only else sum_over_ranks(result)  # each rank has filled in its own rows


def for_each_token(
    backbone: Backbone, role: str, sequences: Sequences, token_budget: int, compute: Callable[[Sequences], Tensor]
) -> Tensor:
    """As `for_each_row`, for a number per response token: `compute` gives _N, the result is _BR, 0 at padding."""
    R = sequences.mask_BR.shape[1]

    def padded(part: Sequences) -> Tensor:
        mask_BR = part.mask_BR
        numbers_BR = torch.zeros(len(part), R)
        numbers_BR[:, : mask_BR.shape[1]][mask_BR] = compute(part).float().cpu()
        return numbers_BR

    return for_each_row(backbone, role, sequences, token_budget, padded)
