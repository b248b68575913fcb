"""A policy that is routed by task and a real vLLM, which gets one task's policy after the other."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.by_task import RoutedRollout
from pe_rlhf.types import Rollout, Sequences
from tests.integration.rollout.conftest import new_engine
from tests.integration.rollout.vllm_support import PROMPTS, TEMPERATURE, config
from tests.tiny import perturb


@torch.no_grad()
def gap(backbone: Backbone, rollout: Rollout) -> float:
    """The largest difference of vLLM's log-probs and the trainer's, each row by its own task's route."""
    with backbone.role("policy"):
        found_N, _ = backbone.response_logprobs(Sequences.of(rollout, backbone.pad_token_id), TEMPERATURE)
    return float((found_N - torch.tensor([value for row in rollout.logprobs for value in row])).abs().max())


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_responses_are_of_the_prompts_own_task(vllm_model: Path, tmp_path: Path, sync: str) -> None:
    backbone = load_backbone(str(vllm_model))
    values = {"a": {"a": 1.0, "b": -0.5}}
    backbone.add_adapter("policy", kind="routed", rank=2, alpha=4, shared_rank=1, tasks=["a", "b"], values=values)
    perturb(backbone, "policy", 0.1)
    tasks = [i % 2 for i in range(len(PROMPTS))]
    with closing(new_engine(backbone, config(sync=sync), tmp_path)) as engine:
        routed = RoutedRollout(engine, backbone, "policy")
        routed.sync(1)
        found = routed.generate(PROMPTS, seed=1, tasks=tasks)
        other = routed.generate(PROMPTS, seed=1, tasks=[1 - task for task in tasks])
    assert found.tasks == tuple(tasks)
    assert gap(backbone, found) < 1e-4
    assert gap(backbone, other) < 1e-4
    assert other.responses != found.responses
