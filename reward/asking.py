"""Asking a judge about many pairs: both orders, several at once, and every answer on disk before the next question.

The file has one JSON line per question that was answered (the columns of `reward.verdicts` and more), so a run that was
interrupted goes on from it and asks nothing twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reward.errors import InputError, JudgeError
from reward.judges.base import Comparison, Judge, Verdict
from reward.records import Prompt
from reward.summary import Outcome, pair_up
from reward.verdicts import FIRST, SECOND, parse_verdict

Row = dict[str, Any]
OnProgress = Callable[[int, float | None], None]


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt. position: number of the prompt; sample: which of several pairs of that prompt."""

    prompt: Prompt
    candidate: str
    baseline: str
    position: int
    sample: int = 0


@dataclass(frozen=True)
class Question:
    """A pair in one order (None: the judge sees none); `key` is a hash of all that the answer depends on."""

    pair: Pair
    order: str | None
    key: str

    @property
    def comparison(self) -> Comparison:
        comparison = Comparison(self.pair.prompt, self.pair.candidate, self.pair.baseline)
        return comparison.swap() if self.order == SECOND else comparison


class VerdictFile:
    """The answers so far, by key. Opening it mends what a kill left: a last line that is half written is dropped."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.rows: dict[str, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(f"{path} is being written by another process, which asks the same questions") from None
        self._read()

    def append(self, row: Row) -> None:
        """Write one answer; it is the system's to keep when this returns."""
        with self._lock:
            # ASCII: a response that was cut within a character may hold half of one, which UTF-8 has no bytes for.
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            self.rows[row["key"]] = row

    def forget_invalid(self, questions: Sequence[Question]) -> None:
        """Let those without a valid answer be asked again; the answer that comes then counts in place of the first."""
        for question in questions:
            if question.key in self.rows and self.rows[question.key]["preference"] is None:
                del self.rows[question.key]

    def close(self) -> None:
        self._file.close()

    def _read(self) -> None:
        whole = 0
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True), start=1):
            try:
                row = json.loads(line)
                key = row["key"]
            except (ValueError, KeyError, TypeError) as error:
                if line.endswith(b"\n"):
                    raise InputError(f"{self._path} line {number} is damaged: {error}") from error
                break
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            self.rows[key] = row
        with self._path.open("r+b") as file:
            file.truncate(whole)


def judge_pairs(
    judge: Judge,
    pairs: Sequence[Pair],
    path: Path,
    *,
    candidate: str = "candidate",
    baseline: str = "baseline",
    max_invalid_share: float = 0.05,
    on_progress: OnProgress = lambda done, win_rate: None,
) -> list[Outcome]:
    """Have every pair judged and return the outcomes in their order; `path` has a line per question.

    on_progress: told how many more questions are answered and the win rate so far.
    Raises `JudgeError` where more than `max_invalid_share` of the pairs have no valid verdict, as soon as that is
    certain, and whatever stops the judge. What was answered before stays in the file.
    """
    questions = [question for pair in pairs for question in _questions(judge, pair)]
    file = VerdictFile(path)
    try:
        if _Tally(file, questions, max_invalid_share, len(pairs)).is_refused:
            # An earlier start ended for that. Since then the judge's server may have been given more room.
            file.forget_invalid(questions)
        open_questions = [question for question in questions if question.key not in file.rows]
        tally = _Tally(file, questions, max_invalid_share, len(pairs))
        on_progress(len(questions) - len(open_questions), tally.win_rate)
        tally.refuse_invalid()
        names = {"candidate": candidate, "baseline": baseline, "judge": judge.identity}
        # Closed before the file is, whatever is raised here: what is under way is still written.
        with closing(_ask_all(judge, open_questions, file, names)) as answers:
            for answered in answers:
                for question in answered:
                    tally.add(question)
                on_progress(len(answered), tally.win_rate)
                tally.refuse_invalid()
    finally:
        file.close()
    rows = (parse_verdict(file.rows[question.key]) for question in questions if question.key in file.rows)
    # Both orders under one name: an earlier start may have called the same responses otherwise.
    outcomes = pair_up(replace(row, candidate=candidate, baseline=baseline) for row in rows)
    rank = {(pair.position, pair.sample): i for i, pair in enumerate(pairs)}
    return sorted(outcomes, key=lambda outcome: rank[outcome.row.position or 0, outcome.row.sample])


