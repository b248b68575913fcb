"""Rows of formats that do not have one pair a row: two rows that are one pair, and rows with lists of responses."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import product
from typing import Any, TypeGuard

from pe_rlhf.data.row_table import Row, Rows
from reward.errors import InputError


def side_by_side(rows: Rows) -> Rows:
    """HelpSteer2's scores: the two responses to a prompt are rows one after the other, which become one.

    The first of the two becomes `others` of the second; a row without a fellow stays as it is.
    """
    numbers, fellows = array("q"), array("q")
    before: Row | InputError | None = None
    for number, row in enumerate(rows):
        scored = isinstance(row, Mapping) and isinstance(before, Mapping) and "helpfulness" in row
        if scored and before.get("prompt") == row.get("prompt"):  # type: ignore[union-attr]
            fellows[-1], before = number, None
        else:
            numbers.append(number)
            fellows.append(-1)
            before = row

    def read(i: int) -> Row | InputError:
        row = rows[numbers[i]]
        return row if fellows[i] < 0 or isinstance(row, InputError) else {**row, "others": rows[fellows[i]]}

    return Rows(len(numbers), read)


def each_against_each(rows: Rows) -> Rows:
    """A row for each response of `chosen` with each of `rejected`; a row with an empty list stays as it is."""
    numbers, places = array("q"), array("q")
    for number, row in enumerate(rows):
        for place in range(max(1, len(_pairs_of(row)))):
            numbers.append(number)
            places.append(place)

    def read(i: int) -> Row | InputError:
        row = rows[numbers[i]]
        if isinstance(row, InputError) or not (pairs := _pairs_of(row)):
            return row
        chosen, rejected = pairs[places[i]]
        return {**row, "chosen": chosen, "rejected": rejected}

    return Rows(len(numbers), read)


def are_responses(value: object) -> TypeGuard[list[Any]]:
    """Whether a column holds several responses: a list of texts, or of lists of messages."""
    return isinstance(value, list) and all(isinstance(item, str | list) for item in value)


def _pairs_of(row: Row | InputError) -> list[tuple[Any, Any]]:
    if not isinstance(row, Mapping):
        return []
    sides = (row.get("chosen"), row.get("rejected"))
    better, worse = (side if are_responses(side) else [side] for side in sides)
    return list(product(better, worse))
