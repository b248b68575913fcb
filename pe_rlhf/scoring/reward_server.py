"""Serves the rewards of a run or model over HTTP, by the protocol that `remote.py` asks: see docs/rewards.md.

Requests are read by a thread each. One more thread has the model, and scores what waits at the same time together.
"""

from __future__ import annotations

import hmac
import json
import math
import queue
import socket
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pe_rlhf.scoring.reward_judge import RewardScores
from reward.errors import InputError
from reward.records import Prompt, parse_prompt

LONGEST_REQUEST = 256 * 2**20  # bytes


@dataclass(frozen=True)
class Request:
    """The rows of one request, and where its scores go."""

    prompts: list[Prompt]
    responses: list[str]
    cut: list[bool]
    scores: Future[list[float]] = field(default_factory=Future)


class Batcher:
    """Has one thread score requests: those that wait at the same time together, up to `batch_size` responses."""

    def __init__(self, score: RewardScores, batch_size: int) -> None:
        self._score, self._batch_size = score, batch_size
        self._waiting: queue.Queue[Request] = queue.Queue()
        threading.Thread(target=self._run, name="scores", daemon=True).start()

    def submit(self, request: Request) -> Future[list[float]]:
        self._waiting.put(request)
        return request.scores

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while sum(len(request.responses) for request in batch) < self._batch_size:
                try:
                    batch.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            self._answer(batch)

    def _answer(self, batch: list[Request]) -> None:
        try:
            scores = iter(self._scores(batch))
            for request in batch:
                request.scores.set_result([next(scores) for _ in request.responses])
        except Exception as error:
            if len(batch) == 1:
                batch[0].scores.set_exception(error)
                return
            for request in batch:  # one request must not fail another
                self._answer([request])

    def _scores(self, batch: list[Request]) -> list[float]:
        prompts = [prompt for request in batch for prompt in request.prompts]
        responses = [response for request in batch for response in request.responses]
        cut = [flag for request in batch for flag in request.cut]
        size = self._batch_size
        found: list[float] = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            found += self._score(prompts[part], responses[part], cut[part])
        if not all(map(math.isfinite, found)):
            raise ValueError("a score is not a finite number")
        return found


class RewardServer(ThreadingHTTPServer):
    """`POST /score` and `GET /health` at an address; port 0 is a free one.

    key: what clients have to send to be scored, as `Authorization: Bearer …`; None serves everybody.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], name: str, score: RewardScores, batch_size: int = 64, key: str | None = None
    ) -> None:
        self.expected = None if key is None else f"Bearer {key}".encode()
        self.name, self.batcher = name, Batcher(score, batch_size)
        self.answered = {"requests": 0, "responses": 0, "failures": 0}
        self._lock = threading.Lock()
        super().__init__(address, Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}"

    def count(self, responses: int, failed: bool) -> None:
        with self._lock:
            self.answered["requests"] += 1
            self.answered["responses"] += responses
            self.answered["failures"] += failed


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: RewardServer  # type: ignore[assignment]  # a narrower type than the base class has
    protocol_version = "HTTP/1.1"
    timeout = 600  # seconds for a request to arrive whole, however its bytes drip in, and for an answer to be taken

    def log_message(self, format: str, *arguments: Any) -> None:
        """No line for each request."""

    def handle_one_request(self) -> None:
        assert self.timeout is not None  # the base class has it so
        self._clock = threading.Timer(self.timeout, self.connection.shutdown, [socket.SHUT_RD])
        self._clock.daemon = True
        self._clock.start()
        try:
            super().handle_one_request()
        finally:
            self._clock.cancel()

    def do_GET(self) -> None:
        if self.path.rstrip("/") in ("", "/health"):
            return self._send(200, {"status": "ok", "model": self.server.name, **self.server.answered})
        return self._send(404, _error(f"there is no {self.path}; there are POST /score and GET /health"))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LONGEST_REQUEST:
            self.close_connection = True  # what it sends is not read
            return self._send(411 if not length.isdecimal() else 413, _error("a request needs a length, up to 256 MiB"))
        content = self.rfile.read(int(length))
        self._clock.cancel()
        if len(content) < int(length):
            self.close_connection = True
            return self._send(408, _error(f"the request did not arrive whole within {self.timeout} s"))
        if self.path.rstrip("/") != "/score":
            return self._send(404, _error(f"there is no {self.path}; there are POST /score and GET /health"))
        sent, expected = self.headers.get("Authorization", "").encode(), self.server.expected
        if expected is not None and not hmac.compare_digest(sent, expected):
            return self._send(401, _error("a key is needed, as `Authorization: Bearer …`"))
        status, answer, responses = self._scored(content)
        self.server.count(responses, status != 200)
        return self._send(status, answer)

    def _scored(self, content: bytes) -> tuple[int, dict[str, Any], int]:
        """Status, answer, and the number of responses that were scored."""
        try:
            request = parse_request(content)
            scores = self.server.batcher.submit(request).result() if request.responses else []
        except InputError as error:
            return 400, _error(str(error)), 0
        except Exception as error:  # the model's, of any kind: the server goes on, and the client hears of it
            return 500, _error(f"{type(error).__name__}: {error}"), 0
        return 200, {"scores": scores}, len(scores)

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def parse_request(content: bytes) -> Request:
    """The rows of a request's body. Raises `InputError` that names the field."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request is not JSON: {error}", kind="unreadable") from error
    if not isinstance(said, dict):
        raise InputError("the request is not a JSON object", kind="invalid")
    prompts, responses = (_list(said, name) for name in ("prompts", "responses"))
    cut = _list(said, "cut") if said.get("cut") is not None else [False] * len(responses)
    if not len(prompts) == len(responses) == len(cut):
        message = f"{len(prompts)} prompts, {len(responses)} responses and {len(cut)} values of cut are not as many"
        raise InputError(message, kind="invalid", key="responses")
    for name, values, kind in (("responses", responses, str), ("cut", cut, bool)):
        for row, value in enumerate(values, start=1):
            if not isinstance(value, kind):
                message = f"{name}: number {row} is {type(value).__name__}, not {kind.__name__}"
                raise InputError(message, kind="invalid", key=name, row=row)
    parsed: list[Prompt] = []
    for row, prompt in enumerate(prompts, start=1):
        try:
            parsed.append(parse_prompt(prompt))
        except InputError as error:
            raise InputError(f"prompts: number {row}: {error}", kind=error.kind, key="prompts", row=row) from error
    return Request(parsed, responses, cut)


def _list(said: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(said.get(name), list):
        raise InputError(f"{name} is not a list", kind="missing" if name not in said else "invalid", key=name)
    return said[name]


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}
