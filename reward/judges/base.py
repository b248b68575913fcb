"""A question to a judge, and the protocol of judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from reward.records import Prompt
from reward.verdicts import Verdict

__all__ = ["Comparison", "Judge", "Verdict"]


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt, for a judge."""

    prompt: Prompt
    response_a: str
    response_b: str

    def swap(self) -> Comparison:
        """The same question with the responses in the other order."""
        return Comparison(self.prompt, self.response_b, self.response_a)


class Judge(Protocol):
    """Anything that compares."""

    @property
    def identity(self) -> str:
        """Kind, model and prompt of this judge. Verdicts of a judge with another identity are not reused."""
        ...

    @property
    def sees_order(self) -> bool:
        """True if the answer can depend on which response comes first; the judge is then asked in both orders."""
        ...

    @property
    def batch_size(self) -> int:
        """How many comparisons one call gets."""
        ...

    @property
    def concurrency(self) -> int:
        """How many batches may be judged at the same time, each in a thread."""
        ...

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict per comparison, in order.

        Raises `InputError` for a mistake of the user and `JudgeError` where the judge cannot go on.
        """
        ...
