"""Files and rows that cannot be used as prompts: each is refused with the file, and with the row where there is one."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config import DataSource
from pe_rlhf.data.rows import load_prompts
from reward.errors import Kind
from tests.failures import raises
from tests.runs import PROMPTS

pytestmark = pytest.mark.usefixtures("data_cache")
LINES = [json.dumps(row) for row in PROMPTS]
TRUNCATED_GZIP = gzip.compress("\n".join(f'{{"prompt": "p{i} {i**9}"}}' for i in range(500)).encode())[:-200]
ONE = LINES[0]


@pytest.mark.parametrize(
    ("name", "content", "source", "kind", "row"),
    [
        ("absent.jsonl", None, {}, "missing", None),
        ("empty.jsonl", "", {}, "empty", None),
        ("blank.jsonl", "\n\n \n", {}, "empty", None),
        ("bad.jsonl", "\n".join([*LINES[:2], '{"prompt": "cut', *LINES[3:]]), {}, "unreadable", 3),
        ("bad.json", '[{"prompt": ', {}, "unreadable", None),
        ("cut.jsonl.gz", TRUNCATED_GZIP, {}, "unreadable", None),
        ("not.parquet", "PAR0", {}, "unreadable", None),
        ("notes.docx", "x", {}, "unknown", None),
        ("a.jsonl", '{"question": "q", "id": 1}\n', {}, "missing", None),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', {}, "empty", 2),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', {}, "invalid", 2),
        ("a.jsonl", '{"prompt": 3}\n', {}, "invalid", 1),
        ("a.jsonl", '{"prompt": []}\n', {}, "empty", 1),
        ("a.jsonl", '{"prompt": [{"content": "c"}]}\n', {}, "invalid", 1),
        ("a.csv", "prompt\n12\n", {}, "invalid", 1),
        ("a.csv", "prompt\n", {}, "empty", None),
        ("a.txt", "one\n\nthree\n", {}, "empty", 2),
        ("a.jsonl", ONE, {"split": "test"}, "unknown", None),
        ("some/hub-id", None, {}, "missing", None),
    ],
)
def test_prompts_that_cannot_be_used(
    tmp_path: Path, name: str, content: str | bytes | None, source: dict[str, Any], kind: Kind, row: int | None
) -> None:
    path = name if "/" in name else str(tmp_path / name)
    if content is not None:
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    with raises(kind, key="ppo.prompts", file=path, row=row):
        load_prompts(DataSource(path=path, **source), "ppo.prompts")


@pytest.mark.parametrize(
    ("source", "kind", "key"),
    [
        ({"columns": {"prompt": "question"}}, "missing", "ppo.prompts.columns"),
        ({"split": "train[5:]"}, "empty", "ppo.prompts.split"),
        ({"split": "train[:0]"}, "empty", "ppo.prompts.split"),
    ],
)
def test_a_mapping_or_split_that_the_file_does_not_have(
    tmp_path: Path, source: dict[str, Any], kind: Kind, key: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(ONE)
    with raises(kind, key=key, file=path):
        load_prompts(DataSource(path=str(path), **source), "ppo.prompts")
