"""A chat model behind an OpenAI-compatible server, with retries, a limit of requests and an API key that no file gets.

A temporary failure (429, 5xx, a dropped connection, a time-out, a damaged body) is tried again after a growing pause;
any other (a wrong key, an unknown model) stops at once.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import openai
import tenacity
from openai.types.chat import ChatCompletion

from reward.errors import InputError, JudgeError
from reward.judges.judge_settings import ServerSettings
from reward.judges.llm import Completion
from reward.records import Message

LONGEST_PAUSE = 60.0
FEW_LOGPROBS = 5  # every server that gives any allows this many
TOO_LONG = ("context_length", "context length", "maximum context", "too long", "max_model_len")


class Passing(Exception):
    """A failure that may be gone at the next try."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


class Endpoint:
    """Chat with `model` at `base_url`. One request per chat; `concurrency` says how many run at the same time."""

    batch_size = 1

    def __init__(self, model: str, base_url: str, settings: ServerSettings, top_logprobs: int = 20) -> None:
        self._key = _key(base_url, settings.api_key_env)
        self._model, self._base_url, self._settings = model, base_url, settings
        # Not its address: a server that comes back on another port is the same judge.
        self.identity = f"endpoint:{model}"
        self.concurrency = settings.concurrency
        self._requests, self._lock = 0, threading.Lock()
        self._top_logprobs, self._no_logprobs = top_logprobs, False  # until the server refuses them
        self._limit = "max_tokens"  # what the server calls the limit of its answer: OpenAI has renamed it
        self._stopped = threading.Event()
        # The client's own retries would not be counted in max_requests.
        self._client = openai.OpenAI(api_key=self._key, base_url=base_url, timeout=settings.timeout, max_retries=0)

    def label_logprobs(self, chats: Sequence[list[Message]], labels: Sequence[str]) -> list[Completion]:
        """The labels' log-probs among the most likely first tokens; None from a server that gives no log-probs."""
        return [self._labels_of(chat, labels) for chat in chats]

    def generate(
        self, chats: Sequence[list[Message]], max_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        """One answer to each chat. Raises as `complete`."""
        options: dict[str, Any] = {"temperature": temperature, "seed": seed}
        return [self._completion(chat, max_tokens, options) for chat in chats]

    def stop(self) -> None:
        """End the pauses between tries, because another thread has failed."""
        self._stopped.set()

    def _labels_of(self, chat: list[Message], labels: Sequence[str]) -> Completion:
        if self._no_logprobs:
            return Completion("")
        options: dict[str, Any] = {"temperature": 0.0, "logprobs": True, "top_logprobs": self._top_logprobs}
        try:
            answer = self._ask(chat, 1, options)
        except TooLong as error:
            return Completion("", error=str(error))
        except Refused as refusal:
            if not refusal.names("logprobs"):
                raise
            # The server refuses this many log-probs, or any: ask for few, then for text.
            self._top_logprobs, self._no_logprobs = FEW_LOGPROBS, options["top_logprobs"] <= FEW_LOGPROBS
            return self._labels_of(chat, labels)
        text = answer.choices[0].message.content or ""
        content = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
        if not content:
            return Completion(text)
        found: dict[str, float] = {}
        for token in content[0].top_logprobs or []:
            label = token.token.strip()
            if label in labels:
                found[label] = _log_add(found.get(label, -math.inf), token.logprob)
        return Completion(text, found)

    def _completion(self, chat: list[Message], max_tokens: int, options: dict[str, Any]) -> Completion:
        try:
            return Completion(self._ask(chat, max_tokens, options).choices[0].message.content or "")
        except TooLong as error:
            return Completion("", error=str(error))

    def _ask(self, chat: list[Message], max_tokens: int, options: dict[str, Any]) -> ChatCompletion:
        """Ask until there is an answer.

        Raises `InputError` for a failure that another try will not mend, `JudgeError` after the last try.
        """
        limit = self._limit
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Passing),
            stop=tenacity.stop_after_attempt(self._settings.attempts) | tenacity.stop_when_event_set(self._stopped),
            wait=_pause,
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )
        try:
            return attempts(self._ask_once, chat, {limit: max_tokens, **options})
        except Refused as refusal:
            if not refusal.names("max_completion_tokens") or limit == "max_completion_tokens":
                raise
            self._limit = "max_completion_tokens"
            return self._ask(chat, max_tokens, options)
        except Passing as error:
            raise JudgeError(
                f"{self._base_url} failed {self._settings.attempts} times, the last time: {self._clean(error)}",
                kind="server",
                fix="look at the server, or raise attempts and timeout",
            ) from None

    def _ask_once(self, chat: list[Message], options: dict[str, Any]) -> ChatCompletion:
        self._count()
        try:
            sent = [{**message, "content": _whole(message["content"])} for message in chat]
            answer = self._client.chat.completions.create(model=self._model, messages=sent, **options)  # type: ignore[call-overload]
            _check(answer)
        except openai.APIStatusError as error:
            raise self._of_status(error) from None
        except openai.APITimeoutError:
            raise Passing(f"no answer within {self._settings.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise Passing(f"the connection failed: {error.__cause__ or error}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, openai.APIResponseValidationError) as error:
            raise Passing(f"the body is not an answer: {error}") from None
        return answer

    def _count(self) -> None:
        """Count a request, over all threads. Raises `JudgeError` before the one that would be too many."""
        most = self._settings.max_requests
        with self._lock:
            if most is not None and self._requests >= most:
                raise JudgeError(
                    f"{most} requests to {self._base_url} are spent", kind="budget", fix="raise max_requests"
                )
            self._requests += 1

    def _of_status(self, error: openai.APIStatusError) -> Exception:
        status, said = error.status_code, self._clean(error.message)
        if status in (401, 403):
            name = self._settings.api_key_env
            return InputError(
                f"{self._base_url} refuses the key in {name} (status {status})", kind="server", key="api_key_env"
            )
        if status in (408, 409, 425, 429) or status >= 500:
            return Passing(f"status {status}", _retry_after(error.response.headers))
        if status in (400, 413, 422) and any(sign in said.lower() for sign in TOO_LONG):
            return TooLong(f"the question is too long for the judge: {said}", kind="too_long")
        return Refused(f"{self._base_url} refuses the request (status {status}): {said}", kind="server")

    def _clean(self, said: object) -> str:
        """A message of a server or library, without the key: some quote it."""
        text = str(said).replace(self._key, "***") if len(self._key) > 3 else str(said)
        return " ".join(text.split())[:300]


