"""Which prompts each PPO step takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from pe_rlhf.data.rows import SOURCE, task_numbers
from pe_rlhf.system.seeding import permutation
from reward.records import Columns, Prompt


@dataclass(frozen=True)
class PromptTable:
    """All prompts of a data set, as recipes give them and as token ids, with the other columns of their rows.

    Prompts and columns may be read from the file each time. `tasks` are the numbers of the prompts' tasks, where the
    policy is routed by task.
    """

    prompts: Sequence[Prompt]
    ids: Sequence[list[int]]
    columns: Columns
    tasks: list[int] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int]) -> PromptSet:
        """The prompts of those rows, which may be named more than once."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        tasks = None if self.tasks is None else [self.tasks[row] for row in rows]
        return PromptSet([self.prompts[row] for row in rows], [self.ids[row] for row in rows], columns, tasks)

    def routed(self, names: Sequence[str], key: str, task: str | None = None) -> Self:
        """With the task of each: `task`, or what the column `source` says. As they are where there are no `names`.

        Raises as `task_numbers`.
        """
        if not names:
            return self
        given = [task] * len(self) if task is not None else self.columns.get(SOURCE, [None] * len(self))
        return replace(self, tasks=task_numbers([*given], names, key))


@dataclass(frozen=True)
class PromptSet(PromptTable):
    """Some prompts, which are in memory."""

    prompts: list[Prompt]
    ids: list[list[int]]


class PromptOrder:
    """Endless shuffled passes over the prompts; the batch of step n follows from the seed and n only."""

    def __init__(self, prompts: PromptTable, batch_size: int, samples_per_prompt: int, seed: int) -> None:
        self._prompts = prompts
        self._batch_size, self._samples, self._seed = batch_size, samples_per_prompt, seed

    def batch(self, step: int) -> PromptSet:
        """The batch of a step, counted from 0, each prompt as often as it is to be answered.

        A batch may run over the end of one pass into the next.
        """
        rows: list[int] = []
        position = step * self._batch_size
        while len(rows) < self._batch_size:
            epoch, offset = divmod(position + len(rows), len(self._prompts))
            order = permutation(len(self._prompts), self._seed, "prompts", epoch)
            rows += order[offset : offset + self._batch_size - len(rows)]
        rows = [row for row in rows for _ in range(self._samples)]
        return self._prompts.take(rows)
