"""Files: JSON, JSONL, folders that appear whole or not at all, folders that one process has to itself.

A full disk or a kill leaves the old file in place.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pe_rlhf.system.processes import is_main
from pe_rlhf.system.progress import say
from reward.errors import InputError

# Half of a character, which a response that was cut within one may hold, has no bytes in UTF-8; in JSON it is escaped.
HALVES = "backslashreplace"


def write_whole(path: Path, text: str) -> None:
    """Write a text file, on rank 0; until the new one is whole, the old one is there."""
    if not is_main():
        return
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8", errors=HALVES)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Raises `InputError` where another process holds it.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when the block ends: a kill leaves the old one, or none.

    Where the block raises, nothing of the new folder stays.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for written in (*scratch.iterdir(), scratch):
            _flush(written)
        shutil.rmtree(path, ignore_errors=True)
        scratch.rename(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of files has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `InputError` where the file is missing, is not JSON, or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", kind="missing", file=path) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}", kind="unreadable", file=path) from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a JSON object but a {type(values).__name__}", kind="unreadable", file=path)
    return values


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one line, on rank 0; it is on its way to the disk when this returns."""
    if not is_main():
        return
    with path.open("a", encoding="utf-8", errors=HALVES) as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All lines of a file, none where it is missing. Raises `InputError` naming the line that is damaged."""
    rows = []
    for number, line in enumerate(_lines(path) if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{path} line {number}: not valid JSON: {error}", kind="unreadable", file=path, row=number
            ) from error
    return rows


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Keep the lines up to and with a step; a line that a kill left half written is dropped too."""
    if not path.exists() or not is_main():
        return
    kept = []
    for line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or cut inside a character
            break
        if row["step"] <= last_step:
            kept.append(line.decode() + "\n")
    write_whole(path, "".join(kept))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a summary; the old file is there until the new one is whole."""
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _lines(path: Path) -> list[bytes]:
    """The lines of a file, split at line feeds alone: `splitlines` also cuts where a JSON string may hold U+2028."""
    content = path.read_bytes()
    return content.removesuffix(b"\n").split(b"\n") if content else []
