"""Servers that are OpenAI-compatible in their own way: what they refuse, leave out, or answer instead."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from reward.errors import InputError, JudgeError
from reward.judges import Comparison, Verdict
from reward.judges.endpoint import Endpoint
from reward.judges.judge_settings import JudgeSettings, ServerSettings
from reward.judges.llm import LLMJudge
from reward.judges.server_errors import retry_after
from reward.judges.templates import JudgePrompt
from tests import loopback
from tests.failures import refuses
from tests.loopback import HEAD, QuietHandler

Body = dict[str, Any]
# Gets the body of a request and its number; gives status, answer (an object, or bytes) and headers.
Rule = Callable[[Body, int], tuple[int, Any, dict[str, str]]]
PAIR = Comparison("Name a fruit.", "Pear", "A stone")


class Server:
    def __init__(self, rule: Rule) -> None:
        self.rule, self.bodies, self.url = rule, list[Body](), ""


@contextmanager
def serving(rule: Rule) -> Iterator[Server]:
    server = Server(rule)

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.bodies.append(body)
            status, answer, headers = server.rule(body, len(server.bodies) - 1)
            parts = answer if isinstance(answer, Iterator) else None
            data = b"" if parts else answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            length = {} if parts else {"Content-Length": str(len(data))}
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | length | headers).items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # who asked has gone
                for part in parts or [data]:
                    self.wfile.write(part)

    with loopback.serving(Handler) as address:
        server.url = f"{address}/v1"
        yield server


def said(text: Any, finish: str = "stop", top: Any = None) -> Body:
    choice: Body = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    if top is not None:
        choice["logprobs"] = {"content": [{"token": "A", "logprob": -1.0, "top_logprobs": top}]}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def refusing(*refusals: tuple[str, str]) -> Rule:
    """Refuses each of these parameters, with that message, while it is sent; otherwise says A."""

    def rule(body: Body, number: int) -> tuple[int, Any, dict[str, str]]:
        for parameter, message in refusals:
            if parameter in body:
                return 400, {"error": {"message": message, "type": "invalid_request_error"}}, {}
        return 200, said("A"), {}

    return rule


def judge(server: Server, template: str = "general", **settings: Any) -> LLMJudge:
    own = {name: settings.pop(name) for name in ("verdict", "answer_tokens", "reasoning") if name in settings}
    return LLMJudge(Endpoint("m", server.url, ServerSettings(**settings)), JudgePrompt(template), **own)


def ask(rule: Rule, n: int = 1, **settings: Any) -> tuple[list[Verdict], Server]:
    with serving(rule) as server:
        asked = judge(server, **settings)
        return [verdict for _ in range(n) for verdict in asked.compare([PAIR])], server


O_SERIES = (
    (
        "max_tokens",
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    ),
    (
        "temperature",
        "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) value is.",
    ),
    ("logprobs", "You are not allowed to request logprobs from this model."),
)


@pytest.mark.parametrize(
    "refusals",
    [
        O_SERIES,
        (("seed", "Unrecognized request argument supplied: seed"),),
        (
            ("seed", 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'),
            ("logprobs", "Logprobs is not enabled for m"),
        ),
        (("top_logprobs", "top_logprobs: Extra inputs are not permitted"),),
        (("temperature", "temperature and top_p cannot both be specified for this model."),),
        (("logprobs", "This model does not support log probs."), ("max_tokens", "unknown field max_tokens")),
        (("logprobs", "'logprobs' : this feature is not supported"), ("seed", "property 'seed' is unsupported")),
    ],
)
def test_what_a_server_refuses_by_name_is_left_out_from_then_on(refusals: tuple[tuple[str, str], ...]) -> None:
    verdicts, server = ask(refusing(*refusals), n=3)
    assert [verdict.preference for verdict in verdicts] == [1.0] * 3
    names = {name for name, _ in refusals}
    # After the first verdict nothing is refused any more, and there is one request for each.
    assert not any(names & body.keys() for body in server.bodies[-2:])
    first = len(server.bodies) - 2
    assert first <= 2 + 2 * len(refusals)


def test_a_parameter_is_named_by_the_field_of_the_error_too() -> None:
    def rule(body: Body, number: int) -> tuple[int, Any, dict[str, str]]:
        if "seed" in body:
            return 422, {"error": {"message": "this temperature of logprobs is fine", "param": "seed"}}, {}
        return 200, said("B"), {}

    (verdict,), server = ask(rule, verdict="text")
    assert verdict.preference == 0.0
    assert "temperature" in server.bodies[-1]


def test_a_reasoning_model_has_thousands_of_tokens() -> None:
    (verdict,), server = ask(refusing(*O_SERIES))
    assert verdict.preference == 1.0
    assert server.bodies[-1]["max_completion_tokens"] >= 2000
    # Reasoning that is asked for has 256 tokens by default, which hidden thoughts would eat.
    _, server = ask(refusing(*O_SERIES), reasoning=True)
    assert min(body.get("max_completion_tokens", 1e9) for body in server.bodies if "messages" in body) in (1, 4096)


@pytest.mark.parametrize("text", ["", None, "<think>So, A has"])
def test_an_answer_that_was_cut_is_invalid_and_says_so(text: str | None) -> None:
    (verdict,), _ = ask(lambda body, number: (200, said(text, "length"), {}))
    assert "finish_reason" in (verdict.invalid or "")
    assert "answer_tokens" in (verdict.invalid or "")


def test_a_server_that_ignores_logprobs_is_asked_for_one_token_once() -> None:
    """As Anthropic's and Gemini's do: the parameter is taken, and nothing comes of it."""

    def rule(body: Body, number: int) -> tuple[int, Any, dict[str, str]]:
        short = body.get("max_tokens") == 1
        return 200, said("Response" if short else "Response B is better.", "length" if short else "stop"), {}

    verdicts, server = ask(rule, n=3)
    assert [verdict.preference for verdict in verdicts] == [0.0] * 3
    assert len(server.bodies) == 4


def top(*pairs: tuple[Any, Any]) -> list[Body]:
    return [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in pairs]


@pytest.mark.parametrize(
    ("reported", "preference"),
    [
        (top(("A", -11.5), ("<think>", -0.001), ("B", -9.0)), 0.0),  # next to no mass: its text says B
        (top(("A", -11.5), ("Response", -0.01)), 0.0),  # B is not reported, and its text says B
        (top(("A", -20.7), ("B", -25.3), ("**", -0.01)), 0.0),
        # Reported A 0.6, "The" 0.1; so B has at most 0.1.
        (top(("A", -0.510826), ("The", -2.302585)), 0.6 / 0.7),
        # One token only: what is left for B is 0.3.
        (top(("A", -0.356675)), 0.7),
        (top(("A", -0.916291), (" A", -1.609438), ("B", -1.609438)), 0.75),  # 0.4 + 0.2 against 0.2
        (top(("A", None), (None, -1.0), ("B", "x"), ("B", float("nan"))), 0.0),  # of other types
    ],
)
def test_the_mass_of_the_labels_decides_whether_they_are_a_verdict(reported: list[Body], preference: float) -> None:
    def rule(body: Body, number: int) -> tuple[int, Any, dict[str, str]]:
        if body.get("logprobs"):
            return 200, said("Response", "length", reported), {}
        return 200, said("Response B is better."), {}

    (verdict,), _ = ask(rule)
    assert verdict.preference == pytest.approx(preference, abs=1e-5)


def test_without_text_labels_with_no_mass_are_invalid() -> None:
    rule: Rule = lambda body, number: (200, said("A", "length", top(("A", -11.5), ("The", -0.01))), {})  # noqa: E731
    (verdict,), server = ask(rule, verdict="probabilities")
    assert (verdict.is_valid, len(server.bodies)) == (False, 1)
    assert verdict.label_mass == pytest.approx(1.013e-5, rel=1e-3)


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 2048 tokens. However, you requested 4596 tokens (500 in the"
        " messages, 4096 in the completion).",
        "'max_tokens' or 'max_completion_tokens' is too large: 4096. This model's maximum context length is 2048",
        "max_tokens: 4096 > 2000, which is the maximum allowed number of output tokens for m",
    ],
)
def test_a_server_with_less_room_than_the_answer_may_take_decides_itself(message: str) -> None:
    def rule(body: Body, number: int) -> tuple[int, Any, dict[str, str]]:
        limit = max(body.get("max_tokens", 0), body.get("max_completion_tokens", 0))
        return (400, {"error": {"message": message}}, {}) if limit > 2000 else (200, said("A"), {})

    verdicts, _ = ask(rule, n=2, verdict="text")
    assert [verdict.preference for verdict in verdicts] == [1.0, 1.0]


def test_a_policys_temperature_and_length_are_not_left_out() -> None:
    for refusal in O_SERIES[:2]:
        with serving(refusing(refusal, ("max_completion_tokens", "max_completion_tokens? no"))) as server:
            policy = Endpoint("m", server.url, ServerSettings(), keep=frozenset({"temperature", "max_tokens"}))
            with pytest.raises(InputError) as caught:
                policy.generate([[{"role": "user", "content": "p"}]], 64, 0.7, 0)
        assert caught.value.kind == "server"


def test_one_question_that_is_filtered_is_invalid() -> None:
    rule: Rule = lambda body, number: (400, {"error": {"message": "no", "code": "content_filter"}}, {})  # noqa: E731
    (verdict,), server = ask(rule)
    assert (verdict.is_valid, len(server.bodies)) == (False, 1)


GARBAGE: list[Any] = [
    b"", b"<html>busy</html>", b"[" * 20000, b"\xff\xfe", b"null", b"17", b'"text"', b"[]", b"{}", {"choices": {}},
    {"choices": [None]},
    {"choices": ["A"]}, {"choices": []}, said({"a": 1}), said(7), said([{"type": "text", "text": 5}]), said([1]),
    {"error": {"message": "down"}},
]  # fmt: skip


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_one_judge_error(garbage: Any) -> None:
    with pytest.raises(JudgeError) as caught:
        ask(lambda body, number: (200, garbage, {}), attempts=1)
    assert (caught.value.kind, caught.value.key) == ("server", "judge.base_url")


def without_end(part: bytes, pause: float) -> Iterator[bytes]:
    while True:
        yield part
        time.sleep(pause)


@pytest.mark.parametrize(("part", "pause"), [(b" ", 0.05), (b" " * 2**20, 0)], ids=["a byte at a time", "at once"])
def test_an_answer_without_end_is_one_judge_error(part: bytes, pause: float) -> None:
    start = time.monotonic()
    with pytest.raises(JudgeError) as caught:
        ask(lambda body, number: (200, without_end(part, pause), {}), attempts=1, timeout=1)
    assert (caught.value.kind, caught.value.key) == ("server", "judge.base_url")
    assert time.monotonic() - start < 10


def test_a_head_without_end_is_one_judge_error() -> None:
    class Dripping(QuietHandler):
        def do_POST(self) -> None:
            self.drip(HEAD, b"x")

    start = time.monotonic()
    with loopback.serving(Dripping) as url, pytest.raises(JudgeError) as caught:
        Endpoint("m", f"{url}/v1", ServerSettings(attempts=1, timeout=0.5)).generate([[]], 1, 0.0, 0)
    assert (caught.value.kind, caught.value.key) == ("server", "judge.base_url")
    assert time.monotonic() - start < 8


def test_a_judge_that_is_stopped_waits_for_no_further_try() -> None:
    """The server asks for so long a pause that nobody would wait for its end."""
    with serving(lambda body, number: (500, {}, {"Retry-After": "20"})) as server:
        asked = judge(server, attempts=2)
        threading.Timer(0.5, asked.stop).start()
        start = time.monotonic()
        with pytest.raises(JudgeError):
            asked.compare([PAIR])
        assert time.monotonic() - start < 10
        assert len(server.bodies) == 1


def test_content_in_parts_is_its_text() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "B"}]}, {"type": "text", "text": "A"}]
    (verdict,), _ = ask(lambda body, number: (200, said(parts), {}))
    assert verdict.preference == 1.0


def test_a_server_that_is_not_there_or_hangs_is_one_judge_error() -> None:
    def hang(body: Body, number: int) -> tuple[int, Any, dict[str, str]]:
        time.sleep(1)
        return 200, said("A"), {}

    with pytest.raises(JudgeError) as caught:
        ask(hang, attempts=1, timeout=0.2)
    assert caught.value.kind == "server"
    with serving(refusing()) as gone:
        pass
    with pytest.raises(JudgeError) as caught:
        judge(gone, attempts=1).compare([PAIR])
    assert caught.value.kind == "server"


def test_a_busy_server_is_waited_for_longer_than_a_broken_one_and_as_long_as_it_asks() -> None:
    def busy(body: Body, number: int) -> tuple[int, Any, dict[str, str]]:
        return (
            (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.2"}) if number < 4 else (200, said("A"), {})
        )

    start = time.monotonic()
    (verdict,), _ = ask(busy, attempts=2, verdict="text")
    assert verdict.preference == 1.0
    assert time.monotonic() - start >= 0.8
    with pytest.raises(JudgeError):
        ask(lambda body, number: (500, {}, {"Retry-After": "0.01"}), attempts=2)


def test_an_account_without_credit_is_not_waited_for() -> None:
    spent = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    with serving(lambda body, number: (429, spent, {})) as server, pytest.raises(JudgeError) as caught:
        judge(server).compare([PAIR])
    assert (caught.value.kind, len(server.bodies)) == ("budget", 1)


def test_a_pause_is_a_number_a_date_or_in_milliseconds() -> None:
    assert retry_after({"retry-after": "90"}) == 90
    assert retry_after({"retry-after-ms": "250"}) == 0.25
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert retry_after({"retry-after": date}) == pytest.approx(30, abs=2)
    for other in ("soon", "nan", "Mon, 01 Jan 99999 00:00:00 GMT"):
        assert retry_after({"retry-after": other}) is None
    for long in ("inf", "1e300", "Fri, 01 Jan 2400 00:00:00 GMT"):
        assert retry_after({"retry-after": long}) == 600
    assert retry_after({}) is None


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8999/v1", "localhost:8000", "judge.example/v1", "http://", "http://h:x/v1", "ftp://h/v1", "//h/v1"],
)
def test_an_address_without_scheme_or_server_is_named_as_such(url: str) -> None:
    with refuses("base_url", "invalid"):
        JudgeSettings(kind="llm:m", base_url=url)
    with pytest.raises(InputError) as caught:
        Endpoint("m", url, ServerSettings())
    assert (caught.value.kind, caught.value.key) == ("invalid", "base_url")


def test_ties_count_where_the_template_offers_them(tmp_path: Any) -> None:
    path = tmp_path / "five.jinja2"
    path.write_text(
        '{% extends "base.jinja2" %}'
        "{% block criteria %}End with [[A>>B]], [[A>B]], [[A=B]], [[B>A]] or [[B>>A]].{% endblock %}"
    )
    for text, preference in (("[[A>>B]]", 1.0), ("[[A=B]]", 0.5), ("My final verdict is: [[B>A]]", 0.0)):
        with serving(lambda body, number, text=text: (200, said(text), {})) as server:
            (verdict,) = judge(server, str(path), verdict="text").compare([PAIR])
            (plain,) = judge(server, verdict="text").compare([PAIR])
        assert verdict.preference == preference
        assert plain.is_valid == (preference != 0.5)
