"""SIGTERM and SIGINT while a stage trains: it saves at the next step boundary and ends with an exit code of its own.

A second signal ends it at once; the last checkpoint is then what is there.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pe_rlhf.distributed import max_over_ranks


class StopRequest:
    """Which signal this process has received, if any."""

    def __init__(self) -> None:
        self._number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            raise KeyboardInterrupt
        self._number = number

    def received(self) -> int:
        """The signal's number on any rank, 0 for none; all ranks ask at the same step boundary."""
        return max_over_ranks(self._number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within it SIGTERM and SIGINT are noted instead of ending the process."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
