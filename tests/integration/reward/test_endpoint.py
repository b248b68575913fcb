"""The llm judge against a real local server that misbehaves: nothing is asked twice, nothing is lost, no key leaks."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from reward.asking import Pair, VerdictFile, judge_pairs
from reward.errors import InputError, JudgeError
from reward.judges import Comparison
from reward.judges.endpoint import Endpoint
from reward.judges.judge_settings import JudgeSettings, ServerSettings
from reward.judges.length import length_judge
from reward.judges.llm import LLMJudge, probability_of_a
from reward.judges.templates import JudgePrompt, template_names
from reward.summary import pair_up, summarise
from reward.verdicts import read_verdicts
from tests.chat_server import KEY, ChatServer, running
from tests.failures import refuses
from tests.runs import read_jsonl

PAIRS = [Pair(f"Prompt {i}", "good " * (i % 3), "good", position=i) for i in range(24)]
FAULTS = ("429", "500", "drop", "truncated", "wrong format")


def judge(server: ChatServer, **settings: Any) -> LLMJudge:
    verdict = settings.pop("verdict", "auto")
    endpoint = Endpoint("m", server.url, ServerSettings(**settings))
    return LLMJudge(endpoint, JudgePrompt("general"), verdict=verdict, attempts=2)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def expected_win_rate() -> float:
    """By hand: "good" 0, 1 or 2 times against once: loses 0.1, ties 0.5, wins 0.9, a third of the prompts each."""
    return (0.1 + 0.5 + 0.9) / 3


def assert_each_answered_once(server: ChatServer, path: Path, questions: int = 48) -> None:
    assert len(server.answered) == questions
    assert set(server.answered.values()) == {1}
    rows = read_jsonl(path)
    assert len(rows) == len({row["key"] for row in rows}) == questions


def test_verdicts_are_the_probabilities_of_the_labels(tmp_path: Path) -> None:
    with running(ChatServer()) as server:
        outcomes = judge_pairs(judge(server), PAIRS, tmp_path / "v.jsonl")
    assert [o.preference for o in outcomes] == pytest.approx([0.1, 0.5, 0.9] * 8)
    assert_each_answered_once(server, tmp_path / "v.jsonl")
    assert all(body["max_tokens"] == 1 and body["temperature"] == 0 for body in server.bodies)
    line = summarise("candidate", outcomes)
    assert line["win_rate"] == pytest.approx(expected_win_rate())
    assert (line["flips"], line["position_bias"]) == (0, pytest.approx(0))


def test_a_position_bias_of_the_server_is_seen(tmp_path: Path) -> None:
    with running(ChatServer(bias=0.3)) as server:
        line = summarise("candidate", judge_pairs(judge(server), PAIRS, tmp_path / "v.jsonl"))
    # By hand: shown first 0.4, 0.8, 0.99 and second 1 − 0.99, 1 − 0.8, 1 − 0.4: only the ties in quality flip.
    assert line["flip_share"] == pytest.approx(1 / 3)
    assert line["position_bias"] == pytest.approx((0.4 + 0.99 + 0.8 + 0.8 + 0.99 + 0.4) / 6 - 0.5)
    assert line["win_rate"] == pytest.approx(((0.4 + 0.01) / 2 + (0.8 + 0.2) / 2 + (0.99 + 0.6) / 2) / 3)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_burst_of_faults_is_ridden_out(tmp_path: Path, fault: str) -> None:
    """Every second request of the first 30 fails."""
    with running(ChatServer(faults=lambda number: fault if number < 30 and number % 2 else None)) as server:
        outcomes = judge_pairs(judge(server, concurrency=16), PAIRS, tmp_path / "v.jsonl")
    assert summarise("candidate", outcomes)["win_rate"] == pytest.approx(expected_win_rate())
    assert_each_answered_once(server, tmp_path / "v.jsonl")
    assert server.requests == 48 + 15


def test_a_slow_answer_is_asked_for_again(tmp_path: Path) -> None:
    with running(ChatServer(faults=lambda number: "hang" if number in (0, 5) else None)) as server:
        outcomes = judge_pairs(judge(server, concurrency=16, timeout=0.7), PAIRS, tmp_path / "v.jsonl")
    assert summarise("candidate", outcomes)["n"] == 24
    assert len(read_jsonl(tmp_path / "v.jsonl")) == 48


@pytest.mark.parametrize("fault", [*FAULTS, "hang"])
def test_a_server_that_stays_broken_stops_the_run_and_keeps_what_there_is(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "v.jsonl"
    server = ChatServer(faults=lambda number: fault if number >= 20 else None)
    with running(server):
        with pytest.raises(JudgeError) as caught:
            judge_pairs(judge(server, attempts=2, concurrency=4, timeout=0.7 if fault == "hang" else 60.0), PAIRS, path)
        assert caught.value.kind == "server"
        assert KEY not in str(caught.value)
        kept = len(read_jsonl(path))
        assert 16 <= kept <= 20
        # The server is well again: the same call goes on and asks what is left.
        server.faults = lambda number: None
        before = server.requests
        outcomes = judge_pairs(judge(server), PAIRS, path)
    assert server.requests - before == 48 - kept
    assert summarise("candidate", outcomes)["win_rate"] == pytest.approx(expected_win_rate())
    if fault != "hang":  # what is answered too late has been answered
        assert_each_answered_once(server, path)


def test_a_wrong_key_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "sk-wrong-key-of-somebody"
    monkeypatch.setenv("OPENAI_API_KEY", wrong)
    with running(ChatServer()) as server, pytest.raises(InputError) as caught:
        judge_pairs(judge(server, concurrency=2), PAIRS, tmp_path / "v.jsonl")
    assert (caught.value.kind, caught.value.key) == ("server", "api_key_env")
    assert wrong not in str(caught.value)
    assert server.requests <= 2  # one for each thread, none again


def test_the_key_is_in_no_file_and_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = ChatServer(faults=lambda number: "500" if number % 3 else None)
    with running(server), pytest.raises(JudgeError) as caught:
        judge_pairs(judge(server, attempts=2, concurrency=1), PAIRS, tmp_path / "v.jsonl")
    assert KEY not in str(caught.value)
    assert KEY not in caplog.text
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_key_from_a_file_may_end_in_a_newline_and_a_wrong_one_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with running(ChatServer()) as server:
        assert len(judge_pairs(judge(server), PAIRS, tmp_path / "v.jsonl")) == len(PAIRS)
    for wrong in ("sk-ü-in-it", "sk-two\nlines"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(InputError) as caught:
            Endpoint("m", "http://127.0.0.1:1/v1", ServerSettings())
        assert (caught.value.kind, caught.value.key) == ("invalid", "api_key_env")
        assert "sk-" not in str(caught.value)


def test_one_file_is_written_by_one_process_and_each_verdict_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    with running(ChatServer()) as server:
        whole = judge_pairs(judge(server), PAIRS, path)
        held = VerdictFile(path)
        with pytest.raises(InputError) as caught:
            judge_pairs(judge(server), PAIRS, path)
        assert (caught.value.kind, caught.value.file) == ("in_use", str(path))
        held.close()
        path.write_bytes(path.read_bytes() * 2)  # what two processes left before there was a lock
        assert judge_pairs(judge(server), PAIRS, path) == whole
        assert server.requests == 2 * len(PAIRS)


def test_half_a_character_in_a_response_is_written_and_read(tmp_path: Path) -> None:
    pair = Pair("p", "cut \ud83d", "all", 0)
    for _ in range(2):
        (outcome,) = judge_pairs(length_judge(), [pair], tmp_path / "v.jsonl")
        assert outcome.preference == 1.0


def test_a_missing_key_is_an_error_but_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError) as caught:
        Endpoint("m", "https://judge.example/v1", ServerSettings())
    assert (caught.value.kind, caught.value.key) == ("missing", "api_key_env")
    Endpoint("m", "http://127.0.0.1:1/v1", ServerSettings())


def test_a_server_without_log_probs_is_asked_for_text(tmp_path: Path) -> None:
    with running(ChatServer(logprobs=0)) as server:
        outcomes = judge_pairs(judge(server, concurrency=1), PAIRS[:3], tmp_path / "v.jsonl")
    # It says B where both are alike, so that pair flips.
    assert [(o.preference, o.flipped) for o in outcomes] == [(0.0, False), (0.5, True), (1.0, False)]
    assert server.requests == 8  # two refusals, which are heeded from then on


def test_a_server_that_gives_few_log_probs_is_asked_for_few(tmp_path: Path) -> None:
    with running(ChatServer(logprobs=5)) as server:
        outcomes = judge_pairs(judge(server, concurrency=1), PAIRS[:3], tmp_path / "v.jsonl")
    # Probabilities, not text: where both are alike it does not flip.
    assert [o.preference for o in outcomes] == pytest.approx([0.1, 0.5, 0.9])
    assert not any(o.flipped for o in outcomes)
    assert [body["top_logprobs"] for body in server.bodies] == [20, 5, 5, 5, 5, 5, 5]


def test_an_answer_in_the_wrong_format_is_asked_for_again_and_then_invalid(tmp_path: Path) -> None:
    with running(ChatServer(text="Both are fine.")) as server, pytest.raises(JudgeError) as caught:
        judge_pairs(judge(server, verdict="text", concurrency=1), PAIRS, tmp_path / "v.jsonl")
    assert (caught.value.kind, caught.value.key) == ("judge", "max_invalid_share")
    assert str(caught.value).startswith("2 of 24 pairs have no valid verdict, more than the 5.0% allowed")
    rows = read_jsonl(tmp_path / "v.jsonl")
    assert {row["preference"] for row in rows} == {None}
    assert rows[0]["invalid"] == "the answer names neither A nor B"
    assert rows[0]["raw"] == "Both are fine."
    assert [body["temperature"] for body in server.bodies[:2]] == [0.0, 0.7]


def test_what_was_refused_for_invalid_answers_is_asked_again_by_the_next_start(tmp_path: Path) -> None:
    """The server has been given more room, or another template; and the file is one that `winrate` reads."""
    path = tmp_path / "v.jsonl"
    with running(ChatServer(text="Both are fine.")) as server, pytest.raises(JudgeError):
        judge_pairs(judge(server, verdict="text", concurrency=1), PAIRS, path)
    refused = len(read_jsonl(path))
    with running(ChatServer(logprobs=0)) as server:
        outcomes = judge_pairs(judge(server, verdict="text", concurrency=1), PAIRS, path)
        assert server.requests == 48
    assert summarise("candidate", outcomes)["n"] == 24
    assert len(read_jsonl(path)) == 48 + refused
    assert [o.preference for o in pair_up(read_verdicts(path))] == [o.preference for o in outcomes]


def test_both_orders_meet_under_whatever_name_the_responses_had(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    with running(ChatServer()) as server:
        with pytest.raises(JudgeError):
            judge_pairs(judge(server, max_requests=3, concurrency=1), PAIRS, path, candidate="out.jsonl")
        outcomes = judge_pairs(judge(server), PAIRS, path, candidate="./out.jsonl")
    assert summarise("./out.jsonl", outcomes)["n"] == 24


def test_a_question_that_is_too_long_is_invalid_and_the_others_go_on(tmp_path: Path) -> None:
    with running(ChatServer(faults=lambda number: "too long" if number == 3 else None)) as server:
        outcomes = judge_pairs(judge(server, concurrency=1), PAIRS, tmp_path / "v.jsonl")
    line = summarise("candidate", outcomes)
    assert (line["n"], line["invalid"]) == (23, 1)


def test_the_budget_of_requests_stops_and_the_rest_follows(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    with running(ChatServer()) as server:
        with pytest.raises(JudgeError) as caught:
            judge_pairs(judge(server, max_requests=10), PAIRS, path)
        assert caught.value.kind == "budget"
        assert server.requests == len(read_jsonl(path)) == 10
        judge_pairs(judge(server), PAIRS, path)
    assert_each_answered_once(server, path)


@pytest.mark.parametrize("key", ["max_cost", "price_in", "price_out"])
def test_costs_are_refused_with_a_word_on_requests_but_not_in_old_recipes(key: str) -> None:
    assert JudgeSettings.model_validate({"kind": "llm:m", key: None}) == JudgeSettings(kind="llm:m")
    with refuses(key, "unknown"):
        JudgeSettings.model_validate({"kind": "llm:m", key: 1.0})


def test_reasoning_comes_first_and_is_kept(tmp_path: Path) -> None:
    with running(ChatServer(text="The first is longer.")) as server:
        endpoint = Endpoint("m", server.url, ServerSettings())
        reasoning = LLMJudge(endpoint, JudgePrompt("helpfulness"), reasoning=True)
        judge_pairs(reasoning, PAIRS[:1], tmp_path / "v.jsonl")
    rows = read_jsonl(tmp_path / "v.jsonl")
    assert [row["reason"] for row in rows] == ["The first is longer."] * 2
    roles = [[message["role"] for message in body["messages"]] for body in server.bodies]
    assert sorted(roles, key=len) == [["user"]] * 2 + [["user", "assistant", "user"]] * 2


def test_requests_run_side_by_side(tmp_path: Path) -> None:
    """Eight requests that take 1.5 s each are done well before the 12 s that they take one by one."""
    start = time.monotonic()
    with running(ChatServer(faults=lambda number: "hang")) as server:
        judge_pairs(judge(server, concurrency=8), PAIRS[:4], tmp_path / "v.jsonl")
    assert time.monotonic() - start < 9


def test_probability_of_a() -> None:
    assert probability_of_a({"A": -1.0, "B": -1.0}) == 0.5
    assert probability_of_a({"A": -0.1, "B": -2.3978952727983707}) == pytest.approx(
        1 / (1 + 2.718281828 ** (-2.297895))
    )
    assert probability_of_a({"A": -0.1}) == 1.0
    # B is not among the likely tokens, so that it has at most the probability of the least likely one.
    assert probability_of_a({"A": -0.1}, -2.3978952727983707) == pytest.approx(1 / (1 + 2.718281828 ** (-2.297895)))
    assert probability_of_a({"B": -0.1}, -0.1) == 0.5
    assert probability_of_a({"B": -0.1}) == pytest.approx(0.0)
    assert probability_of_a({}) is None


@pytest.mark.parametrize("name", template_names())
def test_templates_show_everything_once_and_dialogues_as_such(name: str) -> None:
    dialogue = [
        {"role": "user", "content": "First <question>"},
        {"role": "assistant", "content": "An answer"},
        {"role": "user", "content": "Second question"},
    ]
    comparison = Pair(dialogue, "mine & more", "theirs", 0)
    text = JudgePrompt(name).chat(Comparison(dialogue, comparison.candidate, comparison.baseline), reasoning=False)[-1][
        "content"
    ]
    for part in ("First <question>", "Second question", "]\nmine & more\n[", "]\ntheirs\n["):
        assert text.count(part) == 1
    assert text.index("mine & more") < text.index("theirs")
    if name in ("arena_hard", "mt_bench"):  # the suites' own form, and labels
        assert "[[A" in text
        return
    assert "[Response A]\nmine & more\n" in text
    assert "[Response B]\ntheirs\n" in text
    if name != "summarization":
        assert "User: First <question>\nAssistant: An answer\nUser: Second question" in text
    assert text.endswith("A or B, and nothing else.")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja2"
    path.write_text('{% extends "base.jinja2" %}{% block criteria %}Rhymes win.{% endblock %}')
    assert "Rhymes win." in JudgePrompt(str(path)).chat(Comparison("p", "a", "b"), reasoning=False)[-1]["content"]
    for text, kind, row in (("{% block %}", "unreadable", 1), ("{{ unknown }}", "user_code", None)):
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            JudgePrompt(str(path))
        assert (caught.value.kind, caught.value.key, caught.value.row) == (kind, "judge.template", row)
    with pytest.raises(InputError) as caught:
        JudgePrompt("helpfullness")
    assert (caught.value.kind, caught.value.fix) == ("unknown", "did you mean 'helpfulness'?")


def test_a_half_written_line_is_dropped_and_a_damaged_one_named(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    with running(ChatServer()) as server:
        judge_pairs(judge(server), PAIRS[:3], path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        judge_pairs(judge(server), PAIRS[:3], path)
        assert {json.loads(line)["key"] for line in path.read_bytes().splitlines()} == {
            json.loads(line)["key"] for line in whole.splitlines()
        }
        assert server.requests == 7
        path.write_bytes(b"{broken\n" + whole)
        with pytest.raises(InputError) as caught:
            judge_pairs(judge(server), PAIRS[:3], path)
        assert (caught.value.kind, caught.value.file, caught.value.row) == ("unreadable", str(path), 1)


@pytest.mark.parametrize(("status", "kind"), [(200, None), (403, None), (404, None), (401, "server")])
def test_whether_a_server_answers_is_known_before_it_is_asked(status: int, kind: str | None) -> None:
    """By its list of models; not every server has one, or shows it to every key."""
    with running(ChatServer(list_status=status)) as server:
        endpoint = Endpoint("m", server.url, ServerSettings(attempts=1))
        if kind is None:
            endpoint.check_server()
        else:
            with pytest.raises(InputError) as caught:
                endpoint.check_server()
            assert (caught.value.kind, caught.value.key) == (kind, "api_key_env")
            assert KEY not in str(caught.value)
    assert server.requests == 0
    with pytest.raises(JudgeError) as gone:  # without the connection that is still open
        Endpoint("m", server.url, ServerSettings(attempts=1)).check_server()
    assert (gone.value.kind, gone.value.key) == ("server", "judge.base_url")