def _questions(judge: Judge, pair: Pair) -> list[Question]:
    version = [found] if (found := getattr(judge, "version", "")) else []  # of a judge whose source can be edited
    content = [judge.identity, *version, pair.position, pair.sample, pair.prompt, pair.candidate, pair.baseline]
    return [
        Question(pair, order, hashlib.sha256(json.dumps([*content, order]).encode()).hexdigest()[:24])
        for order in ((FIRST, SECOND) if judge.sees_order else (None,))
    ]


def _ask_all(
    judge: Judge, questions: list[Question], file: VerdictFile, names: dict[str, str]
) -> Generator[list[Question]]:
    """Batches as they are answered; at most `judge.concurrency` are under way. The first failure ends it.

    An answer is written by the thread that got it, at once: what has been paid for is not lost to what fails elsewhere.
    """

    def ask(batch: list[Question]) -> list[Question]:
        verdicts = judge.compare([question.comparison for question in batch])
        for question, verdict in zip(batch, verdicts, strict=True):
            file.append(_row(question, verdict, names))
        return batch

    starts = iter(range(0, len(questions), judge.batch_size))
    running: set[Future[list[Question]]] = set()
    pool = ThreadPoolExecutor(max_workers=judge.concurrency, thread_name_prefix="judge")
    try:
        while True:
            while len(running) < judge.concurrency and (start := next(starts, None)) is not None:
                running.add(pool.submit(ask, questions[start : start + judge.batch_size]))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BaseException:
        # No further tries of the questions under way, but what they are being answered is still kept.
        if callable(stop := getattr(judge, "stop", None)):
            stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _row(question: Question, verdict: Verdict, names: dict[str, str]) -> Row:
    pair = question.pair
    own = verdict.swap() if question.order == SECOND else verdict
    return {
        "key": question.key,
        "position": pair.position,
        "sample": pair.sample,
        "order": question.order,
        "preference": None if math.isnan(own.preference) else own.preference,
        "invalid": own.invalid,
        "score_candidate": own.score_a,
        "score_baseline": own.score_b,
        "raw": own.raw,
        "reason": own.reason,
        "prompt": pair.prompt,
        "response_candidate": pair.candidate,
        "response_baseline": pair.baseline,
        "len_candidate": len(pair.candidate),
        "len_baseline": len(pair.baseline),
        **names,
    }


class _Tally:
    """The win rate so far and the pairs that have no valid verdict."""

    def __init__(self, file: VerdictFile, questions: Sequence[Question], max_share: float, pairs: int) -> None:
        self._file, self._max_share, self._pairs = file, max_share, pairs
        self._sum, self._valid = 0.0, 0
        self._invalid: dict[tuple[int, int], str] = {}
        for question in questions:
            if question.key in file.rows:
                self.add(question)

    def add(self, question: Question) -> None:
        row = self._file.rows[question.key]
        if row["preference"] is None:
            self._invalid[question.pair.position, question.pair.sample] = row["invalid"] or "no reason given"
        else:
            self._sum += row["preference"]
            self._valid += 1

    @property
    def win_rate(self) -> float | None:
        """The mean of the answers so far: of single orders, so it is without the rule for flips."""
        return self._sum / self._valid if self._valid else None

    @property
    def is_refused(self) -> bool:
        """Whether too many pairs have no valid verdict."""
        return len(self._invalid) > self._max_share * self._pairs

    def refuse_invalid(self) -> None:
        if self.is_refused:
            why = next(iter(self._invalid.values()))
            raise JudgeError(
                f"{len(self._invalid)} of {self._pairs} pairs have no valid verdict, more than the"
                f" {self._max_share:.1%} allowed; the first: {why}"
            )


def make_pairs(prompts: Sequence[Prompt], candidates: Sequence[str], baselines: Sequence[str]) -> list[Pair]:
    """One pair per prompt. Equal prompts are samples of one position, since their comparisons go together."""
    numbered = zip(prompts, candidates, baselines, number_prompts(prompts), strict=True)
    return [Pair(prompt, mine, other, *numbers) for prompt, mine, other, numbers in numbered]


def number_prompts(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Position and sample of each prompt: equal prompts share a position, since their comparisons go together."""
    position_of: dict[str, int] = {}
    samples: Counter[int] = Counter()
    numbered: list[tuple[int, int]] = []
    for prompt in prompts:
        position = position_of.setdefault(json.dumps(prompt), len(position_of))
        numbered.append((position, samples[position]))
        samples[position] += 1
    return numbered
