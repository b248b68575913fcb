"""Several data sets as one: how many rows of each, in which order. Nothing here is random: shuffling comes later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pe_rlhf.config import DataSource
from pe_rlhf.system.progress import say
from reward.errors import InputError

T = TypeVar("T")


def mixed(source: DataSource, parts: Sequence[list[T]], key: str) -> list[T]:
    """The rows of a mixture's parts, taking turns, so that each stretch of it has about the shares of the whole.

    Without weights all rows of all parts. With weights as many of each as its share of `size`, or of the most that none
    has to be repeated for, evenly spaced, since a file may be sorted. Raises `InputError` where a share is less than
    one row.
    """
    assert source.mix is not None
    counts = [len(part) for part in parts]
    if all(part.weight is not None for part in source.mix):
        weights = [part.weight or 0.0 for part in source.mix]
        counts = shares(weights, [len(part) for part in parts], source.size)
        for number, (part, count, rows) in enumerate(zip(source.mix, counts, parts, strict=True)):
            if not count:
                message = f"{key}: {part.path} has a share of less than one row of the mixture"
                fix = "raise its weight, or the size"
                raise InputError(message, kind="empty", key=f"{key}.mix.{number}", file=part.path, fix=fix)
            again = f", each {count / len(rows):.1f} times" if count > len(rows) else ""
            say(f"{key}: {count} rows of {part.path}, which has {len(rows)}{again}")
    turns = sorted((i / count, number, i) for number, count in enumerate(counts) for i in range(count))
    return [parts[number][place(i, counts[number], len(parts[number]))] for _, number, i in turns]


def place(i: int, count: int, there: int) -> int:
    """Which of `there` rows is the i-th of `count`: evenly spaced, or pass after pass where there are fewer."""
    return i * there // count if count <= there else i % there


def shares(weights: Sequence[float], there: Sequence[int], size: int | None) -> list[int]:
    """How many rows of each part: in proportion to the weights, `size` in all, or the most without repeating any."""
    whole = sum(weights)
    if size is None:
        return [int(min(n / w for n, w in zip(there, weights, strict=True)) * weight + 1e-9) for weight in weights]
    exact = [size * weight / whole for weight in weights]
    counts = [int(each) for each in exact]
    largest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])  # the rest by largest remainder
    for i in largest[: size - sum(counts)]:
        counts[i] += 1
    return counts
