"""How a long step says how far it is."""

from __future__ import annotations

from typing import Protocol


class Advance(Protocol):
    """Called with the number of units that were finished since the last call, and a note on the result so far."""

    def __call__(self, n: int, note: str = "") -> None: ...


def no_progress(n: int, note: str = "") -> None:
    """An `Advance` that says nothing."""
