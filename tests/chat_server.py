"""A real OpenAI-compatible server on loopback that judges by a rule, and misbehaves on demand."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import QuietHandler, serving

KEY = "sk-secret-0123456789abcdef"

# Told the number of the request, counted from 0: what goes wrong with it, or None.
Faults = Callable[[int], str | None]


@dataclass
class ChatServer:
    """How it answers, and what it was asked.

    logprobs: how many it gives at most.
    list_status: what it says when it is asked which models it has.
    answered: how often each question was answered whole. text: what it says where log-probs are not asked for.
    """

    faults: Faults = lambda number: None
    logprobs: int = 20
    text: str | None = None
    bias: float = 0.0
    list_status: int = 501
    url: str = ""
    requests: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def probability_of_a(self, question: str) -> float:
        """0.9 for the response that says "good" more often, 0.5 where both do alike, shifted by `bias` towards A."""
        a, b = (re.search(rf"\[Response {x}\]\n(.*?)\n\[End of response", question, re.DOTALL) for x in "AB")
        assert a is not None, question
        assert b is not None, question
        difference = a[1].count("good") - b[1].count("good")
        base = 0.5 if difference == 0 else 0.9 if difference > 0 else 0.1
        return min(0.99, max(0.01, base + self.bias))


@contextmanager
def running(server: ChatServer) -> Iterator[ChatServer]:
    with serving(_handler(server)) as address:
        server.url = f"{address}/v1"
        yield server


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(server.list_status, {"object": "list", "data": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number, server.requests = server.requests, server.requests + 1
                server.bodies.append(body)
            if self.headers.get("Authorization") not in (f"Bearer {KEY}", "Bearer none"):
                # Some servers say which key was wrong.
                return self._send(401, {"error": {"message": f"Incorrect key: {self.headers['Authorization']}"}})
            fault = server.faults(number)
            if fault == "hang":
                time.sleep(1.5)
            if fault == "drop":
                self.close_connection = True
                return self.connection.close()
            if fault == "429":
                return self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
            if fault == "500":
                return self._send(500, {"error": {"message": f"it broke, {self.headers['Authorization']}"}})
            if fault == "wrong format":
                return self._send(200, {"verdict": "A"})
            if fault == "too long":
                return self._send(400, {"error": {"message": "maximum context length is 8 tokens"}})
            if body.get("logprobs") and body["top_logprobs"] > server.logprobs:
                return self._send(400, {"error": {"message": f"top_logprobs are at most {server.logprobs}"}})
            text = json.dumps(self._answer(body))
            if fault == "truncated":
                return self._raw(200, text[: len(text) // 2].encode(), {})
            question = body["messages"][0]["content"]
            with server.lock:
                server.answered[question] += 1
            return self._raw(200, text.encode(), {})

        def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
            import math

            judged = server.text is None or body.get("logprobs")
            p = server.probability_of_a(body["messages"][0]["content"]) if judged else math.nan
            said = server.text if server.text is not None else ("A" if p > 0.5 else "B")
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": said}
            if body.get("logprobs"):
                top = [{"token": t, "logprob": math.log(0.8 * q), "bytes": None} for t, q in (("A", p), (" B", 1 - p))]
                choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
            usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
            head = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            return {**head, "choices": [choice], "usage": usage}

        def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            self._raw(status, json.dumps(body).encode(), headers or {})

        def _raw(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler
