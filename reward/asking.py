"""Asking a judge about many pairs: both orders, several at once, and every answer on disk before the next question.

The file has one JSON line per answered question (see `reward.verdicts`), so an interrupted evaluation goes on from it
and asks nothing twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from reward.advance import Advance, no_progress
from reward.errors import InputError, JudgeError
from reward.judges.base import Comparison, Judge, Verdict
from reward.judges.guest import rest
from reward.records import Prompt
from reward.row_files import damaged, refuse_pipe
from reward.summary import Outcome, pair_up
from reward.verdicts import FIRST, SECOND


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt. position: number of the prompt; sample: number of the pair among those of it."""

    prompt: Prompt
    candidate: str
    baseline: str
    position: int
    sample: int = 0


@dataclass(frozen=True)
class Question:
    """A pair in one order (None: the judge sees no order); `key` is a hash of all that the answer depends on."""

    pair: Pair
    order: str | None
    key: str

    @property
    def comparison(self) -> Comparison:
        comparison = Comparison(self.pair.prompt, self.pair.candidate, self.pair.baseline)
        return comparison.swap() if self.order == SECOND else comparison


class VerdictFile:
    """The answers so far, by key. Opening it drops a last line that a kill left half written."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.answers: dict[str, Verdict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            refuse_pipe(path)
        self._file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"{path} is being written by another process, which asks the same questions", kind="in_use", file=path
            ) from None
        try:
            self._read()
        except BaseException:
            self._file.close()  # and with it the lock
            raise

    def append(self, key: str, answer: Verdict) -> None:
        """Write one answer; it is in the system's hands when this returns."""
        with self._lock:
            # ASCII: a response that was cut within a character may hold half of one, which UTF-8 has no bytes for.
            self._file.write(json.dumps(answer.to_json(), allow_nan=False) + "\n")
            self._file.flush()
            self.answers[key] = answer

    def forget_invalid(self, questions: Sequence[Question]) -> None:
        """Let questions without a valid answer be asked again; the new answer then counts instead of the first."""
        for question in questions:
            if question.key in self.answers and not self.answers[question.key].is_valid:
                del self.answers[question.key]

    def close(self) -> None:
        self._file.close()

    def _read(self) -> None:
        intact = 0
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                self.answers[row["key"]] = Verdict.from_json(row)
            except (ValueError, KeyError, TypeError) as error:
                raise damaged(self._path, number, error) from error
            intact += len(line)
        with self._path.open("r+b") as file:
            file.truncate(intact)


def judge_pairs(
    judge: Judge,
    pairs: Sequence[Pair],
    path: Path,
    *,
    candidate: str = "candidate",
    baseline: str = "baseline",
    max_invalid_share: float = 0.05,
    advance: Advance = no_progress,
) -> list[Outcome]:
    """Have every pair judged and return the outcomes in their order; `path` has a line per question.

    advance: gets the number of answered questions, and the win rate so far as its note.
    Raises `JudgeError` as soon as more than `max_invalid_share` of the pairs are certain to have no valid verdict, and
    whatever stops the judge. The answers before that stay in the file.
    """
    questions = [question for pair in pairs for question in _questions(judge, pair)]
    file = VerdictFile(path)
    try:
        if _Tally(file, questions, max_invalid_share, len(pairs)).is_refused:
            # An earlier start ended for that reason. Since then the judge's server may have been given more room.
            file.forget_invalid(questions)
        open_questions = [question for question in questions if question.key not in file.answers]
        tally = _Tally(file, questions, max_invalid_share, len(pairs))
        advance(len(questions) - len(open_questions), tally.note)
        tally.refuse_invalid()
        names = {"candidate": candidate, "baseline": baseline, "judge": judge.identity}
        names |= {"judge_version": version} if (version := getattr(judge, "version", "")) else {}
        # Closed before the file is, whatever is raised here: answers that are under way are still written.
        with closing(_ask_all(judge, open_questions, file, names)) as answers:
            for answered in answers:
                for question in answered:
                    tally.add(question)
                advance(len(answered), tally.note)
                tally.refuse_invalid()
    finally:
        file.close()
        rest(judge)
    # Both orders under one name: an earlier start may have had other names for the same responses.
    found = (file.answers[question.key] for question in questions if question.key in file.answers)
    outcomes = pair_up(replace(answer, candidate=candidate, baseline=baseline) for answer in found)
    rank = {(pair.position, pair.sample): i for i, pair in enumerate(pairs)}
    return sorted(outcomes, key=lambda outcome: rank[outcome.verdict.position or 0, outcome.verdict.sample])


