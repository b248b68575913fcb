"""Roles that PEFT would load as something else: no PEFT files, and the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.runs.saved_roles import check_peft_files, load_role, read_role, save_role
from tests.failures import raises
from tests.model_types import build
from tests.tiny import IDS_BT, perturb, role_logits


def trained(name: str, **settings: Any) -> Backbone:
    backbone = load_backbone(build(name))
    backbone.add_adapter("policy", rank=2, **settings)
    perturb(backbone, "policy")
    return backbone


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "mamba"])
def test_what_peft_loads_as_something_else_is_not_written(name: str, tmp_path: Path) -> None:
    backbone = trained(name)
    folder = tmp_path / "policy"
    save_role(backbone, "policy", folder)
    assert {file.name for file in folder.iterdir()} == {"role.json", "role.safetensors"}
    with raises("conflict", key="format", file=folder):
        check_peft_files(read_role(folder))
    again = load_backbone(build(name))
    load_role(again, "policy", folder)
    assert torch.equal(role_logits(again, "policy"), role_logits(backbone, "policy"))


@pytest.mark.parametrize(
    ("name", "settings"), [("deepseek_v3", {"targets": "attention"}), ("mixtral", {}), ("gemma3", {})]
)
def test_what_peft_loads_right_is_written(name: str, settings: dict[str, str], tmp_path: Path) -> None:
    backbone = trained(name, **settings)
    assert not isinstance(backbone.peft_form("policy"), str)
    save_role(backbone, "policy", tmp_path / "policy")
    loaded = PeftModel.from_pretrained(build(name), str(tmp_path / "policy"))
    with torch.no_grad():
        found = loaded(input_ids=IDS_BT).logits
    torch.testing.assert_close(found, role_logits(backbone, "policy"), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("gemma2", {"final_logit_softcapping": 7.0}),
        ("gemma2", {"attn_logit_softcapping": 9.0}),
        ("granite", {"logits_scaling": 5.0}),
        ("granite", {"embedding_multiplier": 5.0}),
    ],
)
def test_a_base_with_another_config_is_another_base(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The same weights, used otherwise; a role of before, which says nothing of it, still loads."""
    save_role(trained(name), "policy", tmp_path / "policy")
    model = build(name, **changes)
    with raises("changed", key="base_config", file=tmp_path / "policy"):
        load_role(load_backbone(model), "policy", tmp_path / "policy")
    description = tmp_path / "policy" / "role.json"
    description.write_text(description.read_text().replace('"base_config"', '"of_no_interest"'))
    load_role(load_backbone(model), "policy", tmp_path / "policy")
