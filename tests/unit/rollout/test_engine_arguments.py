"""How much of a GPU an embedded vLLM takes: by hand."""

from __future__ import annotations

import pytest

from pe_rlhf.config import SamplingConfig
from pe_rlhf.model import device_plan
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.device_plan import reserved_bytes
from pe_rlhf.model.memory_plan import GIB
from pe_rlhf.rollout.vllm.engine_arguments import card_arguments, share_of_card
from tests.failures import raises
from tests.tiny import tiny_model
from tests.unit.model.test_device_plan import SHAPE, recipe_of

CARD = (70 * GIB, 80 * GIB)  # free, all


def test_the_cache_is_what_the_batch_needs() -> None:
    taken = share_of_card(15 * GIB, wanted=12 * GIB, least=GIB, card=CARD, reserved=20 * GIB)
    assert taken["kv_cache_memory_bytes"] == 12 * GIB
    assert taken["gpu_memory_utilization"] == pytest.approx((15 + 3 + 12) / 80)  # 3: contexts and workspaces


@pytest.mark.parametrize(
    ("reserved", "free", "cache"),
    [(30, 70, 0.9 * 80 - 30 - 18), (0, 40, 0.9 * 40 - 18)],
    ids=["the plan of the trainer", "others on the card"],
)
def test_it_is_smaller_where_there_is_less_room(reserved: int, free: int, cache: float) -> None:
    taken = share_of_card(15 * GIB, 200 * GIB, GIB, (free * GIB, 80 * GIB), reserved * GIB)
    assert taken["kv_cache_memory_bytes"] == pytest.approx(cache * GIB, abs=1)
    assert taken["gpu_memory_utilization"] * 80 <= free  # what vLLM checks


def test_no_room_for_one_response_is_refused() -> None:
    with raises("memory", key="gpu_memory_share"):
        share_of_card(15 * GIB, 12 * GIB, GIB, (20 * GIB, 80 * GIB), 0.0)
    with raises("memory", key="judge.gpu_memory_share"):
        share_of_card(60 * GIB, 12 * GIB, GIB, CARD, 10 * GIB, "judge.gpu_memory_share")


def test_weights_and_cache_of_a_real_model() -> None:
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_adapter("policy", rank=4)
    weights = 4 * sum(p.numel() for p in tiny_model("llama").parameters())
    config = SamplingConfig(engine="vllm", max_new_tokens=20, batch_size=3)
    taken = card_arguments(backbone, config, 33, CARD, 0.0)
    # 2 × 2 layers × 16 key numbers of 4 bytes; 33 tokens are two blocks of 32, and vLLM keeps one block.
    assert taken["kv_cache_memory_bytes"] == (3 * 2 + 1) * 32 * (2 * 2 * 16 * 4)
    expected = (weights + 3 * GIB + taken["kv_cache_memory_bytes"]) / (80 * GIB)
    assert taken["gpu_memory_utilization"] == pytest.approx(expected)
    given = config.model_copy(update={"gpu_memory_share": 0.3})
    assert card_arguments(backbone, given, 33, CARD, 0.0) == {"gpu_memory_utilization": 0.3}


def test_what_the_trainer_needs_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base, its context, and the two roles with their states; not what sampling itself needs."""
    recipe = recipe_of(backbone__dtype="bfloat16", ppo__rollout__engine="vllm")
    assert recipe.ppo is not None
    assert reserved_bytes(recipe, "ppo", recipe.ppo.rollout) == 0  # on a CPU nothing is
    monkeypatch.setattr(device_plan, "is_on_gpu", lambda recipe: True)
    monkeypatch.setattr(device_plan, "shape_of_recipe", lambda recipe, fetch=False: SHAPE)
    adapter = 16 * (20 + 30)
    expected = 2000 + 1.5 * GIB + 2 * 24 * adapter + 4 * adapter
    assert reserved_bytes(recipe, "ppo", recipe.ppo.rollout) == expected
    assert reserved_bytes(recipe, "ppo", SamplingConfig()) == 0  # hf samples from the trainer's own model
