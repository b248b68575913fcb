"""What a judge is asked, what it answers, and what it must be able to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from reward.records import Prompt


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt, for a judge."""

    prompt: Prompt
    response_a: str
    response_b: str

    def swap(self) -> Comparison:
        """The same question with the responses in the other order."""
        return Comparison(self.prompt, self.response_b, self.response_a)


@dataclass(frozen=True)
class Verdict:
    """A judge's answer.

    preference: probability that A wins, 0.5 a tie; NaN where the answer is invalid.
    score_a, score_b: None for judges that give no scores. raw: what the judge said, as it said it. reason: its
    explanation. invalid: why the answer could not be understood; such an answer is never a tie.
    """

    preference: float
    score_a: float | None = None
    score_b: float | None = None
    raw: str | None = None
    reason: str | None = None
    invalid: str | None = None

    def swap(self) -> Verdict:
        """The same answer to the swapped question."""
        return replace(self, preference=1 - self.preference, score_a=self.score_b, score_b=self.score_a)

    @classmethod
    def not_understood(cls, why: str, raw: str | None = None, reason: str | None = None) -> Verdict:
        return cls(math.nan, raw=raw, reason=reason, invalid=why)


class Judge(Protocol):
    """Anything that compares."""

    @property
    def identity(self) -> str:
        """What tells this judge from others: kind, model, prompt. Verdicts of another identity are not reused."""
        ...

    @property
    def sees_order(self) -> bool:
        """Whether the answer can depend on which response comes first; it is then asked both ways."""
        ...

    @property
    def batch_size(self) -> int:
        """How many comparisons it wants at once."""
        ...

    @property
    def concurrency(self) -> int:
        """How many batches may be under way at once, each in a thread."""
        ...

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict per comparison, in order.

        Raises `InputError` for what the user has to mend and `JudgeError` where the judge cannot go on.
        """
        ...
