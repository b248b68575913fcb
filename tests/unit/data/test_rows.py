"""Data sets: every format that a recipe may name, columns by other names, and splits."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pe_rlhf.config import DataSource
from pe_rlhf.data.data_sources import load_rows
from pe_rlhf.data.rows import load_preferences, load_prompts, note_bad_rows
from pe_rlhf.runs.layout import RunFiles
from reward.records import BadRecord
from tests.failures import raises
from tests.runs import read_jsonl, write_jsonl

pytestmark = pytest.mark.usefixtures("data_cache")

ROWS = [
    {"prompt": "plain", "id": 1},
    {"prompt": 'with "quotes", commas\nand lines', "id": 2},
    {"prompt": "ünï 你", "id": 3},
]
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def write_gzip(path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "id"])
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.json": write_json,
    "a.jsonl": lambda path: write_jsonl(path, ROWS),
    "a.jsonl.gz": write_gzip,
    "a.parquet": write_parquet,
    "a.csv": write_csv,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_rows_of_every_format(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    source = DataSource(path=str(tmp_path / name))
    assert list(load_rows(source, "key")) == ROWS
    assert load_prompts(source, "key") == [row["prompt"] for row in ROWS]


def test_a_text_file_has_a_prompt_in_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one two\nthree  \n你", encoding="utf-8")
    assert load_prompts(DataSource(path=str(path)), "key") == ["one two", "three  ", "你"]


def test_a_file_that_is_read_twice_is_read_again_after_a_change(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "old"}])
    assert load_prompts(DataSource(path=str(path)), "key") == ["old"]
    write_jsonl(path, [{"prompt": "new"}])
    assert load_prompts(DataSource(path=str(path)), "key") == ["new"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(20)),
        ("train[:3]", range(3)),
        ("train[5:8]", range(5, 8)),
        ("train[-2:]", range(18, 20)),
        ("train[:10%]", range(2)),
        ("train[10%:]", range(2, 20)),
        ("train[:2]+train[4:6]", [0, 1, 4, 5]),
    ],
)
def test_slices_of_a_split(split: str, expected: list[int], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}"} for i in range(20)])
    prompts = load_prompts(DataSource(path=str(path), split=split), "key")
    assert prompts == [f"p{i}" for i in expected]


def test_columns_by_other_names(tmp_path: Path) -> None:
    rows = [{"question": "q", "good": "g", "bad": "b", "prompt_id": 7}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    source = DataSource(path=str(path), columns=columns)
    assert list(load_rows(source, "key")) == [{"prompt_id": 7, "prompt": "q", "chosen": "g", "rejected": "b"}]
    assert load_prompts(source, "key") == ["q"]
    _, records, bad = load_preferences(source, "key", 0.0, lambda row: row)
    assert [(r.prompt, r.chosen, r.rejected) for r in records] == [("q", "g", "b")]
    assert bad == []


def test_two_columns_that_swap_their_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "worse", "rejected": "better"}])
    source = DataSource(path=str(path), columns={"chosen": "rejected", "rejected": "chosen"})
    assert list(load_rows(source, "key")) == [{"prompt": "p", "chosen": "better", "rejected": "worse"}]


def test_one_column_under_two_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "t"}])
    source = DataSource(path=str(path), columns={"prompt": "text", "chosen": "text"})
    assert list(load_rows(source, "key")) == [{"prompt": "t", "chosen": "t"}]


def test_a_text_file_with_a_mapped_column(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    source = DataSource(path=str(tmp_path / "a.txt"), columns={"prompt": "text"})
    assert load_prompts(source, "key") == ["one", "two"]


def test_chat_messages_keep_role_and_content_alone(tmp_path: Path) -> None:
    # One row has a key more: the library fills it with None in all the others.
    rows = [{"prompt": CHAT}, {"prompt": [{"role": "user", "content": "v", "name": "ann"}]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert load_prompts(DataSource(path=str(path)), "key") == [CHAT, [{"role": "user", "content": "v"}]]


def test_bad_rows_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "left_out_eval_data.jsonl"
    bad = [BadRecord(row, f"reason {row}") for row in (2, 3, 5, 7, 11, 13)]
    assert note_bad_rows(listed, "reward.eval_data", bad) == 6
    assert read_jsonl(listed) == [
        {"row": row, "reason": f"reason {row}", "kind": "invalid"} for row in (2, 3, 5, 7, 11, 13)
    ]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "reward.eval_data: left out row 2: reason 2"
    assert said[5:] == [f"reward.eval_data: left out 6 unusable rows in all, see {listed}"]
    assert note_bad_rows(tmp_path / "nowhere" / "a.jsonl", "reward.data", bad) == 6
    assert not (tmp_path / "nowhere").exists()


def test_a_few_bad_pairs_are_handed_back_with_their_reasons(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": "r"} for i in range(10)]
    rows[4]["chosen"] = "r"
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    _, records, bad = load_preferences(DataSource(path=str(path)), "key", 0.1, lambda row: row)
    assert [record.prompt for record in records] == [f"p{i}" for i in range(10) if i != 4]
    assert [(row.row, row.reason) for row in bad] == [(5, "the chosen and the rejected response are equal")]


def test_a_name_without_an_ending_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("org/data", "org/data.jsonl"):  # both are missing: on the hub, and here
        with raises("missing", key="key", file=path):
            load_rows(DataSource(path=path), "key")


@pytest.mark.parametrize(("size", "said"), [(50, []), (5, ["key: reading"])])
def test_reading_a_large_file_shows_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], size: int, said: list[str]
) -> None:
    monkeypatch.setattr("pe_rlhf.data.data_sources.LARGE", size)
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a prompt"}\n')
    load_rows(DataSource(path=str(path)), "key")
    assert [line[:12] for line in capfd.readouterr().err.splitlines()] == said


def test_two_lists_of_unusable_rows_in_one_stage_are_two_files(tmp_path: Path) -> None:
    """A judge during PPO reads the prompts of `evaluate`."""
    files = RunFiles(tmp_path).stage("ppo")
    named = [files.left_out(key).name for key in ("ppo.prompts", "evaluate.prompts")]
    assert named == ["left_out_prompts.jsonl", "left_out_evaluate_prompts.jsonl"]
