"""Two ranks that sample from one server: rank 0 exports and loads the adapter, the other one uses it; with a whole base
on each rank, and with one that ZeRO-3 has split.

The server is a small one of the routes that are used, with PEFT behind it, which counts.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pe_rlhf.model.names import resolve_model
from tests.integration.distributed.launching import run_on_ranks
from tests.integration.distributed.test_ranks import CONFIGURATIONS, write_all_split
from tests.loopback import QuietHandler, serving
from tests.runs import read_jsonl, recipe, write_recipe

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

STEPS, LENGTH = 2, 4


class Engine:
    """A base with LoRA adapters by name, and how often each route was asked."""

    def __init__(self, path: str) -> None:
        self._lock, self._base = threading.Lock(), AutoModelForCausalLM.from_pretrained(path).eval()
        self._model: PeftModel | None = None
        self.names: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.folders: set[str] = set()

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self.asked[route] += 1
            if route == "/v1/models":
                cards = [{"id": "base", "object": "model", "max_model_len": 256, "parent": None}]
                cards += [{"id": name, "object": "model", "parent": "base"} for name in sorted(self.names)]
                return 200, {"object": "list", "data": cards}
            if route == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], body["lora_path"])
            if route == "/v1/unload_lora_adapter":
                self.names.discard(body["lora_name"])
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
    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(*engine.answer(self.path, {}))

        def do_POST(self) -> None:
            self._send(*engine.answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _send(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with serving(Handler) as url:
        yield url


@pytest.mark.parametrize("zero", ["zero0", "all_split"])
def test_rank_0_loads_each_version_once(
    tmp_path: Path, model_cache: Path, monkeypatch: pytest.MonkeyPatch, zero: str
) -> None:
    monkeypatch.setenv("PE_RLHF_CACHE", str(model_cache))
    engine = Engine(resolve_model("random:tiny-llama"))
    rollout = {"engine": "vllm", "mode": "server", "max_new_tokens": LENGTH, "start_timeout": 30.0, "timeout": 30.0}
    path = write_recipe(tmp_path, recipe("ppo", ppo__rollout=rollout, ppo__steps=STEPS, ppo__learning_rate=1e-2))
    write_all_split(tmp_path)
    with served(engine) as url:
        settings = [f"ppo.rollout.urls=[{url}]", *CONFIGURATIONS[zero]]
        run_on_ranks(["run", str(path), *settings, "--run-dir=out"], tmp_path, model_cache)
    assert engine.asked["/v1/load_lora_adapter"] == STEPS  # a version a step, whatever the number of ranks
    assert len(engine.folders) == 1
    assert not engine.names  # all of them are unloaded again
    lines = read_jsonl(tmp_path / "out" / "ppo" / "metrics.jsonl")
    assert all(line["logprob_mismatch"] < 1e-4 for line in lines)
    # The responses of both ranks and rank 0's probes: of the base, and of each version.
    assert engine.asked["/v1/completions"] == STEPS * 4 + 1 + STEPS
