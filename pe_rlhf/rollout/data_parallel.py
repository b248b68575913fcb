"""A rollout engine on each rank: the batch is split, and every rank gets the whole rollout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

from pe_rlhf.rollout.interface import BackgroundEngine, RolloutEngine
from pe_rlhf.system.distributed import all_rows, max_over_ranks, own_rows, world_size
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.types import Rollout


def over_ranks(engine: RolloutEngine) -> RolloutEngine:
    """The engine itself where there is one rank, else one that shares the work."""
    return SplitRollout(engine) if world_size() > 1 else engine


class SplitRollout:
    """Has each rank's engine sample its share. What is drawn for a response does not depend on the split."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def generate(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Rollout:
        return _joined(prompts, self._engine.generate(*_share(prompts, seed, rows)))

    def begin(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Callable[[], Rollout]:
        own_part = cast(BackgroundEngine, self._engine).begin(*_share(prompts, seed, rows))

        def wait() -> Rollout:
            part, failure = None, None
            try:
                part = own_part()
            except TrainingError as error:
                failure = error
            if max_over_ranks(int(failure is not None)):
                raise failure or TrainingError("the sampler of another process failed", kind="server")
            assert part is not None
            return _joined(prompts, part)

        return wait

    def sync(self, version: int, role: str | None = None) -> None:
        self._engine.sync(version, role)

    def close(self) -> None:
        self._engine.close()


def _share(prompts: list[list[int]], seed: int, rows: Sequence[int] | None) -> tuple[list[list[int]], int, list[int]]:
    """What this rank's engine is asked for."""
    numbers = list(rows if rows is not None else range(len(prompts)))
    own = own_rows(len(prompts))
    # As many on every rank: under ZeRO-3 the ranks take each step of sampling together.
    own += [0] * (math.ceil(len(prompts) / world_size()) - len(own))
    return [prompts[i] for i in own], seed, [numbers[i] for i in own]


def _joined(prompts: list[list[int]], part: Rollout) -> Rollout:
    """The whole rollout from what each rank's engine gave."""
    n = len(prompts)
    responses, logprobs, finish = all_rows(part.responses, n), all_rows(part.logprobs, n), all_rows(part.finish, n)
    return Rollout(prompts, responses, logprobs, finish, part.version, part.stop)
