"""One vLLM server, asked by openai's client: completions by their method, vLLM's own routes for weights by path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import openai

from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.progress import say
from reward.advance import Advance, no_progress
from reward.errors import InputError, Kind
from reward.judges.bounded import TooLongError, ended
from reward.judges.judge_settings import key_in
from reward.judges.server_errors import without_key

KEY = "VLLM_API_KEY"  # the environment variable, of vLLM's own name
SECONDS_TO_ANSWER = 5.0  # for a question that costs the server nothing
SECONDS_BETWEEN_LOOKS = 0.5

Response = tuple[list[int], list[float]]
T = TypeVar("T")


class ServerFault(Exception):
    """A server failed in a way that may pass: ask again, or ask another server."""

    def __init__(self, what: str) -> None:
        super().__init__(_keyless(what))


class Server:
    """One server, the adapter that it samples from, and whether it can be used."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        # No retries by the client: after a failure the server may have lost its weights, so it is looked at first.
        self._options: dict[str, Any] = {
            "base_url": f"{self.url}/v1",
            "api_key": key_in(KEY, KEY) or "none",
            "timeout": timeout,
            "max_retries": 0,
        }
        self._timeout = timeout
        ends = ended(openai.DefaultHttpxClient())
        self._client = openai.OpenAI(**self._options, http_client=ends)
        self.base, self.root, self._max_length = "", "", 0
        self.adapter: str | None = None
        self._loaded: set[str] = set()
        self.merged = False  # whether the base's weights were replaced
        self.down = False

    @property
    def model(self) -> str:
        """The name to ask for: the adapter's, otherwise the base's."""
        return self.adapter or self.base

    def is_ready(self) -> bool:
        """Whether the server is up and lists its models; notes the base's name, folder or hub id, and length.

        Raises `InputError` if it is not a vLLM server, or refuses the key.
        """
        quick = self._client.with_options(timeout=SECONDS_TO_ANSWER)
        try:
            with _faults(SECONDS_TO_ANSWER):
                quick.get(f"{self.url}/health", cast_to=NoneType)
        except ServerFault:
            return False
        except openai.APIStatusError as error:
            self._refuse_key(error)
            return False
        try:
            with _faults(SECONDS_TO_ANSWER):
                models: Any = quick.get("/models", cast_to=object)
            base = next(card for card in models["data"] if not card.get("parent"))
            self.base, self._max_length = str(base["id"]), int(base["max_model_len"])
            self.root = _keyless(base.get("root") or self.base)
        except ServerFault:
            return False
        except (openai.APIStatusError, AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
            if isinstance(error, openai.APIStatusError):
                self._refuse_key(error)
            raise server_refused("server", f"{self.url} does not answer as a vLLM server does: {error!r}") from None
        return True

    def _refuse_key(self, error: openai.APIStatusError) -> None:
        if error.status_code in (401, 403):
            message = f"{self.url} refuses the key in {KEY} (status {error.status_code})"
            fix = f"set {KEY} to the key that the server was started with"
            raise InputError(message, kind="server", key=KEY, fix=fix) from None

    def wait(self, seconds: float) -> None:
        """Wait until it is up. Raises `TrainingError` after so many seconds; 0 looks once."""
        start = time.monotonic()
        if self.is_ready():
            return
        if seconds:
            say(f"waiting up to {seconds:g} s for the vLLM server {self.url}")
        while time.monotonic() - start < seconds:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if self.is_ready():
                return
        raise server_error(f"the vLLM server {self.url} is not up" + (f" after {seconds:g} s" if seconds else ""))

    def check_length(self, tokens: int) -> None:
        if tokens > self._max_length:
            message = f"{self.url} takes {self._max_length} tokens, prompt and response have up to {tokens}"
            raise server_refused("too_long", message, f"start the server with --max-model-len {tokens}")

    def tokens_of(self, text: str) -> list[int] | None:
        """The ids of a text by the server's own tokenizer; None from one that does not say. Raises `ServerFault`."""
        body = {"model": self.base, "prompt": text, "add_special_tokens": False}
        try:
            answer = self._post(f"{self.url}/tokenize", body, object)
        except openai.APIStatusError:
            return None
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        return ids if isinstance(ids, list) else None

    # ---- weights ----------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: Path) -> None:
        """Load a LoRA under a name never used before, then drop the one that was sampled from."""
        try:
            self._post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        except openai.APIStatusError as error:
            # A server that lost its connection, but was not restarted, still has the adapter.
            if not (error.status_code == 400 and "already been loaded" in error.response.text):
                self._refuse_adapter(path, error)
        self._loaded.add(name)
        self.unload(but=name)
        self.adapter = name

    def _refuse_adapter(self, path: Path, error: openai.APIStatusError) -> None:
        said = error.response.text
        if any(reason in said for reason in ("max_lora_rank", "LoRA is not enabled")):  # status 500, as faults are
            fix = (
                "start it by launch/vllm_server.sh with a higher LORA_RANK (twice adapter.rank if the init has B0 ≠ 0)"
            )
        elif error.status_code >= 500:
            raise _fault(error) from None
        elif error.status_code == 404 and "lora" not in said.lower():  # no such route
            fix = "start it by launch/vllm_server.sh, or with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        else:
            fix = None
        message = f"{self.url} cannot load the adapter in {path}: {_message(error)}"
        raise server_refused("conflict", message, fix) from None

    def unload(self, but: str | None = None) -> None:
        """Drop all adapters that were loaded here; a restarted server has dropped them already."""
        self.adapter = None
        for name in self._loaded - {but}:
            with suppress(openai.APIStatusError):
                self._post("/unload_lora_adapter", {"lora_name": name})
            self._loaded.discard(name)

    def load_merged(self, path: Path) -> None:
        """Replace the base's weights by a checkpoint's, and drop the cache of the old ones."""
        try:
            # Routes outside of /v1, which a server has in development mode only.
            self._post(
                f"{self.url}/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
            )
            self.merged = True
            answer = self._post(f"{self.url}/reset_prefix_cache", {}, object)
        except openai.APIStatusError as error:
            if error.status_code >= 500:
                raise _fault(error) from None
            fix = (
                "start it by launch/vllm_server.sh with MERGED=1, or with VLLM_SERVER_DEV_MODE=1, or use sync: adapter"
            )
            message = f"{self.url} cannot load the weights in {path}: {_message(error)}"
            raise server_refused("conflict", message, fix if error.status_code == 404 else None) from None
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise ServerFault("its prefix cache could not be reset")

    def close(self) -> None:
        self._client.close()

    def _post(self, route: str, body: dict[str, Any], wanted: type = NoneType) -> object:
        """Post to a route below /v1, or to an address. Raises `ServerFault`, `openai.APIStatusError`.

        wanted: `object` for the answer as JSON; by default it is not read, since some routes answer in plain text.
        """
        with _faults(self._timeout):
            return self._client.post(route, cast_to=wanted, body=body)

    # ---- tokens -----------------------------------------------------------------------------------------------------

    async def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        sampling: dict[str, Any],
        salt: str,
        *,
        at_once: int = 1,
        model: str | None = None,
        advance: Advance = no_progress,
    ) -> list[Response]:
        """Ids and log-probs of one response per prompt, at most `at_once` requests at the same time.

        salt: separates the prefix caches of two versions. model: default: the adapter, otherwise the base.
        Raises `ServerFault`, and `TrainingError` where another try cannot help.
        """
        places = asyncio.Semaphore(at_once)
        ends = ended(openai.DefaultAsyncHttpxClient())
        async with openai.AsyncOpenAI(**self._options, http_client=ends) as client:

            async def one(prompt: list[int], seed: int) -> Response:
                async with places:
                    response = await self._complete(client, prompt, seed, sampling, salt, model or self.model)
                advance(1)
                return response

            return await together(one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True))

    async def _complete(
        self, client: openai.AsyncOpenAI, prompt: list[int], seed: int, sampling: dict[str, Any], salt: str, model: str
    ) -> Response:
        # Tokens in, tokens out: text is never tokenised again, and no special token is added.
        extra = {**sampling, "return_token_ids": True, "add_special_tokens": False, "cache_salt": salt}
        try:
            with _faults(self._timeout):
                answer = await client.completions.create(
                    model=model, prompt=prompt, seed=seed, logprobs=0, extra_body=extra
                )
        except openai.APIStatusError as error:
            # It was restarted, is going down, or what stands before it has too much to do.
            if error.status_code in (404, 408, 429) or error.status_code >= 500:
                raise _fault(error) from None
            raise server_error(f"{self.url} refused a prompt of {len(prompt)} tokens: {_message(error)}") from None
        try:
            # The client does not check an answer, and does not know vLLM's fields.
            choice = answer.choices[0]
            own = choice.model_extra or {}
            ids, read, named = list(own["token_ids"]), own["prompt_token_ids"], answer.model
            logprobs: list[Any] = list(choice.logprobs.token_logprobs)  # type: ignore[union-attr, arg-type]
            if not all(isinstance(i, int) for i in ids) or not all(isinstance(p, int | float) for p in logprobs):
                raise TypeError("ids or log-probs that are not numbers")
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ServerFault(f"an answer that is not a completion with ids and log-probs: {error!r}") from None
        if named != model or read != prompt:
            raise ServerFault(f"an answer by {named!r}, or to another prompt; {model!r} was asked")
        return ids, [float(p) for p in logprobs]


