"""Score functions against the values their authors publish."""

import sys
from typing import Any

import pytest

from reward import scores
from reward.errors import InputError
from reward.judges import FunctionJudge, load_function
from tests.failures import raises


def test_vader_gives_the_compound_scores_of_its_readme() -> None:
    responses = [
        "VADER is smart, handsome, and funny.",
        "VADER is not smart, handsome, nor funny.",
        "At least it isn't a horrible book.",
        "The book was only kind of good.",
        "",
    ]
    prompts = ["This terrible prompt is not scored."] * len(responses)
    assert scores.vader(prompts, responses) == [0.8316, -0.7424, 0.431, 0.3832, 0.0]


def test_varied_cheer_takes_off_words_that_were_said_before() -> None:
    # "like" has VADER's valence 1.5: 1.5 / √(1.5² + 15) = 0.3612; said four times 6 / √(6² + 15) = 0.8402.
    found = scores.varied_cheer([""] * 3, ["like", "like like like like", ""])
    assert found == pytest.approx([0.3612, 0.8402 - 3 / 4, 0.0], abs=1e-4)


def test_vader_makes_its_analyzer_once() -> None:
    scores._vader_analyzer.cache_clear()
    scores.vader(["p"], ["good"])
    scores.vader(["p"], ["bad"])
    assert scores._vader_analyzer.cache_info().misses == 1


def test_vader_says_how_to_install_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    scores._vader_analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)  # how Python marks a module as absent
    with raises("not_installed", key="reward.scores:vader", fix="pip install 'pe-rlhf[demo]'"):
        scores.vader(["p"], ["good"])


def test_length_counts_characters() -> None:
    values = scores.length(["p", "p", "p"], ["", "abc", "naïve β"])
    assert values == [0.0, 3.0, 7.0]
    assert all(type(value) is float for value in values)


def test_a_recipe_can_name_them() -> None:
    judge = FunctionJudge(load_function("reward.scores:length"))
    assert isinstance(judge.function, type(scores.length))
    assert judge.function(["p"], ["four"]) == [4.0]


@pytest.mark.parametrize(
    ("words", "expected"), [(0, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (10, -1.0), (11, -1.0), (100, -1.0)]
)
def test_the_length_penalty_falls_over_its_buffer(words: int, expected: float) -> None:
    """limit 10, buffer 4: 0 up to 6, then −1/4 for each word."""
    text = " ".join(["ab"] * words)
    assert scores.length_penalty(["p"], [text], limit=10, buffer=4) == [expected]
    assert scores.length_penalty(["p"], ["é" * words], limit=10, buffer=4, unit="characters") == [expected]
    assert scores.length_penalty(["p"], [text], limit=10, buffer=0) == [-float(words > 10)]


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("", 3, 0.0),
        ("a b", 3, 0.0),
        ("a b c d", 3, 0.0),
        ("a b a b a b", 2, -3 / 5),  # ab ba ab ba ab: two of five are new
        ("no no no no", 1, -3 / 4),
        ("no no no no", 3, -1 / 2),
    ],
)
def test_the_repetition_penalty_is_the_share_that_was_said_before(text: str, n: int, expected: float) -> None:
    assert scores.repetition_penalty(["p"], [text], n=n) == pytest.approx([expected])


def test_brevity_and_questions() -> None:
    texts = ["", "one two", "a b c d e", "a b c d e f g h i j", "really? no", "really?\n"]
    assert scores.brevity([""] * 6, texts) == pytest.approx([-1, 0, 0, -1, 0, 0])
    assert scores.brevity([""] * 6, texts, words=2) == pytest.approx([-1, 0, -1.5, -4, 0, 0])
    assert scores.asks([""] * 6, texts) == [0, 0, 0, 0, 0, 1]
    with pytest.raises(InputError):
        scores.brevity([""], ["a"], words=0)


def test_formats() -> None:
    responses = [" yes\n", "yes.", "no", "yes\nno"]
    assert scores.matches(["p"] * 4, responses, r"yes|no") == [1, 0, 1, 0]
    assert scores.matches(["p"] * 4, responses, r"yes.*") == [1, 1, 0, 1]
    texts = ['{"a": [1]}', " 3 ", "```json\n{}\n```", "```\n[]\n```", "{", "", "NaN", "{} {}", "[" * 100_000]
    assert scores.valid_json(["p"] * 9, texts) == [1, 1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (scores.length_penalty, {"limit": 3, "buffer": 4}),
        (scores.length_penalty, {"unit": "lines"}),
        (scores.repetition_penalty, {"n": 0}),
        (scores.matches, {"pattern": "("}),
    ],
)
def test_arguments_that_are_none(function: Any, arguments: dict[str, Any]) -> None:
    with raises("invalid", key="ppo.reward.arguments"):
        function(["p"], ["a response"], **arguments)
