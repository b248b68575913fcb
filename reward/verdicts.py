"""Files of verdicts: one row per comparison, as jsonl, json or csv (also .gz), ours or AlpacaEval's.

| column         | meaning                                                                                         |
|----------------|-------------------------------------------------------------------------------------------------|
| `preference`   | probability that the candidate wins; empty or null: the judge gave no valid verdict             |
| `candidate`    | optional: which policy; every candidate has a result of its own                                 |
| `baseline`     | optional: what it was compared with                                                             |
| `position`     | optional: number of the prompt from 0; comparisons of one prompt are not independent            |
| `order`        | optional: `candidate_first` or `baseline_first`; both orders of a pair are one comparison       |
| `sample`       | optional: number of the sample, where a prompt has several pairs                                |
| `len_candidate`, `len_baseline` | optional: lengths of the responses, for the length-controlled win rate         |
| `difficulty`   | optional: of the instruction, on AlpacaEval's scale                                             |
| `score_candidate`, `score_baseline` | optional: what a judge that scores gave to each                            |
| `human`        | optional: a person's preference, as `preference`                                                |

AlpacaEval's `annotations.json` has `generator_2` (the candidate), `output_1`, `output_2` and a preference in [1, 2],
1.5 a draw. It is told by its columns, and the position is then the row of the candidate.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward.errors import InputError

FIRST, SECOND = "candidate_first", "baseline_first"
ALPACA_COLUMNS = {"generator_2", "output_2", "len_output_2"}


@dataclass(frozen=True)
class VerdictRow:
    """One verdict; the module's table says what the fields are. preference is NaN where it is not valid."""

    preference: float
    candidate: str = "candidate"
    baseline: str = "baseline"
    position: int | None = None
    order: str | None = None
    sample: int = 0
    len_candidate: float | None = None
    len_baseline: float | None = None
    difficulty: float | None = None
    human: float | None = None
    score_candidate: float | None = None
    score_baseline: float | None = None


def read_verdicts(path: Path) -> list[VerdictRow]:
    """All rows of a file; where a question without a valid answer was asked again (`key`), the later one alone.

    Raises `InputError` naming file and line for what is missing, damaged or out of range.
    """
    rows: list[VerdictRow] = []
    invalid: dict[str, int] = {}
    seen: Counter[str] = Counter()
    for line, row in read_rows(path):
        try:
            verdict = _alpaca_row(row, seen) if ALPACA_COLUMNS & row.keys() else parse_verdict(row)
        except InputError as error:
            raise InputError(f"{path} line {line}: {error}") from error
        seen[verdict.candidate] += 1
        question = json.dumps([row.get("key"), verdict.position, verdict.sample, verdict.order])
        if "key" in row and question in invalid:
            rows[invalid.pop(question)] = verdict
            continue
        if math.isnan(verdict.preference):
            invalid[question] = len(rows)
        rows.append(verdict)
    if not rows:
        raise InputError(f"{path} has no verdicts")
    return rows


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and columns of each row of a jsonl, json or csv file; of a json list, the number of the item."""
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if ending not in (".jsonl", ".json", ".csv"):
        raise InputError(f"{path} is none of .jsonl, .json and .csv (or .gz of one)")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged or not text: {error}") from error
    if not text.strip():
        raise InputError(f"{path} is empty")
    if ending == ".csv":
        csv.field_size_limit(2**31 - 1)  # of a cell; a long response goes over the default
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                if None in row:
                    raise InputError(f"{path} line {reader.line_num}: more values than columns")
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num}: {error}") from error
    elif ending == ".json":
        yield from enumerate(_parsed_list(path, text), start=1)
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, _parsed(line, f"{path} line {number}")


def read_difficulty(path: Path) -> list[float]:
    """AlpacaEval's difficulty of each instruction by position: the column `instruction_difficulty` of a csv file.

    Its `df_gamed.csv` will do, too: an instruction that stands there several times is read once.
    """
    found: dict[int, float] = {}
    for line, row in read_rows(path):
        try:
            index = _whole(row, "index")
            found.setdefault(len(found) if index is None else index, _required(row, "instruction_difficulty"))
        except InputError as error:
            raise InputError(f"{path} line {line}: {error}") from error
    if sorted(found) != list(range(len(found))):
        raise InputError(f"{path}: the index must run from 0 without a gap")
    return [found[i] for i in range(len(found))]


def number(row: Mapping[str, Any], column: str) -> float | None:
    """A finite number, or None where the column is missing or empty."""
    value = row.get(column)
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan", "null", "none")):
        return None
    try:
        parsed = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        parsed = math.nan
    if math.isnan(parsed) and isinstance(value, float):  # NaN is how pandas writes what is missing
        return None
    if not math.isfinite(parsed):
        raise InputError(f"{column} is {value!r}, not a number")
    return parsed


def parse_verdict(row: Mapping[str, Any]) -> VerdictRow:
    """A row in our own columns. Raises `InputError` for what is missing or out of range."""
    if "preference" not in row:
        raise InputError(f"there is no column 'preference'; there are {', '.join(map(str, row))}")
    preference, human = _probability(row, "preference"), _probability(row, "human")
    order = row.get("order") or None
    if order not in (None, FIRST, SECOND):
        raise InputError(f"order is {order!r}, not {FIRST} or {SECOND}")
    return VerdictRow(
        math.nan if preference is None else preference,
        candidate=str(row.get("candidate") or row.get("model") or "candidate"),
        baseline=str(row.get("baseline") or "baseline"),
        position=_whole(row, "position"),
        order=order,
        sample=_whole(row, "sample") or 0,
        len_candidate=number(row, "len_candidate"),
        len_baseline=number(row, "len_baseline"),
        difficulty=number(row, "difficulty"),
        human=human,
        score_candidate=number(row, "score_candidate"),
        score_baseline=number(row, "score_baseline"),
    )


def _alpaca_row(row: Mapping[str, Any], seen: Counter[str]) -> VerdictRow:
    candidate = str(row.get("generator_2") or row.get("model") or "candidate")
    preference = number(row, "preference")
    if preference == 0:  # how early files write a draw
        preference = 1.5
    if preference is not None and not 1 <= preference <= 2:
        raise InputError(f"preference is {preference}; AlpacaEval's lie in [1, 2]")
    position = _whole(row, "position")
    return VerdictRow(
        math.nan if preference is None else preference - 1,
        candidate=candidate,
        baseline=str(row.get("generator_1") or "baseline"),
        position=seen[candidate] if position is None else position,
        len_candidate=_length(row, "2"),
        len_baseline=_length(row, "1"),
        difficulty=number(row, "difficulty"),
    )


def _length(row: Mapping[str, Any], which: str) -> float | None:
    length = number(row, f"len_output_{which}")
    output = row.get(f"output_{which}")
    return float(len(output)) if length is None and isinstance(output, str) else length


def _probability(row: Mapping[str, Any], column: str) -> float | None:
    value = number(row, column)
    if value is not None and not 0 <= value <= 1:
        raise InputError(f"{column} is {value:g}, not a probability in [0, 1]")
    return value


def _whole(row: Mapping[str, Any], column: str) -> int | None:
    value = number(row, column)
    if value is not None and (value < 0 or value != int(value)):
        raise InputError(f"{column} is {value:g}, not a whole number from 0")
    return None if value is None else int(value)


def _required(row: Mapping[str, Any], column: str) -> float:
    value = number(row, column)
    if value is None:
        raise InputError(f"{column} is missing")
    return value


def _parsed(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: not an object with named columns")
    return row


def _parsed_list(path: Path, text: str) -> list[Mapping[str, Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: a list of objects is wanted")
    return rows