def server_refused(kind: Kind, message: str, fix: str | None = None) -> InputError:
    """The error for a server that cannot serve this run."""
    return InputError(_keyless(message), kind=kind, key="rollout.urls", fix=fix)


def server_error(message: str) -> TrainingError:
    """The error for servers with which a run cannot go on."""
    return TrainingError(_keyless(message), kind="server", key="rollout.urls")


async def together(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all jobs; the first one that fails ends the others."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


@contextmanager
def _faults(seconds: float) -> Iterator[None]:
    """Turn a failure without an answer into `ServerFault`.

    A status of 400 or more stays an `openai.APIStatusError`: what it means depends on the route. Errors of the client
    are no causes of ours: a traceback would show what they quote.
    """
    try:
        yield
    except openai.APITimeoutError:
        raise ServerFault(f"no answer in {seconds:g} s") from None
    except openai.APIConnectionError as error:
        raise ServerFault(f"the connection failed ({error.__cause__!r})") from None
    except (TimeoutError, TooLongError) as error:
        raise ServerFault(f"an answer that is not taken: {error}") from None
    except (openai.APIResponseValidationError, ValueError) as error:  # the body is not JSON, or not text
        raise ServerFault(f"an answer that cannot be read: {error!r}") from None


def _fault(error: openai.APIStatusError) -> ServerFault:
    return ServerFault(f"{error.status_code}: {_message(error)}")


def _message(error: openai.APIStatusError) -> str:
    """What a server says is wrong, in a line."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    text = _keyless(said or error.response.text)  # before it is cut: half a key would be left
    return " ".join(text.split())[:300] or f"status {error.status_code}"


def _keyless(said: object) -> str:
    """What a server says without the key, which some quote: it goes to the console, logs and `failure.json`."""
    return without_key(said, key_in(KEY, KEY))
