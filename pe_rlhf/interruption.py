"""SIGTERM and SIGINT: a run saves at the next step boundary and ends with an exit code of its own.

A second signal ends it at once; the last checkpoint is then what is there.
"""

from __future__ import annotations

import signal
from types import FrameType

from pe_rlhf.processes import launched

_received: list[int] = []


class Stopped(Exception):
    """A run that was asked to stop and has saved; `code` is its exit code, 128 + the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


def listen() -> None:
    """Note SIGTERM and SIGINT from here on instead of ending at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def stop_requested() -> int:
    """The signal that any rank has received, 0 for none; every rank asks at the same step boundary."""
    own = _received[0] if _received else 0
    if not launched():
        return own
    import torch

    from pe_rlhf.distributed import sum_over_ranks

    found = torch.zeros(65)
    found[own] = 1
    found = sum_over_ranks(found)
    return next((number for number in range(1, 65) if found[number]), 0)


def _note(number: int, frame: FrameType | None) -> None:
    if _received:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt
    _received.append(number)
