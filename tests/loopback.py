"""Real HTTP servers on loopback, for as long as a block."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HEAD = b"HTTP/1.1 200 OK\r\nX-Slow: "


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server whose requests a handler answers, each in a thread of its own."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class QuietHandler(BaseHTTPRequestHandler):
    """Says nothing into the tests' output."""

    def drip(self, first: bytes, part: bytes, count: int = 100, pause: float = 0.1) -> None:
        """Write a part of an answer at a time, until the client has had enough."""
        with suppress(OSError):
            self.wfile.write(first)
            for _ in range(count):
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(pause)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
