"""Invariant 3: an exported role on the original base, in plain PEFT, computes what the role computes here."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from pe_rlhf.adapters.layer import WrappedLayer, merged_weight
from pe_rlhf.adapters.targets import Targets
from pe_rlhf.model.backbone import Backbone, load_backbone
from tests.failures import raises
from tests.pairwise import pairwise
from tests.tiny import (
    ALL_INITS,
    EOS,
    FAMILIES,
    PAD,
    add_role,
    padded,
    perturb,
    ragged_sequences,
    randomise_head,
    role_logits,
    rows_of,
    tiny_model,
    train_role,
)
from tests.unit.adapters.anchored import ZERO_PRODUCT

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")

IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [20, 30, 40, 50, 60, 3, 2, 4]])


# Inits whose B starts at zero have nothing to subtract, and export at their own rank.


# Every init with every architecture, and both with every form, but not all three together.
CASES = pairwise(("policy", "merged", "value", "reward"), FAMILIES, ALL_INITS)


def cases(form: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("family", "init"), [case[1:] for case in CASES if case[0] == form])


def trained(
    family: str, init: str, role: str = "policy", targets: Targets = "all-linear", rank: int = 3
) -> tuple[Backbone, PreTrainedModel]:
    """A backbone whose role has had real updates, and the untouched original."""
    original = tiny_model(family)
    backbone = load_backbone(copy.deepcopy(original))
    add_role(backbone, role, init, rank=rank, alpha=5, targets=targets)
    if role != "policy":
        randomise_head(backbone, role)
    train_role(backbone, role)
    return backbone, original


@torch.no_grad()
def plain_logits(model: torch.nn.Module, **inputs: Tensor) -> Tensor:
    return model.eval()(**inputs).logits


def assert_has_moved(backbone: Backbone, role: str) -> None:
    assert (role_logits(backbone, role, IDS_BT) - role_logits(backbone, "anchor", IDS_BT)).abs().max() > 0.1


@cases("policy")
def test_policy_loads_in_peft_as_it_is(family: str, init: str, tmp_path: Path) -> None:
    backbone, original = trained(family, init)
    assert_has_moved(backbone, "policy")
    backbone.export_adapter("policy", tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == (3 if init in ZERO_PRODUCT else 6)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    found = plain_logits(peft_model, input_ids=IDS_BT)
    torch.testing.assert_close(found, role_logits(backbone, "policy", IDS_BT), atol=2e-5, rtol=1e-5)
    with peft_model.disable_adapter():  # the base is the original: switched off, it is the anchor
        assert torch.equal(plain_logits(peft_model, input_ids=IDS_BT), role_logits(backbone, "anchor", IDS_BT))


@cases("merged")
def test_merged_weights_in_a_plain_model_compute_the_role(family: str, init: str) -> None:
    backbone, original = trained(family, init)
    merged = copy.deepcopy(original)
    replaced = 0
    for name, layer in backbone.model.named_modules():
        if isinstance(layer, WrappedLayer):
            merged.get_submodule(name).weight.data = merged_weight(layer, "policy")
            replaced += 1
    assert replaced == {"llama": 14, "gpt2": 8, "gpt_neo": 12}[family]
    found = plain_logits(merged, input_ids=IDS_BT)
    torch.testing.assert_close(found, role_logits(backbone, "policy", IDS_BT), atol=2e-5, rtol=1e-5)


@cases("value")
def test_value_is_the_adapter_in_peft_and_the_head_of_its_file(family: str, init: str, tmp_path: Path) -> None:
    backbone, original = trained(family, init, role="value")
    perturb(backbone, "value")  # where training leaves the bias, an init may by chance leave it near 0
    backbone.export_adapter("value", tmp_path)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path).eval()
    with torch.no_grad():
        base_model = peft_model.get_base_model().base_model
        hidden_BTH = base_model(input_ids=IDS_BT).last_hidden_state  # type: ignore[operator]
    head = load_file(tmp_path / "head.safetensors")
    assert head["bias"].abs() > 1e-3
    expected_BT1 = (hidden_BTH @ head["weight"] + head["bias"])[..., None]
    torch.testing.assert_close(role_logits(backbone, "value", IDS_BT), expected_BT1, atol=2e-5, rtol=1e-5)


@cases("reward")
def test_reward_is_a_sequence_classifier_in_peft(
    family: str, init: str, tmp_path: Path, saved_model: Callable[[PreTrainedModel], Path]
) -> None:
    backbone, original = trained(family, init, role="reward")
    backbone.heads["reward"].shift(0.75)  # type: ignore[operator]
    backbone.export_adapter("reward", tmp_path / "adapter")
    # PEFT's side finds the last token by looking for the pad id, so here the pad id must be no real token.
    unused = 63
    base = AutoModelForSequenceClassification.from_pretrained(saved_model(original), num_labels=1, pad_token_id=unused)
    peft_model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    bias = load_file(tmp_path / "adapter" / "head.safetensors")["bias"]
    assert float(bias) == 0.75

    expected_B1 = role_logits(backbone, "reward", IDS_BT)
    assert (expected_B1[0] - expected_B1[1]).abs() > 0.1
    found_B1 = plain_logits(peft_model, input_ids=IDS_BT) + bias
    torch.testing.assert_close(found_B1, expected_B1, atol=2e-5, rtol=1e-5)

    rows = [[5, 6, 7, EOS], [8, PAD, 10, 11, 12, 13, EOS], [9, 2]]
    ids_BT, mask_BT, _ = padded(rows, "right")
    found_B1 = plain_logits(
        peft_model, input_ids=ids_BT.where(mask_BT.bool(), torch.tensor(unused)), attention_mask=mask_BT
    )
    expected_B1 = role_logits(backbone, "reward", ids_BT, mask_BT)
    torch.testing.assert_close(found_B1 + bias, expected_B1, atol=2e-5, rtol=1e-5)


PARTIAL = [
    ("llama", ["self_attn.o_proj", "mlp.down_proj"], 4, ["down_proj", "o_proj"]),
    ("llama", ["model.layers.1.self_attn.q_proj"], 1, ["model.layers.1.self_attn.q_proj"]),
    ("gpt2", "attention", 4, None),
    ("gpt2", ["mlp.c_proj"], 2, None),
    ("gpt_neo", "attention", 8, ["k_proj", "out_proj", "q_proj", "v_proj"]),
]


@pytest.mark.parametrize(("architecture", "targets", "count", "short"), PARTIAL)
def test_a_partial_target_list_names_those_layers_and_no_others(
    architecture: str, targets: Targets, count: int, short: list[str] | None, tmp_path: Path
) -> None:
    backbone, original = trained(architecture, "pissa", targets=targets)
    backbone.export_adapter("policy", tmp_path)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    hit = {name for name, module in peft_model.named_modules() if isinstance(module, LoraLayer)}
    assert hit == {f"base_model.model.{name}" for name in backbone.adapter_spec("policy").modules}
    assert len(hit) == count
    if short is not None:  # endings where they say it all, as PEFT configs usually have them
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == short
    found = plain_logits(peft_model, input_ids=IDS_BT)
    torch.testing.assert_close(found, role_logits(backbone, "policy", IDS_BT), atol=2e-5, rtol=1e-5)


def test_layers_of_different_ranks_are_filled_up_to_one(tmp_path: Path) -> None:
    # A zero weight has nothing to subtract (B0 = 0): its adapter has rank r, those of the others rank 2r.
    original = tiny_model("llama")
    with torch.no_grad():
        original.get_parameter("model.layers.0.mlp.down_proj.weight").zero_()
    backbone = load_backbone(copy.deepcopy(original))
    backbone.add_adapter("policy", init="pissa", rank=3, targets=["down_proj", "up_proj"])
    perturb(backbone, "policy")  # no training: with A = B = 0 the one layer would stay where it is
    backbone.export_adapter("policy", tmp_path)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    found = plain_logits(peft_model, input_ids=IDS_BT)
    assert_has_moved(backbone, "policy")
    torch.testing.assert_close(found, role_logits(backbone, "policy", IDS_BT), atol=2e-5, rtol=1e-5)


def test_a_rank_that_is_filled_up_changes_nothing(tmp_path: Path) -> None:
    """vLLM is given one rank for all roles. PEFT divides alpha by the rank, so alpha has to grow with it."""
    original = tiny_model("llama")
    backbone = load_backbone(copy.deepcopy(original))
    backbone.add_adapter("policy", rank=3, alpha=6)
    train_role(backbone, "policy")
    backbone.export_adapter("policy", tmp_path, rank=8)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    found = plain_logits(PeftModel.from_pretrained(original, tmp_path), input_ids=IDS_BT)
    assert_has_moved(backbone, "policy")
    torch.testing.assert_close(found, role_logits(backbone, "policy", IDS_BT), atol=2e-5, rtol=1e-5)


def test_rslora_is_exported_as_its_scale(tmp_path: Path) -> None:
    original = tiny_model("gpt2")
    backbone = load_backbone(copy.deepcopy(original))
    backbone.add_adapter("policy", init="milora", rank=5, alpha=7, scaling="rslora")
    train_role(backbone, "policy")
    backbone.export_adapter("policy", tmp_path)
    found = plain_logits(PeftModel.from_pretrained(original, tmp_path), input_ids=IDS_BT)
    torch.testing.assert_close(found, role_logits(backbone, "policy", IDS_BT), atol=2e-5, rtol=1e-5)


def test_a_bf16_base_has_the_same_adapter_in_peft(tmp_path: Path) -> None:
    original = tiny_model("llama", torch.bfloat16)
    backbone = load_backbone(copy.deepcopy(original))
    backbone.add_adapter("policy", init="pissa", rank=3)
    train_role(backbone, "policy")
    backbone.export_adapter("policy", tmp_path)
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "adapter_model.safetensors").values())
    found = plain_logits(PeftModel.from_pretrained(original, tmp_path), input_ids=IDS_BT).float()
    expected = role_logits(backbone, "policy", IDS_BT).float()
    anchor = role_logits(backbone, "anchor", IDS_BT).float()
    # PEFT adds its terms in another order, and each addition rounds to bf16.
    assert (found - expected).abs().max() < 0.1 * (expected - anchor).abs().max()


def test_the_base_of_a_directory_is_named_in_the_config(
    tmp_path: Path, saved_model: Callable[[PreTrainedModel], Path]
) -> None:
    directory = saved_model(tiny_model("llama"))
    backbone = load_backbone(directory)
    backbone.add_adapter("policy", rank=2)
    train_role(backbone, "policy")
    backbone.export_adapter("policy", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(directory)
    assert config["task_type"] == "CAUSAL_LM"
    model = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    found = plain_logits(PeftModel.from_pretrained(model, tmp_path / "adapter"), input_ids=IDS_BT)
    torch.testing.assert_close(found, role_logits(backbone, "policy", IDS_BT), atol=2e-5, rtol=1e-5)


def test_sequences_of_the_trainer_contain_what_could_be_mistaken_for_padding() -> None:
    # The premise of the tests here and of the invariants: pad and end ids stand inside real rows.
    whole = [prompt + response for prompt, response in rows_of(ragged_sequences())]
    assert any(PAD in row for row in whole)
    assert any(EOS in row for row in whole)


def laguna() -> PreTrainedModel:
    """A mixture whose shared experts have another name in checkpoints."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_attention_heads_per_layer": [4, 4]}
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    kinds = {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    config = AutoConfig.for_model("laguna", **sizes, **heads, **experts, **kinds, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config).eval()


def test_what_peft_would_leave_at_random_is_not_exported(tmp_path: Path) -> None:
    """It renames the shared experts, finds no such tensors in the file, and says nothing; attention it loads."""
    model = laguna()
    plain = copy.deepcopy(model)
    backbone = load_backbone(model)
    backbone.add_adapter("everywhere", rank=2)
    backbone.add_adapter("attention", rank=2, targets=["q_proj", "o_proj"])
    perturb(backbone, "attention")
    assert isinstance(backbone.peft_form("everywhere"), str)
    with raises("conflict", key="format"):
        backbone.export_adapter("everywhere", tmp_path / "everywhere")
    backbone.export_adapter("attention", tmp_path / "attention")
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "attention"))
    with torch.no_grad(), backbone.role("attention"):
        torch.testing.assert_close(loaded(IDS_BT).logits, backbone(IDS_BT).logits, atol=1e-5, rtol=1e-5)
