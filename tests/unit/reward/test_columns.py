"""Score functions that see the row: which columns they get, what is refused before the run, and verifiable rewards."""

from __future__ import annotations

from pathlib import Path

import pytest

from reward.judges.functions import load_score_function, score_responses
from reward.scores import answer_format, math_answer
from tests.failures import raises

SOURCE = """
seen = {}

def plain(prompts, responses):
    return [0.0] * len(responses)

def named(prompts, responses, answer):
    return [float(r == a) for r, a in zip(responses, answer)]

def only_by_name(prompts, responses, *, answer, weight=2.0):
    return [weight * (r == a) for r, a in zip(responses, answer)]

def everything(prompts, responses, **columns):
    seen.update(columns)
    return [0.0] * len(responses)

def of_trl(completions, answer, **kwargs):
    seen.update(kwargs)
    return [float(c == a) for c, a in zip(completions, answer)]
"""
COLUMNS = {"answer": ["a", "b"], "id": [1, 2], "prompts": ["no", "no"], "not a name": [0, 0]}


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "row_scores.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("plain", [0, 0]), ("named", [1, 0]), ("only_by_name", [2, 0]), ("everything", [0, 0]), ("of_trl", [1, 0])],
)
def test_a_function_gets_the_columns_that_it_names(name: str, expected: list[float]) -> None:
    function = load_score_function(f"row_scores:{name}", COLUMNS)
    assert score_responses(function, ["p", "q"], ["a", "a"], COLUMNS) == expected
    seen = function.__globals__["seen"]  # type: ignore[attr-defined]
    if name == "everything":
        assert seen == {"answer": ["a", "b"], "id": [1, 2]}
    if name == "of_trl":
        assert seen["prompts"] == ["p", "q"]
        assert seen["id"] == [1, 2]


@pytest.mark.parametrize("name", ["named", "only_by_name", "of_trl"])
def test_a_column_that_the_data_lacks_is_missed_before_the_run(name: str) -> None:
    with raises("user_code"):
        load_score_function(f"row_scores:{name}", {"id": [1]})


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (r"So \boxed{12}.", 12, 1),
        (r"\boxed{3} or rather \boxed{1/2}", "0.5", 1),
        ("It costs 7. #### 1,000", "1000.0", 1),
        ("First 3, then 4 makes 7.", "#### 7", 1),
        ("the answer is 8", "7", 0),
        (r"\boxed{x^2}", "x^2", 1),
        ("", "7", 0),
        ("", "", 0),
    ],
)
def test_a_maths_answer(response: str, answer: object, score: float) -> None:
    assert math_answer(["q"], [response], [answer]) == [score]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>a\nb</think>\n7", 1),
        ("a thought that the template began</think> 7", 1),
        ("<think>a</think>", 0),
        ("7", 0),
        ("<think>a</think><think>b</think>7", 0),
        ("<think>a 7", 0),
    ],
)
def test_the_format_of_an_answer(response: str, score: float) -> None:
    assert answer_format(["q"], [response]) == [score]
