"""What every rollout engine does. Tokens in, tokens out: text is never tokenised again on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pe_rlhf.types import Rollout


class RolloutEngine(Protocol):
    """Samples responses from a role of the backbone, as of a known version of its adapter."""

    def generate(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Rollout:
        """One response per prompt (repeat a prompt for several).

        What is drawn for a response follows from the seed and its row in the whole batch, so the same prompts and seed
        give the same responses, on however many processes: `rows` are the rows of a process's share, 0, 1, … if left
        out.
        """
        ...

    def sync(self, version: int) -> None:
        """Sample from the adapter as it is now; that state is called `version`."""
        ...
