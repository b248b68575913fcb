"""Judges: verdicts, what a score function may return, and functions named by a recipe."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reward.errors import InputError
from reward.judges import (
    CompareJudge,
    Comparison,
    FunctionJudge,
    Judge,
    Verdict,
    load_function,
    load_judge,
    score_responses,
)
from reward.records import Prompt
from tests.failures import raises


def count_of_a(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    return [response.count("a") for response in responses]


def agreement(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    return [1.0 if response == prompt else 0.0 for prompt, response in zip(prompts, responses, strict=True)]


def test_swap_turns_question_and_answer_together() -> None:
    comparison = Comparison([{"role": "user", "content": "p"}], "x", "y")
    assert comparison.swap() == Comparison([{"role": "user", "content": "p"}], "y", "x")
    assert Verdict(0.75, 1.0, 2.0).swap() == Verdict(0.25, 2.0, 1.0)
    assert Verdict(0.5, None, None).swap() == Verdict(0.5, None, None)
    assert comparison.swap().swap() == comparison


def test_the_higher_score_wins_and_equal_scores_tie() -> None:
    judge: Judge = FunctionJudge(count_of_a)
    verdicts = judge.compare([Comparison("p", "aa", "a"), Comparison("p", "b", "a"), Comparison("p", "ab", "ba")])
    assert verdicts == [Verdict(1.0, 2.0, 1.0), Verdict(0.0, 0.0, 1.0), Verdict(0.5, 1.0, 1.0)]


def test_every_response_is_scored_with_its_own_prompt() -> None:
    comparisons = [Comparison("one", "one", "two"), Comparison("two", "one", "two")]
    verdicts = FunctionJudge(agreement).compare(comparisons)
    assert [verdict.preference for verdict in verdicts] == [1.0, 0.0]
    swapped = FunctionJudge(agreement).compare([comparison.swap() for comparison in comparisons])
    assert [verdict.swap() for verdict in swapped] == verdicts


@pytest.mark.parametrize(
    "scores", [[1, 2.5], (1.0, 2.5), np.array([1.0, 2.5]), torch.tensor([1.0, 2.5]), [np.float32(1), np.float64(2.5)]]
)
def test_lists_arrays_and_tensors_are_scores(scores: Any) -> None:
    returned = score_responses(lambda prompts, responses: scores, ["p", "p"], ["a", "b"])
    assert returned == [1.0, 2.5]
    assert all(type(score) is float for score in returned)


def returns(value: Any) -> Any:
    def broken_score(prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        return value

    return broken_score


@pytest.mark.parametrize(
    ("value", "row"),
    [
        ([0.0, math.nan], 2),
        ([math.inf, 0.0], 1),
        ([0.0], None),
        ([0.0, "good"], 2),
        ([0.0, None], 2),
        (np.zeros((2, 1)), 1),
        (None, None),
        (0.5, None),
        ("ab", None),
        (torch.tensor(0.5), None),
    ],
)
def test_a_broken_score_function_is_named(value: Any, row: int | None) -> None:
    with pytest.raises(InputError) as caught:
        FunctionJudge(returns(value)).compare([Comparison("p", "a", "b")])
    numbers = isinstance(value, list) and all(isinstance(score, float) for score in value) and len(value) == 2
    assert (caught.value.kind, caught.value.row) == ("not_finite" if numbers else "user_code", row)
    assert "test_judges:returns.<locals>.broken_score'" in str(caught.value)


def test_a_score_function_may_be_an_object() -> None:
    class Constant:
        def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
            return [math.nan for _ in responses]

    with raises("not_finite", row=1):
        score_responses(Constant(), ["p"], ["a"])


# --- load_function ---------------------------------------------------------------------------------------------------


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as a user has it: on no path, and nothing imported from it yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_loads_what_is_installed() -> None:
    assert load_function("math:sqrt") is math.sqrt
    assert load_function("os.path:join")("a", "b") == str(Path("a") / "b")


def test_loads_a_module_of_the_working_directory_without_hiding_packages(user_folder: Path) -> None:
    (user_folder / "house_rewards.py").write_text(
        "def score(prompts, responses):\n    return [1.0 for _ in responses]\n"
    )
    (user_folder / "statistics.py").write_text("raise RuntimeError('hides the standard library')\n")
    sys.modules.pop("statistics")
    assert load_function("house_rewards:score")(["p"], ["r"]) == [1.0]
    assert load_function("statistics:fmean")([1.0, 2.0]) == 1.5


@pytest.mark.parametrize("path", ["", "math", "math:", ":sqrt", "math.sqrt", "math:a:b", "my file.py:score", "./m:f"])
def test_refuses_another_form(path: str) -> None:
    with raises("invalid"):
        load_function(path)


def test_refuses_what_is_not_callable() -> None:
    with raises("user_code"):
        load_function("math:pi")


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("reward.scorse:vader", "'reward.scores'"),
        ("rewrad.scores:vader", "'reward'"),
        ("reward.scores:vadr", "'vader'"),
        ("qqqzzzxxx:f", None),
    ],
)
def test_a_missing_name_has_the_nearest_one(path: str, nearest: str | None) -> None:
    with pytest.raises(InputError) as caught:
        load_function(path)
    assert caught.value.kind == "unknown"
    assert caught.value.fix == (nearest and f"did you mean {nearest}?")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("import absent_package.part", "not_installed"),
        ("from math import no_such_function", "user_code"),
        ("1 / 0", "user_code"),
    ],
)
def test_a_module_that_cannot_be_imported(user_folder: Path, source: str, kind: str) -> None:
    (user_folder / f"broken_{kind}.py").write_text(source)
    with pytest.raises(InputError) as caught:
        load_function(f"broken_{kind}:f")
    assert caught.value.kind == kind


def test_a_users_verdict_that_is_invalid_is_no_tie_and_its_numbers_are_checked() -> None:
    def answers(*found: Any) -> list[Verdict]:
        judge = CompareJudge(lambda prompts, a, b: list(found))
        return judge.compare([Comparison("p", "a", "b")] * len(found))

    (invalid, plain) = answers(Verdict(0.5, invalid="no idea"), Verdict(np.float32(0.75), score_a=np.int64(3)))  # type: ignore[arg-type]
    assert math.isnan(invalid.preference)
    assert (plain.preference, plain.score_a) == (0.75, 3.0)
    assert type(plain.preference) is type(plain.score_a) is float
    with pytest.raises(InputError) as caught:
        answers(Verdict(0.5, score_a=math.nan))
    assert (caught.value.kind, caught.value.row) == ("user_code", 1)


def test_what_a_users_object_raises_is_one_sentence(user_folder: Path) -> None:
    (user_folder / "mine_that_fails.py").write_text(
        "class Fails:\n    def compare(self, comparisons):\n        raise KeyError('x')\n"
        "class Never(Fails):\n    def __init__(self):\n        raise OSError('no licence')\n"
    )
    with raises("user_code", file=user_folder / "mine_that_fails.py"):
        load_judge("mine_that_fails:Fails").compare([Comparison("p", "a", "b")])
    with raises("user_code", file=user_folder / "mine_that_fails.py"):
        load_judge("mine_that_fails:Never")
