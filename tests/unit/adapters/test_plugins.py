"""Inits that others add: by an installed package's entry point, by a module that a recipe names, by the decorator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pe_rlhf.adapters.lora.init_registry import INITS, get_init, init_names
from pe_rlhf.model.backbone import load_backbone
from reward.errors import InputError
from tests.tiny import tiny_model

SOURCE = '''
import torch
from pe_rlhf.adapters.lora.init_registry import InitContext, register_init


@register_init("half")
def half(context: InitContext) -> tuple[torch.Tensor, torch.Tensor]:
    """A = the first r rows of the identity, B = 0."""
    out_features, in_features = context.weight_OI.shape
    return torch.eye(in_features)[: context.rank], torch.zeros(out_features, context.rank)


def plain(context: InitContext) -> tuple[torch.Tensor, torch.Tensor]:
    out_features, in_features = context.weight_OI.shape
    return torch.ones(context.rank, in_features), torch.ones(out_features, context.rank)
'''


def install(folder: Path, entry_points: str) -> None:
    """A package as pip leaves it: a module, and metadata with entry points beside it."""
    (folder / "half_inits.py").write_text(SOURCE, encoding="utf-8")
    metadata = folder / "half_inits-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: half-inits\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[pe_rlhf.inits]\n{entry_points}\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules and packages are found in; what was registered from there is gone afterwards."""
    before = dict(INITS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    INITS.clear()
    INITS.update(before)
    sys.modules.pop("half_inits", None)


def test_an_entry_point_is_found_by_its_name_and_makes_adapters(folder: Path) -> None:
    install(folder, "half = half_inits:half\nother = half_inits:plain")
    assert {"half", "other", "lora"} <= set(init_names())
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_adapter("policy", init="half", rank=3)
    state = backbone.role_state("policy")
    name = backbone.adapter_spec("policy").modules[0]
    assert torch.equal(state[f"{name}.lora_A"], torch.eye(32)[:3])
    backbone.add_adapter("value", init="other", rank=2)
    assert any(key.endswith("initial_B_OR") for key in backbone.role_state("value"))


def test_a_recipe_can_name_the_function(folder: Path) -> None:
    (folder / "half_inits.py").write_text(SOURCE, encoding="utf-8")
    assert get_init("half_inits:half").name == "half_inits:half"
    assert get_init("half_inits:plain") is get_init("half_inits:plain")
    with pytest.raises(InputError, match="module 'half_inits' has no 'hafl'"):
        get_init("half_inits:hafl")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("pissa = half_inits:half", "there is an adapter init of that name already"),
        ("broken = half_inits:nothing", "the plug-in 'broken' cannot be loaded"),
        ("broken = no_such_module:half", "the plug-in 'broken' cannot be loaded"),
    ],
)
def test_plugins_that_cannot_be_used_are_named(folder: Path, entry: str, message: str) -> None:
    install(folder, entry)
    with pytest.raises(InputError, match=message):
        get_init("broken")
