"""Where the rows of a data set come from: a local file or folder, or the hub through `datasets`.

That library takes two seconds to import, and lines of JSON need it for a slice only: it is imported where it is used.
"""

from __future__ import annotations

import pickle
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_rlhf.config import DataFile
from pe_rlhf.data.formats import converted
from pe_rlhf.data.local_files import IN_MEMORY, READERS, TABLES, ending, read_file
from pe_rlhf.data.packed_messages import unpacked
from pe_rlhf.data.row_table import Bytes, Row, Rows
from pe_rlhf.system.progress import console, say
from reward.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

LARGE = 50 * 2**20  # bytes: reading this takes seconds
SLICE = re.compile(r"([^\[\]+]+)(?:\[(\d*):(\d*)\])?")
ENDINGS = (*READERS, *TABLES)
SHUFFLE_SEED = 0  # of a stream: which rows a recipe has does not depend on its own seed


def load_rows(source: DataFile, key: str) -> Rows:
    """All rows of a data set, columns renamed to ours, and converted where it names a format.

    They are read from the file when they are asked for. `key` is where the recipe names the data set, for errors. A row
    that cannot be read is an `InputError` in its place. Raises `InputError` for a file that is missing, empty or
    damaged, an unknown ending, and a split, a mapped column or a format that does not exist.
    """
    rows = _local_rows(source, key) if _looks_local(source.path) else _hub_rows(source, key)
    if not rows:
        raise InputError(f"{key}: {source.path} has no rows", kind="empty", key=key, file=source.path)
    names = names_of(rows, set(source.columns.values()).issubset)
    for theirs in source.columns.values():
        if names and theirs not in names:
            message = f"{key}: {source.path} has no column {theirs!r}; it has {', '.join(names)}"
            raise InputError(message, kind="missing", key=f"{key}.columns", file=source.path)

    def renamed(row: Row | InputError) -> Row | InputError:
        return row if isinstance(row, InputError) else _renamed(row, source.columns)

    def with_messages(row: Row | InputError) -> Row | InputError:
        return row if isinstance(row, InputError) else unpacked(row)

    rows = rows.map(renamed) if source.columns else rows
    if source.format is None:
        return rows.map(with_messages)
    return converted(rows, source.format, key, source.path)


def names_of(rows: Iterable[Row | InputError], enough: Callable[[set[str]], bool]) -> list[str]:
    """The names of the columns of all rows, or of as many rows as it takes until they are `enough`."""
    names: dict[str, None] = {}
    for row in rows:
        if enough(set(names)):
            break
        names.update(dict.fromkeys(() if isinstance(row, InputError) else row))
    return list(names)


