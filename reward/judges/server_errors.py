"""What a chat server says in place of an answer: a parameter is refused, it is busy, a question is too long."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Collection, Mapping
from contextlib import suppress

from reward.errors import InputError

LONGEST_ASKED = 600.0  # seconds that a server may ask us to wait
LIMIT, NEW_LIMIT = "max_tokens", "max_completion_tokens"
TOO_LONG = ("context_length", "context length", "maximum context", "context window", "too long", "max_model_len")
# How servers call the parameters that a request can do without.
SPELLINGS = {
    "logprobs": re.compile(r"log[\s_-]?prob", re.IGNORECASE),
    "temperature": re.compile(r"temperature", re.IGNORECASE),
    "seed": re.compile(r"\bseed\b", re.IGNORECASE),
    LIMIT: re.compile(
        r"max[\s_-]?(?:completion|output|new)?[\s_-]?tokens|output limit|(?:completion|output) tokens"
        r"|in the completion",
        re.IGNORECASE,
    ),
    "chat_template_kwargs": re.compile(r"chat_template_kwargs"),
}
SPENT = re.compile(r"insufficient_quota|exceeded your current quota|billing|credit balance", re.IGNORECASE)
FILTERED = re.compile(r"content_filter|content management policy|content_policy|responsible ?ai", re.IGNORECASE)


class Passing(Exception):
    """A failure that may be gone at the next try. busy: the server has too much to do; pause: seconds it asks for."""

    def __init__(self, why: str, pause: float | None = None, busy: bool = False) -> None:
        super().__init__(why)
        self.pause, self.busy = pause, busy


class Unanswerable(Exception):
    """One question gets no answer, because it is too long or filtered; the others may."""


class Refused(InputError):
    """The server does not take this request; without the parameter `about`, if it names one, it may."""

    def __init__(self, message: str, about: str | None, said: str) -> None:
        super().__init__(message, kind="server", key="judge.base_url")
        self.about, self.said = about, said


def without_key(said: object, key: str) -> str:
    """A message of a server or library without the key, which some quote; it may get into a file."""
    return str(said).replace(key, "***") if len(key) > 3 else str(said)


def parameter_named(said: str, param: object, sent: Collection[str]) -> str | None:
    """Which of the parameters that were sent a refusal is about: its field `param`, or the first one in its words."""
    for text in (param if isinstance(param, str) else "", said):
        places = {name: found.start() for name in sent if (found := SPELLINGS[name].search(text))}
        if places:
            return min(places, key=lambda name: places[name])
    return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds by `retry-after-ms` or `Retry-After`, a number or a date, at most `LONGEST_ASKED`; None without one."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        with suppress(ValueError, OverflowError):  # neither, or a date of another age
            date = email.utils.parsedate_tz(value)
            seconds = float(value) * unit if date is None else email.utils.mktime_tz(date) - time.time()
            if not math.isnan(seconds):
                return min(max(0.0, seconds), LONGEST_ASKED)
    return None