class TooLong(InputError):
    """One question does not fit into the judge's context; the others may."""


class Refused(InputError):
    """The server does not take this request; with other parameters it may."""

    def names(self, parameter: str) -> bool:
        """Whether the server says that it is about this parameter; the protocol has no field for it."""
        return parameter in str(self)


def _key(base_url: str, variable: str) -> str:
    key = os.environ.get(variable, "").strip()  # a file that a secret comes from often ends in a newline
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the key in {variable} has characters that no HTTP header can have", kind="invalid", key="api_key_env"
        )
    host = urlsplit(base_url).hostname or ""
    if not key and host not in ("localhost", "127.0.0.1", "::1"):
        raise InputError(
            f"the environment variable {variable} with the key for {base_url} is not set",
            kind="missing",
            key="api_key_env",
        )
    return key or "none"  # a server on this machine needs no key, but the client library insists on one


def _check(answer: Any) -> None:
    """Raise `Passing` for another body: the client library does not check what a server sends."""
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise Passing(f"the body is not a chat completion: {str(answer)[:80]!r}")
    content = getattr(choices[0].message, "content", None)
    if content is not None and not isinstance(content, str):
        raise Passing(f"the body is not a chat completion: its content is {type(content).__name__}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None


def _pause(state: tenacity.RetryCallState) -> float:
    """The server's Retry-After, otherwise half a second, doubling; jitter keeps threads from coming back as one."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.pause if isinstance(error, Passing) else None
    if asked is not None:
        return min(asked, LONGEST_PAUSE)
    return tenacity.wait_random_exponential(multiplier=0.5, min=0.2, max=LONGEST_PAUSE)(state)


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high)) if low > -math.inf else high


def _whole(text: str) -> str:
    """The text with a ? for half of a character, which no request can carry."""
    return text.encode("utf-8", "replace").decode("utf-8")
