"""Several judges as one: the mean of their verdicts or the majority. Every vote is kept, and agreement reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from reward.errors import InputError
from reward.judges.base import Comparison, Judge, Verdict
from reward.judges.guest import rest
from reward.judges.judge_registry import check_judge, judge_prompt_check, judge_settings, make_judge
from reward.judges.judge_settings import JudgeSettings
from reward.records import Prompt


class Jury:
    """Asks each of its judges. A pair is valid if more than half of them gave a valid verdict; only those count."""

    concurrency = 1  # each judge has its own

    def __init__(self, judges: Sequence[Judge], vote: Literal["mean", "majority"] = "mean") -> None:
        names = [judge.identity for judge in judges]
        if len(set(names)) < max(2, len(names)):
            raise InputError(
                "judge.members: a jury needs at least two judges, each another one",
                kind="conflict",
                key="judge.members",
            )
        self._judges, self._vote = list(judges), vote
        self.identity = f"jury {vote} of {', '.join(names)}"
        versions = [getattr(judge, "version", "") for judge in judges]
        self.version = ",".join(versions) if any(versions) else ""
        self.sees_order = any(judge.sees_order for judge in judges)
        self.batch_size = max(judge.batch_size * judge.concurrency for judge in judges)

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict per comparison, with the votes of all judges. Raises as the judges do."""
        by_judge = [_ask(judge, comparisons) for judge in self._judges]
        return [self._verdict(votes) for votes in zip(*by_judge, strict=True)]

    def stop(self) -> None:
        """End the tries that are under way, because the evaluation has failed elsewhere."""
        for judge in self._judges:
            if callable(stop := getattr(judge, "stop", None)):
                stop()

    def rest(self) -> None:
        for judge in self._judges:
            rest(judge)

    def _verdict(self, verdicts: Sequence[Verdict]) -> Verdict:
        names = [judge.identity for judge in self._judges]
        votes = {name: v.preference if v.is_valid else None for name, v in zip(names, verdicts, strict=True)}
        said = "\n\n".join(f"{name}: {v.raw or v.invalid}" for name, v in zip(names, verdicts, strict=True))
        valid = [v.preference for v in verdicts if v.is_valid]
        if _too_few(len(valid), len(verdicts)):
            why = next(v.invalid or "no reason given" for v in verdicts if not v.is_valid)
            return Verdict(math.nan, raw=said, invalid=f"half of the jury or more gave no verdict: {why}", votes=votes)
        masses = [v.label_mass for v in verdicts if v.label_mass is not None]
        mass = float(np.mean(masses)) if masses else None
        return Verdict(_combined(valid, self._vote), raw=said, votes=votes, label_mass=mass)


class JuryKind:
    """Makes the judge `jury` of `members`; in one word `jury:ONE,TWO`."""

    def __call__(self, settings: JudgeSettings) -> Jury:
        return Jury([make_judge(member) for member in _members(settings)], settings.vote)

    def check(self, settings: JudgeSettings, run_dir: Path | None) -> None:
        for member in _members(settings):
            check_judge(member, run_dir)

    def prompt_check(self, settings: JudgeSettings) -> Callable[[Prompt], None]:
        checks = [judge_prompt_check(member) for member in _members(settings)]

        def check(prompt: Prompt) -> None:
            refusals: list[InputError] = []
            for read in checks:
                try:
                    read(prompt)
                except InputError as error:
                    refusals.append(error)
            if _too_few(len(checks) - len(refusals), len(checks)):
                raise refusals[0]

        return check


def _members(settings: JudgeSettings) -> list[JudgeSettings]:
    members = [judge_settings(member) for member in settings.judges]
    if len(members) < 2:
        raise InputError(
            "judge.members: a jury needs at least two judges",
            kind="missing",
            key="judge.members",
            fix="list them, as text or as sections, or write jury:ONE,TWO",
        )
    if any(member.kind == "jury" for member in members):
        raise InputError("judge.members: a jury is no member of a jury", kind="conflict", key="judge.members")
    return members


def _too_few(valid: int, judges: int) -> bool:
    """Whether so few of a jury's judges have a verdict that the jury has none."""
    return 2 * valid <= judges


def _ask(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    size = judge.batch_size
    batches = [comparisons[start : start + size] for start in range(0, len(comparisons), size)]
    with ThreadPoolExecutor(max_workers=judge.concurrency, thread_name_prefix="jury") as pool:
        return list(chain.from_iterable(pool.map(judge.compare, batches)))


def _combined(preferences: Sequence[float], vote: str) -> float:
    if vote == "mean":
        return float(np.mean(preferences))
    balance = sum((p > 0.5) - (p < 0.5) for p in preferences)
    return 0.5 if balance == 0 else float(balance > 0)
