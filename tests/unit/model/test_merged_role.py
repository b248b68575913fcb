"""A role played by merged copies of its layers: its own numbers by one product per layer, and nothing left of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_rlhf.adapters.layer import WrappedLayer
from pe_rlhf.config import SamplingConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout import hf
from pe_rlhf.rollout.hf import HFRollout
from tests.failures import raises
from tests.tiny import INITS, ROLES, backbone_with, perturb, role_logits, tiny_model, train_role

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def merged_logits(backbone: Backbone, merged: str, role: str) -> Tensor:
    """A role's logits while another, or the same, is merged."""
    with backbone.merged_role(merged):
        return role_logits(backbone, role)


@pytest.mark.parametrize("init", INITS)
def test_a_merged_role_gives_the_roles_logits(family: str, init: str) -> None:
    backbone = load_backbone(tiny_model(family))
    backbone.add_adapter("policy", init=init, rank=3, alpha=6)
    torch.testing.assert_close(merged_logits(backbone, "policy", "policy"), role_logits(backbone, "anchor"))
    perturb(backbone, "policy", 0.3)
    expected = role_logits(backbone, "policy")
    assert (expected - role_logits(backbone, "anchor")).abs().max() > 0.1
    torch.testing.assert_close(merged_logits(backbone, "policy", "policy"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", INITS)
def test_at_step_0_it_is_the_anchor_to_the_bit(init: str) -> None:
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_adapter("policy", init=init, rank=3, alpha=6)
    assert torch.equal(merged_logits(backbone, "policy", "policy"), role_logits(backbone, "anchor"))


def test_other_roles_are_what_they_were(family: str) -> None:
    backbone = load_backbone(tiny_model(family))
    for role in ROLES:
        backbone.add_adapter(role, rank=3, alpha=6)
        perturb(backbone, role, 0.3)
    for role in ("anchor", "value", "reward"):
        assert torch.equal(merged_logits(backbone, "policy", role), role_logits(backbone, role))


def test_the_copies_are_of_the_weights_as_they_are_then() -> None:
    backbone = backbone_with("policy")
    before = merged_logits(backbone, "policy", "policy")
    train_role(backbone, "policy")
    expected = role_logits(backbone, "policy")
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(merged_logits(backbone, "policy", "policy"), expected, atol=1e-4, rtol=1e-4)


def test_nothing_is_left_of_them_even_after_an_exception() -> None:
    backbone = backbone_with("policy", "value")
    perturb(backbone, "policy", 0.3)
    fingerprint, names = backbone.base_fingerprint(), list(backbone.state_dict())
    expected = role_logits(backbone, "policy")
    with backbone.merged_role("policy"):
        assert backbone.active_role == "policy"
        assert list(backbone.state_dict()) == names
        assert backbone.base_fingerprint() == fingerprint
    with pytest.raises(RuntimeError, match="inside"), backbone.merged_role("policy"):
        raise RuntimeError("inside")
    assert backbone.active_role == "anchor"
    assert torch.equal(role_logits(backbone, "policy"), expected)


def test_a_layer_that_cannot_be_merged_leaves_no_other_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_with("policy")
    perturb(backbone, "policy", 0.3)
    expected, merge, merged = role_logits(backbone, "policy"), WrappedLayer.merge, list[str]()

    def fail(layer: WrappedLayer, role: str) -> None:
        if len(merged) == 3:
            raise torch.OutOfMemoryError("no room")
        merge(layer, role)
        merged.append(role)

    monkeypatch.setattr(WrappedLayer, "merge", fail)
    with pytest.raises(torch.OutOfMemoryError), backbone.merged_role("policy"):
        pass
    assert torch.equal(role_logits(backbone, "policy"), expected)


@pytest.mark.parametrize("name", ["anchor", "own"])
def test_a_role_without_an_adapter_is_played_as_it_is(name: str) -> None:
    backbone = backbone_with("policy")
    backbone.add_own_weights("own")
    assert torch.equal(merged_logits(backbone, name, name), role_logits(backbone, name))


class TernaryLinear(nn.Linear):
    """A layer that quantises as it goes, as BitNet's do."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.sign() * self.weight.abs().mean(), self.bias)


def test_a_base_that_is_no_plain_product_is_not_merged() -> None:
    for change in ("another forward", "a hook's forward", "fp8"):
        model = tiny_model("llama")
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        if change == "another forward":
            layer.__class__ = TernaryLinear
        elif change == "a hook's forward":
            layer.forward = layer.forward
        backbone = load_backbone(model)
        backbone.add_adapter("policy", rank=3, targets=["up_proj"])
        assert backbone.can_merge("policy") == (change == "fp8")
        if change == "fp8":
            weight = model.get_parameter("model.layers.0.mlp.up_proj.base.weight")
            layer.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
            assert not backbone.can_merge("policy")


def test_an_unknown_role_is_refused() -> None:
    with raises("unknown", key="polcy"), backbone_with("policy").merged_role("polcy"):
        pass


# ---- sampling by HF -------------------------------------------------------------------------------------------------


def adapter_passes(backbone: Backbone, role: str = "policy", **settings: Any) -> tuple[list[list[int]], int]:
    """What is sampled, and how often an adapter computed something."""
    passes: list[nn.Module] = []
    adapters = [layer.adapters[role] for layer in backbone.modules() if isinstance(layer, WrappedLayer)]
    hooks = [adapter.register_forward_hook(lambda adapter, *_: passes.append(adapter)) for adapter in adapters]
    config = SamplingConfig(max_new_tokens=6, **settings)
    responses = HFRollout(backbone, role, config).generate(PROMPTS, seed=0).responses
    for hook in hooks:
        hook.remove()
    return responses, len(passes)


@pytest.mark.parametrize(("sync", "merges"), [("auto", True), ("merged", True), ("adapter", False)])
def test_who_computes_while_sampling(family: str, sync: str, merges: bool) -> None:
    backbone = load_backbone(tiny_model(family))
    backbone.add_adapter("policy", init="pissa", rank=3, alpha=6)
    perturb(backbone, "policy", 0.3)
    responses, passes = adapter_passes(backbone, sync=sync)
    assert (passes == 0) == merges
    assert responses == adapter_passes(backbone, sync="adapter")[0]


def test_a_narrow_base_is_not_merged_unasked() -> None:
    backbone = load_backbone(tiny_model("llama", torch.bfloat16))
    backbone.add_adapter("policy", rank=3, alpha=6)
    assert adapter_passes(backbone)[1] > 0
    assert adapter_passes(backbone, sync="merged")[1] == 0


@pytest.mark.parametrize(("size", "least", "most"), [(1e-5, 0.0, 0.5), (0.3, 0.98, 1.02)])
def test_the_share_of_the_update_that_merged_weights_keep(size: float, least: float, most: float) -> None:
    """Against numpy's sums over all layers; fp32 keeps all, bf16 next to nothing of a small update."""
    backbone = load_backbone(tiny_model("llama", torch.bfloat16))
    backbone.add_adapter("policy", init="pissa", rank=3, alpha=6)
    perturb(backbone, "policy", size)
    kept = whole = 0.0
    for base_OI, change_OI in backbone.weight_changes("policy"):
        base, change = base_OI.double().numpy(), change_OI.double().numpy()
        rounded = torch.from_numpy(base + change).bfloat16().double().numpy()
        kept, whole = kept + ((rounded - base) * change).sum(), whole + (change**2).sum()
    share = backbone.merged_share("policy")
    assert share == pytest.approx(kept / whole, abs=1e-3)
    assert least <= share <= most
    assert backbone.merged_share("policy", torch.float32) == pytest.approx(1, abs=1e-3)


def test_merged_tensors_of_another_dtype_are_rounded_once() -> None:
    backbone = load_backbone(tiny_model("llama", torch.bfloat16))
    backbone.add_adapter("policy", rank=3, alpha=6)
    perturb(backbone, "policy", 1e-4)
    wide = dict(backbone.merged_tensors("policy", torch.float32))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    for name, tensor in backbone.merged_tensors("policy"):
        assert torch.equal(wide[name].bfloat16(), tensor)


def test_what_is_said_of_vllms_weights_is_not_of_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that asks its judge between steps samples by HF, whatever its section says of vLLM."""
    backbone = backbone_with("policy")
    assert adapter_passes(backbone, engine="vllm", sync="adapter")[1] == 0
    monkeypatch.setattr(hf, "MERGED_UNASKED", 0)
    assert adapter_passes(backbone, engine="vllm", sync="merged")[1] > 0


def test_unasked_only_what_is_small_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_with("policy")
    size = sum(p.nbytes for name, p in backbone.model.named_parameters() if name.endswith(".base.weight"))
    monkeypatch.setattr(hf, "MERGED_UNASKED", size)
    assert adapter_passes(backbone)[1] == 0
    monkeypatch.setattr(hf, "MERGED_UNASKED", size - 1)
    assert adapter_passes(backbone)[1] > 0
    assert adapter_passes(backbone, sync="merged")[1] == 0


def test_each_rollout_is_of_the_weights_as_they_are_then(saved_model: Callable[[PreTrainedModel], Path]) -> None:
    path = saved_model(tiny_model("llama"))
    trained, loaded = load_backbone(path), load_backbone(path)
    trained.add_adapter("policy", rank=3, alpha=6)
    engine = HFRollout(trained, "policy", SamplingConfig(max_new_tokens=12))
    before = engine.generate(PROMPTS, seed=0).responses
    perturb(trained, "policy", 0.3)
    after = engine.generate(PROMPTS, seed=0).responses
    loaded.load_role("policy", trained.specs["policy"], trained.role_state("policy"))
    assert after == HFRollout(loaded, "policy", SamplingConfig(max_new_tokens=12)).generate(PROMPTS, seed=0).responses
    assert after != before
