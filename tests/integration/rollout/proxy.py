"""A proxy on loopback before a real server, that misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

Tree = dict[str, Any]


class Proxy(ThreadingHTTPServer):
    """Hands requests on to `upstream`.

    Attributes:
        completions: how many completions were asked for by now.
        spoil: is given each completion's answer and says what is answered instead; None drops the connection.
        refuses: whether every connection is dropped, as that of a server that is not there.
        missing: routes that it has not got.
        gate: completions wait until it is set.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.completions = 0
        self.posts: list[str] = []
        self.spoil: Callable[[int, Tree], Tree | bytes | None] = lambda _, answer: answer
        self.refuses = False
        self.missing: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.client = httpx.Client(timeout=120)  # one for all requests: making it takes longer than asking
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy  # type: ignore[assignment]  # it is made by no other

    def do_GET(self) -> None:
        if self.server.refuses:
            self.close_connection = True
        else:
            self._answer(self.server.client.get(self.server.upstream + self.path))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses:
            self.close_connection = True
            return
        self.server.posts.append(self.path)
        if self.path in self.server.missing:
            self._answer(httpx.Response(404, json={"detail": "Not Found"}))
            return
        headers = {"Content-Type": "application/json"}
        answer = self.server.client.post(self.server.upstream + self.path, content=body, headers=headers)
        samples = self.path == "/v1/completions" and not json.loads(body)["cache_salt"].startswith("probe-")
        if samples and answer.status_code == 200:
            self.server.completions += 1
            spoiled = self.server.spoil(self.server.completions, answer.json())
            self.server.gate.wait()
            if spoiled is None:
                self.close_connection = True
                return
            content = spoiled if isinstance(spoiled, bytes) else json.dumps(spoiled).encode()
            answer = httpx.Response(200, content=content)
        self._answer(answer)

    def _answer(self, answer: httpx.Response) -> None:
        self.send_response(answer.status_code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    server = Proxy(upstream)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        server.server_close()
        server.client.close()


def comes_back(server: Proxy, seconds: float) -> None:
    """Let a server that is gone come back after a while."""

    def wait() -> None:
        time.sleep(seconds)
        server.refuses = False

    threading.Thread(target=wait, daemon=True).start()
