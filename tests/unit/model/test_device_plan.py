"""Defaults by device and the memory plan: by hand, against torch's own counts, and for a card that was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pe_rlhf.config import BackboneConfig, LoRAConfig, Recipe
from pe_rlhf.config.load import make_recipe
from pe_rlhf.model import device_plan
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.device_plan import memory_phases, refuse_impossible, settle
from pe_rlhf.model.memory_plan import GIB, ModelShape, shape_of, tokens_that_fit, weight_bytes
from reward.errors import InputError
from tests.stage_support import byte_model
from tests.tiny import tiny_model

# 2 blocks of width 10, an MLP of 20, one key head of 5, 100 tokens: numbers for the back of an envelope.
SHAPE = ModelShape(
    parameters=1000,
    largest_layer=300,
    linears=((10, 10), (10, 20)),
    layers=2,
    hidden=10,
    inner=20,
    keys=5,
    vocabulary=100,
)
BF16 = BackboneConfig(dtype="bfloat16")


def recipe_of(**changes: Any) -> Recipe:
    tree: dict[str, Any] = {"name": "x", "model": "random:tiny-llama", "reward": {"data": "pairs.jsonl"}}
    tree |= {"ppo": {"prompts": "prompts.jsonl"}, "evaluate": {"prompts": "prompts.jsonl", "judge": "length"}}
    for key, value in changes.items():
        node, (*above, last) = tree, key.split("__")
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
    return make_recipe(tree, Path("x.yaml"))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_plan, "is_on_gpu", lambda recipe: True)
    monkeypatch.setattr(device_plan, "device_bytes", lambda recipe: 80 * GIB)


def test_on_a_cpu_nothing_changes() -> None:
    recipe = recipe_of()
    assert settle(recipe).model_dump() == recipe.model_dump()


@pytest.mark.usefixtures("card")
def test_on_a_gpu_what_the_recipe_leaves_out_is_the_gpus() -> None:
    settled = settle(recipe_of())
    assert (settled.backbone.dtype, settled.ppo.rollout.batch_size) == ("bfloat16", 256)  # type: ignore[union-attr]
    assert settled.ppo.micro_batch_tokens == settled.reward.micro_batch_tokens == 32_768  # type: ignore[union-attr]
    given = settle(recipe_of(backbone__dtype="float32", ppo__micro_batch_tokens=1024, ppo__rollout__batch_size=64))
    assert (given.backbone.dtype, given.ppo.micro_batch_tokens) == ("float32", 1024)  # type: ignore[union-attr]
    assert given.ppo.rollout.batch_size == 64  # type: ignore[union-attr]


@pytest.fixture
def qwen(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card, vLLM, and a model of 0.5B parameters."""
    shape = replace(SHAPE, parameters=494_000_000, family="qwen2")
    monkeypatch.setattr(device_plan, "has_vllm", lambda: True)
    monkeypatch.setattr(device_plan, "shape_of_recipe", lambda recipe, fetch=False: shape)
    monkeypatch.setattr(device_plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * GIB))


def engines(recipe: Recipe, saved: Recipe | None = None) -> set[str]:
    settled = settle(recipe, saved)
    assert settled.ppo is not None
    assert settled.evaluate is not None
    return {settled.ppo.rollout.engine, settled.evaluate.sampling.engine}


@pytest.mark.usefixtures("qwen")
def test_on_a_gpu_with_vllm_it_samples_what_a_recipe_leaves_open() -> None:
    assert engines(recipe_of()) == engines(recipe_of(ppo__rollout__engine="auto")) == {"vllm"}
    assert engines(recipe_of(ppo__rollout__engine="hf")) == {"hf", "vllm"}
    assert engines(recipe_of(), recipe_of()) == {"hf"}  # a resumed run keeps what it had


