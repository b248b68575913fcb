"""Rows that stay on disk until they are asked for, streams, and how files are packed."""

import bz2
import csv
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from pe_rlhf.config import DataSource
from pe_rlhf.data import local_files
from pe_rlhf.data.data_sources import load_rows, streamed
from pe_rlhf.data.preference_pairs import Pairs, PairTable, PairTokens
from pe_rlhf.data.row_table import Ragged, RowTable
from pe_rlhf.data.rows import load_prompt_rows
from tests.failures import raises
from tests.runs import write_jsonl

pytestmark = pytest.mark.usefixtures("data_cache")
ROWS = [{"prompt": f"{i} ünï 你\u2028 next", "n": i, "parts": [{"a": i}]} for i in range(50)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.fixture(params=[0, 16 * 2**20], ids=["on disk", "in memory"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(local_files, "IN_MEMORY", request.param)
    return request.param


PACKED: dict[str, Callable[[bytes], bytes]] = {".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packing", PACKED)
def test_packed_files(kept: int, packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKED[packing](LINES))
    assert list(load_rows(DataSource(path=str(path)), "key")) == ROWS
    path.write_bytes(PACKED[packing](LINES)[:-20])
    with raises("unreadable", key="key", file=path):
        load_rows(DataSource(path=str(path)), "key")


def test_a_zstandard_file(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
        file.write(LINES)
    assert list(load_rows(DataSource(path=str(path)), "key")) == ROWS


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2, ensure_ascii=False),
        "\ufeff" + json.dumps(ROWS),
        "".join(json.dumps(row) + "\r\n\n" for row in ROWS),
    ],
)
def test_json_of_every_shape(kept: int, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    rows = load_rows(DataSource(path=str(path)), "key")
    assert list(rows) == ROWS
    assert rows[17] == ROWS[17]
    assert list(rows[40:42]) == ROWS[40:42]


@pytest.mark.parametrize("text", ['[{"a": 1} {"a": 2}]', '[{"a": 1}] x', '[{"a": 1},', "[{]", '[{"a": 1},]'])
def test_a_list_that_is_no_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with raises("unreadable", key="key", file=path):
        load_rows(DataSource(path=str(path)), "key")


@pytest.mark.parametrize(("name", "line"), [("a.csv", "\n"), ("a.tsv", "\r\n"), ("a.csv", "\r")])
def test_tables_of_text(kept: int, name: str, line: str, tmp_path: Path) -> None:
    rows = [{"prompt": f'say "{i}",\tor\n{i} lines\r\nof it', "n": i, "share": i / 2, "none": None} for i in range(9)]
    path = tmp_path / name
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name == "a.tsv" else ",", lineterminator=line)
        writer.writeheader()
        writer.writerows(rows)
    found = load_rows(DataSource(path=str(path)), "key")
    assert list(found) == rows
    assert found[-2] == rows[-2]


def test_an_arrow_file(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    rows = load_rows(DataSource(path=str(tmp_path / "a.arrow"), split="train[10:13]"), "key")
    assert list(rows) == ROWS[10:13]


def test_rows_on_disk_take_no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local_files, "IN_MEMORY", 2**20)
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"{i} " + "word " * 400, "n": i} for i in range(4000)])
    tracemalloc.start()
    rows, _ = load_prompt_rows(DataSource(path=str(path)), "key", lambda row: row.again)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 8e6
    assert peak < 2.5e6  # less than a third of the file; as objects it is more than the file
    assert (rows[3999]().columns, str(rows[7]().prompt)[:7]) == ({"n": 3999}, "7 word ")


def test_a_large_file_that_changes_while_it_is_read_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_files, "IN_MEMORY", 0)
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    rows = load_rows(DataSource(path=str(path)), "key")
    with path.open("a") as file:
        file.write("{}\n")
    with raises("conflict", key="key", file=path):
        rows[0]


def test_mixed_rows_are_read_again_with_their_source(tmp_path: Path) -> None:
    parts = [
        {
            "path": str(write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}"} for i in range(3)])),
            "label": name,
        }
        for name in ("x", "y")
    ]
    rows, _ = load_prompt_rows(DataSource.model_validate({"mix": parts}), "key", lambda row: row.again)
    again = [row() for row in rows]
    assert [(str(row.prompt), row.columns) for row in again] == [
        (f"{name}{i}", {"source": name}) for i in range(3) for name in ("x", "y")
    ]


@pytest.mark.parametrize("buffer", [None, 20])
def test_a_stream_is_read_as_far_as_its_slice(buffer: int | None, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"p{i}", "n": i} for i in range(200)])
    source = DataSource(path=str(tmp_path), split="train[5:25]", streaming=True, shuffle_buffer=buffer)
    first, second = ([row["n"] for row in streamed(source, "key") if isinstance(row, dict)] for _ in range(2))
    assert first == second
    assert len(set(first)) == 20
    assert (first == list(range(5, 25))) is (buffer is None)
    with raises("invalid", key="key.split", file=tmp_path):
        streamed(source.model_copy(update={"split": "train[:10%]"}), "key")


@pytest.mark.parametrize("setting", [{"streaming": True}, {"revision": "main"}])
def test_local_rows_are_no_stream_and_have_no_revision(setting: dict[str, Any], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with raises("conflict", key=f"key.{next(iter(setting))}", file=path):
        load_rows(DataSource.model_validate({"path": str(path), **setting}), "key")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_revision_reaches_the_hub(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no hub here: its client is given a folder for the name, and the revision is noted."""
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a"}])
    load: Any = datasets.load_dataset
    asked: list[tuple[str, str]] = []

    def of_folder(path: str, **settings: Any) -> Any:
        asked.append((path, settings["revision"]))
        return load(str(tmp_path), **settings | {"revision": None})

    monkeypatch.setattr(datasets, "load_dataset", of_folder)
    rows = load_rows(DataSource(path="some/set", revision="v1", streaming=streaming), "key")
    assert (asked, [*rows]) == ([("some/set", "v1")], [{"prompt": "a"}])


def test_tables_of_tables() -> None:
    table = RowTable.joined([RowTable(0, int), RowTable(3, int), [10, 11]])
    assert [*table] == [0, 1, 2, 10, 11] == [table[i] for i in range(5)]
    assert [*table[1:4].map(str)] == ["1", "2", "10"]
    assert [*table.take([4, 0, 4])] == [11, 0, 11]
    assert table[-1] == 11
    with pytest.raises(IndexError):
        table[5]


def test_pairs_in_a_table_are_the_pairs() -> None:
    pairs = [PairTokens([5, 6], [20, 21], [30]), PairTokens([7], [22], [31, 32], margin=0.5)]
    table = PairTable()
    numbers = [table.append(pair) for pair in pairs]
    assert [*table.take(numbers)] == pairs
    rows: Any = Pairs(table.take([1, 0]), 0).responses().rows
    assert [*rows] == [([7], [22]), ([5, 6], [20, 21]), ([7], [31, 32]), ([5, 6], [30])] == [rows[i] for i in range(4)]
    assert Ragged([[1], [], [2, 3]])[:] == [[1], [], [2, 3]]
