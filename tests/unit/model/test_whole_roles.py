"""Saved roles are what their description and checksums say, or nothing is loaded or exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pe_rlhf.runs.layout import RoleFiles
from pe_rlhf.runs.saved_roles import check_peft_files, load_role, read_role, save_role
from pe_rlhf.system.tensor_files import about_tensors
from tests.failures import raises
from tests.tiny import backbone_with, perturb
from tests.unit.model.test_whole import change_json


@pytest.fixture
def role(tmp_path: Path) -> RoleFiles:
    backbone = backbone_with("policy")
    perturb(backbone, "policy")
    save_role(backbone, "policy", tmp_path / "adapter")
    return RoleFiles(tmp_path / "adapter")


@pytest.mark.parametrize("change", [{"init": "lora"}, {"alpha": 60}, {"scaling": "rslora"}, {"dropout": 0.5}])
def test_a_description_of_another_adapter(role: RoleFiles, change: dict[str, Any]) -> None:
    said = json.loads(role.description.read_text())
    change_json(role.description, spec=said["spec"] | change)
    with raises("changed", key="spec", file=role.description):
        load_role(backbone_with(), "policy", role.folder)


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj.lora_A", "lora_A", "x.head.weight"])
def test_a_role_with_a_tensor_of_no_layer(role: RoleFiles, name: str) -> None:
    tensors, about = load_file(role.tensors), about_tensors(role.tensors)
    save_file(tensors | {name: torch.zeros(2, 2)}, role.tensors, about)
    with raises("unreadable", file=role.folder):
        load_role(backbone_with(), "policy", role.folder)


def test_a_role_that_is_not_finite(role: RoleFiles) -> None:
    tensors, about = load_file(role.tensors), about_tensors(role.tensors)
    next(iter(tensors.values()))[0] = torch.inf
    save_file(tensors, role.tensors, about)
    with raises("not_finite", file=role.tensors):
        load_role(backbone_with(), "policy", role.folder)


def test_a_role_of_before_checksums_still_loads(role: RoleFiles) -> None:
    said = json.loads(role.description.read_text())
    del said["sha256"]
    role.description.write_text(json.dumps(said))
    save_file(load_file(role.tensors), role.tensors)
    load_role(backbone_with(), "policy", role.folder)
    check_peft_files(read_role(role.folder))


@pytest.mark.parametrize("checksums", [True, False])
def test_peft_files_that_were_cut_are_not_exported(role: RoleFiles, checksums: bool) -> None:
    check_peft_files(read_role(role.folder))
    if not checksums:
        change_json(role.description, sha256={})
    role.adapter_tensors.write_bytes(role.adapter_tensors.read_bytes()[:-20])
    with raises("unreadable", file=role.adapter_tensors):
        check_peft_files(read_role(role.folder))


def test_peft_files_that_changed_or_are_gone_are_not_exported(role: RoleFiles, tmp_path: Path) -> None:
    shutil.copytree(role.folder, tmp_path / "other")
    change_json(role.adapter_config, lora_alpha=99)
    with raises("changed", file=role.adapter_config):
        check_peft_files(read_role(role.folder))
    other = RoleFiles(tmp_path / "other")
    other.adapter_tensors.unlink()
    with raises("missing", file=other.adapter_tensors):
        check_peft_files(read_role(other.folder))
