"""One vLLM server by HTTP: the OpenAI-compatible routes for completions, and vLLM's own for weights."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx

from pe_rlhf.system.failures import TrainingError
from reward.errors import InputError

SECONDS_TO_ANSWER = 5.0  # a question that costs the server nothing


class ServerFault(Exception):
    """A server did not do what it was asked, in a way that may pass: asking again, or another one, is the answer."""


class Server:
    """One server, the adapter that it samples from, and whether it can be used."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.timeout = timeout
        self._http = httpx.Client(timeout=timeout, headers=self._headers)
        self._locks: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None
        self.base, self._max_length = "", 0
        self.adapter: str | None = None
        self._loaded: set[str] = set()
        self.merged = False  # whether the base's weights were replaced
        self.down = False

    @property
    def model(self) -> str:
        """The name that is asked for: the adapter's, else the base's."""
        return self.adapter or self.base

    def lock(self) -> asyncio.Lock:
        """A lock of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._locks is None or self._locks[0] is not loop:
            self._locks = loop, asyncio.Lock()
        return self._locks[1]

    def is_ready(self) -> bool:
        """Whether it is up and says what it serves: the base's name and length, which are noted.

        Raises `InputError` for a server that is not vLLM's.
        """
        try:
            if self._http.get(f"{self.url}/health", timeout=SECONDS_TO_ANSWER).status_code != 200:
                return False
            answer = self._http.get(f"{self.url}/v1/models", timeout=SECONDS_TO_ANSWER)
        except httpx.HTTPError:
            return False
        if answer.status_code < 500:
            self._note_models(answer)
        return answer.status_code < 500

    def _note_models(self, answer: httpx.Response) -> None:
        try:
            cards = self._json(answer)["data"]
            base = next(card for card in cards if not card.get("parent"))
            self.base, self._max_length = str(base["id"]), int(base["max_model_len"])
        except (ServerFault, KeyError, TypeError, ValueError, StopIteration) as error:
            raise InputError(f"{self.url} does not answer as a vLLM server does: {error!r}") from error

    def check_length(self, tokens: int) -> None:
        if tokens > self._max_length:
            raise InputError(
                f"{self.url} takes {self._max_length} tokens, prompt and response have up to {tokens}:"
                f" start it with --max-model-len {tokens}"
            )

    # ---- weights ----------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: Path) -> None:
        """Load a LoRA under a name never used before, then drop the one that was sampled from."""
        answer = self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        if any(reason in answer.text for reason in ("max_lora_rank", "LoRA is not enabled")):  # a 500, as faults are
            raise InputError(
                f"{self.url} cannot load this adapter: {_message(answer)}; start it by launch/vllm_server.sh with a"
                " RANK that is high enough (twice adapter.rank where the init has B0 ≠ 0)"
            )
        _raise_fault(answer)
        if answer.status_code == 404 and "lora" not in answer.text.lower():
            raise InputError(
                f"{self.url} loads no adapters: start it by launch/vllm_server.sh, or with --enable-lora and"
                " VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        has_it = answer.status_code == 400 and "already been loaded" in answer.text  # it was away, and not started anew
        if answer.status_code != 200 and not has_it:
            raise InputError(f"{self.url} did not load the adapter in {path}: {_message(answer)}")
        self._loaded.add(name)
        self.unload(but=name)
        self.adapter = name

    def unload(self, but: str | None = None) -> None:
        """Drop all adapters that were loaded here; what the server does not know any more is dropped already."""
        self.adapter = None
        for name in self._loaded - {but}:
            self._post("/v1/unload_lora_adapter", {"lora_name": name})
            self._loaded.discard(name)

    def load_merged(self, path: Path) -> None:
        """Put a checkpoint's weights in the place of the base's, and forget what those computed."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        answer = self._post("/collective_rpc", call)
        _raise_fault(answer)
        if answer.status_code == 404:
            raise InputError(
                f"{self.url} has no route for new weights (sync: merged): start it by launch/vllm_server.sh with"
                " MERGED=1, or with VLLM_SERVER_DEV_MODE=1, or use sync: adapter"
            )
        if answer.status_code != 200:
            raise InputError(f"{self.url} did not load the weights in {path}: {_message(answer)}")
        self.merged = True
        if self._json(self._post("/reset_prefix_cache", {})).get("success") is not True:
            raise ServerFault("its prefix cache could not be reset")

    # ---- tokens -----------------------------------------------------------------------------------------------------

    async def complete(
        self,
        client: httpx.AsyncClient,
        prompt: list[int],
        seed: int,
        sampling: dict[str, Any],
        salt: str,
        model: str | None = None,
    ) -> tuple[list[int], list[float]]:
        """Ids and log-probs of one response.

        Raises `ServerFault`, and `TrainingError` for what asking again cannot mend.
        """
        model = model or self.model
        body = {"model": model, "prompt": prompt, "seed": seed, "logprobs": 0, **sampling}
        # The salt is one more wall between the prefix caches of two versions.
        body |= {"return_token_ids": True, "add_special_tokens": False, "cache_salt": salt}
        try:
            answer = await client.post(f"{self.url}/v1/completions", json=body, headers=self._headers)
        except httpx.TimeoutException as error:
            raise ServerFault(f"no answer in {client.timeout.read:g} s") from error
        except httpx.HTTPError as error:
            raise ServerFault(f"the connection failed ({error!r})") from error
        if answer.status_code == 404 or answer.status_code >= 500:  # it was started again, or is going down
            raise ServerFault(f"{answer.status_code}: {_message(answer)}")
        if answer.status_code != 200:
            raise TrainingError(f"{self.url} refused a prompt of {len(prompt)} tokens: {_message(answer)}")
        try:
            choice = self._json(answer)["choices"][0]
            ids, logprobs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
            named, read = answer.json()["model"], choice["prompt_token_ids"]
            if not all(isinstance(i, int) for i in ids) or not all(isinstance(p, int | float) for p in logprobs):
                raise TypeError("ids or log-probs that are not numbers")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerFault(f"an answer that is not a completion with ids and log-probs: {error!r}") from error
        if named != model or read != prompt:
            raise ServerFault(f"an answer by {named!r}, or to another prompt; {model!r} was asked")
        return ids, [float(p) for p in logprobs]

    def close(self) -> None:
        self._http.close()

    def _post(self, route: str, body: dict[str, Any]) -> httpx.Response:
        try:
            return self._http.post(f"{self.url}{route}", json=body)
        except httpx.HTTPError as error:
            raise ServerFault(f"{route} failed ({error!r})") from error

    def _json(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code != 200:
            raise ServerFault(f"{answer.status_code}: {_message(answer)}")
        tree = answer.json()
        if not isinstance(tree, dict):
            raise ServerFault("an answer that is not an object")
        return tree


def _raise_fault(answer: httpx.Response) -> None:
    """Raise `ServerFault` for an answer of a server that is going down, or whose engine has died."""
    if answer.status_code >= 500:
        raise ServerFault(f"{answer.status_code}: {_message(answer)}")


def _message(answer: httpx.Response) -> str:
    """What a server says is wrong, in a line."""
    try:
        error = answer.json()["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = answer.text
    return " ".join(text.split())[:300] or f"status {answer.status_code}"