def _local_rows(source: DataFile, key: str) -> Rows:
    for setting, why in (("streaming", "its rows are never all in memory"), ("revision", "has no revisions")):
        if getattr(source, setting):
            message, fix = f"{key}: {source.path} is local, and {why}", f"leave {setting} out"
            raise InputError(message, kind="conflict", key=f"{key}.{setting}", file=source.path, fix=fix)
    path = Path(source.path).expanduser()
    path = path / source.data_dir if source.data_dir else path
    if path.is_dir():
        if saved := [name for name in ("state.json", "dataset_dict.json") if (path / name).is_file()]:
            return _saved_rows(path, saved[0], source, key)
        files = sorted(file for file in path.rglob("*") if file.is_file() and ending(file) in ENDINGS)
        split = source.split.split("[")[0]
        if named := [file for file in files if split in file.relative_to(path).as_posix()]:
            files, source = named, _as_train(source, split)
        if not files:
            raise InputError(f"{key}: {path} holds no file of rows", kind="missing", key=key, file=source.path)
    else:
        files = [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size > LARGE:
        say(f"{key}: reading {source.path}")
    rows = Rows.joined([_table(file, key) if ending(file) in TABLES else read_file(file, key) for file in files])
    if not rows:
        raise InputError(f"{key}: {source.path} is empty", kind="empty", key=key, file=source.path)
    return _sliced(rows, source, key)


def _sliced(rows: Rows, source: DataFile, key: str) -> Rows:
    """The slice that a split names, in the words of `datasets`; files know of one split, train."""
    if (plain := SLICE.fullmatch(source.split)) is not None and plain[1] == "train":
        start, end = (int(given) if given else None for given in plain.groups()[1:])
        if (start or 0) < (len(rows) if end is None else end) <= len(rows):
            return rows[start:end]
    import datasets

    where: dict[str, Any] = {"file": source.path}
    asked = [part.split("[")[0] for part in source.split.split("+")]
    if unknown := [name for name in asked if name != "train"]:
        message = f"{key}: {source.path} has no split {unknown[0]!r}; files have the split 'train' only"
        raise InputError(message, kind="unknown", key=key, **where)
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        message = f"{key}: {source.path} has no split {source.split!r}: {error}"
        raise InputError(message, kind="invalid", key=f"{key}.split", **where) from error
    kept = Rows.joined([rows[part.from_ : part.to] for part in parts])
    if not kept:
        message = f"{key}: {source.path} has no rows in split {source.split!r}"
        raise InputError(message, kind="empty", key=f"{key}.split", **where)
    return kept


class _Arrow(Rows):
    """The rows of an Arrow file, which are pages of the file until they are read."""

    def __init__(self, dataset: Dataset) -> None:
        every: Any = dataset  # typed as if a row could be a table
        super().__init__(len(dataset), lambda i: every[i], lambda: iter(every))
        self._dataset = dataset

    def take(self, numbers: Sequence[int]) -> Rows:
        return _Arrow(self._dataset.select(numbers))


def _table(path: Path, key: str) -> Rows:
    if not path.is_file():
        raise InputError(f"{key}: there is no file {path}", kind="missing", key=key, file=str(path))
    import datasets

    datasets.disable_progress_bars()
    try:
        return _Arrow(datasets.load_dataset(TABLES[ending(path)], data_files=str(path), split="train"))
    except Exception as error:  # the library raises a dozen classes, its own and pyarrow's
        message = f"{key}: {path} cannot be read: {_reason(error)}"
        raise InputError(message, kind="unreadable", key=key, file=str(path)) from error


def _saved_rows(path: Path, kind: str, source: DataFile, key: str) -> Rows:
    """Rows that `save_to_disk` wrote: of one split, or of several."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        message = f"{key}: {path} cannot be read: {_reason(error)}"
        raise InputError(message, kind="unreadable", key=key, file=source.path) from error
    if isinstance(saved, datasets.Dataset):
        return _sliced(_Arrow(saved), source, key)
    name = source.split.split("[")[0]
    if name not in saved:
        message = f"{key}: {source.path} has no split {name!r}; it has {', '.join(map(str, saved))}"
        raise InputError(message, kind="unknown", key=key, file=source.path)
    return _sliced(_Arrow(saved[name]), _as_train(source, name), key)


def _as_train(source: DataFile, split: str) -> DataFile:
    """The source where that split has been found and is all there is."""
    return source.model_copy(update={"split": source.split.replace(split, "train", 1)})


def _hub_rows(source: DataFile, key: str) -> Rows:
    import datasets

    # A download takes long enough to be watched: by the library's bar, or one line without a terminal.
    (datasets.enable_progress_bars if console.is_terminal else datasets.disable_progress_bars)()
    if not console.is_terminal:
        say(f"{key}: reading {source.path}")
    try:
        if source.streaming:
            return streamed(source, key)
        return _Arrow(datasets.load_dataset(**_hub_arguments(source), split=source.split))
    except InputError:
        raise
    except Exception as error:  # the library raises a dozen classes, its own and pyarrow's
        reason = _reason(error)
        kind = "unknown" if "Unknown split" in reason else "missing"
        message = f"{key}: could not load {source.path} (split {source.split!r}): {reason}"
        raise InputError(message, kind=kind, key=key, file=source.path) from error


def _hub_arguments(source: DataFile) -> dict[str, Any]:
    """What says which data set of the hub it is."""
    return {"path": source.path, "name": source.name, "data_dir": source.data_dir, "revision": source.revision}


def streamed(source: DataFile, key: str) -> Rows:
    """The rows of a split or its slice as they come, no more of them fetched than that; they are kept in a file.

    With `shuffle_buffer` they come shuffled, always in the same order. Raises `InputError` for a slice of another form
    than [a:b], and what the library raises.
    """
    import datasets

    if (found := SLICE.fullmatch(source.split)) is None:
        message = f"{key}: of a stream a split can be sliced as train[100:2000], not as {source.split!r}"
        raise InputError(message, kind="invalid", key=f"{key}.split", file=source.path)
    stream = datasets.load_dataset(**_hub_arguments(source), split=found[1], streaming=True)
    if source.shuffle_buffer:
        stream = stream.shuffle(seed=SHUFFLE_SEED, buffer_size=source.shuffle_buffer)
    first, last = (int(given) if given else None for given in found.groups()[1:])
    places, copy = array("q", [0]), Bytes.of_our_own(IN_MEMORY)
    for row in islice(stream, first, last):
        places.append(copy.append(pickle.dumps(row)))
    return copy.rows(places[:-1], places[1:], pickle.loads)


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    """All at once, so that two columns can swap their names."""
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return kept | {ours: row.get(theirs) for ours, theirs in columns.items()}


def _looks_local(path: str) -> bool:
    return Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or ending(Path(path)) in ENDINGS


def _reason(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300]
