"""How a batch is cut into micro-batches, on one rank and on many."""

from __future__ import annotations

import torch
from torch import Tensor

from pe_rlhf.system.distributed import rank, world_size

ROOM_IN_ATTENTION = 2  # times the budget, padding included


def micro_batches(lengths_B: Tensor, token_budget: int, *, padded: bool) -> list[Tensor]:
    """Cut a batch into groups of similar length that are at most `token_budget` tokens each.

    With `padded` a group's rows are all as long as its longest one. Packed rows are that in attention alone, where
    padding may take up as much again.

    Returns index tensors, longest rows first; a row that alone is over the budget is a group of its own. No smaller
    budget would do with as many groups: a small last one would be computed at a small one's speed.
    """
    order = torch.argsort(lengths_B, descending=True, stable=True)
    ordered = lengths_B[order].tolist()
    wanted, low = len(_cut(ordered, token_budget, padded)), 0
    while low + 1 < token_budget:  # the budget suffices, `low` does not
        middle = (low + token_budget) // 2
        enough = len(_cut(ordered, middle, padded)) == wanted
        low, token_budget = (low, middle) if enough else (middle, token_budget)
    return list(order.split(_cut(ordered, token_budget, padded)))


def _cut(lengths: list[int], token_budget: int, padded: bool) -> list[int]:
    """Sizes of the groups that rows fall into, from the longest on, where each takes in what it can."""
    sizes: list[int] = []
    left = first = 0  # of the last group: what is left of its budget, its longest row
    for length in lengths:
        takes = first if padded and sizes else length
        if sizes and takes <= left and (sizes[-1] + 1) * first <= ROOM_IN_ATTENTION * token_budget:
            sizes[-1] += 1
        else:
            sizes.append(1)
            left, first, takes = token_budget, length, length
        left -= takes
    return sizes


def own_micro_batches(lengths_B: Tensor, token_budget: int, *, padded: bool) -> list[tuple[Tensor, bool]]:
    """This rank's micro-batches of a batch: the index of their rows, and whether they count.

    Arguments are those of `micro_batches`. Rows are dealt out by length, so that every rank has about as much to do.
    All ranks have the same number of micro-batches, since under ZeRO-3 they gather the base's weights together: past
    its own a rank repeats the shortest row of the batch, which then counts for nothing.
    """
    order = torch.argsort(lengths_B, descending=True, stable=True)
    shares = [order[k :: world_size()] for k in range(world_size())]
    cut = [[share[i] for i in micro_batches(lengths_B[share], token_budget, padded=padded)] for share in shares]
    own = [(index, True) for index in cut[rank()]]
    return own + [(order[-1:], False)] * (max(map(len, cut)) - len(own))
