"""A chat model behind an OpenAI-compatible server, with retries, a limit of requests and an API key that no file gets.

A temporary failure (5xx, a dropped connection, a time-out, a damaged body) is tried again after a growing pause, and a
server that is busy (429) is waited for longer. A parameter that the server refuses by name is left out from then on.
Any other failure (a wrong key, an unknown model) stops at once.
"""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import openai

from reward.errors import InputError, JudgeError
from reward.judges.bounded import TooLongError, ended
from reward.judges.judge_settings import ServerSettings, api_key
from reward.judges.llm import Completion
from reward.judges.server_errors import (
    FILTERED,
    LIMIT,
    NEW_LIMIT,
    SPENT,
    TOO_LONG,
    Passing,
    Refused,
    Unanswerable,
    parameter_named,
    retry_after,
    without_key,
)
from reward.records import Message

LONGEST_PAUSE = 60.0  # seconds, of our own pauses
BUSY_TRIES = 3  # times `attempts`, of a server that is busy: about 12 minutes
FEW_LOGPROBS = 5  # every server that gives any allows this many
REASONING_ROOM = 4096  # tokens, where a server counts thoughts that it does not show
T = TypeVar("T")
DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, openai.APIResponseValidationError)


@dataclass(frozen=True)
class Answer:
    """The first choice. top: the most likely first tokens with their log-probs; None if the server gives none."""

    text: str
    cut: bool
    top: list[tuple[str, float]] | None


