"""Kinds of adapters and a real vLLM: as a LoRA where a kind has the form of one, else by merged weights."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.adapters.kinds.stacked import stacked
from pe_rlhf.model.backbone import Backbone, load_backbone
from tests.failures import raises
from tests.integration.rollout.conftest import new_engine
from tests.integration.rollout.vllm_support import PROMPTS, Make, config, difference
from tests.tiny import train_role
from tests.unit.adapters.test_kinds import SMALL, add

LONGER = {"spectral_r": {"rank": 4}, "additive": {"rank": 4}, "lora_dash": {"rank": 3, "directions": 2}}
AS_LORA = ("adalora", "additive", "lora_dash", "miss", "spectral_a", "spectral_r", "tinylora")


@pytest.fixture(scope="module")
def kinds(vllm_model: Path) -> Backbone:
    """A backbone with a policy of every kind, each after real updates; vLLM takes a rank of 8 for all of them."""
    backbone = load_backbone(str(vllm_model))
    for kind in sorted(KINDS):
        settings = {"rank": 4} if "rank" in SMALL.get(kind, {}) or kind in ("spectral_a", "redrawn", "rosa") else {}
        add(backbone, kind, kind, **settings | LONGER.get(kind, {}))
        train_role(backbone, kind)
    return backbone


def test_merged_weights_of_every_kind_are_the_policys(kinds: Backbone, tmp_path: Path) -> None:
    with closing(new_engine(kinds, config(), tmp_path)) as engine:
        for version, kind in enumerate(sorted(KINDS)):
            engine.sync(version, kind)
            assert difference(kinds, kind, engine.generate(PROMPTS, seed=1)) < 1e-4, kind


def test_a_server_has_kinds_that_are_a_lora_as_adapters(vllm_model: Path, vllm_server: str, make: Make) -> None:
    backbone = load_backbone(str(vllm_model))
    for kind in AS_LORA:
        add(backbone, kind, kind, **{"rank": 4} | LONGER.get(kind, {}))
        train_role(backbone, kind)
    engine = make(vllm_server, backbone=backbone, role=AS_LORA[0], sync="adapter")
    for version, kind in enumerate(AS_LORA):
        engine.sync(version, kind)
        assert difference(backbone, kind, engine.generate(PROMPTS, seed=1)) < 1e-4, kind


def test_a_later_tasks_policy_is_one_adapter_with_the_earlier_ones(
    vllm_model: Path, vllm_server: str, make: Make
) -> None:
    backbone = load_backbone(str(vllm_model))
    for task, init in (("first", "pissa"), ("second", "lora")):
        backbone.add_adapter(task, init=init, rank=2, alpha=4)
        train_role(backbone, task)
    below = backbone.role_layers("first")
    backbone.load_role("policy", *stacked(backbone.adapter_spec("second"), backbone.role_state("second"), below))
    engine = make(vllm_server, backbone=backbone, role="policy", sync="adapter")
    engine.sync(1, "policy")
    rollout = engine.generate(PROMPTS, seed=1)
    assert difference(backbone, "policy", rollout) < 1e-4
    assert difference(backbone, "second", rollout) > 1e-3


def test_an_adapter_that_is_no_lora_cannot_be_one_at_vllm(vllm_model: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(vllm_model))
    add(backbone, "policy", "dora")
    with raises("conflict", key="rollout.sync"):
        new_engine(backbone, config(sync="adapter"), tmp_path)
