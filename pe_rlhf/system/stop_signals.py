"""SIGTERM and SIGINT while a stage trains: it saves at the next step boundary and ends with an exit code of its own.

A second signal, if it comes later, ends it at once; the last checkpoint is then what is there.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pe_rlhf.system.distributed import max_over_ranks

# A launcher that gets Ctrl-C with its processes hands it on to them as SIGTERM at once: that is one request, not two.
SECONDS_OF_ONE_REQUEST = 0.5


class StopRequest:
    """Which signal this process has received, if any."""

    def __init__(self) -> None:
        self._number, self._since = 0, 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._number:
            self._number, self._since = number, now
        elif now - self._since > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt

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
