"""Progress of long steps: a bar with rate and ETA in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pe_rlhf.system.processes import is_main
from reward.advance import Advance, no_progress

__all__ = ["Advance", "console", "no_progress", "progress", "say"]

# Outside a terminal no width is known, and rich would cut tables at 80 columns.
console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 1000)

SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Yield a function that takes how many more units are done."""
    if not is_main():
        yield no_progress
    elif console.is_terminal:
        with _bar(unit) as bar:
            task = bar.add_task(description, total=total, rate="")
            start = time.monotonic()

            def advance(n: int, note: str = "") -> None:
                bar.advance(task, n)
                done = bar.tasks[0].completed
                rate = f"{done / max(time.monotonic() - start, 1e-9):.1f} {unit}/s"
                bar.update(task, rate=f"{rate}, {note}" if note else rate)

            yield advance
    else:
        yield _Lines(description, total, unit)


def say(message: str) -> None:
    """One line to the person at the terminal, from rank 0."""
    if not is_main():
        return
    console.print(message, markup=False, soft_wrap=True)


class _Lines:
    """Says how far a step is, at most every few seconds, and once at its end if it said anything before."""

    def __init__(self, description: str, total: int, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def __call__(self, n: int, note: str = "") -> None:
        self._done += n
        now = time.monotonic()
        finished = self._done >= self._total and self._last > self._start
        if now - self._last < SECONDS_BETWEEN_LINES and not finished:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        rest = f", {note}" if note else ""
        say(f"{self._description}: {self._done}/{self._total}, {rate:.1f} {self._unit}/s, {left:.0f} s left{rest}")


def _bar(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
