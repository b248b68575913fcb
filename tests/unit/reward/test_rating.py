"""Ratings from 1 to 10: how answers are read, by hand, and what is none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from reward.judges import Comparison
from reward.judges.llm import Completion
from reward.judges.rating import RatingJudge, expected_rating, parse_rating, rating_alone
from reward.judges.templates import RatingPrompt, template_names
from reward.records import Message


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("7", 7),
        (" **8** ", 8),
        ("10", 10),
        ("7.5", 7.5),
        ("8/10", 8),
        ("8 / 10.", 8),
        ("８", 8),
        ("Rating: 6", 6),
        ("Bewertung: 6", 6),
        ("Оценка: **6**", 6),
        ("点数：6", 6),
        ("**Rating:** 6/10", 6),
        ("Rating (1-10): 9", 9),
        ("Overall score = 4", 4),
        ("Rating 5", 5),
        ("My rating is a 7.", 7),
        ("The answer is right.\n\nRating: [[9]]", 9),
        ("Score 3 for style, 5 for content. Rating: [[4]]", 4),
        (r"So \boxed{6}", 6),
        ('{"reason": "2 errors", "rating": 8}', 8),
        ('```json\n{"overall_score": "7/10"}\n```', 7),
        ("On a scale from 1 to 10, I'd rate this response an 8.", 8),
        ("I would give it 9 out of 10", 9),
        ("I’d give this an 8 because it has 3 examples.", 8),
        ("8\nIt is clear and has 2 examples.", 8),
        ("It has 2 examples and is clear.\n8", 8),
        ("8/10 - it names all 3 causes", 8),
        ("Helpfulness: 7\nAccuracy: 9\nOverall: 8", 8),
        ("<reason>2 errors</reason>\n<rating>7</rating>", 7),
        ("Rating - 8", 8),
        ("评分：8分", 8),
        ("总体得分为 7.5", 7.5),
    ],
)
def test_a_rating(text: str, rating: float) -> None:
    assert parse_rating(text) == rating


@pytest.mark.parametrize(
    "text",
    [
        "",
        "good",
        "0",
        "11",
        "-3",
        "100",
        "8/100",
        "Accuracy: 7\nStyle: 4",
        "Version 2: 7",
        "4/5",
        "80%",
        "7-8",
        "7 or 8",
        "Rating: 7-8",
        "Rating: 7 to 8",
        "I would rate it between 7 and 8",
        "Rating: 7\nRating: 8",
        "Clarity: 7/10\nDepth: 5/10",
        "Rating: [[7]] or rather [[8]]",
        "Rating: [[rating]]",
        "7½",
        "There are 3 mistakes.",
        "It gives 3 examples for grade 5 students.",
        "A rating of 1 to 10 is wanted.",
        "1e3",
        "7,000",
        "Rating: 7,5",
        "Overall: 24",
        "评分：15分",
        "它用了8分钟",
        '{"rating": 7, "style_score": 3}',
        '{"rating": null}',
        '{"rating": 1e999}',
        '{"rating": true}',
        "nan",
        "Rating: " + "9" * 500,
    ],
)
def test_none_or_several(text: str) -> None:
    assert parse_rating(text) is None


def test_a_line_by_itself() -> None:
    assert rating_alone("**7**") == 7
    assert rating_alone("7/10") == 7
    assert rating_alone("7 errors") is None
    assert rating_alone("") is None


def test_the_expectation_by_hand() -> None:
    logs = {"7": math.log(0.3), "8": math.log(0.5), "10": math.log(0.1)}
    assert expected_rating(logs) == pytest.approx((7 * 0.3 + 8 * 0.5 + 10 * 0.1) / 0.9)
    assert expected_rating({"1": math.log(0.2), "10": math.log(0.6)}) == pytest.approx((0.2 + 6) / 0.8)
    # No token 10: a 1 may begin it. A small one moves the expectation by less than 0.09.
    assert expected_rating({"1": math.log(0.2), "9": math.log(0.6)}) is None
    assert expected_rating({"1": math.log(0.004), "9": math.log(0.6)}) == pytest.approx(5.404 / 0.604)
    assert expected_rating({}) is None


class Scripted:
    """A chat model with given answers, in turn; it keeps what it was asked."""

    identity, batch_size, concurrency = "scripted", 8, 1

    def __init__(self, logprobs: dict[str, float] | None, texts: Sequence[str], cut: bool = False) -> None:
        self._logprobs, self._texts, self._cut = logprobs, list(texts), cut
        self.asked: list[str] = []

    def label_logprobs(self, chats: Sequence[list[Message]], labels: Sequence[str]) -> list[Completion]:
        self.asked += [chat[-1]["content"] for chat in chats]
        return [Completion("1", self._logprobs) for _ in chats]

    def generate(
        self, chats: Sequence[list[Message]], max_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        self.asked += [chat[-1]["content"] for chat in chats]
        return [Completion(self._texts.pop(0), cut=self._cut) for _ in chats]


def judge(model: Scripted, **how: object) -> RatingJudge:
    return RatingJudge(model, RatingPrompt("general"), **how)  # type: ignore[arg-type]


def test_one_question_for_equal_responses_and_two_for_others() -> None:
    model = Scripted({"8": math.log(0.9)}, [])
    (single,) = judge(model).compare([Comparison("p", "same", "same")])
    assert (single.score_a, single.score_b, single.preference) == (pytest.approx(8), pytest.approx(8), 0.5)
    assert len(model.asked) == 1
    assert "same" in model.asked[0]
    assert single.label_mass == pytest.approx(0.9)
    spoken = Scripted(None, ["4", "9", "9"])
    verdicts = judge(spoken).compare([Comparison("p", "bad", "good"), Comparison("p", "good", "fine")])
    assert [(v.score_a, v.score_b, v.preference) for v in verdicts] == [(4, 9, 0.0), (9, 9, 0.5)]
    assert judge(spoken).sees_order is False


def test_little_mass_and_a_one_that_may_be_a_ten_are_read_as_text() -> None:
    for logprobs in (None, {"8": math.log(0.2)}, {"1": math.log(0.9), "9": math.log(0.1)}):
        (found,) = judge(Scripted(logprobs, ["10"])).compare([Comparison("p", "a", "a")])
        assert found.score_a == 10
        (none,) = judge(Scripted(logprobs, []), verdict="probabilities").compare([Comparison("p", "a", "a")])
        assert none.score_a is None
        assert none.invalid is not None
        assert math.isnan(none.preference)


def test_an_answer_that_cannot_be_read_is_asked_again_and_then_invalid() -> None:
    (found,) = judge(Scripted(None, ["who knows", "7 or 8", "7"])).compare([Comparison("p", "a", "a")])
    assert found.score_a == 7
    (none,) = judge(Scripted(None, ["who knows"] * 3)).compare([Comparison("p", "a", "a")])
    assert none.invalid is not None
    assert none.score_a is None
    # Of one that was cut, only a number by itself on the first of several lines counts.
    (cut,) = judge(Scripted(None, ["Rating: 7 because"] * 3, cut=True)).compare([Comparison("p", "a", "a")])
    assert cut.invalid is not None
    (first,) = judge(Scripted(None, ["7\nIt is clear and"], cut=True)).compare([Comparison("p", "a", "a")])
    assert first.score_a == 7
    (half,) = judge(Scripted(None, ["1"] * 3, cut=True)).compare([Comparison("p", "a", "a")])
    assert half.invalid is not None


def test_reasoning_comes_first() -> None:
    model = Scripted({"6": 0.0}, ["It is fine."])
    (found,) = judge(model, reasoning=True).compare([Comparison([{"role": "user", "content": "q"}], "a", "a")])
    assert (found.score_a, found.reason) == (6, "It is fine.")
    assert "Do not state your rating yet" in model.asked[0]
    assert "from 1 to 10" in model.asked[1]


def test_there_is_a_rating_template_for_each_criterion() -> None:
    names = template_names(RatingPrompt.folder)
    assert names == ["general", "harmlessness", "helpfulness", "summarization"]
    for name in names:
        text = RatingPrompt(name).chat(Comparison("the question", "the answer", "x"), reasoning=False)[-1]["content"]
        assert "the question" in text
        assert "the answer" in text
        assert "1 (very bad) to 10" in text
