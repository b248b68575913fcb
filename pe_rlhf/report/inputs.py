"""Summaries and lines that pages are made of; a field that is missing is named with its file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pe_rlhf.system.files import read_json, read_jsonl
from reward.errors import InputError


class Record(dict[str, Any]):
    """A JSON object that knows where it is from. `record[name]` raises `InputError` for a field that it has not."""

    def __init__(self, values: dict[str, Any], file: Path, row: int | None = None) -> None:
        super().__init__(values)
        self.file, self.row = file, row

    def __missing__(self, key: str) -> Any:
        where = self.file if self.row is None else f"{self.file} line {self.row}"
        raise InputError(f"{where}: no field {key!r}", kind="unreadable", key=key, file=self.file, row=self.row)


def read_record(path: Path) -> Record:
    """A summary. Raises `InputError` where it is missing or damaged."""
    return Record(read_json(path), path)


def read_records(path: Path) -> list[Record]:
    """The lines of a file, none where it is missing. Raises `InputError` for a line that is no JSON object."""
    rows = read_jsonl(path)
    for row, value in enumerate(rows, start=1):
        if not isinstance(value, dict):
            message = f"{path} line {row}: not a JSON object but a {type(value).__name__}"
            raise InputError(message, kind="unreadable", file=path, row=row)
    return [Record(value, path, row) for row, value in enumerate(rows, start=1)]
