"""Local files of rows: JSON, JSON lines, CSV and plain text, also compressed.

They are read here and not by `datasets`, which crashes on a line that is `null` and stops at the first line that it
cannot read. A row that cannot be read is an `InputError` in its place, for `parse_rows` to count. What is read of a
file at first is where its rows begin and end; each is parsed when it is asked for.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pe_rlhf.data.row_table import Bytes, Row, Rows
from reward.errors import InputError
from reward.row_files import parse_json, refuse_pipe

WHOLE = r"-?(0|[1-9]\d*)"  # a number that begins with 0 is a name
NUMBER = rf"{WHOLE}(\.\d+)?([eE][+-]?\d\d?)?"
IN_MEMORY = 16 * 2**20  # bytes of a file that are kept; of larger ones the rows are read from the disk again
SPACE = re.compile(r"[ \t\n\r]*")


def read_file(path: Path, key: str) -> Rows:
    """All rows of a file. Raises `InputError` for one that is missing, empty, damaged, or of an unknown ending."""
    where: dict[str, Any] = {"key": key, "file": str(path)}
    reader = READERS.get(ending(path))
    if reader is None:
        endings = ", ".join([*READERS, *TABLES])
        also = ", ".join(COMPRESSED)
        raise InputError(f"{key}: {path} has another ending than {endings} (or {also} of one)", kind="unknown", **where)
    try:
        raw = _opened(path, key)
    except FileNotFoundError as error:
        raise InputError(f"{key}: there is no file {path}", kind="missing", **where) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{key}: {path} cannot be read: {error}", kind="unreadable", **where) from error
    start = raw.read(0, 16)
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            message = f"{key}: {path} is {what} under another ending"
            raise InputError(message, kind="unreadable", fix="rename it", **where)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{key}: {path} is UTF-16", kind="unreadable", fix="save it as UTF-8", **where)
    try:
        return reader(raw, 3 if start.startswith(b"\xef\xbb\xbf") else 0)
    except InputError as error:
        raise error.at(f"{key}: {path}", **where) from error


def ending(path: Path) -> str:
    """The ending that says what is in a file: `.jsonl` of `a.jsonl.gz`."""
    return (Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix).lower()


def _opened(path: Path, key: str) -> Bytes:
    """A small file's bytes, a large one where it is, and a copy of what is in a compressed one."""
    refuse_pipe(path)
    if (unpacked := COMPRESSED.get(path.suffix.lower())) is not None:
        copy = Bytes.of_our_own(IN_MEMORY)
        with unpacked(path) as file:
            while part := file.read(2**20):
                copy.append(part)
        return copy
    if path.stat().st_size <= IN_MEMORY:
        return Bytes(io.BytesIO(path.read_bytes()))
    return Bytes.of_file(path, key)


def _zstandard(path: Path) -> Any:
    import pyarrow  # it takes a third of a second

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _json_lines(raw: Bytes, start: int) -> Rows:
    starts, ends = array("q"), array("q")
    for place, line in raw.lines(start):
        if line.strip():
            starts.append(place)
            ends.append(place + len(line))
    return raw.rows(starts, ends, _object)


def _json(raw: Bytes, start: int) -> Rows:
    """A list of objects; one object a line, which is also written under this ending; or one object."""
    lines = _json_lines(raw, start)
    if len(lines) and not raw.read(start, start + 4096).lstrip().startswith(b"["):
        whole = lines[0] if len(lines) == 1 else None
        if len(lines) > 1 and isinstance(lines[0], InputError):
            whole = _object(raw.read(start, -1))
        _refuse_table(whole)
        return lines if not isinstance(whole, Mapping) else Rows(1, lambda _: whole)
    places, copy = array("q", [0]), Bytes.of_our_own(IN_MEMORY)
    try:
        text = raw.read(start, -1).decode(errors="surrogatepass")
        for first, last in _items(text) if text.strip() else ():
            places.append(copy.append(text[first:last].encode(errors="surrogatepass")))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {_reason(error)}", kind="unreadable") from error
    return copy.rows(places[:-1], places[1:], _object)


def _refuse_table(whole: object) -> None:
    """A file that is one object is one row, unless it holds columns, or the rows under a name."""
    values = list(whole.values()) if isinstance(whole, Mapping) else []
    by_number = [value for value in values if isinstance(value, Mapping) and {"0", "1"} <= value.keys()]
    by_column = all(isinstance(value, list) and len(value) == len(values[0]) for value in values)
    texts = [value for value in values if isinstance(value, list) and value and all(isinstance(v, str) for v in value)]
    if values and (len(by_number) == len(values) or (by_column and len(texts) > 1)):
        fix = "write one object for each row, as pandas does with to_json(orient='records', lines=True)"
        raise InputError("it is one object with all values of each column, not rows", kind="unreadable", fix=fix)
    for name in ("data", "rows", "train", "examples", "instances"):
        held = whole.get(name) if isinstance(whole, Mapping) else None
        if isinstance(held, list) and held and all(isinstance(item, Mapping) for item in held):
            message = f"it is one object that holds its rows under {name!r}"
            raise InputError(message, kind="unreadable", fix=f"write a file of what is under {name!r}")


