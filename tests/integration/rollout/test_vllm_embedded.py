"""The embedded vLLM engine, the real one: what it samples from, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.by_task import RoutedRollout
from pe_rlhf.rollout.vllm.embedded import EmbeddedVLLM
from pe_rlhf.system.failures import TrainingError
from tests.failures import raises
from tests.integration.rollout.conftest import ROUTED, new_engine
from tests.integration.rollout.serving import ROOT
from tests.integration.rollout.test_ahead import assert_a_step_ahead
from tests.integration.rollout.vllm_support import (
    ENDS,
    NEW_TOKENS,
    PROMPTS,
    TEMPERATURE,
    add_trained,
    config,
    difference,
)
from tests.tiny import ALL_INITS, train_role
from tests.unit.rollout.test_hf import assert_sampled_from

# ---- what it samples from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [*ALL_INITS, "anchor"])
def test_log_probs_are_the_trainers(embedded: EmbeddedVLLM, policies: Backbone, init: str) -> None:
    embedded.sync(4, init)
    rollout = embedded.generate(PROMPTS, seed=1)
    assert rollout.version == 4
    assert difference(policies, init, rollout) < 1e-4
    others = {difference(policies, other, rollout) for other in [*ALL_INITS, "anchor"] if other != init}
    assert min(others) > 1e-2  # the premise: the roles differ by more than they may


def test_two_versions_share_no_cached_prefix(embedded: EmbeddedVLLM, policies: Backbone) -> None:
    """Long equal prompts, so that there are whole blocks in the prefix cache, and updates in between."""
    prompts = [list(range(2, 42))] * 8
    for version in range(3):
        embedded.sync(version, "pissa")
        rollout = embedded.generate(prompts, seed=1)
        again = embedded.generate(prompts, seed=2)  # its prefixes come from the cache
        assert max(difference(policies, "pissa", r) for r in (rollout, again)) < 1e-4
        train_role(policies, "pissa", steps=1)
        assert difference(policies, "pissa", rollout) > 1e-2


def test_responses_follow_from_the_seed_and_their_row(embedded: EmbeddedVLLM) -> None:
    embedded.sync(0, "lora")
    whole = embedded.generate(PROMPTS, seed=1)
    assert embedded.generate(PROMPTS, seed=1).responses == whole.responses
    assert embedded.generate(PROMPTS, seed=2).responses != whole.responses
    part = embedded.generate(PROMPTS[4:8], seed=1, rows=range(4, 8))
    assert part.responses == whole.responses[4:8]
    assert len({tuple(response) for response in whole.responses[::4]}) > 1  # equal prompts, different responses


def test_responses_end_with_the_first_eos_or_at_the_limit(embedded: EmbeddedVLLM) -> None:
    embedded.sync(0, "lora")
    rollout = embedded.generate(PROMPTS * 2, seed=3)
    assert rollout.prompts == PROMPTS * 2
    for response, logprobs, finish in zip(rollout.responses, rollout.logprobs, rollout.finish, strict=True):
        assert len(logprobs) == len(response) <= NEW_TOKENS
        assert not set(response[:-1]) & set(ENDS)
        assert (response[-1] in ENDS) == (finish == "eos")
        assert finish == "eos" or len(response) == NEW_TOKENS
    assert set(rollout.finish) == {"eos", "length"}


def test_a_token_has_the_probability_of_the_model(embedded: EmbeddedVLLM, policies: Backbone) -> None:
    embedded.sync(0, "anchor")
    rollout = embedded.generate([[5, 6, 7]] * 600, seed=5)
    logits_V = torch.softmax(_anchor_logits(policies).double() / TEMPERATURE, dim=-1).numpy()
    assert_sampled_from(logits_V, np.array([response[0] for response in rollout.responses]))


def _anchor_logits(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone(torch.tensor([[5, 6, 7]])).logits[0, -1]


def test_no_weights_pile_up(embedded: EmbeddedVLLM) -> None:
    for version in range(3):
        embedded.sync(version, "milora")
    assert len(list(embedded._exchange.folder.iterdir())) <= 1


def test_an_embedded_engine_samples_a_step_ahead(embedded: EmbeddedVLLM, policies: Backbone) -> None:
    assert_a_step_ahead(embedded, policies)


def test_responses_are_of_the_prompts_own_task(embedded: EmbeddedVLLM, policies: Backbone) -> None:
    """It gets one task's policy after the other; each row's log-probs are those of its own task's route."""
    tasks = [i % 2 for i in range(len(PROMPTS))]
    routed = RoutedRollout(embedded, policies, ROUTED)
    routed.sync(1)
    found = routed.generate(PROMPTS, seed=1, tasks=tasks)
    other = routed.generate(PROMPTS, seed=1, tasks=[1 - task for task in tasks])
    assert found.tasks == tuple(tasks)
    assert difference(policies, ROUTED, found) < 1e-4
    assert difference(policies, ROUTED, other) < 1e-4
    assert other.responses != found.responses