class Endpoint:
    """Chat with `model` at `base_url`. One request per chat; `concurrency` says how many run at the same time.

    keep: parameters that are asked for by name, such as a policy's temperature. If the server refuses one of them, it
    stops; without them the answers would be others.
    """

    batch_size = 1

    def __init__(
        self,
        model: str,
        base_url: str,
        settings: ServerSettings,
        top_logprobs: int = 20,
        template_kwargs: Mapping[str, Any] | None = None,
        keep: frozenset[str] = frozenset(),
    ) -> None:
        self._key = api_key(base_url, settings.api_key_env)
        self._model, self._base_url, self._settings, self._keep = model, base_url, settings, keep
        # Not its address: a server that comes back on another port is the same judge.
        self.identity = f"endpoint:{model}" + (f" {json.dumps(template_kwargs)}" if template_kwargs else "")
        self.concurrency = settings.concurrency
        self._requests, self._lock = 0, threading.Lock()
        # What the server takes, as far as it has refused something.
        self._limit, self._without, self._top_logprobs = LIMIT, set[str](), top_logprobs
        self._template_kwargs = dict(template_kwargs or {})
        self._stopped = threading.Event()
        # The client's own retries would not be counted in max_requests.
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=base_url,
            timeout=settings.timeout,
            max_retries=0,
            http_client=ended(openai.DefaultHttpxClient()),
        )

    def label_logprobs(self, chats: Sequence[list[Message]], labels: Sequence[str]) -> list[Completion]:
        """The labels' log-probs among the most likely first tokens; None from a server that gives no log-probs."""
        return [self._labels_of(chat, labels) for chat in chats]

    def generate(
        self, chats: Sequence[list[Message]], max_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        """One answer to each chat.

        Raises `InputError` for a failure that another try will not mend, `JudgeError` after the last try.
        """
        return [self._completion(chat, {LIMIT: max_tokens, "temperature": temperature, "seed": seed}) for chat in chats]

    def check_server(self) -> None:
        """Raise `InputError` where the server refuses the key, `JudgeError` where nothing answers after all tries."""
        self._until_answered(self._list_models)

    def stop(self) -> None:
        """End the pauses between tries, because another thread has failed."""
        self._stopped.set()

    def _completion(self, chat: list[Message], options: dict[str, Any]) -> Completion:
        try:
            answer = self._ask(chat, options)
        except Unanswerable as error:
            return Completion("", error=str(error))
        return Completion(answer.text, cut=answer.cut)

    def _labels_of(self, chat: list[Message], labels: Sequence[str]) -> Completion:
        if "logprobs" in self._without:
            return Completion("")
        try:
            answer = self._ask(chat, {LIMIT: 1, "temperature": 0.0, "logprobs": True})
        except Unanswerable as error:
            return Completion("", error=str(error))
        except Refused as refusal:
            if refusal.about != LIMIT:
                raise
            answer = Answer("", True, None)  # one token is less than the server takes
        if answer.top is None:
            # It may take the parameter and give nothing. Asking for one token is then of no use.
            self._without.add("logprobs")
            return Completion(answer.text, cut=answer.cut)
        found: dict[str, float] = {}
        for token, logprob in answer.top:
            if (label := token.strip()) in labels:
                found[label] = _log_add(found.get(label, -math.inf), logprob)
        left = 1 - sum(math.exp(logprob) for _, logprob in answer.top)
        least = min(logprob for _, logprob in answer.top)
        return Completion(answer.text, found, min(least, math.log(left)) if left > 0 else least, answer.cut)

    def _ask(self, chat: list[Message], options: dict[str, Any]) -> Answer:
        """Ask, and again without what the server refuses by name, until there is an answer."""
        while True:
            sent = self._as_taken(options)
            try:
                return self._until_answered(partial(self._ask_once, chat, sent))
            except Refused as refusal:
                if sent == self._as_taken(options) and not self._adapt(refusal, sent):
                    raise
            if "logprobs" in options and "logprobs" in self._without:
                return Answer("", True, None)

    def _as_taken(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options as the server takes them, as far as it is known."""
        sent = {name: value for name, value in options.items() if name not in self._without}
        if LIMIT in sent and self._limit == NEW_LIMIT:
            limit = sent.pop(LIMIT)
            sent[NEW_LIMIT] = limit if limit == 1 or LIMIT in self._keep else max(limit, REASONING_ROOM)
        if "logprobs" in sent:
            sent["top_logprobs"] = self._top_logprobs
        if self._template_kwargs and "chat_template_kwargs" not in self._without:
            sent["extra_body"] = {"chat_template_kwargs": self._template_kwargs}
        return sent

    def _adapt(self, refusal: Refused, sent: dict[str, Any]) -> bool:
        """Remember what the server has refused; False if the request can't do without it."""
        name = refusal.about
        if name == LIMIT and LIMIT in sent and NEW_LIMIT in refusal.said:
            self._limit = NEW_LIMIT
        elif (
            name is None
            or name in self._keep
            or name == "chat_template_kwargs"
            or (name == LIMIT and 1 in sent.values())
        ):
            return False
        elif name == "logprobs" and sent["top_logprobs"] > FEW_LOGPROBS:
            self._top_logprobs = FEW_LOGPROBS  # it refuses this many, or any
        else:
            self._without.add(name)
        return True

    def _until_answered(self, ask: Callable[[], T]) -> T:
        """Ask until there is an answer. Raises `JudgeError` after the last try."""
        failures = busy = 0
        while True:
            try:
                return ask()
            except Passing as error:
                failures, busy = failures + (not error.busy), busy + error.busy
                tries, most = failures + busy, self._settings.attempts
                pause = _pause(error, busy if error.busy else failures)
                if failures >= most or busy >= BUSY_TRIES * most or self._stopped.wait(pause):
                    raise JudgeError(
                        f"{self._base_url} failed {tries} times, the last time: {self._clean(error)}",
                        kind="server",
                        key="judge.base_url",
                        fix="look at the server, or raise judge.attempts and judge.timeout",
                    ) from None

    def _ask_once(self, chat: list[Message], sent: dict[str, Any]) -> Answer:
        self._count()
        messages = [{**message, "content": _whole(message["content"])} for message in chat]
        try:
            return _answer(self._client.chat.completions.create(model=self._model, messages=messages, **sent))  # type: ignore[call-overload]
        except openai.APIStatusError as error:
            raise self._of_status(error, sent) from None
        except openai.APITimeoutError:
            raise Passing(f"no answer within {self._settings.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise Passing(f"the connection failed: {error.__cause__ or error}") from None
        except (TimeoutError, TooLongError) as error:
            raise Passing(f"an answer that is not taken: {error}") from None
        except DAMAGED as error:
            raise Passing(f"the body is not a chat completion: {error}") from None

    def _list_models(self) -> None:
        """Any answer will do, except that the key is unknown: not every server has such a list, or shows it."""
        try:
            self._client.models.list()
        except openai.APIStatusError as error:
            if error.status_code == 401:
                raise self._of_status(error, {}) from None
        except openai.APIConnectionError as error:
            raise Passing(f"the connection failed: {error.__cause__ or error}") from None
        except (TimeoutError, TooLongError, *DAMAGED):
            pass

    def _count(self) -> None:
        """Count a request, over all threads. Raises `JudgeError` before the one that would be too many."""
        most = self._settings.max_requests
        with self._lock:
            if most is not None and self._requests >= most:
                raise JudgeError(
                    f"{most} requests to {self._base_url} are spent",
                    kind="budget",
                    key="judge.max_requests",
                    fix="raise judge.max_requests",
                )
            self._requests += 1

    def _of_status(self, error: openai.APIStatusError, sent: dict[str, Any]) -> Exception:
        status, said = error.status_code, self._clean(error.message)
        if status in (401, 403):
            name = self._settings.api_key_env
            return InputError(
                f"{self._base_url} refuses the key in {name} (status {status})",
                kind="server",
                key="api_key_env",
                fix=f"set {name} to a key of this server",
            )
        if status in (402, 429) and SPENT.search(said):
            return JudgeError(
                f"{self._base_url} has no credit left for the key: {said}", kind="budget", key="api_key_env"
            )
        asked = retry_after(error.response.headers)
        if status in (429, 529) or (status == 503 and asked is not None):
            return Passing(f"status {status}, too many requests", asked, busy=True)
        if status in (408, 409, 425) or status >= 500:
            return Passing(f"status {status}", asked)
        names = {LIMIT if name == NEW_LIMIT else name for name in sent} & {LIMIT, "logprobs", "temperature", "seed"}
        names |= {"chat_template_kwargs"} if "extra_body" in sent else set()
        about = parameter_named(said, error.param, names)
        too_long = any(sign in said.lower() for sign in TOO_LONG)
        # Question and answer may be too long together: then the room for the answer can go.
        if too_long and (about != LIMIT or LIMIT in self._keep):
            return Unanswerable(f"the question is too long for the judge: {said}")
        if FILTERED.search(f"{error.code} {said}"):
            return Unanswerable(f"the server refuses the question: {said}")
        return Refused(f"{self._base_url} refuses the request (status {status}): {said}", about, said)

    def _clean(self, said: object) -> str:
        """A message of a server or library, without the key: some quote it."""
        return " ".join(without_key(said, self._key).split())[:300]


def _answer(body: Any) -> Answer:
    """The first choice. Raises one of `DAMAGED` for another body: the client library does not check what comes."""
    choices = getattr(body, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise ValueError(f"{str(body)[:80]!r}")
    choice = choices[0]
    content = getattr(choice.message, "content", None)
    if isinstance(content, list):  # in parts, of which thoughts are some
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(f"its content is {type(content).__name__}")
    first = getattr(getattr(choice, "logprobs", None), "content", None)
    tops = [
        (token.token, float(token.logprob))
        for token in (getattr(first[0], "top_logprobs", None) or () if isinstance(first, list) and first else ())
        if isinstance(token.token, str) and isinstance(token.logprob, int | float) and -math.inf < token.logprob < 0.01
    ]
    cut = getattr(choice, "finish_reason", None) in ("length", "max_tokens", "MAX_TOKENS")
    return Answer(content or "", cut, tops or None)


def _pause(error: Passing, tries: int) -> float:
    """The server's wish, otherwise half a second or, of a busy one, a second, doubling.

    Jitter keeps threads from coming back as one.
    """
    if error.pause is not None:
        return error.pause
    longest = min(LONGEST_PAUSE, (1.0 if error.busy else 0.5) * 2.0 ** (tries - 1))
    return random.uniform(longest / 2 if error.busy else min(0.2, longest), longest)


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high)) if low > -math.inf else high


def _whole(text: str) -> str:
    """The text with a ? for half of a character, which no request can carry."""
    return text.encode("utf-8", "replace").decode("utf-8")
