"""Answers of HTTP servers that end. A client's own time-out is for each read: a byte at a time may come for ever.

`ended` makes the connections of a client of httpx such that an answer, its head and its body, has the seconds that one
read may take, and so many bytes when it is unpacked. It knows no class of httpx: openai's client may have another
edition of it, and only their transports' pools can be given a connection.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

LONGEST_ANSWER = 64 * 2**20  # bytes

Client = TypeVar("Client")


class TooLongError(Exception):
    """The body has more bytes than an answer may have."""


def ended(client: Client) -> Client:
    """A client, sync or async, whose answers end. It then raises `TimeoutError`, `TooLongError`."""
    own: Any = client
    waits = hasattr(own, "aclose")
    for transport in (own._transport, *own._mounts.values()):
        # An address that goes by no proxy has None. In another edition of httpx the names, which are its own, may be
        # others: its answers then have no deadline beside each read's.
        pool: Any = getattr(transport, "_pool", None)
        if (network := getattr(pool, "_network_backend", None)) is not None:
            pool._network_backend = _AsyncNetwork(network) if waits else _Network(network)
    own.event_hooks = {"response": [_short_async if waits else _short]}
    return client


class _Around:
    """Has what the other one has."""

    def __init__(self, other: Any) -> None:
        self._other = other
        self._deadline: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)

    def _see(self, seconds: float | None) -> None:
        """Before each read: the first one after a write says how long all of them may take."""
        now = time.monotonic()
        if self._deadline is None and seconds is not None:
            self._deadline = now + seconds
        if self._deadline is not None and now > self._deadline:
            raise TimeoutError(f"the answer did not end in {seconds:g} s")


class _Connection(_Around):
    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._see(timeout)
        return self._other.read(max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._deadline = None
        self._other.write(buffer, timeout)

    def start_tls(self, *arguments: Any, **named: Any) -> _Connection:
        return _Connection(self._other.start_tls(*arguments, **named))


class _AsyncConnection(_Around):
    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._see(timeout)
        return await self._other.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._deadline = None
        await self._other.write(buffer, timeout)

    async def start_tls(self, *arguments: Any, **named: Any) -> _AsyncConnection:
        return _AsyncConnection(await self._other.start_tls(*arguments, **named))


class _Network(_Around):
    def connect_tcp(self, *arguments: Any, **named: Any) -> _Connection:
        return _Connection(self._other.connect_tcp(*arguments, **named))


class _AsyncNetwork(_Around):
    async def connect_tcp(self, *arguments: Any, **named: Any) -> _AsyncConnection:
        return _AsyncConnection(await self._other.connect_tcp(*arguments, **named))


def _short(response: Any) -> None:
    see, parts = _counted(), response.iter_bytes
    response.iter_bytes = lambda chunk_size=None: map(see, parts(chunk_size))


async def _short_async(response: Any) -> None:
    see, parts = _counted(), response.aiter_bytes

    async def seen(chunk_size: int | None = None) -> AsyncIterator[bytes]:
        async for part in parts(chunk_size):
            yield see(part)

    response.aiter_bytes = seen


def _counted() -> Callable[[bytes], bytes]:
    """What each part of the body passes through. Raises `TooLongError`."""
    left = LONGEST_ANSWER

    def see(part: bytes) -> bytes:
        nonlocal left
        left -= len(part)
        if left < 0:
            raise TooLongError(f"more than {LONGEST_ANSWER // 2**20} MiB")
        return part

    return see
