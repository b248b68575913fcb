"""Suites: files with the columns of the hub's data, turns, and the suites' numbers by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pe_rlhf.evaluation.suites import SUITES, Item, find_suite
from reward.judges import Comparison
from reward.judges.templates import JudgePrompt
from reward.summary import Outcome as Judged
from reward.verdicts import FIRST, SECOND, Verdict
from tests.failures import raises
from tests.runs import Outcome, read_jsonl, write_jsonl

QUESTIONS = ("Name a fruit.", "Count to three.", "Say hello.")


def alpaca(folder: Path) -> Path:
    rows = [{"instruction": q, "output": "0123456789", "generator": "gpt4", "dataset": "x"} for q in QUESTIONS]
    folder.mkdir()
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(rows))
    return folder


def arena(folder: Path, version: str) -> Path:
    folder.mkdir()
    if version == "2.0":
        rows = [
            {"uid": f"u{i}", "category": "hard_prompt", "subcategory": "x", "prompt": q}
            for i, q in enumerate(QUESTIONS)
        ]
        rows.append({"uid": "w", "category": "creative_writing", "subcategory": "x", "prompt": "Write a poem."})
        answers = []
        for i, q in enumerate(QUESTIONS):
            said = {"role": "assistant", "content": {"answer": "0123456789"}}
            answers.append({"uid": f"u{i}", "model": "o3", "messages": [{"role": "user", "content": q}, said]})
    else:
        rows = [
            {"question_id": f"u{i}", "category": "arena-hard-v0.1", "cluster": "x", "turns": [{"content": q}]}
            for i, q in enumerate(QUESTIONS)
        ]
        answers = [
            {"question_id": f"u{i}", "choices": [{"index": 0, "turns": [{"content": "0123456789", "token_len": 3}]}]}
            for i in range(3)
        ]
    write_jsonl(folder / "question.jsonl", rows)
    (folder / "model_answer").mkdir()
    write_jsonl(folder / "model_answer" / "o3-mini-2025-01-31.jsonl", answers)
    return folder


def mt_bench(folder: Path) -> Path:
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"question_id": 80 + i, "category": "writing", "turns": [q, "Now in capitals."]}
        for i, q in enumerate(QUESTIONS)
    ]
    write_jsonl(folder / "question.jsonl", rows)
    answers = [{"question_id": 80 + i, "choices": [{"index": 0, "turns": ["0123456789", "0123"]}]} for i in range(3)]
    write_jsonl(folder / "gpt-3.5-turbo.jsonl", answers)
    write_jsonl(folder / "gpt-4.jsonl", [{"question_id": 81, "choices": [{"index": 0, "turns": ["1 2 3", "1 2 3"]}]}])
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "alpaca_eval": alpaca,
    "arena_hard": lambda folder: arena(folder, "2.0"),
    "arena_hard 0.1": lambda folder: arena(folder, "0.1"),
    "mt_bench": mt_bench,
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_columns_of_the_hub_are_read(tmp_path: Path, name: str) -> None:
    items = find_suite(name.split()[0]).load(MAKERS[name](tmp_path / "data"), with_answers=True)
    assert [item.turns[0] for item in items] == list(QUESTIONS)
    assert [item.answer and item.answer[0] for item in items] == ["0123456789"] * 3
    if name == "mt_bench":
        assert items[0].turns[1] == "Now in capitals."
        assert [item.reference for item in items] == [None, ("1 2 3", "1 2 3"), None]


def test_prompts_in_the_form_of_the_hubs_copy_of_mt_bench(tmp_path: Path) -> None:
    rows = [{"prompt_id": 81, "category": "math", "prompt": ["1 + 1?", "And 2 + 2?"], "reference": ["2", "4"]}]
    write_jsonl(tmp_path / "question.jsonl", rows)
    (item,) = SUITES["mt_bench"].load(tmp_path, with_answers=False)
    assert item == Item("81", ("1 + 1?", "And 2 + 2?"), None, ("2", "4"))


@pytest.mark.parametrize("name", MAKERS)
def test_a_suite_through_the_command_line(cli: Callable[..., Outcome], tmp_path: Path, name: str) -> None:
    """Answers of 12, 8 and 20 characters against 10: by hand 2 of 3 are longer."""
    data, suite = MAKERS[name](tmp_path / "data"), name.split()[0]
    texts = ["x" * 12, "x" * 8, "x" * 20]
    ids = {
        "alpaca_eval": [{"instruction": q} for q in QUESTIONS],
        "mt_bench": [{"question_id": 80 + i} for i in range(3)],
    }
    keys = ids.get(suite, [{"uid": f"u{i}"} for i in range(3)])
    said = [{"choices": [{"turns": [t, ""]}]} if suite == "mt_bench" else {"output": t} for t in texts]
    mine = write_jsonl(tmp_path / "mine.jsonl", [key | one for key, one in zip(keys, said, strict=True)])
    arguments = ("evaluate", mine, "--suite", suite, "--suite-data", data, "--judge", "length", "--out", "e")
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome
    line = json.loads(outcome.out)
    assert (line["suite"], line["baseline"]) == (suite, SUITES[suite].baseline)
    if suite == "mt_bench":  # at the second turn whole conversations are compared: 2 + 0 against 10 + 4 characters less
        assert line["n"] == 6
        assert line["suite_score_turn_1"] == pytest.approx(2 / 3)
        assert line["suite_score_turn_2"] == pytest.approx(1 / 3)
    else:
        assert (line["n"], line["win_rate"]) == (3, pytest.approx(2 / 3))
    assert json.loads(cli(*arguments).out) == line


def test_each_side_goes_on_from_its_own_first_answer(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    data = mt_bench(tmp_path / "data")
    arguments = (
        "--suite",
        "mt_bench",
        "--suite-data",
        data,
        "--judge",
        "length",
        "--out",
        "e",
        "sampling.max_new_tokens=4",
    )
    outcome = cli("evaluate", "random:tiny-llama", *arguments, "--limit", 2)
    assert outcome.code == 0, outcome
    first, second = (read_jsonl(tmp_path / "e" / f"candidate{turn}.jsonl")[1:] for turn in ("", "-turn-2"))
    assert [row["prompt"] for row in first] == list(QUESTIONS[:2])
    for question, one, two in zip(QUESTIONS, first, second, strict=False):
        assert [m["content"] for m in two["prompt"]] == [question, one["response"], "Now in capitals."]
        assert [m["role"] for m in two["prompt"]] == ["user", "assistant", "user"]
    verdicts = read_jsonl(tmp_path / "e" / "verdicts.jsonl")
    assert sorted((row["position"], row["sample"]) for row in verdicts) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all("0123456789" in row["response_baseline"] for row in verdicts)
    # The same command goes on, though the folder has files of second turns.
    assert json.loads(cli("evaluate", "random:tiny-llama", *arguments, "--limit", 2).out) == json.loads(outcome.out)


def game(preference: float, order: str, raw: str, sample: int = 0) -> Verdict:
    return Verdict(preference, position=0, order=order, raw=raw, sample=sample)


def test_arena_hards_number_counts_a_clear_verdict_three_times() -> None:
    """By hand: 3 of a clear win, 0 of a loss, ½ of a tie, 0 of a clear loss: 3.5 of 3 + 1 + 1 + 3."""
    outcomes = [
        Judged((game(1.0, FIRST, "[[A>>B]]"), game(0.0, SECOND, "So: [[A>B]]"))),
        Judged((game(0.5, FIRST, "[[A=B]]"), game(0.0, SECOND, "[[A>>B]]"))),
    ]
    assert SUITES["arena_hard"].score(outcomes, {})["suite_score"] == pytest.approx(3.5 / 8)


def test_mt_benchs_number_takes_a_verdict_that_turns_as_a_tie() -> None:
    first = Judged((game(1.0, FIRST, "[[A]]"), game(1.0, SECOND, "[[B]]")))
    second = Judged((game(1.0, FIRST, "[[A]]", 1), game(0.5, SECOND, "[[C]]", 1)))
    found = SUITES["mt_bench"].score([first, second], {})
    assert found == {"suite_score": 0.75, "suite_score_turn_1": 1.0, "suite_score_turn_2": 0.5}


def test_mt_benchs_rating_is_the_mean_over_both_turns() -> None:
    rated = [
        Judged((Verdict(1.0, 7.0, 5.0, position=0, sample=0),)),
        Judged((Verdict(0.0, 4.0, 6.0, position=0, sample=1),)),
    ]
    assert SUITES["mt_bench"].score(rated, {})["suite_rating"] == 5.5


def test_templates_ask_for_the_labels_and_show_everything_once() -> None:
    item = Item("1", ("First question", "Second question"), None, ("Right one", "Right two"))
    sides = [item.response(["mine", "more"]), item.response(["theirs", "less"])]
    text = JudgePrompt("mt_bench").chat(Comparison(item.question(1), *sides), reasoning=False)[-1]["content"]
    for part in (
        "### Assistant A:\nmine",
        "### Assistant B:\ntheirs",
        "Right one\n\nRight two",
        "[[A]]",
        "[[C]]",
        "[Question 2]",
    ):
        assert text.count(part) == 1
    single = JudgePrompt("mt_bench").chat(Comparison(item.turns[0], "mine", "theirs"), reasoning=False)[-1]["content"]
    assert "[Question]\nFirst question" in single
    assert "reference" not in single.lower()
    five = JudgePrompt("arena_hard")
    assert all(
        f"[[{label}]]" in five.chat(Comparison("p", "a", "b"), reasoning=False)[-1]["content"]
        for label in ("A>>B", "A=B", "B>>A")
    )
    assert five.allows_ties
    assert JudgePrompt("mt_bench").allows_ties
    assert not JudgePrompt("general").allows_ties


def test_settings_of_the_user_go_before_those_of_the_suite() -> None:
    settings: dict[str, Any] = {
        "judge": {"kind": "llm:m", "template": "mine.jinja2"},
        "sampling": {"max_new_tokens": 9},
    }
    SUITES["arena_hard"].set_defaults(settings)
    assert settings["judge"] == {"kind": "llm:m", "template": "mine.jinja2", "verdict": "text", "members": []}
    assert settings["sampling"] == {"max_new_tokens": 9}


def test_the_published_text_comes_from_folder_or_hub_and_its_lack_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def template_of(judge: str, folder: Path | None = None) -> tuple[str, bool]:
        settings: dict[str, Any] = {"judge": judge}
        SUITES["mt_bench"].set_defaults(settings, folder)
        return settings["judge"]["template"], "warning" in capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert template_of("llm:m") == template_of("rating:m", tmp_path / "empty") == ("mt_bench", True)
    assert template_of("length") == ("mt_bench", False)  # which nobody is asked by
    repository = tmp_path / "hub" / "spaces--lmsys--mt-bench"
    text = repository / "snapshots" / ("a" * 40) / "data" / "judge_prompts.jsonl"
    for folder in (text.parent, repository / "refs"):
        folder.mkdir(parents=True)
    text.write_text("{}")
    (repository / "refs" / "main").write_text("a" * 40)
    assert template_of("llm:m") == (str(text), False)


def test_what_a_suite_lacks_is_named(tmp_path: Path) -> None:
    with raises("unknown", key="--suite", fix="did you mean 'mt_bench'?"):
        find_suite("mtbench")
    with raises("missing", key="--suite-data", file=tmp_path):
        SUITES["mt_bench"].load(tmp_path, with_answers=True)
    data = mt_bench(tmp_path / "data")
    write_jsonl(data / "gpt-3.5-turbo.jsonl", [{"question_id": 80, "choices": [{"turns": ["a", "b"]}]}])
    with raises("missing", key="--suite-data", file=data / "question.jsonl", row=2):
        SUITES["mt_bench"].load(data, with_answers=True)
    write_jsonl(data / "question.jsonl", [{"question_id": 80, "text": "no turns"}])
    with raises("missing", key="turns", row=1):
        SUITES["mt_bench"].load(data, with_answers=False)
