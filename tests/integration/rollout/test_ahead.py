"""Rollouts ahead with real vLLM: the policy that is sampled from, exact resumes, and servers that fail meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config import PPOConfig
from pe_rlhf.data.prompt_order import PromptOrder, PromptSet
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.interface import BackgroundEngine
from pe_rlhf.stages.rollouts import Rollouts, pack, unpack
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import derive_seed
from tests.forked import Forked
from tests.integration.distributed.launching import run_on_ranks, start_ranks
from tests.integration.rollout.proxy import proxy
from tests.integration.rollout.vllm_support import MODES, NEW_TOKENS, PROMPTS, Make, difference
from tests.runs import Tree, read_jsonl, recipe, without_time, write_recipe

STEPS = 3


def rollouts(engine: Any, *roles: str, steps: int = STEPS) -> Rollouts:
    """A step takes eight of the prompts, from the first of the roles."""
    config = PPOConfig.model_validate(
        {
            "prompts": "prompts.jsonl",
            "reward": [{"function": "reward.scores:length"}],
            "steps": steps,
            "batch_size": 8,
            "rollout": {"engine": "vllm", "ahead": 1, "max_new_tokens": NEW_TOKENS},
        }
    )
    prompts = PromptOrder(PromptSet(["" for _ in PROMPTS], PROMPTS, {}), 8, 1, seed=5)
    return Rollouts(engine, roles[0], prompts, config, seed=5)


def seed_of(step: int) -> int:
    return derive_seed(5, "rollout", step)


def assert_a_step_ahead(sampler: BackgroundEngine, policies: Backbone) -> None:
    """Log-probs of the role as it was when the step before began, and the responses that `generate` gives then."""
    ahead = rollouts(sampler, "pissa")
    order = ahead._prompts
    found = []
    for step, role in enumerate(("pissa", "milora", "lora")):  # other weights at each step, as after an update
        ahead._role = role
        found.append(ahead.take(step))
    assert [rollout.version for rollout in found] == [0, 0, 1]
    for step, role in enumerate(("pissa", "pissa", "milora")):
        assert found[step].prompts == order.batch(step).ids
        assert difference(policies, role, found[step], temperature=0.8) < 1e-3
        sampler.sync(9, role)
        again = sampler.generate(order.batch(step).ids, seed_of(step))
        assert again.responses == found[step].responses
    assert ahead.wait() is None  # the last step begins with nothing


@pytest.mark.parametrize("sync", MODES)
def test_a_server_samples_a_step_ahead(make: Make, vllm_server: str, policies: Backbone, sync: str) -> None:
    assert_a_step_ahead(make(vllm_server, sync=sync), policies)


def test_a_kept_rollout_is_the_same(make: Make, vllm_server: str) -> None:
    engine = make(vllm_server)
    ahead = rollouts(engine, "pissa")
    ahead.take(0)
    kept = ahead.wait()
    assert kept is not None
    assert unpack(kept.prompts, pack(kept)) == kept
    other = rollouts(engine, "pissa")
    other.restore(1, pack(kept))
    assert other.take(1) == ahead.take(1) == kept


def test_a_server_that_goes_meanwhile_is_asked_again_for_the_newest_policy(
    make: Make, vllm_server: str, policies: Backbone
) -> None:
    with proxy(vllm_server) as dying:
        engine = make(dying.url)
        ahead = rollouts(engine, "pissa")
        dying.spoil = lambda count, answer: answer if count <= 8 else None
        ahead.take(0)
        assert ahead.wait() is None
        dying.spoil = lambda _, answer: answer
        ahead._role = "milora"
        rollout = ahead.take(1)
        assert rollout.version == 1
        assert difference(policies, "milora", rollout, temperature=0.8) < 1e-3
        engine.close()


def test_closing_does_not_wait_for_the_batch(make: Make, vllm_server: str) -> None:
    with proxy(vllm_server) as slow:
        engine = make(slow.url)
        ahead = rollouts(engine, "pissa")
        slow.spoil = lambda count, answer: slow.gate.clear() or answer if count > 8 else answer  # type: ignore[func-returns-value]
        ahead.take(0)
        start = time.monotonic()
        engine.close()
        assert time.monotonic() - start < 5


def test_another_version_is_refused(make: Make, vllm_server: str) -> None:
    ahead = rollouts(make(vllm_server), "pissa", steps=9)
    ahead.take(0)
    with pytest.raises(TrainingError) as caught:
        ahead.take(2)
    assert caught.value.kind == "mismatch"


def ahead_recipe(model: Path, url: str) -> Tree:
    rollout = {"engine": "vllm", "mode": "server", "urls": [url], "max_new_tokens": 8, "ahead": 1}
    return recipe("ppo", model=str(model), ppo__steps=6, ppo__learning_rate=3e-3) | {
        "ppo": {**recipe("ppo")["ppo"], "steps": 6, "learning_rate": 3e-3, "rollout": rollout}
    }


@contextmanager
def run_until(folder: Path, cache: Path, path: Path, steps: int) -> Iterator[Forked]:
    process = Forked(["run", str(path), "--run-dir", "cut"], folder, cache)
    metrics = folder / "cut" / "ppo" / "metrics.jsonl"
    process.wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= steps)
    yield process


def test_a_run_that_was_cut_goes_on_exactly(
    tmp_path: Path, vllm_model: Path, vllm_server: str, model_cache: Path, cli: Callable[..., Any]
) -> None:
    """Killed, and asked to stop: the metrics are those of the run that went through."""
    path = write_recipe(tmp_path, ahead_recipe(vllm_model, vllm_server))
    done = cli("run", path, "--run-dir", "whole")
    assert done.code == 0, done.err
    whole = [without_time(line) for line in read_jsonl(tmp_path / "whole" / "ppo" / "metrics.jsonl")]
    assert [line["staleness"] for line in whole] == [0, 1, 1, 1, 1, 1]
    assert whole[1]["logprob_mismatch"] > 10 * whole[0]["logprob_mismatch"]  # the premise: an update moves the policy
    with run_until(tmp_path, model_cache, path, steps=2) as process:
        process.kill()
    with_signal = Forked(["run", str(path), "--run-dir", "cut", "--resume"], tmp_path, model_cache)
    metrics = tmp_path / "cut" / "ppo" / "metrics.jsonl"
    with_signal.wait_until(lambda: metrics.read_bytes().count(b"\n") >= 4)
    with_signal.send(15)
    with_signal.finish(code=143)
    done = cli("run", path, "--run-dir", "cut", "--resume")
    assert done.code == 0, done.err
    cut = [without_time(line) for line in read_jsonl(metrics)]
    assert [line["step"] for line in cut] == [1, 2, 3, 4, 5, 6]
    for line, want in zip(cut, whole, strict=True):
        assert line == pytest.approx(want, rel=1e-4, abs=1e-6)


def metrics_of(run_dir: Path) -> list[Tree]:
    return [without_time(line) for line in read_jsonl(run_dir / "ppo" / "metrics.jsonl")]


def test_two_ranks_are_one(tmp_path: Path, vllm_model: Path, vllm_server: str, model_cache: Path) -> None:
    """The same batches are sampled ahead, from the same versions; also where the ranks are stopped and go on."""
    pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    path = write_recipe(tmp_path, ahead_recipe(vllm_model, vllm_server))
    Forked(["run", str(path), "--run-dir", "one"], tmp_path, model_cache).finish()
    one = metrics_of(tmp_path / "one")
    assert [line["staleness"] for line in one] == [0, 1, 1, 1, 1, 1]

    ranks = start_ranks(["run", str(path), "--run-dir", "two"], tmp_path, model_cache)
    metrics = tmp_path / "two" / "ppo" / "metrics.jsonl"
    try:
        ranks[0].wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)
        for rank in ranks:
            rank.send(15)
        for rank in ranks:
            rank.finish(code=143)
    finally:
        for rank in ranks:
            rank.kill()
    assert 2 <= len(metrics_of(tmp_path / "two")) < 6  # the premise: it was stopped on the way
    run_on_ranks(["run", str(path), "--run-dir", "two", "--resume"], tmp_path, model_cache)
    two = metrics_of(tmp_path / "two")
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    for line, want in zip(two, one, strict=True):
        assert line == pytest.approx(want, rel=2e-3, abs=2e-5)