@pytest.mark.usefixtures("qwen")
@pytest.mark.parametrize(
    "changes",
    [
        {"tuning": "full"},
        {"backbone__quantization": "4bit"},
        {"deepspeed": "zero3"},
        {"adapter": {"kind": "dora"}},  # no LoRA that vLLM loads
    ],
)
def test_what_vllm_cannot_serve_beside_the_trainer_is_sampled_by_transformers(changes: dict[str, Any]) -> None:
    assert engines(recipe_of(**changes)) == {"hf"}


@pytest.mark.usefixtures("qwen")
@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("has_vllm", lambda: False),
        ("is_on_gpu", lambda recipe: False),
        ("device_bytes", lambda recipe: 8 * GIB),  # 1 for each copy, 3 + 1.5 for contexts and a cache, and adapters
        ("_ranks", lambda: 5),  # 5 copies in 8 GiB of the machine's memory while they sleep
        ("shape_of_recipe", lambda recipe, fetch=False: replace(SHAPE, parameters=10**9, family="gpt2")),
        ("shape_of_recipe", lambda recipe, fetch=False: replace(SHAPE, parameters=10**7, family="qwen2")),
    ],
)
def test_where_vllm_is_not_worth_it(monkeypatch: pytest.MonkeyPatch, what: str, value: Any) -> None:
    monkeypatch.setattr(device_plan, what, value)
    assert engines(recipe_of()) == {"hf"}


@pytest.mark.usefixtures("card")
def test_a_resumed_run_keeps_its_own() -> None:
    saved = recipe_of(backbone__dtype="float32", reward__micro_batch_tokens=2048, ppo__micro_batch_tokens=4096)
    settled = settle(recipe_of(), saved)
    assert settled.backbone.dtype == "float32"
    assert settled.reward.micro_batch_tokens == 2048  # type: ignore[union-attr]
    assert settled.ppo.micro_batch_tokens == 4096  # type: ignore[union-attr]
    assert settled.ppo.rollout.batch_size == 64  # type: ignore[union-attr]


def test_a_settled_recipe_stays_as_it_is() -> None:
    once = settle(recipe_of())
    assert settle(once) == once


def test_counts_by_hand() -> None:
    assert SHAPE.adapter(LoRAConfig(rank=4)) == 4 * (10 + 10) + 4 * (10 + 20)
    assert SHAPE.cache_of_a_token(2) == 2 * 2 * 5 * 2
    assert SHAPE.kept_of_a_token(2) == 2 * (80 + 10 + 60) * 2
    assert SHAPE.kept_of_a_token(2, checkpointing=True) == (80 + 10 + 60) * 2 + 2 * 10 * 2
    assert weight_bytes(SHAPE, BF16) == 2000
    assert weight_bytes(SHAPE, BF16, ranks_of_zero3=4) == (250 + 300) * 2
    assert tokens_that_fit(SHAPE, BF16, room=600 * 5000) == 4096
    assert tokens_that_fit(SHAPE, BF16, room=600 * 1000) == 0
    assert tokens_that_fit(SHAPE, BF16, room=600 * 10**9) == 32_768


def test_phases_by_hand() -> None:
    recipe = recipe_of(backbone__dtype="bfloat16", ppo__micro_batch_tokens=2048, ppo__rollout__batch_size=8)
    phases = {(phase.stage, phase.name): phase.parts for phase in memory_phases(recipe, SHAPE, on_gpu=False)}
    adapter = 16 * (20 + 30)
    assert phases["ppo", "update"]["activations"] == 2048 * 600
    assert phases["ppo", "update"]["policy and value"] == 2 * 24 * adapter
    assert phases["ppo", "update"]["reward adapters"] == 4 * adapter
    assert phases["ppo", "sampling"]["cache"] == 8 * (512 + 64) * 40 * 1.5
    assert phases["ppo", "sampling"]["logits"] == 16 * 8 * 100
    assert phases["reward", "update"]["base"] == 2000


