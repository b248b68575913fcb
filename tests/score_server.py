"""A real scorer on loopback that gives lengths, by a protocol written down here again, and misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import HEAD, QuietHandler, serving

# Gets the number of the request, from 0: what goes wrong with it, as `Handler._fault` knows it, or None.
Faults = Callable[[int], Any]


@dataclass
class ScoreServer:
    """How it answers, and what it was asked."""

    faults: Faults = lambda number: None
    url: str = ""
    requests: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def running(server: ScoreServer) -> Iterator[ScoreServer]:
    with serving(_handler(server)) as address:
        server.url = address
        yield server


def _handler(server: ScoreServer) -> type[BaseHTTPRequestHandler]:
    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self._send(404, b"no such page")  # a scorer of a user's own may have no page of its health

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number, server.requests = server.requests, server.requests + 1
                server.bodies.append(body)
                server.keys.append(self.headers["Authorization"])
            assert self.path == "/score"
            fault = server.faults(number)
            if fault is None:
                scores = [float(len(response)) for response in body["responses"]]
                return self._send(200, json.dumps({"scores": scores}).encode())
            return self._fault(fault, len(body["responses"]))

        def _fault(self, fault: Any, count: int) -> None:
            if fault == "drop":
                return self.connection.close()
            if fault in ("drip", "drip head"):  # a byte at a time, for ever
                return self.drip(HEAD if fault == "drip head" else HEAD + b"\r\n\r\n", b" ")
            if fault == "hang":
                time.sleep(5)
                return None
            if isinstance(fault, int):
                return self._send(fault, b"no")
            if isinstance(fault, bytes):
                return self._send(200, fault)
            return self._send(200, json.dumps({"scores": fault(count)}).encode())

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