def _items(text: str) -> Iterator[tuple[int, int]]:
    """Where each item of a JSON list begins and ends. Raises ValueError where it is none."""
    decoder, place = json.JSONDecoder(), _after_space(text, text.index("[") + 1)
    closed = text[place : place + 1] == "]"
    while not closed:
        _, end = decoder.raw_decode(text, place)
        yield place, end
        place = _after_space(text, end)
        closed = text[place : place + 1] == "]"
        if not closed and text[place : place + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        place = place if closed else _after_space(text, place + 1)
    if (rest := _after_space(text, place + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _after_space(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    assert found is not None
    return found.end()


def _object(line: bytes) -> Row | InputError:
    try:
        item = parse_json(line)
    except (ValueError, RecursionError) as error:  # undecodable bytes and numbers of too many digits are ValueErrors
        return InputError(f"not valid JSON: {_reason(error)}", kind="unreadable")
    if not isinstance(item, dict):
        return InputError(f"the row is {json.dumps(item)[:40]}, not an object with named columns", kind="unreadable")
    if b"\\ud" in line or b"\\uD" in line or b"\xed" in line:  # perhaps half of a pair of surrogates
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except ValueError as error:  # which no tokenizer takes
            return InputError(f"the row is no text: {_reason(error)}", kind="unreadable")
    return item


# ---- text and tables -------------------------------------------------------------------------------------------------


def _text(raw: Bytes, start: int) -> Rows:
    """A row with the column `text` for each line."""
    starts, ends = array("q"), array("q")
    blank = True
    for place, line in raw.lines(start):
        blank = blank and not line.strip()
        starts.append(place)
        ends.append(place + len(line))

    def parse(line: bytes) -> Row | InputError:
        try:
            return {"text": line.removesuffix(b"\n").removesuffix(b"\r").decode()}
        except UnicodeDecodeError as error:
            return InputError(f"not UTF-8: {error.reason}", kind="unreadable")

    return raw.rows(array("q"), array("q"), parse) if blank else raw.rows(starts, ends, parse)


def _csv(raw: Bytes, start: int, delimiter: str = ",") -> Rows:
    """Cells are text; a column of whole numbers, numbers, or true and false is read as that, an empty cell as None."""
    csv.field_size_limit(2**31 - 1)  # of a cell; a long response exceeds the default
    starts, ends, names, columns = array("q"), array("q"), list[str](), list[_Column]()
    end = start

    def lines() -> Iterator[str]:
        nonlocal end
        for place, line in raw.lines(start):
            end = place
            for part in re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", line):
                end += len(part)
                yield part.decode(errors="surrogateescape")

    first = raw.read(start, start + 4096).splitlines()[:1]
    if delimiter == "," and first and b"," not in first[0] and b";" in first[0]:
        delimiter = ";"  # as Excel writes it where a comma is the decimal point
    records = csv.reader(lines(), delimiter=delimiter)
    try:
        for cells in records:
            if cells and not names:
                names, columns = cells, [_Column() for _ in cells]
                if twice := next((name for name in names if names.count(name) > 1), None):
                    raise InputError(f"the column {twice!r} is there more than once", kind="conflict")
            elif cells:
                starts.append(start)
                ends.append(end)
                for column, cell in zip(columns, cells if len(cells) <= len(names) else (), strict=False):
                    column.see(cell)
            start = end
    except csv.Error as error:
        raise InputError(f"line {records.line_num}: {error}", kind="unreadable", row=records.line_num) from error

    def parse(record: bytes) -> Row | InputError:
        text = io.StringIO(record.decode(errors="surrogateescape"), newline="")
        cells = next(cells for cells in csv.reader(text, delimiter=delimiter) if cells)
        if len(cells) > len(names):
            return InputError(f"{len(cells)} cells for {len(names)} columns", kind="unreadable")
        if any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
            return InputError("not UTF-8", kind="unreadable")
        cells += [""] * (len(names) - len(cells))
        return {name: column.value(cell) for name, column, cell in zip(names, columns, cells, strict=True)}

    return raw.rows(starts, ends, parse)


class _Column:
    """What a column of text may be read as: the first kind that all its cells have that say something."""

    def __init__(self) -> None:
        self._kinds: dict[str, Callable[[str], Any]] = {WHOLE: int, NUMBER: float, "true|false": "true".__eq__}

    def see(self, cell: str) -> None:
        if cell and self._kinds:
            kinds = self._kinds.items()
            self._kinds = {p: kind for p, kind in kinds if len(cell) < 300 and re.fullmatch(p, cell)}

    def value(self, cell: str) -> Any:
        return next(iter(self._kinds.values()), str)(cell) if cell else None


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


READERS: dict[str, Callable[[Bytes, int], Rows]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".txt": _text,
}
TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # what `datasets` reads
COMPRESSED: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".bz2": bz2.open,  # type: ignore[dict-item]
    ".xz": lzma.open,  # type: ignore[dict-item]
    ".zst": _zstandard,
}
MAGIC = {
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a parquet file",
    b"PK\x03\x04": "a zip file",
    b"BZh91AY&SY": "a bzip2 file",
    b"\xfd7zX": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstandard file",
    b"ARROW1": "an arrow file",
}
