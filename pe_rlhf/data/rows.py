"""Data sets of a recipe, through the `datasets` library: local files and the hub, with column mapping."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import datasets

from pe_rlhf.config import DataSource
from pe_rlhf.data.examples import Example, has_format, parse_example
from pe_rlhf.system.files import write_jsonl
from pe_rlhf.system.processes import is_main
from pe_rlhf.system.progress import console, say
from pe_rlhf.system.seeding import permutation
from reward.errors import InputError
from reward.records import BadRecord, PreferenceRecord, Prompt, load_records, parse_prompt, parse_rows

Record = TypeVar("Record")

# The builder of `datasets` for each ending of a local file.
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
LARGE = 50 * 2**20  # bytes: reading this takes seconds


def load_rows(source: DataSource, key: str) -> list[dict[str, Any]]:
    """All rows of a data set, columns renamed to ours.

    `key` is where the recipe names it, for errors. Raises `InputError` for a file that is missing, empty or malformed,
    an unknown ending, and a split or a mapped column that does not exist.
    """
    arguments: dict[str, Any] = (
        _local_file(source, key) if _looks_local(source.path) else {"path": source.path, "name": source.name}
    )
    local = "data_files" in arguments
    # A download or a large file takes long enough to be watched: by the library's bar, or one line without a terminal.
    slow = not local or Path(source.path).stat().st_size > LARGE
    (datasets.enable_progress_bars if slow and console.is_terminal else datasets.disable_progress_bars)()
    if slow and not console.is_terminal:
        say(f"{key}: reading {source.path}")
    try:
        table = datasets.load_dataset(**arguments, split=source.split)
    except Exception as error:  # the library raises a dozen classes, its own and pyarrow's
        raise _explained(source, key, error) from error
    rows = [dict(row) for row in table]
    if not rows:
        raise InputError(f"{key}: {source.path} has no rows", kind="empty", key=key, file=source.path)
    for theirs in source.columns.values():
        if theirs not in rows[0]:
            message = f"{key}: {source.path} has no column {theirs!r}; it has {', '.join(rows[0])}"
            raise InputError(message, kind="missing", key=f"{key}.columns", file=source.path)
    return [_renamed(row, source.columns) for row in rows]


def _local_file(source: DataSource, key: str) -> dict[str, str]:
    """What `load_dataset` is given for a local file, after the checks that it would explain badly."""
    path = Path(source.path)
    where: dict[str, Any] = {"key": key, "file": source.path}
    builder = BUILDERS.get(_ending(path))
    if builder is None:
        endings = ", ".join(BUILDERS)
        raise InputError(f"{key}: {source.path} is none of {endings} (or .gz of one)", kind="unknown", **where)
    if not path.is_file():
        raise InputError(f"{key}: there is no file {source.path}", kind="missing", **where)
    if path.stat().st_size == 0:
        raise InputError(f"{key}: {source.path} is empty", kind="empty", **where)
    return {"path": builder, "data_files": str(path)}


def load_prompts(source: DataSource, key: str) -> list[Prompt]:
    """The `prompt` column: texts, or lists of chat messages (`text` in a .txt file)."""
    rows = load_rows(source, key)
    column = "text" if _ending(Path(source.path)) == ".txt" and not source.columns else "prompt"
    _refuse_without(column, rows, source, key)
    prompts: list[Prompt] = []
    for number, row in enumerate(rows, start=1):
        try:
            prompts.append(parse_prompt(row[column]))
        except InputError as error:
            raise error.at(f"{key}: {source.path} row {number}", key=key, file=source.path, row=number) from error
    return prompts


def load_preferences(
    source: DataSource, key: str, max_bad_share: float
) -> tuple[list[PreferenceRecord], list[BadRecord]]:
    """The preference pairs of a data set, and separately its unusable rows; see `reward.records`."""
    rows = load_rows(source, key)
    for column in ("chosen", "rejected"):
        _refuse_without(column, rows, source, key)
    return load_records(rows, source.path, max_bad_share, key)


def load_examples(source: DataSource, key: str, max_bad_share: float) -> tuple[list[Example], list[BadRecord]]:
    """The rows of a data set to fine-tune on, and separately its unusable rows; see `examples.py`."""
    rows = load_rows(source, key)
    if not has_format(rows[0]):
        raise InputError(
            f"{key}: {source.path} has neither the columns prompt and completion (or response), nor messages, nor text;"
            f" it has {', '.join(rows[0])}",
            kind="missing",
            key=key,
            file=source.path,
            fix="map them with columns: {completion: …}",
        )
    return parse_rows(rows, parse_example, source.path, max_bad_share, key)


def hold_out(
    records: list[Record], group: Callable[[Record], str], share: float, seed: int, *purpose: str
) -> tuple[list[Record], list[Record]]:
    """Split off the records of a share of the groups, at least of one, so that no group is on both sides."""
    groups = sorted({group(record) for record in records})
    order = permutation(len(groups), seed, *purpose)
    chosen = {groups[i] for i in order[: max(1, round(share * len(groups)))]}
    train = [record for record in records if group(record) not in chosen]
    return train, [record for record in records if group(record) in chosen]


def note_bad_rows(path: Path, key: str, bad: list[BadRecord]) -> int:
    """Say which rows were left out, the first few, and list all of them in a file. Returns how many there are."""
    for record in bad[:5]:
        say(f"{key}: left out row {record.row}: {record.reason}")
    if bad and is_main() and path.parent.is_dir():  # `inspect` has no folder
        write_jsonl(path, (asdict(record) for record in bad))
        say(f"{key}: left out {len(bad)} unusable rows in all, see {path}")
    return len(bad)


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """All at once, so that two columns can swap their names."""
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _refuse_without(column: str, rows: list[dict[str, Any]], source: DataSource, key: str) -> None:
    if column not in rows[0]:
        message = f"{key}: {source.path} has no column {column!r}; it has {', '.join(rows[0])}"
        fix = f"map it with columns: {{{column}: …}}"
        raise InputError(message, kind="missing", key=key, file=source.path, fix=fix)


def _looks_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/", "~")) or _ending(Path(path)) in BUILDERS


def _ending(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _explained(source: DataSource, key: str, error: Exception) -> InputError:
    """What is wrong with a data set that could not be loaded, with the line in a JSONL file."""
    path = Path(source.path)
    where: dict[str, Any] = {"key": key, "file": source.path}
    if _ending(path) == ".jsonl" and path.is_file():
        opener = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):  # noqa: B007  (used where a line is bad)
                    if line.strip():
                        json.loads(line)
        except json.JSONDecodeError as mistake:
            message = f"{key}: {source.path} line {number}: not valid JSON: {mistake.msg}"
            return InputError(message, kind="unreadable", row=number, **where)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as mistake:
            message = f"{key}: {source.path}: damaged or not text: {mistake}"
            return InputError(message, kind="unreadable", **where)
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    if "corresponds to no data" in reason:
        message = f"{key}: {source.path} has no rows in split {source.split!r}"
        asked = f"{key}.split" if "[" in source.split else key  # otherwise the file has no rows at all
        return InputError(message, kind="empty", key=asked, file=source.path)
    kind = "unknown" if "Unknown split" in reason else "unreadable" if path.is_file() else "missing"
    message = f"{key}: could not load {source.path} (split {source.split!r}): {reason}"
    return InputError(message, kind=kind, **where)
