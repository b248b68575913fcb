"""Files: JSON, JSONL, files and folders that appear whole or not at all, folders that one process has to itself.

A full disk or a kill leaves the old file in place. A file that cannot be read as what it should be is an `InputError`
that names it.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pe_rlhf.system.processes import is_main
from pe_rlhf.system.progress import say
from reward.errors import InputError
from reward.row_files import refuse_pipe

# Half of a character, which a response that was cut within one may hold, has no bytes in UTF-8; in JSON it is escaped.
HALVES = "backslashreplace"

# ---- whole or not at all ---------------------------------------------------------------------------------------------


@contextmanager
def new_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends; where the block raises, the old one stays.

    `shared`: several processes may be making the same file at once.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when the block ends: a kill leaves the old one, or none.

    Where the block raises, nothing of the new folder stays.
    """
    path = path.resolve()  # `absent/..` is another place once `absent` was made
    scratch = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        # Renaming is atomic, but a system that loses power may keep the new name and lose the content: flush it first.
        for written in (*scratch.iterdir(), scratch):
            _flush(written)
        shutil.rmtree(path, ignore_errors=True)
        scratch.rename(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file, on rank 0; until the new one is whole, the old one is there."""
    if is_main():
        with new_file(path) as scratch:
            scratch.write_text(text, encoding="utf-8", errors=HALVES)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Where another process holds it, wait until it is free, or raise `InputError` unless `wait`.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise InputError(
                f"{folder} is in use by another run (process {owner})", kind="in_use", file=folder
            ) from error
        except OSError as error:  # a file system without locks
            say(f"{folder} cannot be locked ({error.strerror}): take care that no other run uses it")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of files has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def csv_text(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    """Rows as CSV. A text that a spreadsheet would compute gets an apostrophe before it; numbers stay as they are."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _as_cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _as_cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


# ---- JSON ------------------------------------------------------------------------------------------------------------


class JsonObject(dict[str, Any]):
    """A JSON object of a file. A key that it lacks is a fault of the file: `InputError`, not `KeyError`.

    It is made without a file as every dict is, by `dataclasses.asdict` for example, and then is nothing but one.
    """

    def __init__(self, values: Any = (), file: Path | None = None, row: int | None = None) -> None:
        super().__init__(values)
        self._file, self._row = file, row

    def __missing__(self, key: str) -> Any:
        if self._file is None:
            raise KeyError(key)
        where = _place(self._file, self._row)
        raise InputError(f"{where}: has no {key!r}", kind="unreadable", key=key, file=self._file, row=self._row)


def read_json(path: Path) -> JsonObject:
    """A JSON object. Raises `InputError` where the file is missing, is not JSON, or holds something else."""
    try:
        refuse_pipe(path)
        text = path.read_bytes()
    except OSError as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise InputError(f"{path}: cannot be read: {error.strerror}", kind=kind, file=path) from error
    return _parsed(text, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object; the old file is there until the new one is whole."""
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_jsonl(path: Path, *, may_be_cut: bool = False) -> list[dict[str, Any]]:
    """All lines of a file, none where it is missing. Raises `InputError` naming the line that is damaged.

    `may_be_cut`: a last line that is not JSON is left out, as of a run that was killed or is writing.
    """
    lines = _lines(path) if path.exists() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_parsed(line, path, number))
        except InputError:
            if may_be_cut and number == len(lines):
                break
            raise
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of one JSON object per line; the old file is there until the new one is whole."""
    write_whole(path, "".join(_line(row) for row in rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one line, on rank 0; it is on its way to the disk when this returns."""
    if not is_main():
        return
    with path.open("a", encoding="utf-8", errors=HALVES) as file:
        file.write(_line(row))


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Keep the lines up to and with a step, on rank 0; a last line that a kill left half written is dropped too.

    Raises `InputError` naming any other line that is damaged, or has no step.
    """
    if not path.exists() or not is_main():
        return
    rows = read_jsonl(path, may_be_cut=True)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row["step"], int):
            where = _place(path, number)
            raise InputError(f"{where}: step is {row['step']!r}, no number", kind="unreadable", file=path, row=number)
    # The lines as they are, not as this version of the program would write them.
    kept = [line for line, row in zip(_lines(path), rows, strict=False) if row["step"] <= last_step]
    write_whole(path, "".join(line.decode() + "\n" for line in kept))


def _lines(path: Path) -> list[bytes]:
    """The lines of a file, split at line feeds only: `splitlines` also cuts where a JSON string may hold U+2028."""
    try:
        refuse_pipe(path)
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", kind="unreadable", file=path) from error
    return content.removesuffix(b"\n").split(b"\n") if content else []


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parsed(text: bytes, file: Path, row: int | None = None) -> JsonObject:
    where = _place(file, row)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, cut inside a character, or nested thousands deep
        raise InputError(f"{where}: not valid JSON: {error}", kind="unreadable", file=file, row=row) from error
    if not isinstance(values, dict):
        found = type(values).__name__
        raise InputError(f"{where}: not a JSON object but a {found}", kind="unreadable", file=file, row=row)
    return JsonObject(values, file, row)


def _place(file: Path, row: int | None) -> str:
    return str(file) if row is None else f"{file} line {row}"
