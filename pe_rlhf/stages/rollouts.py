"""The rollout of each PPO step: sampled when the step begins or, with `rollout.ahead`, during the step before.

A step that samples ahead takes what is ready and lets the engine begin with the next batch, from the policy as it is
then; so each rollout after the first is of the policy one update before the trainer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from pe_rlhf.config import PPOConfig
from pe_rlhf.data.prompt_order import PromptOrder
from pe_rlhf.rollout.by_task import sample
from pe_rlhf.rollout.interface import BackgroundEngine, RolloutEngine
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.progress import say
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.types import FinishReason, Rollout

FINISH: tuple[FinishReason, ...] = ("eos", "stop", "length")


class Rollouts:
    """What the steps of a run train on, in their order.

    Args:
        role: what the engine samples from.
    """

    def __init__(self, engine: RolloutEngine, role: str, prompts: PromptOrder, config: PPOConfig, seed: int) -> None:
        self._engine, self._role, self._prompts = engine, role, prompts
        self._ahead, self._steps, self._seed = bool(config.rollout.ahead), config.steps, seed
        self._stop = tuple(config.rollout.stop)
        self._next: Callable[[], Rollout] | None = None  # waits for the rollout of the next step
        self.seconds_before = 0.0  # that the rollout of the newest step took before that step began

    def first(self) -> Rollout:
        """The rollout that the first step will take."""
        start = time.monotonic()
        self._engine.sync(0, self._role)
        rollout = self._sample(0)
        self._next = lambda: rollout
        self.seconds_before = time.monotonic() - start
        return rollout

    def take(self, step: int) -> Rollout:
        """The rollout of a step, counted from 0. The role is as it is when the step begins.

        Raises `TrainingError` for one of another version of the role than this step's or, ahead, the one before.
        """
        rollout = self.wait()
        self.seconds_before = self.seconds_before if step == 0 else 0.0
        self._engine.sync(step, self._role)
        if rollout is None:
            rollout = self._sample(step)
        if not step - self._ahead <= rollout.version <= step:
            raise TrainingError(
                f"version {rollout.version} of the policy was sampled from, the trainer is at {step}",
                kind="mismatch",
                key="ppo.rollout",
            )
        if self._ahead and step + 1 < self._steps:
            engine = cast(BackgroundEngine, self._engine)  # the recipe refuses others
            self._next = engine.begin(*self._request(step + 1))
        else:
            self._next = None
        return rollout

    def wait(self) -> Rollout | None:
        """The rollout that is being sampled ahead, when it is done: the engine is free then.

        None where there is none, or where the engine failed: the step samples it itself then.
        """
        if self._next is None:
            return None
        try:
            rollout = self._next()
        except TrainingError as error:
            if error.kind not in ("server", "process"):
                raise
            say(f"{error}; the batch is sampled again, from the newest policy")
            self._next = None
            return None
        self._next = lambda: rollout
        return rollout

    def restore(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Have the rollout that `pack` kept for the step that a run goes on with."""
        if tensors and self._ahead:
            rollout = unpack(self._prompts.batch(step).ids, tensors, self._stop)
            self._next = lambda: rollout

    def _sample(self, step: int) -> Rollout:
        return sample(self._engine, *self._request(step), self._prompts.batch(step).tasks)

    def _request(self, step: int) -> tuple[list[list[int]], int]:
        """Prompts and seed of a step."""
        return self._prompts.batch(step).ids, derive_seed(self._seed, "rollout", step)


def pack(rollout: Rollout | None) -> dict[str, Tensor]:
    """A rollout as the tensors of a checkpoint; nothing for none. The prompts follow from the step."""
    if rollout is None:
        return {}
    return {
        "ids": torch.tensor([token for row in rollout.responses for token in row]),
        "logprobs": torch.tensor([value for row in rollout.logprobs for value in row], dtype=torch.float64),
        "lengths": torch.tensor([len(row) for row in rollout.responses]),
        "finish": torch.tensor([FINISH.index(reason) for reason in rollout.finish]),
        "version": torch.tensor(rollout.version),
    }


def unpack(prompts: list[list[int]], tensors: Mapping[str, Tensor], stop: tuple[str, ...] = ()) -> Rollout:
    """The inverse of `pack`."""
    lengths = tensors["lengths"].tolist()
    responses, logprobs = ([part.tolist() for part in tensors[name].split(lengths)] for name in ("ids", "logprobs"))
    finish = [FINISH[i] for i in tensors["finish"].tolist()]
    return Rollout(prompts, responses, logprobs, finish, int(tensors["version"]), stop)
