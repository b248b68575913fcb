"""Answers of HTTP servers that end. A client's own time-out is for each read: a byte at a time may come for ever.

`bounded` and `bounded_async` are hooks of httpx, called when the head of an answer is there: the body that follows has
the seconds that one read may take, and so many bytes when it is unpacked. They know no class of httpx: openai's client
may have another edition of it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

LONGEST_ANSWER = 64 * 2**20  # bytes


class TooLongError(Exception):
    """The body has more bytes than an answer may have."""


def bounded(response: Any) -> None:
    see, parts = _bounds(response), response.iter_bytes
    response.iter_bytes = lambda chunk_size=None: map(see, parts(chunk_size))


async def bounded_async(response: Any) -> None:
    see, parts = _bounds(response), response.aiter_bytes

    async def seen(chunk_size: int | None = None) -> AsyncIterator[bytes]:
        async for part in parts(chunk_size):
            yield see(part)

    response.aiter_bytes = seen


def _bounds(response: Any) -> Callable[[bytes], bytes]:
    """What each part of the body passes through. Raises `TooLongError`, `TimeoutError`."""
    seconds = response.request.extensions["timeout"]["read"]
    deadline, left = time.monotonic() + seconds, LONGEST_ANSWER

    def see(part: bytes) -> bytes:
        nonlocal left
        left -= len(part)
        if left < 0:
            raise TooLongError(f"more than {LONGEST_ANSWER // 2**20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the answer did not end in {seconds:g} s")
        return part

    return see
