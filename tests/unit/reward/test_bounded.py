"""Answers of servers: how many bytes one may have."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from reward.judges import bounded
from reward.judges.bounded import TooLongError, ended
from tests.loopback import QuietHandler, serving

LIMIT = 5000


def body(address: str, waits: bool) -> bytes:
    if not waits:
        with ended(httpx.Client()) as client:
            return client.get(address).content

    async def get() -> bytes:
        async with ended(httpx.AsyncClient()) as client:
            return (await client.get(address)).content

    return asyncio.run(get())


@pytest.mark.parametrize("waits", [False, True], ids=["sync", "async"])
def test_an_answer_has_so_many_bytes_and_no_more(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    class Says(QuietHandler):
        def do_GET(self) -> None:
            size = int(self.path[1:])
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(b"x" * size)

    monkeypatch.setattr(bounded, "LONGEST_ANSWER", LIMIT)
    with serving(Says) as address:
        assert body(f"{address}/{LIMIT}", waits) == b"x" * LIMIT
        with pytest.raises(TooLongError):
            body(f"{address}/{LIMIT + 1}", waits)
