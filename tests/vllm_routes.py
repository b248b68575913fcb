"""A real HTTP server on loopback with the routes of vLLM's that are used, and PEFT behind them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.loopback import QuietHandler, serving

# Gets a route, its body and the header with the key: a status and an answer in place of the server's own, or None.
Faults = Callable[[str, dict[str, Any], str], tuple[int, Any] | None]


class Engine:
    """A base with LoRA adapters by name, and how often each route was asked.

    Attributes:
        key: what a client has to send on routes below /v1; None: any will do.
        faults: what goes wrong.
        length: prompt and response that it takes, tokens.
    """

    def __init__(self, path: str, *, key: str | None = None, length: int = 256) -> None:
        self._lock, self._base = threading.Lock(), AutoModelForCausalLM.from_pretrained(path).eval()
        self._tokenizer, self._path = AutoTokenizer.from_pretrained(path), path
        self.key, self.length, self.keys = key, length, set[str]()
        self.faults: Faults = lambda route, body, sent: None
        self._model: PeftModel | None = None
        self.names: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.folders: set[str] = set()

    def answer(self, route: str, body: dict[str, Any], sent: str) -> tuple[int, Any]:
        with self._lock:
            self.asked[route] += 1
            self.keys.add(sent)
            if (fault := self.faults(route, body, sent)) is not None:
                return fault
            if self.key is not None and route.startswith("/v1") and sent != f"Bearer {self.key}":
                return 401, {"error": f"Unauthorized: {sent}"}
            if route == "/v1/models":
                about = {"root": self._path, "max_model_len": self.length, "parent": None}
                cards: list[dict[str, Any]] = [{"id": "base", "object": "model", **about}]
                cards += [{"id": name, "object": "model", "parent": "base"} for name in sorted(self.names)]
                return 200, {"object": "list", "data": cards}
            if route == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], body["lora_path"])
            if route == "/v1/unload_lora_adapter":
                self.names.discard(body["lora_name"])
            if route == "/tokenize":
                ids = self._tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"]).input_ids
                return 200, {"tokens": ids, "count": len(ids), "max_model_len": self.length}
            if route == "/v1/completions":
                return self._complete(body)
            return 200, {}

    def _load(self, name: str, path: str) -> tuple[int, Any]:
        if name in self.names:
            return 400, {"message": f"The lora adapter '{name}' has already been loaded."}
        self.folders.add(str(Path(path).parent))
        plain = name.replace(".", "_")
        if self._model is None:
            self._model = PeftModel.from_pretrained(self._base, path, adapter_name=plain)
        else:
            self._model.load_adapter(path, plain)
        self.names.add(name)
        return 200, {}

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, ids = body["model"], list(body["prompt"])
        if name not in {"base", *self.names}:
            return 404, {"message": f"The model {name} does not exist."}
        if max(ids) >= self._base.config.vocab_size:
            return 400, {"message": f"Token id {max(ids)} is out of vocabulary"}
        generator, found = torch.Generator().manual_seed(body["seed"] % 2**31), []
        for _ in range(body["max_tokens"]):
            logprobs_V = torch.log_softmax(self._logits(name, ids) / body["temperature"], dim=-1)
            token = int(torch.multinomial(logprobs_V.exp(), 1, generator=generator))
            ids.append(token)
            found.append(float(logprobs_V[token]))
            if token in body.get("stop_token_ids", ()):
                break
        own = {"token_ids": ids[len(body["prompt"]) :], "prompt_token_ids": body["prompt"]}
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": {"token_logprobs": found}, **own}
        return 200, {"id": "x", "object": "text_completion", "created": 0, "model": name, "choices": [choice]}

    def _logits(self, name: str, ids: list[int]) -> torch.Tensor:
        rows = torch.tensor([ids])
        if self._model is None:
            return self._base(rows).logits[0, -1]
        if name == "base":
            with self._model.disable_adapter():
                return self._model(rows).logits[0, -1]
        self._model.set_adapter(name.replace(".", "_"))
        return self._model(rows).logits[0, -1]


@contextmanager
def served(engine: Engine) -> Iterator[str]:
    """Its address."""

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(*engine.answer(self.path, {}, self.headers.get("Authorization", "")))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*engine.answer(self.path, body, self.headers.get("Authorization", "")))

        def _send(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with serving(Handler) as url:
        yield url
