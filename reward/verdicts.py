"""Verdicts, and files of them: one row per verdict, as jsonl, json or csv (also .gz), ours or AlpacaEval's.

| column         | meaning                                                                                         |
|----------------|-------------------------------------------------------------------------------------------------|
| `preference`   | probability that the candidate wins; empty or null: the judge gave no valid verdict             |
| `candidate`    | optional: the policy; every candidate has a result of its own                                   |
| `baseline`     | optional: the policy that it was compared with                                                  |
| `position`     | optional: number of the prompt from 0; comparisons of one prompt are not independent            |
| `order`        | optional: `candidate_first` or `baseline_first`; both orders of a pair are one comparison       |
| `sample`       | optional: number of the sample, where a prompt has several pairs                                |
| `len_candidate`, `len_baseline` | optional: lengths of the responses, for the length-controlled win rate         |
| `difficulty`   | optional: of the instruction, on AlpacaEval's scale                                             |
| `score_candidate`, `score_baseline` | optional: the scores of a judge that scores                                |
| `human`        | optional: a person's preference, as `preference`                                                |
| `label_mass`   | optional: p(A) + p(B) of a chat model's first token; low: it was about to say something else    |
| `votes`        | optional: the preference of each member of a jury; null: no valid verdict                       |
| `judge`, `judge_version` | optional: who gave the verdict; of each judge only its newest version counts          |

AlpacaEval's `annotations.json` has `generator_2` (the candidate), `output_1`, `output_2` and a preference in [1, 2],
1.5 a draw. It is recognised by its columns, and the position is then the row of the candidate.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from reward.errors import InputError
from reward.records import Prompt
from reward.row_files import Row, finite_number, in_line, probability, read_rows, whole

FIRST, SECOND = "candidate_first", "baseline_first"
ALPACA_COLUMNS = {"generator_2", "output_2", "len_output_2"}
COLUMNS = {"score_a": "score_candidate", "score_b": "score_baseline"}  # the other fields are named as their columns
OPTIONAL = ("difficulty", "human", "label_mass", "judge_version", "votes")  # columns that many judges do not write


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to a comparison of A and B, and in a file of verdicts, where A is the candidate, its row.

    preference: probability that A wins, 0.5 a tie; NaN if the answer is invalid.
    score_a, score_b: None for judges that give no scores. raw: the judge's answer. reason: its explanation.
    invalid: why the answer could not be parsed; such an answer is never a tie.
    The other fields are of the row; the module's table says what they are. key: hash of the question.
    """

    preference: float
    score_a: float | None = None
    score_b: float | None = None
    raw: str | None = None
    reason: str | None = None
    invalid: str | None = None
    candidate: str = "candidate"
    baseline: str = "baseline"
    position: int | None = None
    order: str | None = None
    sample: int = 0
    len_candidate: float | None = None
    len_baseline: float | None = None
    difficulty: float | None = None
    human: float | None = None
    prompt: Prompt | None = None
    response_candidate: str | None = None
    response_baseline: str | None = None
    judge: str | None = None
    judge_version: str | None = None
    label_mass: float | None = None
    votes: dict[str, float | None] | None = None
    key: str | None = None

    @property
    def is_valid(self) -> bool:
        return not math.isnan(self.preference)

    def swap(self) -> Verdict:
        """The same answer to the swapped question."""
        votes = self.votes and {name: None if p is None else 1 - p for name, p in self.votes.items()}
        return replace(self, preference=1 - self.preference, score_a=self.score_b, score_b=self.score_a, votes=votes)

    @classmethod
    def not_understood(cls, why: str, raw: str | None = None, reason: str | None = None) -> Verdict:
        return cls(math.nan, raw=raw, reason=reason, invalid=why)

    def to_json(self) -> dict[str, Any]:
        """The row of a file of verdicts."""
        row = {COLUMNS.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        row["preference"] = self.preference if self.is_valid else None
        return {column: value for column, value in row.items() if value is not None or column not in OPTIONAL}

    @classmethod
    def from_json(cls, row: Row) -> Verdict:
        """The verdict of a row. Raises `InputError` for a column that is missing or out of range."""
        if "preference" not in row:
            raise InputError(
                f"there is no column 'preference'; there are {', '.join(map(str, row))}",
                kind="missing",
                key="preference",
            )
        preference, order, key = probability(row, "preference"), row.get("order") or None, row.get("key")
        if order not in (None, FIRST, SECOND):
            raise InputError(f"order is {order!r}, not {FIRST} or {SECOND}", kind="invalid", key="order")
        texts = ("raw", "reason", "invalid", "response_candidate", "response_baseline", "judge", "judge_version")
        numbers = ("len_candidate", "len_baseline", "difficulty", "label_mass")
        return cls(
            math.nan if preference is None else preference,
            score_a=finite_number(row, "score_candidate"),
            score_b=finite_number(row, "score_baseline"),
            candidate=str(row.get("candidate") or row.get("model") or "candidate"),
            baseline=str(row.get("baseline") or "baseline"),
            position=whole(row, "position"),
            order=order,
            sample=whole(row, "sample") or 0,
            human=probability(row, "human"),
            prompt=row.get("prompt"),
            votes=votes if isinstance(votes := row.get("votes"), dict) else None,
            key=key if key is None or isinstance(key, str) else json.dumps(key),
            **{name: finite_number(row, name) for name in numbers},
            **{name: row[name] for name in texts if isinstance(row.get(name), str)},
        )


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of a file that count: of a question that was asked again the last one.

    A file of ours (rows with `key`) may also hold verdicts of an earlier version of a judge; those are left out. Raises
    `InputError` naming file and line for what is missing, damaged or out of range.
    """
    verdicts: list[Verdict] = []
    seen: Counter[str] = Counter()
    for line, row in read_rows(path):
        try:
            verdict = _alpaca_verdict(row, seen) if ALPACA_COLUMNS & row.keys() else Verdict.from_json(row)
        except InputError as error:
            raise in_line(path, line, error) from error
        seen[verdict.candidate] += 1
        verdicts.append(verdict)
    if not verdicts:
        raise InputError(f"{path} has no verdicts", kind="empty", file=path)
    return _newest(verdicts)


def _newest(verdicts: list[Verdict]) -> list[Verdict]:
    version = {verdict.judge: verdict.judge_version for verdict in verdicts}
    last: dict[Hashable, Verdict] = {}
    for i, verdict in enumerate(verdicts):
        if verdict.key is None:
            last[i] = verdict
        elif verdict.judge_version == version[verdict.judge]:
            sides = verdict.candidate, verdict.baseline, verdict.judge
            last[sides, verdict.position, verdict.sample, verdict.order] = verdict
    return list(last.values())


def read_difficulty(path: Path) -> list[float]:
    """AlpacaEval's difficulty of each instruction by position: the column `instruction_difficulty` of a csv file.

    In its `df_gamed.csv` an instruction has several rows, of which the first one counts.
    """
    found: dict[int, float] = {}
    for line, row in read_rows(path):
        try:
            index, value = whole(row, "index"), finite_number(row, "instruction_difficulty")
        except InputError as error:
            raise in_line(path, line, error) from error
        if value is None:
            raise InputError(
                f"{path} line {line}: instruction_difficulty is missing",
                kind="missing",
                key="instruction_difficulty",
                file=path,
                row=line,
            )
        found.setdefault(len(found) if index is None else index, value)
    if sorted(found) != list(range(len(found))):
        raise InputError(f"{path}: the index does not run from 0 without a gap", kind="invalid", key="index", file=path)
    return [found[i] for i in range(len(found))]


def _alpaca_verdict(row: Row, seen: Counter[str]) -> Verdict:
    candidate = str(row.get("generator_2") or row.get("model") or "candidate")
    preference = finite_number(row, "preference")
    if preference == 0:  # a draw in early files
        preference = 1.5
    if preference is not None and not 1 <= preference <= 2:
        raise InputError(
            f"preference is {preference}, outside of AlpacaEval's range [1, 2]", kind="invalid", key="preference"
        )
    position = whole(row, "position")
    return Verdict(
        math.nan if preference is None else preference - 1,
        candidate=candidate,
        baseline=str(row.get("generator_1") or "baseline"),
        position=seen[candidate] if position is None else position,
        len_candidate=_length(row, "2"),
        len_baseline=_length(row, "1"),
        difficulty=finite_number(row, "difficulty"),
    )


def _length(row: Row, which: str) -> float | None:
    length = finite_number(row, f"len_output_{which}")
    output = row.get(f"output_{which}")
    return float(len(output)) if length is None and isinstance(output, str) else length
