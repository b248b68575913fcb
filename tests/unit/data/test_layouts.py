"""Rows as people have them that are of no named format, and of lists of responses: read as meant, or said to be odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config import DataSource
from pe_rlhf.data.rows import load_examples, load_preferences
from reward.errors import InputError
from tests.failures import raises
from tests.runs import Tree, write_jsonl


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def source(tmp_path: Path, rows: list[Tree], **settings: Any) -> DataSource:
    return DataSource(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)), **settings)


def pairs(data: DataSource) -> list[tuple[Any, str, str]]:
    _, records, left_out = load_preferences(data, "reward.data", 0.0, lambda record: record)
    assert not left_out
    return [(record.prompt, record.chosen, record.rejected) for record in records]


BEST_OF_4 = {"id": "0", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}
MANY_RIGHT = {"prompt": [user("r")], "chosen": ["a", "b"], "rejected": ["c", " a", "d"], "subset": "Ties"}


def test_lists_of_responses_are_a_pair_of_each_with_each(tmp_path: Path) -> None:
    """With the subset of their row; what cannot be used is counted as the pair or, without one, the row that it is."""
    dialogues = {"chosen": [[user("s"), said("a")]], "rejected": [[user("s"), said(t)] for t in "bc"], "prompt": None}
    rows: list[Tree] = [
        BEST_OF_4,
        MANY_RIGHT,
        {"prompt": "q", "chosen": ["a"]},
        {**BEST_OF_4, "chosen": "e"},
        dialogues,
    ]
    data = source(tmp_path, rows, format="rewardbench2")
    _, records, left_out = load_preferences(data, "reward.data", 0.2, lambda record: record)
    assert [(record.chosen, record.rejected, record.subset) for record in records] == [
        *(("a", rejected, "Math") for rejected in "bcd"),
        *(("a", rejected, "Ties") for rejected in "cd"),
        *(("b", rejected, "Ties") for rejected in ("c", " a", "d")),
        *(("e", rejected, "Math") for rejected in "bcd"),
        *(("a", rejected, "all") for rejected in "bc"),
    ]
    assert [record.prompt for record in records[-1:]] == [[user("s")]]
    assert [(bad.row, bad.kind) for bad in left_out] == [(5, "conflict"), (10, "empty")]  # " a" is "a"; no rejected


@pytest.mark.parametrize("row", [BEST_OF_4, MANY_RIGHT, {**BEST_OF_4, "chosen": "a"}])
def test_lists_of_responses_are_no_messages(tmp_path: Path, row: Tree) -> None:
    with pytest.raises(InputError) as raised:
        load_preferences(source(tmp_path, [row] * 4), "reward.data", 0.05, lambda record: record)
    assert (raised.value.kind, raised.value.key) == ("invalid", "reward.data.format")
    assert "rewardbench2" in str(raised.value.fix)


SYSTEM = {"role": "system", "content": "s"}
PROMPTS = {
    "a prompt of text beside messages": ("q", [said("a")], [said("b")], "q"),
    "a prompt of text beside one message": ("q", said("a"), said("b"), "q"),
    "messages after a copy of the prompt": ([user("q")], [user("q"), said("a")], [user("q"), said("b")], [user("q")]),
    "with a system turn": (
        [SYSTEM, user("q")],
        [SYSTEM, user("q"), said("a")],
        [SYSTEM, user("q"), said("b")],
        [SYSTEM, user("q")],
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_beside_messages(tmp_path: Path, name: str) -> None:
    prompt, chosen, rejected, expected = PROMPTS[name]
    data = source(tmp_path, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    assert pairs(data) == [(expected, "a", "b")]


def test_another_prompt_in_the_dialogues_is_no_copy(tmp_path: Path) -> None:
    row = {"prompt": [user("q")], "chosen": [user("r"), said("a")], "rejected": [user("r"), said("b")]}
    with raises("invalid", key="reward.data", row=1):
        pairs(source(tmp_path, [row]))


def test_responses_that_begin_with_their_prompt_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are read as they are, since a response may quote; as format: implicit the prompt is where they part."""
    row = {"prompt": "1 + 1 is", "chosen": "1 + 1 is 2", "rejected": "1 + 1 is 23"}
    assert pairs(source(tmp_path, [row])) == [tuple(row.values())]
    assert "warning: reward.data" in capsys.readouterr().err
    assert pairs(source(tmp_path, [row], format="implicit")) == [("1 + 1 is", " 2", " 23")]
    assert pairs(source(tmp_path, [row | {"rejected": "no"}])) == [("1 + 1 is", "1 + 1 is 2", "no")]
    assert "warning" not in capsys.readouterr().err
    load_examples(source(tmp_path, [{"prompt": "q", "completion": "q a"}]), "sft.data", 0, lambda example: example)
    assert "warning: sft.data" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"format": "sharegpt"}])
