"""Rows to fine-tune on: every format, what counts where a row has several, and what is wrong with the others."""

from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config import DataSource
from pe_rlhf.data.examples import Example, parse_example
from pe_rlhf.data.rows import hold_out, load_examples
from reward.errors import Kind
from tests.failures import raises
from tests.runs import write_jsonl

pytestmark = pytest.mark.usefixtures("data_cache")

ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
SAID = {"role": "assistant", "content": "a"}
TOOLS = ("tool", "function", "observation")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Example("p", "c")),
        ({"prompt": "p", "response": " c"}, Example("p", " c")),
        ({"prompt": ASKED, "completion": "c"}, Example(ASKED, "c")),
        ({"prompt": ASKED, "completion": [SAID]}, Example(ASKED, "a")),
        ({"prompt": "p", "response": [SAID | {"tool_calls": None}]}, Example("p", "a")),
        ({"messages": [*ASKED, SAID]}, Example(ASKED, "a")),
        ({"messages": [*ASKED, SAID, ASKED[1], SAID]}, Example([*ASKED, SAID, ASKED[1]], "a")),
        ({"text": "a whole\ntext "}, Example(None, "a whole\ntext ")),
        # As in UltraChat: a prompt of its own beside the messages, and no completion.
        ({"prompt": "u", "prompt_id": "1", "messages": [*ASKED, SAID]}, Example(ASKED, "a")),
        # A loader fills in what other rows of the file have.
        ({"prompt": None, "completion": None, "messages": None, "text": "t"}, Example(None, "t")),
        ({"prompt": "p", "completion": None, "response": "r", "text": "p r"}, Example("p", "r")),
        # KTO's label, and labels that say nothing of the completion.
        ({"prompt": "p", "completion": "c", "label": True}, Example("p", "c")),
        ({"prompt": "p", "completion": "c", "label": 0}, Example("p", "c")),
        ({"text": "t", "label": False}, Example(None, "t")),
    ],
)
def test_formats(row: dict[str, Any], expected: Example) -> None:
    assert parse_example(row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c", "label": False},
        {"prompt": ASKED, "completion": [SAID], "label": "False"},  # of a table of text
    ],
)
def test_a_completion_to_avoid_is_dropped_and_does_not_count_as_unusable(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "kto.jsonl", [row, row | {"label": type(row["label"])(True)}])
    examples, left_out = load_examples(DataSource(path=str(path)), "sft.data", 0, lambda example: example)
    assert (len(examples), [(bad.row, bad.kind) for bad in left_out]) == (1, [(1, "conflict")])


@pytest.mark.parametrize(
    ("row", "kind", "key"),
    [
        ({"prompt": "p"}, "missing", None),
        ({"completion": "c"}, "missing", None),
        ({"messages": "text"}, "missing", None),
        ({"text": 3}, "missing", None),
        ({"prompt": " ", "completion": "c"}, "empty", "prompt"),
        ({"prompt": "p", "completion": " \n"}, "empty", "completion"),
        ({"text": "\n"}, "empty", "text"),
        ({"prompt": "p", "completion": [SAID, SAID]}, "invalid", "completion"),
        ({"prompt": "p", "completion": 3}, "invalid", "completion"),
        ({"prompt": "p", "response": ASKED[:1]}, "invalid", "response"),
        ({"messages": ASKED}, "invalid", "messages"),
        ({"messages": [SAID]}, "missing", "messages"),
        ({"messages": []}, "empty", "messages"),
        ({"messages": [{"role": "user"}, SAID]}, "invalid", "messages"),
        *(({"messages": [*ASKED, {"role": r, "content": "{}"}, SAID]}, "invalid", "messages") for r in TOOLS),
        ({"prompt": [*ASKED, {"role": "tool", "content": "{}"}], "completion": "c"}, "invalid", "prompt"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], kind: Kind, key: str | None) -> None:
    with raises(kind, key=key):
        parse_example(row)


def test_a_file_with_some_bad_rows(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}" if i != 3 else ""} for i in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = DataSource(path=str(path), columns={"prompt": "question", "completion": "answer"})
    examples, bad = load_examples(source, "sft.data", 0.2, lambda row: row)
    assert examples == [Example(f"q{i}", f"a{i}") for i in range(8) if i != 3]
    assert [(record.row, record.reason) for record in bad] == [(4, "the response is empty")]
    with raises("invalid", key="sft.data", file=path, row=4):
        load_examples(source, "sft.data", 0.1, lambda row: row)


def test_a_file_without_the_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    with raises("missing", key="sft.data", file=path):
        load_examples(DataSource(path=str(path)), "sft.data", 0.1, lambda row: row)


def test_a_text_file_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("one line\nand another\n")
    examples, _ = load_examples(DataSource(path=str(tmp_path / "rows.txt")), "sft.data", 0.0, lambda row: row)
    assert examples == [Example(None, "one line"), Example(None, "and another")]


def test_a_group_is_held_out_whole() -> None:
    records = [f"{group}{i}" for i in range(3) for group in "abcdefghij"]
    train, held_out = hold_out(records, lambda record: record[0], 0.2, 0, "test")
    assert sorted(train + held_out) == sorted(records)
    assert len({record[0] for record in held_out}) == 2
    assert not {record[0] for record in held_out} & {record[0] for record in train}
    assert train == [record for record in records if record in set(train)]  # in their order
    assert hold_out(records, lambda record: record[0], 0.2, 0, "test") == (train, held_out)
    assert len(hold_out(records, lambda record: record[0], 0.0, 0, "test")[1]) == 3  # one group at least
