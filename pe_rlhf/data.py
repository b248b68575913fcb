"""Data sets of a recipe, through the `datasets` library: local files and the hub, with column mapping."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import datasets

from pe_rlhf.config import DataSource
from reward.errors import InputError
from reward.records import BadRecord, PreferenceRecord, Prompt, load_records, parse_prompt

# The builder of `datasets` for each ending of a local file.
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def load_rows(source: DataSource, key: str) -> list[dict[str, Any]]:
    """All rows of a data set, columns renamed to ours.

    `key` is where the recipe names it, for messages. Raises `InputError` for a file that is missing, empty or
    malformed, an ending that is not known, a split or a mapped column that is not there.
    """
    datasets.disable_progress_bars()
    path = Path(source.path)
    if _looks_local(source.path):
        builder = BUILDERS.get(_ending(path))
        if builder is None:
            raise InputError(f"{key}: {source.path} is none of {', '.join(BUILDERS)} (or .gz of one)")
        if not path.is_file():
            raise InputError(f"{key}: there is no file {source.path}")
        if path.stat().st_size == 0:
            raise InputError(f"{key}: {source.path} is empty")
        arguments: dict[str, Any] = {"path": builder, "data_files": str(path)}
    else:
        arguments = {"path": source.path, "name": source.name}
    try:
        table = datasets.load_dataset(**arguments, split=source.split)
    except Exception as error:  # the library raises a dozen kinds, from its own to pyarrow's
        raise InputError(f"{key}: {_why(path, source, error)}") from error
    rows = [dict(row) for row in table]
    if not rows:
        raise InputError(f"{key}: {source.path} has no rows")
    for theirs in source.columns.values():
        if theirs not in rows[0]:
            raise InputError(f"{key}: {source.path} has no column {theirs!r}; it has {', '.join(rows[0])}")
    return [_renamed(row, source.columns) for row in rows]


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
            raise InputError(f"{key}: {source.path} row {number}: {error}") from error
    return prompts


def load_preferences(
    source: DataSource, key: str, max_bad_share: float
) -> tuple[list[PreferenceRecord], list[BadRecord]]:
    """The preference pairs of a data set, and apart from them the rows that are none; see `reward.records`."""
    rows = load_rows(source, key)
    for column in ("chosen", "rejected"):
        _refuse_without(column, rows, source, key)
    return load_records(rows, f"{key}: {source.path}", max_bad_share)


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """All at once, so that two columns can swap their names."""
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def _refuse_without(column: str, rows: list[dict[str, Any]], source: DataSource, key: str) -> None:
    if column not in rows[0]:
        raise InputError(
            f"{key}: {source.path} has no column {column!r}; it has {', '.join(rows[0])};"
            f" map it with columns: {{{column}: …}}"
        )


def _looks_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/", "~")) or _ending(Path(path)) in BUILDERS


def _ending(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _why(path: Path, source: DataSource, error: Exception) -> str:
    """What is wrong with a data set that could not be loaded, with the line where that can be found out."""
    if _ending(path) == ".jsonl" and path.is_file():
        opener = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):  # noqa: B007  (used where a line is bad)
                    if line.strip():
                        json.loads(line)
        except json.JSONDecodeError as mistake:
            return f"{source.path} line {number}: not valid JSON: {mistake.msg}"
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as mistake:
            return f"{source.path}: damaged or not text: {mistake}"
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    if "corresponds to no data" in reason:
        return f"{source.path} has no rows in split {source.split!r}"
    return f"could not load {source.path} (split {source.split!r}): {reason}"
