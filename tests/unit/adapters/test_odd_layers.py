"""Layers that are no plain linear map, or that the model does not call: what gets an adapter, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pe_rlhf.adapters.targets import find_targets, linear_modules, share_without_adapter
from pe_rlhf.model.backbone import Backbone, load_backbone
from tests.failures import raises
from tests.model_types import build
from tests.tiny import IDS_BT, add_role, perturb, role_logits


def with_policy(name: str, **settings: Any) -> Backbone:
    backbone = load_backbone(build(name))
    backbone.add_adapter("policy", init="pissa", rank=1, alpha=2, **settings)
    return backbone


@pytest.mark.parametrize("name", ["phimoe", "mamba", "jamba", "longcat_flash", "deepseek_v32", "falcon"])
def test_every_adapter_that_is_put_on_moves_the_logits(name: str) -> None:
    """Also bit-equal before it is moved; an adapter on a weight that the model reads itself would move nothing."""
    backbone = with_policy(name)
    assert torch.equal(role_logits(backbone, "policy"), role_logits(backbone, "anchor"))
    with backbone.role("policy"):
        loss = (
            backbone(torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))).logits.square().mean()
        )
    parameters = backbone.role_parameters("policy")
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    unmoved = {n.rsplit(".lora_", 1)[0] for n, g in zip(parameters, gradients, strict=True) if g is None}
    assert not unmoved


def test_a_router_that_gives_a_tuple_and_a_weight_that_is_read_get_none() -> None:
    assert not [name for name in linear_modules(load_backbone(build("phimoe")).model) if "router" in name]
    names = [name.rsplit(".", 1)[-1] for name in linear_modules(load_backbone(build("mamba")).model)]
    assert "in_proj" in names
    assert "dt_proj" not in names


@pytest.mark.parametrize(("name", "target"), [("mamba", "dt_proj"), ("phimoe", "router"), ("mixtral", "gate_proj")])
def test_one_that_is_named_is_refused(name: str, target: str) -> None:
    with raises("unknown", key="adapter.targets"):
        with_policy(name, targets=[target])


def test_the_language_model_alone_gets_adapters() -> None:
    """Its vision tower has more blocks than its text: the last ones are those of the text all the same."""
    backbone = with_policy("gemma3", last_layers=1)
    modules = backbone.adapter_spec("policy").modules
    assert len(modules) == 7
    assert all(name.startswith("model.language_model.layers.1.") for name in modules)
    perturb(backbone, "policy")
    assert not torch.equal(role_logits(backbone, "policy"), role_logits(backbone, "anchor"))


def test_the_share_without_an_adapter_is_that_of_the_experts() -> None:
    model = load_backbone(build("mixtral")).model
    # Two layers of four experts: gate and up 96 × 32 and down 32 × 48 each, and a router of 4 × 32.
    experts = 2 * (4 * (96 * 32 + 32 * 48) + 4 * 32)
    attention = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32)
    share, names = share_without_adapter(model, list(linear_modules(model)))
    assert share == pytest.approx(experts / (experts + attention))
    assert {"experts.gate_up_proj", "experts.down_proj"} <= set(names)
    share, names = share_without_adapter(model, find_targets(model, "all-linear", takes_experts=True))
    assert share == pytest.approx(2 * 4 * 32 / (experts + attention))
    assert names == ["mlp.gate"]
    llama = load_backbone(build("llama")).model
    assert share_without_adapter(llama, list(linear_modules(llama))) == (0.0, [])


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (r".*self_attn\.(q|v)_proj", [], {"q_proj", "v_proj"}),
        (r"model\.layers\.1\.mlp\..*", [], {"gate_proj", "up_proj", "down_proj"}),
        ("all-linear", ["down_proj", "k_proj"], {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),
        ("attention", r".*\.o_proj", {"q_proj", "k_proj", "v_proj"}),
        (["q_proj", "up_proj"], "up_proj", {"q_proj"}),
    ],
)
def test_expressions_and_exclusions(targets: str | list[str], exclude: str | list[str], expected: set[str]) -> None:
    found = find_targets(build("llama"), targets, exclude=exclude)
    assert {name.rsplit(".", 1)[-1] for name in found} == expected


def test_expressions_that_match_nothing_or_are_none() -> None:
    model = build("llama")
    with raises("unknown", key="adapter.exclude"):
        find_targets(model, "all-linear", exclude=["w_proj"])
    with raises("invalid", key="adapter.targets"):
        find_targets(model, "*_proj")
    with raises("empty", key="adapter.exclude"):
        find_targets(model, ["q_proj"], exclude=["q_proj"])


@pytest.mark.parametrize("init", ["eva", "corda", "cross_task"])
def test_inits_that_look_at_inputs_take_those_that_come_flattened(init: str) -> None:
    """OPT's MLP sees all tokens of a batch one after the other."""
    backbone = load_backbone(build("opt"))
    add_role(backbone, "policy", init, rank=2)
    assert torch.equal(role_logits(backbone, "policy"), role_logits(backbone, "anchor", IDS_BT))


def test_a_rank_that_is_too_great_names_the_layer() -> None:
    backbone = load_backbone(build("qwen2_moe"))
    with pytest.raises(Exception, match="shared_expert_gate"):
        backbone.add_adapter("policy", init="pissa", rank=2)
    backbone.add_adapter("policy", init="pissa", rank=2, exclude=["shared_expert_gate"])
