"""Rows in other files and under other names: prompts out of pairs, mappings that match nothing, damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from pe_rlhf.config import DataSource
from pe_rlhf.data.rows import load_preferences, load_prompts
from reward.errors import Kind
from tests.failures import raises
from tests.runs import Tree, write_jsonl
from tests.unit.data.test_formats import said, source, user

# ---- prompts out of other data ------------------------------------------------------------------------------------


def test_prompts_out_of_preference_data(tmp_path: Path) -> None:
    rows = [
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, [user("q")]),
        ({"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]}, [user("q")]),
        ({"messages": [user("q"), said("a")]}, [user("q")]),
        ({"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"}, [user("q"), said("a"), user("r")]),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}]},
            [user("qr")],
        ),
    ]
    for row, expected in rows:
        assert load_prompts(source(tmp_path, None, [row]), "ppo.prompts") == [expected]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "x"}, {"prompt": "chosen"}),
        ({"chosen": [user("q"), said("a")], "rejected": []}, {"prompt": "chosen"}),
        ({"messages": [user("q"), said("a")]}, {"prompt": "messages"}),
        ({"prompt": [user("q"), {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}, {}),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]}, {}),
    ],
)
def test_what_is_no_prompt(tmp_path: Path, row: Tree, columns: dict[str, str]) -> None:
    with raises("invalid", key="ppo.prompts", row=1):
        load_prompts(source(tmp_path, None, [row], columns=columns), "ppo.prompts")


# ---- mappings that match nothing, layouts that were guessed -------------------------------------------------------


RENAMED = {"chosen": "good", "rejected": "bad"}
TEXTS = {"good": "The a", "bad": "The b"}


@pytest.mark.parametrize(
    ("row", "columns", "kind"),
    [
        ({"q": "q", **TEXTS}, {"promt": "q", **RENAMED}, "unknown"),
        ({"q": "q", **TEXTS}, RENAMED, "missing"),
        ({"question": "q", "chosen": "The a", "rejected": "The b"}, {}, "missing"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"margin": "marign"}, "missing"),
    ],
)
def test_a_mapping_that_means_nothing_is_refused(
    tmp_path: Path, row: Tree, columns: dict[str, str], kind: Kind
) -> None:
    with raises(kind, key="reward.data.columns"):
        load_preferences(source(tmp_path, None, [row], columns=columns), "reward.data", 0, lambda record: record)


# ---- files -------------------------------------------------------------------------------------------------------

GOOD = json.dumps({"prompt": "q"}).encode()
BAD_LINES = {
    "null": b"null",
    "a number": b"3",
    "a list": b"[1]",
    "undecodable": b'{"prompt": "\xff\xfe"}',
    "half a pair": b'{"prompt": "\\ud83d"}',
    "deep": b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "huge": b'{"prompt": ' + b"9" * 6_000 + b"}",
    "cut": b'{"prompt": "q',
    "empty": b'{"prompt": ""}',
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("place", [0, 20])
def test_a_line_that_cannot_be_read_is_an_unusable_row(tmp_path: Path, name: str, place: int) -> None:
    lines = [GOOD] * 20
    lines.insert(place, BAD_LINES[name])
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    data = DataSource(path=str(tmp_path / "a.jsonl"))
    assert load_prompts(data, "ppo.prompts", 0.05) == ["q"] * 20
    with raises("empty" if name == "empty" else "unreadable", key="ppo.prompts", row=place + 1):
        load_prompts(data, "ppo.prompts", 0.01)


def test_a_number_beyond_a_float_is_no_margin(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}
    with raises("invalid", row=1):
        load_preferences(source(tmp_path, None, [row]), "reward.data", 0, lambda record: record)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", b"\x1f\x8b\x08\x00rest", "unreadable"),
        ("a.jsonl", b"PAR1rest", "unreadable"),
        ("a.jsonl", '{"prompt": "q"}'.encode("utf-16"), "unreadable"),
        ("a.csv", b"prompt,prompt\na,b\n", "conflict"),
        ("a.csv", b"prompt,id\na,b,c\n", "unreadable"),
        ("a.csv", b"prompt,id\n\xff,b\n", "unreadable"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says(tmp_path: Path, name: str, content: bytes, kind: Kind) -> None:
    (tmp_path / name).write_bytes(content)
    with raises(kind, key="ppo.prompts", file=tmp_path / name):
        load_prompts(DataSource(path=str(tmp_path / name)), "ppo.prompts")


def test_folders_of_shards_and_of_save_to_disk(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{"prompt": "c"}, {"prompt": "d"}])
    shards = tmp_path / "shards" / "plain"
    shards.mkdir(parents=True)
    write_jsonl(shards / "train-00000.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    table.to_parquet(str(shards / "train-00001.parquet"))
    write_jsonl(shards / "test-00000.jsonl", [{"prompt": "e"}])
    folder = DataSource(path=str(tmp_path / "shards"), data_dir="plain")
    assert load_prompts(folder, "key") == ["a", "b", "c", "d"]
    assert load_prompts(folder.model_copy(update={"split": "test"}), "key") == ["e"]
    datasets.DatasetDict({"train": table, "prefs": table.select([1])}).save_to_disk(str(tmp_path / "saved"))
    saved = DataSource(path=str(tmp_path / "saved"))
    assert load_prompts(saved.model_copy(update={"split": "train[:1]"}), "key") == ["c"]
    assert load_prompts(saved.model_copy(update={"split": "prefs"}), "key") == ["d"]
    with raises("unknown", key="key"):
        load_prompts(saved.model_copy(update={"split": "test"}), "key")
