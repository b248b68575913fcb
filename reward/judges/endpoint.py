"""A chat model behind an OpenAI-compatible server: retries with back-off, a budget, and no key anywhere but in memory.

What passes (429, 5xx, a dropped connection, a time-out, a damaged body) is tried again after a growing pause; what does
not (a wrong key, an unknown model) stops at once.
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
from reward.judges.judge_registry import JudgeSettings
from reward.judges.llm import Completion
from reward.records import Message

LONGEST_PAUSE = 60.0
FEW_LOGPROBS = 5  # what every server allows that gives any
TOO_LONG = ("context_length", "context length", "maximum context", "too long", "max_model_len")


class Passing(Exception):
    """A failure that may be gone at the next try."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


class Budget:
    """Counts requests and cost over all threads. Raises `JudgeError` before the request that would go over.

    What a request costs is known when its answer is there: as many as run at once may go over a cost.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        if settings.max_cost is not None and (settings.price_in is None or settings.price_out is None):
            raise InputError("judge: max_cost needs price_in and price_out, per million tokens")
        self._settings, self._lock = settings, threading.Lock()
        self.requests, self.tokens_in, self.tokens_out = 0, 0, 0

    @property
    def cost(self) -> float:
        price_in, price_out = self._settings.price_in or 0.0, self._settings.price_out or 0.0
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6

    def take(self) -> None:
        with self._lock:
            most, cost = self._settings.max_requests, self._settings.max_cost
            if most is not None and self.requests >= most:
                raise JudgeError(f"stopped at --max-requests {most}")
            if cost is not None and self.cost >= cost:
                raise JudgeError(f"stopped at --max-cost {cost:g}, {self.requests} requests")
            self.requests += 1

    def spent(self, tokens_in: int, tokens_out: int) -> None:
        with self._lock:
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out


class Endpoint:
    """Chat with `model` at `base_url`. One request per chat; the judge's concurrency is how many run at once."""

    batch_size = 1

    def __init__(self, model: str, settings: JudgeSettings) -> None:
        if not settings.base_url:
            raise InputError("judge: an endpoint needs its base_url")
        self._key = _key(settings)
        self._model, self._settings = model, settings
        # Not its address: a server that comes back on another port is the same judge.
        self.identity = f"endpoint:{model}"
        self.concurrency = settings.concurrency
        self.budget = Budget(settings)
        self._top_logprobs, self._no_logprobs = settings.top_logprobs, False  # until the server refuses them
        self._limit = "max_tokens"  # what the server calls the limit of its answer: OpenAI has renamed it
        self._stopped = threading.Event()
        # Retries are ours alone: the client's own would not be counted in the budget.
        self._client = openai.OpenAI(
            api_key=self._key, base_url=settings.base_url, timeout=settings.timeout, max_retries=0
        )

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
        """Break off the pauses between tries: another thread has failed."""
        self._stopped.set()

    def _labels_of(self, chat: list[Message], labels: Sequence[str]) -> Completion:
        if self._no_logprobs:
            return Completion("")
        options: dict[str, Any] = {"temperature": 0.0, "logprobs": True, "top_logprobs": self._top_logprobs}
        try:
            answer = self._ask(chat, 1, options)
        except TooLong as error:
            return Completion("", error=str(error))
        except InputError as error:
            if "logprobs" not in str(error):
                raise
            # It refuses so many, or the very question; then text will do.
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

        Raises `InputError` for what trying again will not mend, `JudgeError` where all attempts have failed.
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
        except InputError as error:
            if "max_completion_tokens" not in str(error) or limit == "max_completion_tokens":
                raise
            self._limit = "max_completion_tokens"
            return self._ask(chat, max_tokens, options)
        except Passing as error:
            where = self._settings.base_url
            raise JudgeError(
                f"the judge at {where} failed {self._settings.attempts} times, the last time: {self._clean(error)}"
            ) from None

    def _ask_once(self, chat: list[Message], options: dict[str, Any]) -> ChatCompletion:
        self.budget.take()
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
            raise Passing(f"the body is no answer: {error}") from None
        if answer.usage is None and self._settings.max_cost is not None:
            raise InputError(
                f"judge: {self._settings.base_url} does not say how many tokens it read and wrote, so max_cost cannot"
                " be kept; use max_requests"
            )
        if answer.usage:
            self.budget.spent(answer.usage.prompt_tokens or 0, answer.usage.completion_tokens or 0)
        return answer

    def _of_status(self, error: openai.APIStatusError) -> Exception:
        status, said = error.status_code, self._clean(error.message)
        where = self._settings.base_url
        if status in (401, 403):
            return InputError(f"judge: {where} refuses the key in {self._settings.api_key_env} (status {status})")
        if status in (408, 409, 425, 429) or status >= 500:
            return Passing(f"status {status}", _retry_after(error.response.headers))
        if status in (400, 413, 422) and any(sign in said.lower() for sign in TOO_LONG):
            return TooLong(f"the question is too long for the judge: {said}")
        return InputError(f"judge: {where} refuses the request (status {status}): {said}")

    def _clean(self, said: object) -> str:
        """What a server or library said, without the key, which some put into their messages."""
        text = str(said).replace(self._key, "***") if len(self._key) > 3 else str(said)
        return " ".join(text.split())[:300]


class TooLong(InputError):
    """One question does not fit into the judge's context; the others may."""


def _key(settings: JudgeSettings) -> str:
    key = os.environ.get(settings.api_key_env, "").strip()  # a file that a secret comes from often ends in a newline
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"judge: the key in {settings.api_key_env} has characters that no HTTP header can have")
    host = urlsplit(settings.base_url or "").hostname or ""
    if not key and host not in ("localhost", "127.0.0.1", "::1"):
        raise InputError(f"judge: the environment variable {settings.api_key_env} with the key is not set")
    return key or "none"  # a server on this machine needs none, the client library insists on one


def _check(answer: Any) -> None:
    """The client library does not check what a server sends: any JSON may come out of it."""
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise Passing(f"the body is no chat completion: {str(answer)[:80]!r}")
    content = getattr(choices[0].message, "content", None)
    if content is not None and not isinstance(content, str):
        raise Passing(f"the body is no chat completion: its content is {type(content).__name__}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None


def _pause(state: tenacity.RetryCallState) -> float:
    """What the server asks for, else half a second doubling, with jitter so that threads do not come back as one."""
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
