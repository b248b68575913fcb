"""Gated MLPs that keep less: transformers' numbers to the bit, autograd's gradients, and fewer tensors kept."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.fast.gated_mlp import lighten_mlps
from tests.tiny import IDS_BT, tiny_model, with_gradient

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# The gate's activation is SiLU in all but Gemma.
ALIKE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3"]


def model_of(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | {"pad_token_id": 0} | changes)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


def mlps(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("MLP")]


def is_light(mlp: nn.Module) -> bool:
    return "forward" in vars(mlp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ALIKE)
def test_numbers_and_gradients_are_those_of_transformers_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    plain = model_of(kind, dtype)
    light = copy.deepcopy(plain)
    lighten_mlps(light)
    assert len(mlps(plain)) == 2
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    for before, after in zip(mlps(plain), mlps(light), strict=True):
        assert is_light(after)
        for found, expected in zip(with_gradient(after, x), with_gradient(before, x), strict=True):
            assert torch.equal(found, expected)


def test_gate_up_and_their_product_are_all_that_is_kept() -> None:
    light, plain = load_backbone(tiny_model("llama")), load_backbone(tiny_model("llama"))
    for mlp in mlps(plain):
        del mlp.forward
    kept = {}
    for name, backbone in (("light", light), ("plain", plain)):
        backbone.add_adapter("policy", rank=3)
        wide: dict[int, Tensor] = {}

        def keep(tensor: Tensor, wide: dict[int, Tensor] = wide) -> Tensor:
            if tensor.shape == (1, 7, 48):
                wide[tensor.data_ptr()] = tensor
            return tensor

        with backbone.role("policy"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = backbone(torch.arange(7)[None]).logits
        kept[name] = len(wide)
        del logits
    assert kept == {"light": 2 * 3, "plain": 2 * 4}


class ClampedMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(min=-10.0, max=10.0)
        return self.down_proj(self.act_fn(gate) * up)


class SwappedMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        down_proj = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return down_proj  # noqa: RET504  (the same instructions as Llama's, with two names exchanged)


class WithWeights(nn.SiLU):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.slope * input)


def test_one_that_is_another_is_left_alone() -> None:
    model = model_of("llama", num_hidden_layers=4)
    first, second, third, fourth = mlps(model)
    first.__class__, second.__class__ = ClampedMLP, SwappedMLP
    third.act_fn = WithWeights()
    fourth.forward = fourth.forward  # somebody else's, such as accelerate's
    lighten_mlps(model)
    assert [is_light(mlp) for mlp in (first, second, third)] == [False] * 3
    assert not isinstance(fourth.forward, partial)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_models_without_gates_are_left_alone(family: str) -> None:
    model = tiny_model(family)
    before = [dict(vars(module)) for module in model.modules()]
    lighten_mlps(model)
    assert [vars(module).keys() for module in model.modules()] == [values.keys() for values in before]


def test_a_copy_that_is_trained_has_the_gradients_of_its_own_weights() -> None:
    plain = model_of("llama")
    light = copy.deepcopy(plain)
    lighten_mlps(light)
    trained, plain = copy.deepcopy(light).requires_grad_(True), plain.requires_grad_(True)
    for model in (trained, plain):
        model(input_ids=IDS_BT).logits.square().mean().backward()
    for (name, found), (_, expected) in zip(trained.named_parameters(), plain.named_parameters(), strict=True):
        assert found.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, msg=name)
    assert all(parameter.grad is None for parameter in light.parameters())


def test_a_backbone_has_them_and_the_logits_of_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        expected = model(input_ids=IDS_BT).logits
    backbone = load_backbone(model)
    assert all(map(is_light, mlps(backbone)))
    with torch.no_grad():
        assert torch.equal(backbone(IDS_BT).logits, expected)
