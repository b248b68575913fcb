"""Inits that users add, with the decorator or as a plain function, in a module that a recipe names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pe_rlhf.adapters.lora.init_registry import INITS, get_init, init_of
from pe_rlhf.config import LoRAConfig
from pe_rlhf.config.adapter import INIT_OPTIONS
from pe_rlhf.model.backbone import load_backbone
from reward.errors import InputError
from tests.failures import raises
from tests.tiny import tiny_model

SOURCE = '''
import torch
from pe_rlhf.adapters.lora.init_registry import InitContext, register_init
from pe_rlhf.config import Section


class Options(Section):
    factor: float = 1.0


@register_init("half", options=Options)
def half(context: InitContext) -> tuple[torch.Tensor, torch.Tensor]:
    """A = the first r rows of the identity times a factor, B = 0."""
    out_features, in_features = context.weight_OI.shape
    return context.options.factor * torch.eye(in_features)[: context.rank], torch.zeros(out_features, context.rank)


def plain(context: InitContext) -> tuple[torch.Tensor, torch.Tensor]:
    out_features, in_features = context.weight_OI.shape
    return torch.ones(context.rank, in_features), torch.ones(out_features, context.rank)
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that can be imported. After the test its inits are gone."""
    (tmp_path / "half_inits.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    inits, options = dict(INITS), dict(INIT_OPTIONS)
    yield "half_inits"
    for name in INITS.keys() - inits.keys():
        del INITS[name]
    for name in INIT_OPTIONS.keys() - options.keys():
        del INIT_OPTIONS[name]
    sys.modules.pop("half_inits", None)


@pytest.mark.parametrize("name", ["half_inits:half", "half"])
def test_a_decorated_init_makes_adapters_with_its_options(module: str, name: str) -> None:
    importlib.import_module(module)
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_adapter("policy", init=name, rank=3, init_options={"factor": 2.0})
    layer = backbone.adapter_spec("policy").modules[0]
    assert torch.equal(backbone.role_state("policy")[f"{layer}.lora_A"], 2 * torch.eye(32)[:3])
    with pytest.raises(InputError) as caught:
        init_of(LoRAConfig(init="half_inits:half", init_options={"fcator": 2.0}))
    assert (caught.value.kind, caught.value.key) == ("unknown", "adapter.init_options.fcator")


def test_a_plain_function_is_an_init_without_options(module: str) -> None:
    init, options = init_of(LoRAConfig(init=f"{module}:plain"))
    assert (init.name, options.model_dump(), init.needs) == ("half_inits:plain", {}, None)
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_adapter("value", init=init.name, rank=2)
    assert any(key.endswith("initial_B_OR") for key in backbone.role_state("value"))


def test_a_function_that_does_not_exist_is_refused(module: str) -> None:
    with raises("unknown", fix="did you mean 'half'?"):
        get_init(f"{module}:hafl")
