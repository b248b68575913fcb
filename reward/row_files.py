"""Files of rows with named columns: jsonl, json and csv (also .gz), and numbers in their cells."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import math
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reward.errors import InputError

Row = Mapping[str, Any]


def refuse_pipe(path: Path) -> None:
    """Raise `OSError` for a pipe, socket or device: nobody may write to it, so we would wait, or it may not end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe, socket or device, not a file", str(path))


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line number and columns of each row of a jsonl, json or csv file; in a json list, the number of the item.

    Raises `InputError` naming file and line.
    """
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if ending not in (".jsonl", ".json", ".csv"):
        raise InputError(f"{path} is not a .jsonl, .json or .csv file (or .gz of one)", kind="unreadable", file=path)
    text = _text(path)
    if not text.strip():
        raise InputError(f"{path} is empty", kind="empty", file=path)
    if ending == ".csv":
        yield from _csv_rows(path, text)
    elif ending == ".json":
        yield from enumerate(_parsed_list(path, text), start=1)
    else:
        for line, row in enumerate(text.split("\n"), start=1):
            if row.strip():
                yield line, _parsed(path, line, row)


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`. Raises `ValueError` also for an object with a key twice, of which one value would be lost."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there more than once")
    return found


def damaged(path: Path, line: int, why: object) -> InputError:
    """The error for a line that cannot be used."""
    return InputError(f"{path} line {line}: {why}", kind="unreadable", file=path, row=line)


def in_line(path: Path, line: int, error: InputError) -> InputError:
    """The error of a row, with the place of the row."""
    placed = error.at(f"{path} line {line}")
    placed.file, placed.row = str(path), line
    return placed


def finite_number(row: Row, column: str) -> float | None:
    """A finite number, or None where the column is missing or empty."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan", "null", "none")):
        return None
    try:
        parsed = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        parsed = math.nan
    if math.isnan(parsed) and isinstance(value, float):  # pandas writes NaN for a missing value
        return None
    if not math.isfinite(parsed):
        raise InputError(f"{column} is {value!r}, not a number", kind="invalid", key=column)
    return parsed


def probability(row: Row, column: str) -> float | None:
    """As `number`, in [0, 1]."""
    value = finite_number(row, column)
    if value is not None and not 0 <= value <= 1:
        raise InputError(f"{column} is {value:g}, not a probability in [0, 1]", kind="invalid", key=column)
    return value


def whole(row: Row, column: str) -> int | None:
    """As `number`, a whole one from 0."""
    value = finite_number(row, column)
    if value is not None and (value < 0 or value != int(value)):
        raise InputError(f"{column} is {value:g}, not a whole number from 0", kind="invalid", key=column)
    return None if value is None else int(value)


def _text(path: Path) -> str:
    try:
        refuse_pipe(path)
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}", kind="missing", file=path) from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged or not text: {error}", kind="unreadable", file=path) from error


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)  # of a cell; a long response exceeds the default
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names = reader.fieldnames or []
        if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
            message = f"{path}: the column {twice[0]!r} is there more than once"
            raise InputError(message, kind="conflict", key=twice[0], file=path, row=1)
        for row in reader:
            if None in row:
                raise damaged(path, reader.line_num, "more values than columns")
            yield reader.line_num, row
    except csv.Error as error:
        raise damaged(path, reader.line_num, error) from error


def _parsed(path: Path, line: int, text: str) -> Row:
    try:
        row = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, line, f"not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise damaged(path, line, "not an object with named columns")
    return row


def _parsed_list(path: Path, text: str) -> list[Row]:
    try:
        rows = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}", kind="unreadable", file=path) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: not a list of objects", kind="unreadable", file=path)
    return rows
