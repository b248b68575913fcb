"""Many rows in little memory: rows of a data set that are read when they are asked for, and lists of token ids.

A row as Python objects takes several times its space in a file, and a list of token ids nine times that of the ids. So
what a data set holds stays bytes until a row is needed, and no list of all rows as objects is ever made.
"""

from __future__ import annotations

import os
import tempfile
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

from reward.errors import InputError

Row = Mapping[str, Any]
T = TypeVar("T", covariant=True)
S = TypeVar("S")


class RowTable(Sequence[T]):
    """Items that are made when they are asked for: `read` gives the item of a number below `size`.

    `each`, where there is one, gives all of them in their order for less.
    """

    def __init__(self, size: int, read: Callable[[int], T], each: Callable[[], Iterable[T]] | None = None) -> None:
        self._size, self._read, self._each = size, read, each

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> RowTable[T]: ...
    def __getitem__(self, place: int | slice) -> T | RowTable[T]:
        numbers = range(self._size)[place]
        return self._read(numbers) if isinstance(numbers, int) else self.take(numbers)

    def __iter__(self) -> Iterator[T]:
        return iter(self._each()) if self._each is not None else map(self._read, range(self._size))

    def take(self, numbers: Sequence[int]) -> RowTable[T]:
        """The items of those numbers, which may come in any order and more than once."""
        return RowTable(len(numbers), lambda i: self._read(numbers[i]))

    def map(self, change: Callable[[T], S]) -> RowTable[S]:
        """Each item changed when it is asked for."""
        return RowTable(self._size, lambda i: change(self._read(i)), lambda: map(change, self))

    @classmethod
    def joined(cls, tables: Sequence[Sequence[T]]) -> RowTable[T]:
        """The items of several, one after the other."""
        if len(tables) == 1 and isinstance(tables[0], RowTable):
            return tables[0]
        starts = [0, *accumulate(len(table) for table in tables)]

        def read(number: int) -> T:
            which = bisect_right(starts, number) - 1
            return tables[which][number - starts[which]]

        return cls(starts[-1], read, lambda: (item for table in tables for item in table))


Rows = RowTable[Row | InputError]


class Ragged(Sequence[list[int]]):
    """Lists of token ids, four bytes an id."""

    def __init__(self, lists: Iterable[Sequence[int]] = ()) -> None:
        self.flat, self.ends = array("i"), array("q", [0])
        for ids in lists:
            self.append(ids)

    def append(self, ids: Sequence[int]) -> None:
        self.flat.extend(ids)
        self.ends.append(len(self.flat))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, place: int) -> list[int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[int]]: ...
    def __getitem__(self, place: int | slice) -> list[int] | list[list[int]]:
        numbers = range(len(self))[place]
        if isinstance(numbers, int):
            return self.flat[self.ends[numbers] : self.ends[numbers + 1]].tolist()
        return [self[number] for number in numbers]


class Bytes:
    """The bytes of a file, read by place.

    `file`: whatever can seek; it stays open as long as this does. `changed` raises where it is no longer what it was.
    """

    def __init__(self, file: BinaryIO, changed: Callable[[], None] = lambda: None) -> None:
        self._file, self._changed, self._lock = file, changed, threading.Lock()

    @classmethod
    def of_our_own(cls, in_memory: int) -> Bytes:
        """Bytes to be appended; beyond so many they lie in a file that ends with the process."""
        file: Any = tempfile.SpooledTemporaryFile(in_memory)  # noqa: SIM115  # open as long as its rows are
        return cls(file)

    @classmethod
    def of_file(cls, path: Path, key: str) -> Bytes:
        """A file that stays where it is. Reading raises `InputError` once it was written to."""
        file = path.open("rb")

        def stamp() -> tuple[int, int]:
            found = os.fstat(file.fileno())
            return found.st_mtime_ns, found.st_size

        first = stamp()

        def changed() -> None:
            if stamp() != first:
                message = f"{key}: {path} was changed while its rows were in use"
                fix = "start again; while a run reads a large file, write another one instead"
                raise InputError(message, kind="conflict", key=key, file=path, fix=fix)

        return cls(file, changed)

    def read(self, start: int, end: int) -> bytes:
        """The bytes between two places; all from `start` on where `end` is -1."""
        with self._lock:
            self._changed()
            self._file.seek(start)
            return self._file.read(max(-1, end - start))

    def append(self, more: bytes) -> int:
        """Add bytes to a file of ours; returns where they end."""
        self._file.seek(0, os.SEEK_END)
        self._file.write(more)
        return self._file.tell()

    def lines(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """Where each line from a place on begins, and the line."""
        self._file.seek(start)
        for line in self._file:
            yield start, line
            start += len(line)
        self._changed()

    def rows(self, starts: array[int], ends: array[int], parse: Callable[[bytes], S]) -> RowTable[S]:
        """What lies between places, parsed when it is asked for."""
        return RowTable(len(starts), lambda i: parse(self.read(starts[i], ends[i])))
