"""Local files of rows: JSON, JSON lines, CSV and plain text, also compressed.

They are read here and not by `datasets`, which crashes on a line that is `null` and stops at the first line that it
cannot read. A row that cannot be read is an `InputError` in its place, for `parse_rows` to count.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reward.errors import InputError

WHOLE = r"-?(0|[1-9]\d*)"  # a number that begins with 0 is a name
NUMBER = rf"{WHOLE}(\.\d+)?([eE][+-]?\d\d?)?"
Row = Mapping[str, Any]
Rows = list[Row | InputError]


def read_file(path: Path, key: str) -> Rows:
    """All rows of a file. Raises `InputError` for one that is missing, empty, damaged, or of an unknown ending."""
    where: dict[str, Any] = {"key": key, "file": str(path)}
    reader = READERS.get(ending(path))
    if reader is None:
        endings = ", ".join([*READERS, ".parquet"])
        raise InputError(f"{key}: {path} is none of {endings} (or .gz of one)", kind="unknown", **where)
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except FileNotFoundError as error:
        raise InputError(f"{key}: there is no file {path}", kind="missing", **where) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{key}: {path} cannot be read: {error}", kind="unreadable", **where) from error
    for start, what in ((b"\x1f\x8b", "a gzip file"), (b"PAR1", "a parquet file"), (b"PK\x03\x04", "a zip file")):
        if raw.startswith(start):
            raise InputError(
                f"{key}: {path} is {what} under another ending", kind="unreadable", fix="rename it", **where
            )
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{key}: {path} is UTF-16", kind="unreadable", fix="save it as UTF-8", **where)
    try:
        return reader(raw.removeprefix(b"\xef\xbb\xbf"))
    except InputError as error:
        raise error.at(f"{key}: {path}", **where) from error


def ending(path: Path) -> str:
    """The ending that says what is in a file: `.jsonl` of `a.jsonl.gz`."""
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def _json_lines(raw: bytes) -> Rows:
    return [_object(line) for line in raw.split(b"\n") if line.strip()]


def _json(raw: bytes) -> Rows:
    """A list of objects; one object a line, which is also written under this ending; or one object."""
    if not raw.lstrip().startswith(b"["):
        whole = _object(raw) if raw.strip() else None
        return [whole] if isinstance(whole, Mapping) else _json_lines(raw)
    try:
        items = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {_reason(error)}", kind="unreadable") from error
    return [_checked(item) for item in items]


def _object(line: bytes) -> Row | InputError:
    try:
        return _checked(json.loads(line))
    except (ValueError, RecursionError) as error:  # undecodable bytes and numbers of too many digits are ValueErrors
        return InputError(f"not valid JSON: {_reason(error)}", kind="unreadable")


def _checked(item: Any) -> Row | InputError:
    if not isinstance(item, dict):
        return InputError(f"the row is {json.dumps(item)[:40]}, not an object with named columns", kind="unreadable")
    try:
        json.dumps(item, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # half of a pair of surrogates, which no tokenizer takes
        return InputError(f"the row is no text: {_reason(error)}", kind="unreadable")
    return item


def _text(raw: bytes) -> Rows:
    """A row with the column `text` for each line."""
    rows: Rows = []
    for line in raw.removesuffix(b"\n").split(b"\n") if raw.strip() else []:
        try:
            rows.append({"text": line.removesuffix(b"\r").decode()})
        except UnicodeDecodeError as error:
            rows.append(InputError(f"not UTF-8: {error.reason}", kind="unreadable"))
    return rows


def _csv(raw: bytes) -> Rows:
    """Cells are text; a column of whole numbers, numbers, or true and false is read as that, an empty cell as None."""
    csv.field_size_limit(2**31 - 1)  # of a cell; a long response exceeds the default
    lines = csv.reader(io.StringIO(raw.decode(errors="surrogateescape"), newline=""))
    try:
        table = [cells for cells in lines if cells]
    except csv.Error as error:
        raise InputError(f"line {lines.line_num}: {error}", kind="unreadable", row=lines.line_num) from error
    if not table:
        return []
    names, cells = table[0], table[1:]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"the column {twice!r} is there more than once", kind="conflict")
    whole = [row + [""] * (len(names) - len(row)) for row in cells if len(row) <= len(names)]
    columns = {name: _column([row[i] for row in whole]) for i, name in enumerate(names)}
    found = iter(range(len(whole)))
    rows: Rows = []
    for row in cells:
        if len(row) > len(names):
            rows.append(InputError(f"{len(row)} cells for {len(names)} columns", kind="unreadable"))
            continue
        number = next(found)
        if any("\udc80" <= letter <= "\udcff" for cell in row for letter in cell):
            rows.append(InputError("not UTF-8", kind="unreadable"))
        else:
            rows.append({name: values[number] for name, values in columns.items()})
    return rows


def _column(cells: list[str]) -> list[Any]:
    said = [cell for cell in cells if cell]
    kinds: dict[str, Callable[[str], Any]] = {WHOLE: int, NUMBER: float, "true|false": "true".__eq__}
    for pattern, kind in kinds.items():
        if said and all(re.fullmatch(pattern, cell) and len(cell) < 300 for cell in said):
            return [kind(cell) if cell else None for cell in cells]
    return [cell or None for cell in cells]


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


READERS: dict[str, Callable[[bytes], Rows]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".txt": _text,
}
