"""Score functions against the values their authors publish."""

import sys

import pytest

from reward import scores
from reward.errors import InputError
from reward.judges import FunctionJudge, load_function


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


def test_vader_makes_its_analyzer_once() -> None:
    scores._vader_analyzer.cache_clear()
    scores.vader(["p"], ["good"])
    scores.vader(["p"], ["bad"])
    assert scores._vader_analyzer.cache_info().misses == 1


def test_vader_says_how_to_install_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    scores._vader_analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)  # how Python marks a module as absent
    with pytest.raises(InputError, match=r"pip install 'pe-rlhf\[demo\]'"):
        scores.vader(["p"], ["good"])


def test_length_counts_characters() -> None:
    values = scores.length(["p", "p", "p"], ["", "abc", "naïve β"])
    assert values == [0.0, 3.0, 7.0]
    assert all(type(value) is float for value in values)


def test_a_recipe_can_name_them() -> None:
    judge = FunctionJudge(load_function("reward.scores:length"))
    assert isinstance(judge.function, type(scores.length))
    assert judge.function(["p"], ["four"]) == [4.0]
