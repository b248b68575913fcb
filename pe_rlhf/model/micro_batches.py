"""How a batch is cut into micro-batches, on one rank and on many, and what a row costs of their budget."""

from __future__ import annotations

import torch
from torch import Tensor

from pe_rlhf.model.fast.packing import common_starts
from pe_rlhf.system.distributed import rank, world_size
from pe_rlhf.types import Sequences

# In attention packed rows are padded to the longest of their group, up to so many times the budget, padding included.
ROOM_IN_ATTENTION = 2
# Each row keeps a copy of its shared prefix's keys and values, an eighth or less of what the backward pass needs of a
# token that is computed.
KEPT_TOKENS_PER_TOKEN = 8

# ---- what a row costs -----------------------------------------------------------------------------------------------


def sequence_costs(sequences: Sequences, *, packed: bool) -> Tensor:
    """How many tokens _B of a budget each row takes: all, except those that every row starts with, in packed passes.

    Where rows have tasks: except those that every row of its task starts with.
    """
    if not packed:
        return sequences.lengths_B
    prefix_B, lengths_U = common_starts(sequences)
    kept_U = torch.tensor([kept_tokens(length) for length in lengths_U.tolist()])
    return sequences.lengths_B - (lengths_U - kept_U)[prefix_B]


def pair_cost(prompt: int, chosen: int, rejected: int, *, packed: bool) -> int:
    """How many tokens of a budget a pair of those lengths takes: packed passes compute its prompt once.

    The prompt's last token predicts the first response token and is computed for each response.
    """
    if not packed:
        return 2 * (prompt + max(chosen, rejected))
    shared = prompt - 1
    return 2 * prompt + chosen + rejected - shared + 2 * kept_tokens(shared)


def kept_tokens(prefix_length: int) -> int:
    """As how many tokens of a budget a row's copy of its prefix's keys and values counts."""
    return -(-prefix_length // KEPT_TOKENS_PER_TOKEN)


# ---- cutting --------------------------------------------------------------------------------------------------------


def own_micro_batches(costs_B: Tensor, token_budget: int, *, padded: bool) -> list[tuple[Tensor, bool]]:
    """This rank's micro-batches of a batch: the index of their rows, and whether they count.

    Arguments are those of `micro_batches`. Rows are dealt out by length, so that every rank has about as much to do.
    All ranks have the same number of micro-batches, since under ZeRO-3 they gather the base's weights together: past
    its own a rank repeats the shortest row of the batch, which then counts for nothing.
    """
    order = torch.argsort(costs_B, descending=True, stable=True)
    shares = [order[k :: world_size()] for k in range(world_size())]
    cut = [[share[i] for i in micro_batches(costs_B[share], token_budget, padded=padded)] for share in shares]
    own = [(index, True) for index in cut[rank()]]
    return own + [(order[-1:], False)] * (max(map(len, cut)) - len(own))


def all_micro_batches(costs_B: Tensor, token_budget: int, *, padded: bool) -> list[tuple[Tensor, bool]]:
    """The micro-batches of a whole batch on this rank, in the form of `own_micro_batches`; all count."""
    return [(index, True) for index in micro_batches(costs_B, token_budget, padded=padded)]


def micro_batches(costs_B: Tensor, token_budget: int, *, padded: bool) -> list[Tensor]:
    """Cut a batch into groups of similar length that cost at most `token_budget` tokens each.

    With `padded` a group's rows are all as long as its longest one. Packed rows are that in attention only, where
    padding may take up as much again.

    Returns index tensors, longest rows first. A row that is over the budget is a group of its own. The groups are even:
    no smaller budget would do with as many of them, since a small last group would be computed at a small one's speed.
    """
    order = torch.argsort(costs_B, descending=True, stable=True)
    ordered = costs_B[order].tolist()
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