@pytest.mark.parametrize("embedded", ["merged"], indirect=True)
def test_merged_weights_of_every_kind_are_the_policys(
    embedded: EmbeddedVLLM, vllm_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(str(vllm_model))
    monkeypatch.setattr(embedded, "_backbone", backbone)
    for version, kind in enumerate(sorted(KINDS)):
        add_trained(backbone, kind)
        embedded.sync(version, kind)
        assert difference(backbone, kind, embedded.generate(PROMPTS, seed=1)) < 1e-4, kind


def test_an_adapter_that_is_no_lora_cannot_be_one_at_vllm(vllm_model: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(vllm_model))
    add_trained(backbone, "dora")
    with raises("conflict", key="rollout.sync"):
        new_engine(backbone, config(sync="adapter"), tmp_path)


# ---- how it ends ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doomed(policies: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedVLLM]:
    """An engine that the tests, in their order, do to death."""
    engine = new_engine(policies, config(sync="adapter", timeout=60), tmp_path_factory.mktemp("doomed"))
    engine.sync(7, "milora")
    yield engine
    engine.close()


def test_a_killed_engine_is_started_again_and_gives_the_same(doomed: EmbeddedVLLM, policies: Backbone) -> None:
    before = doomed.generate(PROMPTS, seed=1)
    os.kill(doomed._process.pid, signal.SIGKILL)
    after = doomed.generate(PROMPTS, seed=1)
    assert (after.responses, after.version) == (before.responses, 7)
    assert difference(policies, "milora", after) < 1e-4


def test_an_engine_that_was_killed_while_it_was_not_asked(doomed: EmbeddedVLLM, policies: Backbone) -> None:
    os.kill(doomed._process.pid, signal.SIGKILL)
    doomed.sync(8, "milora")
    after = doomed.generate(PROMPTS, seed=1)
    assert after.version == 8
    assert difference(policies, "milora", after) < 1e-4


def test_an_engine_that_hangs_is_stopped(doomed: EmbeddedVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doomed, "_config", config(timeout=1))
    process = doomed._process.pid
    os.kill(process, signal.SIGSTOP)
    with pytest.raises(TrainingError) as caught:
        doomed.generate(PROMPTS, seed=1)
    assert (caught.value.kind, caught.value.file) == ("process", str(doomed._log))
    assert not psutil.pid_exists(process)


STARTS_AN_ENGINE = """
import sys, time
from pathlib import Path
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.config import BackboneConfig, RolloutConfig
from pe_rlhf.rollout.vllm.embedded import EmbeddedVLLM

backbone = load_backbone(sys.argv[1])
config = RolloutConfig(engine="vllm", max_new_tokens=4)
engine = EmbeddedVLLM(backbone, "anchor", config, BackboneConfig(), longest_prompt=4, log=Path("vllm.log"))
print(engine._process.pid, engine._exchange.folder, flush=True)
time.sleep(600)
"""


def test_no_engine_and_no_file_outlives_a_killed_trainer(vllm_model: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STARTS_AN_ENGINE, str(vllm_model)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        process, folder = trainer.stdout.readline().split()
        time.sleep(3)  # it is importing
        assert psutil.pid_exists(int(process))
        trainer.kill()
    deadline = time.monotonic() + 120
    while psutil.pid_exists(int(process)) or Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_model_that_vllm_cannot_run_is_named(policies: Backbone, tmp_path: Path) -> None:
    """What the engine says is in the sentence, and the process is gone."""
    engine = new_engine(policies, config(batch_size=1), tmp_path)
    engine._process.close()
    engine._arguments["model"] = str(tmp_path / "nothing")
    engine._start()
    with pytest.raises(TrainingError) as caught:
        engine.sync(0, "anchor")
    assert (caught.value.kind, caught.value.file) == ("process", str(tmp_path / "vllm.log"))
    engine.close()
    assert not psutil.pid_exists(engine._process.pid)