@pytest.mark.parametrize(
    "roles",
    [
        ("system", "Human", "GPT"),
        ("System", "USER", "Assistant"),
        ("system", "prompter", "bot"),
        ("SYSTEM", "user ", "ChatBot"),
    ],
)
def test_roles_in_other_spellings(tmp_path: Path, roles: tuple[str, str, str], settings: Tree) -> None:
    turns = [{"from": role, "value": text} for role, text in zip(roles, "sqa", strict=True)]
    rows: list[Tree] = [{"conversations" if settings else "messages": turns}]
    (example,), _ = load_examples(source(tmp_path, rows, **settings), "sft.data", 0, lambda example: example)
    assert (example.prompt, example.response) == ([SYSTEM, user("q")], "a")


@pytest.mark.parametrize("turn", [{"from": "narrator", "value": "x"}, {"speaker": "human", "text": "x"}])
def test_a_turn_of_nobody_known(tmp_path: Path, turn: Tree) -> None:
    rows = [{"conversations": [turn, {"from": "gpt", "value": "a"}]}]
    with raises("invalid", key="sft.data", row=1):
        load_examples(source(tmp_path, rows, format="sharegpt"), "sft.data", 0, lambda example: example)


def test_a_message_that_is_not_to_be_learnt_is_dropped(tmp_path: Path) -> None:
    """OpenAI's fine-tuning marks it by its weight; an earlier one is part of the prompt."""
    rows: list[Tree] = [
        {"messages": [user("q"), {**said("a"), "weight": weight}, user("r"), {**said("b"), "weight": 1 - weight}]}
        for weight in (0, 1)
    ]
    found, left_out = load_examples(source(tmp_path, rows), "sft.data", 0, lambda example: example)
    assert [example.response for example in found] == ["b"]
    assert [bad.row for bad in left_out] == [2]


def test_a_table_with_semicolons(tmp_path: Path) -> None:
    """As Excel writes it in half of Europe, with the mark of UTF-8; commas are text then."""
    path = tmp_path / "rows.csv"
    path.write_bytes('prompt;chosen;rejected\r\nq;a, b;"c;d"\r\n'.encode("utf-8-sig"))
    assert pairs(DataSource(path=str(path))) == [("q", "a, b", "c;d")]
    path.write_text("prompt,chosen,rejected\nq;r,a,b\n")
    assert pairs(DataSource(path=str(path))) == [("q;r", "a", "b")]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "whole",
    [
        {name: [text, text] for name, text in PAIR.items()},
        {name: {"0": text, "1": text} for name, text in PAIR.items()},
        {"data": [PAIR, PAIR]},
        {"version": "1.0", "data": [PAIR]},
        {"train": [PAIR], "test": [PAIR]},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_that_is_one_object_of_all_rows(tmp_path: Path, whole: Tree, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(whole, indent=indent))
    with pytest.raises(InputError) as raised:
        pairs(DataSource(path=str(path)))
    assert (raised.value.kind, raised.value.key, raised.value.file) == ("unreadable", "reward.data", str(path))
    assert raised.value.fix


def test_a_json_file_with_one_row_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for indent in (None, 1):
        path.write_text(
            json.dumps({"prompt": [user("q")], "chosen": [said("a")], "rejected": [said("b")]}, indent=indent)
        )
        assert pairs(DataSource(path=str(path))) == [([user("q")], "a", "b")]
