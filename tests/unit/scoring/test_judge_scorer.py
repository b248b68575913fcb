"""Judges as rewards: what they are asked, what is asked once only, and what stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pe_rlhf.config.reward_source import RewardSource
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.scoring.judge_scorer import JudgeScorer, check_against
from pe_rlhf.types import Sequences
from reward.errors import JudgeError
from tests.failures import raises

JUDGE = """
import json
from reward.judges.base import Verdict

ASKED = []

def ratio(prompts, a, b):
    # Prefers the longer one, and the first one a little.
    ASKED.extend(zip(prompts, a, b))
    return [min(1.0, (len(x) + 0.5) / (len(x) + len(y) + 0.5)) for x, y in zip(a, b)]

class Unsure:
    sees_order = False
    def compare(self, comparisons):
        return [Verdict(0.75) if c.response_a != "?" else Verdict.not_understood("no idea") for c in comparisons]
"""
PROMPTS: list[Any] = ["p", "q", "p", [{"role": "user", "content": "r"}]]
RESPONSES = ["aa", "bbb", "aa", "c"]
ROWS = Sequences.pack([[10], [11, 12], [10], [13]], [[1], [2], [1], [3]], 0)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """What the judge `ratio` was asked; its module has a name of its own in each test."""
    name = f"judge_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    return __import__(name)


def scorer(tmp_path: Path, judge: Any, anchor: Any = None, **settings: Any) -> JudgeScorer:
    source = RewardSource.model_validate({"judge": judge, **settings})
    return JudgeScorer(source, StageFiles(tmp_path), anchor)


def scored(judge: JudgeScorer, columns: Any = None) -> list[float]:
    return judge.score(PROMPTS, RESPONSES, ROWS, columns or {}).tolist()


def expected(response: str, other: str) -> float:
    """p(win) in both orders, and their mean."""
    a, b = len(response), len(other)
    return ((a + 0.5) / (a + b + 0.5) + 1 - (b + 0.5) / (a + b + 0.5)) / 2


def test_against_the_anchors_response_to_the_same_prompt_each_text_once(tmp_path: Path, asked: Any) -> None:
    sampled: list[Any] = []

    def anchor(prompts: list[list[int]]) -> list[str]:
        sampled.append(prompts)
        return ["x" * (ids[0] - 8) for ids in prompts]

    judge = scorer(tmp_path, f"{asked.__name__}:ratio", anchor)
    found = scored(judge)
    others = ["xx", "xxx", "xx", "xxxxx"]
    assert found == pytest.approx([expected(r, o) for r, o in zip(RESPONSES, others, strict=True)])
    assert sampled == [[[10], [11, 12], [13]]]
    assert len(asked.ASKED) == 2 * 3  # both orders, of three texts
    assert ("q", "bbb", "xxx") in asked.ASKED
    assert ("q", "xxx", "bbb") in asked.ASKED
    assert judge.metrics == {"asked": 3.0}

    assert scored(judge) == found
    assert judge.metrics == {"asked": 0.0}
    # A run that goes on has the files, of which a kill has left half a line.
    for name in ("judged_rewards", "anchor_responses"):
        path = getattr(StageFiles(tmp_path), name)
        with path.open("a") as file:
            file.write('{"key": "abc')
    assert scored(scorer(tmp_path, f"{asked.__name__}:ratio", anchor)) == found
    assert len(asked.ASKED) == 6
    assert len(sampled) == 1
    assert all(json.loads(line) for line in StageFiles(tmp_path).judged_rewards.read_text().splitlines())


def test_against_a_column(tmp_path: Path, asked: Any) -> None:
    judge = scorer(tmp_path, f"{asked.__name__}:ratio", against="gold")
    assert scored(judge, {"gold": ["x", "xx", "x", "xxx"]}) == pytest.approx(
        [expected("aa", "x"), expected("bbb", "xx"), expected("aa", "x"), expected("c", "xxx")]
    )
    for gold in (None, "", 5):
        with raises("missing", key="ppo.reward.against"):
            scored(judge, {"gold": ["x", gold, "x", "x"]})
    source = RewardSource.model_validate({"judge": "length", "against": "gold"})
    check_against(source, {"gold"})
    with raises("missing", key="ppo.reward.against"):
        check_against(source, {"golden"})


def test_its_own_score(tmp_path: Path, asked: Any) -> None:
    assert scored(scorer(tmp_path, "length", against="score")) == [2.0, 3.0, 2.0, 1.0]
    assert scored(scorer(tmp_path / "b", "reward.scores:length", against="score")) == [2.0, 3.0, 2.0, 1.0]
    with raises("conflict", key="ppo.reward.against"):
        scored(scorer(tmp_path / "c", f"{asked.__name__}:ratio", against="score"))


def test_a_verdict_that_is_none_stops_and_scores_nothing(tmp_path: Path, asked: Any, monkeypatch: Any) -> None:
    judge = scorer(tmp_path, f"{asked.__name__}:Unsure", against="gold")
    monkeypatch.setattr(f"{__name__}.RESPONSES", ["a", "?", "b", "c"])
    with raises("judge", JudgeError, key="max_invalid_share"):
        scored(judge, {"gold": ["x"] * 4})
    assert not StageFiles(tmp_path).judged_rewards.exists()
    monkeypatch.setattr(f"{__name__}.RESPONSES", ["a", "!", "b", "c"])
    assert scored(judge, {"gold": ["x"] * 4}) == [0.75] * 4


def test_a_budget_holds_over_starts_and_stops_before_the_question(tmp_path: Path, asked: Any) -> None:
    settings = {"kind": f"{asked.__name__}:ratio", "max_requests": 6}
    columns = {"gold": ["x", "xx", "x", "xxx"]}  # three texts in two orders
    scored(scorer(tmp_path, settings, against="gold"), columns)
    again = scorer(tmp_path, settings, against="gold")
    assert len(scored(again, columns)) == 4
    with raises("budget", JudgeError, key="ppo.reward.judge.max_requests"):
        scored(again, {"gold": ["x", "xx", "x", "y"]})
    assert len(asked.ASKED) == 6
    # Another judge has a budget of its own.
    assert len(scored(scorer(tmp_path, {"kind": "length", "max_requests": 3}, against="gold"), columns)) == 4


def test_answers_of_a_batch_that_was_stopped_are_not_asked_for_again(
    tmp_path: Path, asked: Any, monkeypatch: Any
) -> None:
    """The judge fails at its second batch, of one text each."""
    source = RewardSource.model_validate({"judge": f"{asked.__name__}:ratio", "against": "gold"})
    columns = {"gold": ["x", "xx", "x", "xxx"]}
    whole = scored(JudgeScorer(source, StageFiles(tmp_path / "whole"), None), columns)
    asked.ASKED.clear()
    judge: Any = JudgeScorer(source, StageFiles(tmp_path / "stopped"), None)

    class OneAtATime:
        identity, sees_order, batch_size, concurrency, calls = judge._judge.identity, True, 1, 1, 0
        version = judge._judge.version

        def compare(self, comparisons: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                raise JudgeError("the server is gone", kind="server")
            return inner.compare(comparisons)

    inner, judge._judge = judge._judge, OneAtATime()
    with raises("server", JudgeError):
        scored(judge, columns)
    assert len(asked.ASKED) == 2
    assert scored(judge, columns) == whole
    assert len(asked.ASKED) == 6
    assert not StageFiles(tmp_path / "stopped").open_questions.exists()


def test_scores_are_fp32(tmp_path: Path) -> None:
    assert scorer(tmp_path, "length", against="score").score(PROMPTS, RESPONSES, ROWS).dtype == torch.float32
