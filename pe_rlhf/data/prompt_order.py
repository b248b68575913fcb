"""Which prompts each PPO step takes."""

from __future__ import annotations

from dataclasses import dataclass

from pe_rlhf.system.seeding import permutation
from reward.records import Prompt


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one step, as recipes give them and as token ids; repeated where several samples are wanted."""

    prompts: list[Prompt]
    ids: list[list[int]]


class PromptOrder:
    """Endless shuffled passes over the prompts; the batch of step n follows from the seed and n alone."""

    def __init__(
        self, prompts: list[Prompt], ids: list[list[int]], batch_size: int, samples_per_prompt: int, seed: int
    ) -> None:
        self._prompts, self._ids = prompts, ids
        self._batch_size, self._samples, self._seed = batch_size, samples_per_prompt, seed

    def batch(self, step: int) -> PromptBatch:
        """The batch of a step, counted from 0; a batch may run over the end of one pass into the next."""
        rows: list[int] = []
        position = step * self._batch_size
        while len(rows) < self._batch_size:
            epoch, offset = divmod(position + len(rows), len(self._prompts))
            order = permutation(len(self._prompts), self._seed, "prompts", epoch)
            rows += order[offset : offset + self._batch_size - len(rows)]
        rows = [row for row in rows for _ in range(self._samples)]
        return PromptBatch([self._prompts[row] for row in rows], [self._ids[row] for row in rows])
