"""Adapters on fused experts, against weights with a dense ΔW for each expert in plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from pe_rlhf.adapters.specs import AdapterSpec, adapter_settings
from pe_rlhf.adapters.targets import find_targets
from pe_rlhf.config import LoRAConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.memory_plan import shape_of
from pe_rlhf.runs.saved_roles import load_role, save_role
from pe_rlhf.types import Sequences
from tests.failures import raises
from tests.model_matrix import compare, numbers
from tests.model_oracle import oracle
from tests.model_types import build
from tests.tiny import IDS_BT, INITS, perturb, role_logits, set_fast

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ONE_TOKEN = Sequences.pack([[5]], [[6]], pad_id=0)  # two of four experts are never asked


def with_experts(name: str = "mixtral", init: str = "pissa", **settings: Any) -> Backbone:
    backbone = load_backbone(build(name))
    backbone.add_adapter("policy", init=init, rank=3, alpha=6, targets=EXPERTS, **settings)
    return backbone


def names_of_experts(names: list[str]) -> set[str]:
    return {name for name in names if ".experts." in name}


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "qwen2_moe", "gpt_oss", "granitemoe"])
def test_all_linear_has_the_experts_that_pefts_has(name: str) -> None:
    wrapped = get_peft_model(build(name), LoraConfig(r=2, target_modules="all-linear"))
    expected = {
        f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}"
        for path, module in wrapped.named_modules()
        if type(module).__name__ == "ParamWrapper"
    }
    found = find_targets(load_backbone(build(name)).model, "all-linear", takes_experts=True)
    assert names_of_experts(found) == names_of_experts(sorted(expected))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_on_experts_is_a_dense_change_of_each(name: str, checkpointing: bool) -> None:
    """Also of experts that no token asks; gpt_oss has biases, and its weights are (in, out)."""
    backbone = with_experts(name)
    perturb(backbone, "policy")
    set_fast(backbone, gradient_checkpointing=checkpointing)
    for sequences in (ONE_TOKEN, Sequences.pack([[5, 6], [9, 8, 7]], [[20, 21], [22]], pad_id=0)):
        compare(name, numbers(backbone, "policy", sequences), oracle(backbone, name, "policy", sequences))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_role_on_experts_starts_with_the_anchors_bits(init: str, dtype: torch.dtype) -> None:
    backbone = load_backbone(build("mixtral").to(dtype))  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    backbone.add_adapter("policy", init=init, rank=3, targets=EXPERTS)
    expected = build("mixtral").to(dtype)(input_ids=IDS_BT).logits  # type: ignore[arg-type]
    assert torch.equal(role_logits(backbone, "anchor"), expected)
    assert torch.equal(role_logits(backbone, "policy"), expected)
    perturb(backbone, "policy")
    assert not torch.equal(role_logits(backbone, "policy"), expected)
    assert torch.equal(role_logits(backbone, "anchor"), expected)
    after = {n.replace(".base.", "."): t for n, t in backbone.model.state_dict().items() if ".adapters." not in n}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_dropout_is_on_what_goes_into_an_experts_adapter() -> None:
    backbone = with_experts(dropout=0.5)
    perturb(backbone, "policy")
    still = role_logits(backbone, "policy")
    assert torch.equal(still, role_logits(backbone, "policy"))
    backbone.train()
    torch.manual_seed(0)
    assert not torch.allclose(role_logits(backbone, "policy"), still)
    assert torch.equal(role_logits(backbone, "anchor"), role_logits(with_experts(), "anchor"))


@torch.no_grad()
def test_merged_copies_and_a_copy_of_its_own_compute_the_role() -> None:
    backbone = with_experts("gpt_oss")
    perturb(backbone, "policy")
    expected = role_logits(backbone, "policy")
    assert backbone.merged_bytes("policy") == 2 * 4 * 4 * (32 * 96 + 48 * 32)  # blocks, experts, bytes
    with backbone.merged_role("policy"):
        found = backbone(IDS_BT).logits
    assert not torch.equal(found, role_logits(backbone, "anchor"))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    backbone.add_own_weights("full", "policy")
    torch.testing.assert_close(role_logits(backbone, "full"), expected, atol=2e-5, rtol=1e-5)
    changes = [float(change.norm()) for _, change in backbone.weight_changes("policy")]
    assert len(changes) == 2 * 2 * 4  # a matrix of each expert
    own = [float(change.norm()) for _, change in backbone.weight_changes("full") if change.norm() > 0]
    assert own == pytest.approx(changes, rel=1e-4)


def test_a_saved_role_on_experts_is_the_role(tmp_path: Path) -> None:
    backbone = with_experts()
    perturb(backbone, "policy")
    save_role(backbone, "policy", tmp_path / "policy")
    again = load_backbone(build("mixtral"))
    load_role(again, "policy", tmp_path / "policy")
    assert torch.equal(role_logits(again, "policy"), role_logits(backbone, "policy"))
    again.copy_role("policy", "other")
    assert torch.equal(role_logits(again, "other"), role_logits(backbone, "policy"))


@pytest.mark.parametrize("settings", [{"kind": "dora"}, {"init": "eva"}, {"init": "lora_ga"}], ids=str)
def test_other_kinds_and_inits_that_look_at_data_have_none(settings: dict[str, str]) -> None:
    model = load_backbone(build("mixtral")).model
    assert not names_of_experts([*AdapterSpec.on(model, adapter_settings(**settings)).modules])
    with raises("unknown", key="adapter.targets"):
        AdapterSpec.on(model, adapter_settings(targets=EXPERTS, **settings))


def eager() -> PreTrainedModel:
    model = build("mixtral")
    model.set_experts_implementation("eager")
    return model


def test_experts_that_are_computed_otherwise_have_none() -> None:
    """A role would not start with the bits of another implementation's products."""
    with raises("unknown", key="adapter.targets"):
        AdapterSpec.on(load_backbone(eager()).model, LoRAConfig(targets=EXPERTS))


def test_a_memory_plan_counts_each_experts_factors() -> None:
    settings = LoRAConfig(rank=3, targets=EXPERTS)
    with torch.device("meta"):
        model = type(build("mixtral"))(build("mixtral").config)
    planned = shape_of(model, model.config, settings).adapter(settings)
    backbone = with_experts()
    assert planned == sum(p.numel() for p in backbone.role_parameters("policy").values())
