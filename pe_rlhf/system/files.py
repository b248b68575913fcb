"""Writing files so that a full disk or a kill leaves the old one, and folders that one process has to itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
            raise InputError(
                f"{folder} is in use by another run (process {file.read().strip() or 'unknown'})"
            ) from error
        except OSError as error:  # a file system without locks
            say(f"{folder} cannot be locked ({error.strerror}): take care that no other run uses it")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
