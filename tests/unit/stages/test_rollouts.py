"""The rollout of each step: which batch, which version of the policy, and what a checkpoint keeps of one ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pe_rlhf.config import PPOConfig
from pe_rlhf.data.prompt_order import PromptOrder, PromptSet
from pe_rlhf.stages.rollouts import Rollouts, pack, unpack
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.types import Rollout
from reward.errors import Kind
from tests.failures import raises

PROMPTS = [[i, i + 1] for i in range(5, 12)]
ORDER = PromptOrder(PromptSet(["" for _ in PROMPTS], PROMPTS, {}), 3, 1, seed=5)
STEPS = 3


class Engine:
    """Answers at once with the version that it was given and the seed that it was asked with."""

    def __init__(self) -> None:
        self.version = -1
        self.begun: list[list[list[int]]] = []
        self.failure: TrainingError | None = None

    def sync(self, version: int, role: str | None = None) -> None:
        assert role == "policy"
        self.version = version

    def generate(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Rollout:
        return Rollout(prompts, [[seed]] * 3, [[-0.5]] * 3, ["eos"] * 3, self.version)

    def begin(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Callable[[], Rollout]:
        self.begun.append(prompts)
        rollout = self.generate(prompts, seed)

        def wait() -> Rollout:
            if self.failure is not None:
                raise self.failure
            return rollout

        return wait

    def close(self) -> None: ...


def rollouts(engine: Engine, ahead: bool) -> Rollouts:
    sampler: dict[str, Any] = {"engine": "vllm", "ahead": 1} if ahead else {}
    config = PPOConfig.model_validate({"prompts": "p.jsonl", "steps": STEPS, "rollout": {**sampler, "stop": ["."]}})
    return Rollouts(engine, "policy", ORDER, config, seed=5)


@pytest.mark.parametrize(("ahead", "versions"), [(False, [0, 1, 2]), (True, [0, 0, 1])])
def test_each_step_has_its_own_batch_and_seed(ahead: bool, versions: list[int]) -> None:
    engine = Engine()
    source = rollouts(engine, ahead)
    found = [source.take(step) for step in range(STEPS)]
    assert [rollout.version for rollout in found] == versions
    assert engine.version == 2
    for step, rollout in enumerate(found):
        assert rollout.prompts == ORDER.batch(step).ids
        assert rollout.responses == [[derive_seed(5, "rollout", step)]] * 3
    assert engine.begun == ([ORDER.batch(1).ids, ORDER.batch(2).ids] if ahead else [])  # after the last one none
    assert source.wait() is None


@pytest.mark.parametrize("ahead", [False, True])
def test_the_first_rollout_may_be_had_before_the_first_step(ahead: bool) -> None:
    engine = Engine()
    source = rollouts(engine, ahead)
    first = source.first()
    assert (first.version, first.prompts) == (0, ORDER.batch(0).ids)
    assert source.take(0) is first
    assert source.take(1).prompts == ORDER.batch(1).ids
    assert engine.begun == ([ORDER.batch(1).ids, ORDER.batch(2).ids] if ahead else [])


def test_what_is_ahead_can_be_waited_for_more_than_once() -> None:
    source = rollouts(Engine(), ahead=True)
    source.take(0)
    assert source.wait() is source.wait() is not None
    assert source.take(1).version == 0


@pytest.mark.parametrize("kind", ["server", "process", "not_finite"])
def test_where_an_engine_fails_ahead_the_step_samples_itself(kind: Kind) -> None:
    engine = Engine()
    source = rollouts(engine, ahead=True)
    source.take(0)
    engine.failure = TrainingError("down", kind=kind)
    if kind == "not_finite":  # another try has the same weights
        with raises(kind, TrainingError):
            source.take(1)
        return
    rollout = source.take(1)
    assert (rollout.version, rollout.prompts) == (1, ORDER.batch(1).ids)
    assert engine.begun[-1] == ORDER.batch(2).ids


@pytest.mark.parametrize(("ahead", "behind"), [(False, 1), (True, 2), (False, -1), (True, -1)])
def test_another_version_of_the_policy_is_refused(ahead: bool, behind: int) -> None:
    engine = Engine()
    source = rollouts(engine, ahead)
    other = Rollout(ORDER.batch(2).ids, [[1]] * 3, [[-0.5]] * 3, ["eos"] * 3, 2 - behind)
    source._next = lambda: other
    with raises("mismatch", TrainingError, key="ppo.rollout"):
        source.take(2)


def test_a_kept_rollout_is_the_same() -> None:
    batch = ORDER.batch(1).ids
    kept = Rollout(batch, [[7, 1], [8, 9, 10], [11]], [[-0.1, -0.2], [-3.0, -1e-9, -0.3], [-2.0]],
                   ["eos", "length", "stop"], 0, (".",))  # fmt: skip
    assert unpack(batch, pack(kept), (".",)) == kept
    source = rollouts(Engine(), ahead=True)
    source.restore(1, pack(kept))
    assert source.wait() == kept
    assert source.take(1) == kept
    assert pack(None) == {}
    for other, tensors in ((rollouts(Engine(), ahead=True), {}), (rollouts(Engine(), ahead=False), pack(kept))):
        other.restore(1, tensors)
        assert other.wait() is None