def test_there_is_no_critic_to_plan_for_without_one() -> None:
    samples = {"ppo__rollout__samples_per_prompt": 2, "ppo__micro_batch_tokens": 2048}
    for advantage in ("rloo", "group_mean", "reinforce_pp"):
        recipe = recipe_of(backbone__dtype="bfloat16", ppo__advantage=advantage, **samples)
        phases = [phase.parts for phase in memory_phases(recipe, SHAPE, on_gpu=False) if phase.stage == "ppo"]
        assert [parts["policy"] for parts in phases] == [24 * 16 * (20 + 30)] * 2
        assert not any("value" in name for parts in phases for name in parts)


def test_the_shape_is_that_of_the_loaded_model() -> None:
    model = tiny_model("llama")
    found = shape_of(model, model.config, LoRAConfig(rank=4))
    backbone = load_backbone(model)
    backbone.add_adapter("policy", rank=4)
    assert found.parameters == sum(p.numel() for n, p in backbone.model.named_parameters() if ".adapters." not in n)
    assert found.adapter(LoRAConfig(rank=4)) == sum(p.numel() for p in backbone.role_parameters("policy").values())
    assert (found.layers, found.hidden, found.inner, found.keys) == (2, 32, 48, 16)


def test_a_pass_that_was_measured() -> None:
    """Qwen2.5-7B's shape on an H200: 36 GiB at 4,096 tokens in bf16, 55 at 8,192 (docs/gpus.md)."""
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064,
    )  # fmt: skip
    with torch.device("meta"):
        shape = shape_of(Qwen2ForCausalLM(config), config, LoRAConfig())
    for tokens, measured in ((4096, 36), (8192, 55)):
        planned = (
            weight_bytes(shape, BF16)
            + tokens * shape.kept_of_a_token(2)
            + 12 * shape.adapter(LoRAConfig(rank=16))
            + GIB
        )
        assert planned / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.usefixtures("card")
def test_a_plan_that_cannot_be_is_refused_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    large = ModelShape(7 * 10**9, 10**9, ((3584, 3584),), 28, 3584, 18944, 512, 150_000)
    monkeypatch.setattr(device_plan, "shape_of_recipe", lambda recipe, fetch=False: large)
    settled = settle(recipe_of())
    refuse_impossible(settled)
    assert 4096 <= settled.ppo.micro_batch_tokens <= 12_288  # type: ignore[union-attr]
    with pytest.raises(InputError) as raised:
        refuse_impossible(recipe_of(backbone__dtype="bfloat16", ppo__micro_batch_tokens=32_768))
    assert (raised.value.kind, raised.value.key) == ("memory", "ppo.micro_batch_tokens")
    with pytest.raises(InputError) as raised:
        refuse_impossible(settled, room=12 * GIB)
    assert (raised.value.kind, raised.value.key) == ("memory", "backbone")


def test_a_local_judge_is_there_while_it_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the base and the roles that the stage trains, without the cache and activations of other phases."""
    path = byte_model(tmp_path, pad_is_eos=True)
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
    local = {"kind": f"llm:{path}", "dtype": "bfloat16"}
    server = {"kind": "llm", "target": str(path), "base_url": "http://localhost:1/v1"}
    jury = {"kind": "jury", "members": [local, {**local, "kind": "llm", "target": str(path), "engine": "vllm"}, server]}
    for judge, expected in ((local, 2 * size), (jury, 4 * size + 3 * GIB), (server, 0)):
        recipe = recipe_of(backbone__dtype="bfloat16", evaluate__judge=judge, ppo__eval_every=1)
        phases = {phase.stage: phase.parts for phase in memory_phases(recipe, SHAPE) if phase.name == "judging"}
        assert {stage: parts["judge"] for stage, parts in phases.items()} == (
            {"ppo": expected, "evaluate": expected} if expected else {}
        )
    monkeypatch.setattr(device_plan, "shape_of_recipe", lambda recipe, fetch=False: SHAPE)
    with pytest.raises(InputError) as raised:
        refuse_impossible(recipe_of(evaluate__judge=jury), room=4 * GIB)
    assert (raised.value.kind, raised.value.key) == ("memory", "evaluate.judge")
