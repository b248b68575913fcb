"""Roles on a backbone: switching, making, copying, saving and loading them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pe_rlhf.model.backbone import Backbone, load_backbone
from reward.errors import InputError
from tests.failures import raises
from tests.tiny import INITS, ROLES, backbone_with, perturb, randomise_head, role_logits, tiny_model, train_role


def test_roles_nest_and_the_one_before_comes_back() -> None:
    backbone = backbone_with("policy", "value")
    seen = [backbone.active_role]
    with backbone.role("policy"):
        seen.append(backbone.active_role)
        with backbone.role("anchor"):
            seen.append(backbone.active_role)
            with backbone.role("value"):
                seen.append(backbone.active_role)
            seen.append(backbone.active_role)
        seen.append(backbone.active_role)
    seen.append(backbone.active_role)
    assert seen == ["anchor", "policy", "anchor", "value", "anchor", "policy", "anchor"]


def test_a_role_ends_with_an_exception() -> None:
    backbone = backbone_with("policy", "value")
    with backbone.role("policy"):
        with pytest.raises(RuntimeError, match="inside"), backbone.role("value"):
            raise RuntimeError("inside")
        assert backbone.active_role == "policy"
    assert backbone.active_role == "anchor"


def test_an_unknown_role_is_refused_with_the_known_ones() -> None:
    backbone = backbone_with("policy", "value")
    with raises("unknown", key="polcy"), backbone.role("polcy"):
        pass


@pytest.mark.parametrize("use", ["role_state", "role_parameters", "copy_role", "export_adapter"])
@pytest.mark.parametrize("name", ["polcy", "anchor"])
def test_a_role_without_an_adapter_has_nothing_to_save(use: str, name: str, tmp_path: Path) -> None:
    backbone = backbone_with("policy")
    arguments = {"copy_role": ["value"], "export_adapter": [tmp_path]}.get(use, [])
    with raises("unknown", key=name):
        getattr(backbone, use)(name, *arguments)


@pytest.mark.parametrize("name", ["policy", "anchor", "my-role", ""])
def test_a_name_that_is_taken_or_cannot_be_one_is_refused(name: str) -> None:
    backbone = backbone_with("policy")
    with raises("exists", key=name):
        backbone.add_adapter(name)
    with raises("exists", key=name):
        backbone.copy_role("policy", name)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"init": "pisa"}, "adapter.init"),
        ({"init": "pissa", "rank": 17}, "adapter.rank"),
        ({"rank": 0}, "adapter.rank"),
        ({"rnak": 2}, "adapter.rnak"),
        ({"targets": ["nowhere"]}, "adapter.targets"),
    ],
)
def test_a_role_that_cannot_be_made_leaves_nothing_behind(changes: dict[str, object], key: str) -> None:
    backbone = backbone_with()
    before, expected = backbone.base_fingerprint(), role_logits(backbone, "anchor")
    with pytest.raises(InputError) as caught:
        backbone.add_adapter("policy", **changes)  # type: ignore[arg-type]
    assert caught.value.key == key
    assert backbone.roles == ["anchor"]
    assert backbone.base_fingerprint() == before
    backbone.add_adapter("policy", rank=2)
    assert torch.equal(role_logits(backbone, "policy"), expected)


@pytest.mark.parametrize("init", INITS)
def test_what_a_role_trains(init: str) -> None:
    backbone = backbone_with(*ROLES, init=init)
    factors = ("lora_A",) if init == "mica" else ("lora_A", "lora_B")
    layers = {f"{name}.{factor}" for name in backbone.adapter_spec("policy").modules for factor in factors}
    assert len(layers) == len(factors) * 14
    assert set(backbone.role_parameters("policy")) == layers
    assert set(backbone.role_parameters("value")) == layers | {"head.weight", "head.bias"}
    # The bias of the reward head gets no gradient from pairs: it is a constant.
    assert set(backbone.role_parameters("reward")) == layers | {"head.weight"}
    assert "head.bias" in backbone.role_state("reward")


def test_training_one_role_moves_no_other() -> None:
    backbone = backbone_with(*ROLES)
    for role in ROLES:
        perturb(backbone, role)
    before = {role: backbone.role_state(role) for role in ROLES}
    train_role(backbone, "policy")
    for role in ("value", "reward"):
        assert all(torch.equal(t, before[role][name]) for name, t in backbone.role_state(role).items())


def test_a_copied_role_goes_its_own_way() -> None:
    backbone = backbone_with("reward")
    perturb(backbone, "reward")
    backbone.heads["reward"].shift(0.5)  # type: ignore[operator]
    backbone.copy_role("reward", "value")
    # The critic from the reward model: same numbers at the last token, and a bias that is trained from here on.
    assert torch.equal(role_logits(backbone, "value")[:, -1], role_logits(backbone, "reward"))
    assert "head.bias" in backbone.role_parameters("value")
    before = backbone.role_state("reward")
    train_role(backbone, "value")
    assert all(torch.equal(t, before[name]) for name, t in backbone.role_state("reward").items())
    value = backbone.role_state("value")
    assert not any(torch.equal(value[name], before[name]) for name in backbone.role_parameters("value"))


def test_a_policy_can_be_copied_too() -> None:
    backbone = backbone_with("policy")
    perturb(backbone, "policy")
    backbone.copy_role("policy", "behaviour")
    assert torch.equal(role_logits(backbone, "behaviour"), role_logits(backbone, "policy"))
    assert backbone.specs["behaviour"] == backbone.adapter_spec("policy")


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("role", ROLES)
def test_a_saved_role_comes_back_exactly(role: str, init: str) -> None:
    backbone = backbone_with(role, init=init)
    train_role(backbone, role)
    state = backbone.role_state(role)
    fresh = backbone_with()
    fresh.load_role(role, backbone.adapter_spec(role), copy.deepcopy(state))
    assert torch.equal(role_logits(fresh, role), role_logits(backbone, role))
    loaded = fresh.role_state(role)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert fresh.role_parameters(role).keys() == backbone.role_parameters(role).keys()
    train_role(backbone, role)
    train_role(fresh, role)
    assert torch.equal(role_logits(fresh, role), role_logits(backbone, role))


def test_role_state_is_a_copy() -> None:
    backbone = backbone_with("value")
    before = role_logits(backbone, "value")
    for tensor in backbone.role_state("value").values():
        tensor.zero_()
    assert torch.equal(role_logits(backbone, "value"), before)


def test_loading_replaces_a_role_that_is_there_wherever_its_layers_were() -> None:
    source = load_backbone(tiny_model("llama"))
    source.add_adapter("policy", init="lora", rank=2, targets=["q_proj"])
    perturb(source, "policy")
    backbone = backbone_with("policy")
    perturb(backbone, "policy")
    backbone.load_role("policy", source.adapter_spec("policy"), source.role_state("policy"))
    assert torch.equal(role_logits(backbone, "policy"), role_logits(source, "policy"))
    assert backbone.role_state("policy").keys() == source.role_state("policy").keys()


def wider(role: str) -> Backbone:
    backbone = load_backbone(tiny_model("llama", hidden_size=64))
    backbone.add_adapter(role, init="pissa", rank=3, alpha=6)
    return backbone


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "make_source",
    [wider, lambda role: backbone_with(role, family="gpt2")],
    ids=["another size", "another architecture"],
)
def test_a_role_of_another_model_is_refused_and_changes_nothing(
    role: str, make_source: Callable[[str], Backbone]
) -> None:
    source, backbone = make_source(role), backbone_with(role)
    perturb(backbone, role)
    before = role_logits(backbone, role)
    with raises("unreadable", key=role):
        backbone.load_role(role, source.adapter_spec(role), source.role_state(role))
    assert torch.equal(role_logits(backbone, role), before)


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.up_proj.lora_B", "head.weight"])
def test_a_role_with_a_tensor_missing_is_refused(missing: str) -> None:
    backbone = backbone_with("value")
    state = backbone.role_state("value")
    del state[missing]
    with raises("unreadable", key="value"):
        backbone_with().load_role("value", backbone.adapter_spec("value"), state)


def test_the_state_of_a_role_that_is_there_is_set_in_place() -> None:
    source, backbone = backbone_with("value"), backbone_with("value")
    perturb(source, "value")
    before = backbone.role_parameters("value")
    backbone.set_role_state("value", source.role_state("value"))
    assert torch.equal(role_logits(backbone, "value"), role_logits(source, "value"))
    # An optimizer that holds the parameters goes on with them.
    assert all(parameter is before[name] for name, parameter in backbone.role_parameters("value").items())


@pytest.mark.parametrize("change", ["missing", "more", "shape"])
def test_setting_a_state_that_is_not_the_roles_is_refused_and_changes_nothing(change: str) -> None:
    backbone = backbone_with("value")
    before = role_logits(backbone, "value")
    state = {name: tensor + 1 for name, tensor in backbone.role_state("value").items()}
    name = "model.layers.1.mlp.up_proj.lora_B"
    if change == "missing":
        del state[name]
    elif change == "more":
        state["more"] = torch.zeros(1)
    else:
        state[name] = state[name][:1]  # would be broadcast
    with raises("unreadable", key="value"):
        backbone.set_role_state("value", state)
    assert torch.equal(role_logits(backbone, "value"), before)


def test_roles_of_a_kind_are_told_by_how_their_names_start(tmp_path: Path) -> None:
    backbone = backbone_with("reward", "reward_2", "value_2")
    assert role_logits(backbone, "reward_2").shape == (2, 1)
    assert role_logits(backbone, "value_2").shape == (2, 5, 1)
    assert "head.bias" not in backbone.role_parameters("reward_2")
    assert "head.bias" in backbone.role_parameters("value_2")
    randomise_head(backbone, "reward_2")
    assert not torch.equal(role_logits(backbone, "reward"), role_logits(backbone, "reward_2"))  # heads of their own
    backbone.export_adapter("reward_2", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