def _questions(judge: Judge, pair: Pair) -> list[Question]:
    version = [found] if (found := getattr(judge, "version", "")) else []  # changes with the source of a user's judge
    content = [judge.identity, *version, pair.position, pair.sample, pair.prompt, pair.candidate, pair.baseline]
    return [
        Question(pair, order, hashlib.sha256(json.dumps([*content, order]).encode()).hexdigest()[:24])
        for order in ((FIRST, SECOND) if judge.sees_order else (None,))
    ]


def _ask_all(
    judge: Judge, questions: list[Question], file: VerdictFile, names: dict[str, str]
) -> Generator[list[Question]]:
    """Batches as they are answered, at most `judge.concurrency` at the same time. The first failure ends it.

    The thread that gets an answer writes it at once, so that no failure elsewhere loses an answer that was paid for.
    """

    def ask(batch: list[Question]) -> list[Question]:
        verdicts = judge.compare([question.comparison for question in batch])
        for question, verdict in zip(batch, verdicts, strict=True):
            file.append(question.key, _placed(question, verdict, names))
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
        # Questions that are under way are not tried again, but their answers are still kept.
        if callable(stop := getattr(judge, "stop", None)):
            stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _placed(question: Question, verdict: Verdict, names: dict[str, str]) -> Verdict:
    """The answer with the candidate as A, and the question that it belongs to."""
    pair = question.pair
    return replace(
        verdict.swap() if question.order == SECOND else verdict,
        key=question.key,
        position=pair.position,
        sample=pair.sample,
        order=question.order,
        prompt=pair.prompt,
        response_candidate=pair.candidate,
        response_baseline=pair.baseline,
        len_candidate=len(pair.candidate),
        len_baseline=len(pair.baseline),
        **names,
    )


class _Tally:
    """The win rate so far and the pairs that have no valid verdict."""

    def __init__(self, file: VerdictFile, questions: Sequence[Question], max_share: float, pairs: int) -> None:
        self._file, self._max_share, self._pairs = file, max_share, pairs
        self._sum, self._valid = 0.0, 0
        self._invalid: dict[tuple[int, int], str] = {}
        for question in questions:
            if question.key in file.answers:
                self.add(question)

    def add(self, question: Question) -> None:
        answer = self._file.answers[question.key]
        if answer.is_valid:
            self._sum += answer.preference
            self._valid += 1
        else:
            self._invalid[question.pair.position, question.pair.sample] = answer.invalid or "no reason given"

    @property
    def note(self) -> str:
        """The mean of the answers so far, each order by itself: the rule for flips is applied at the end."""
        return f"win-rate so far {self._sum / self._valid:.3f}" if self._valid else ""

    @property
    def is_refused(self) -> bool:
        """Whether too many pairs have no valid verdict."""
        return len(self._invalid) > self._max_share * self._pairs

    def refuse_invalid(self) -> None:
        if self.is_refused:
            why = next(iter(self._invalid.values()))
            raise JudgeError(
                f"{len(self._invalid)} of {self._pairs} pairs have no valid verdict, more than the"
                f" {self._max_share:.1%} allowed; the first: {why}",
                kind="judge",
                key="max_invalid_share",
            )


def make_pairs(prompts: Sequence[Prompt], candidates: Sequence[str], baselines: Sequence[str]) -> list[Pair]:
    """One pair per prompt; equal prompts are samples of one position."""
    numbered = zip(prompts, candidates, baselines, number_prompts(prompts), strict=True)
    return [Pair(prompt, mine, other, *numbers) for prompt, mine, other, numbers in numbered]


def number_prompts(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Position and sample of each prompt. Equal prompts share a position: their comparisons are not independent."""
    position_of: dict[str, int] = {}
    samples: Counter[int] = Counter()
    numbered: list[tuple[int, int]] = []
    for prompt in prompts:
        position = position_of.setdefault(json.dumps(prompt), len(position_of))
        numbered.append((position, samples[position]))
        samples[position] += 1
    return numbered
