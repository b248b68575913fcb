"""Every kind of adapter where a LoRA is used: beside other roles, recomputed, packed, above a trunk, under LoRA+."""

from __future__ import annotations

import pytest
import torch

from pe_rlhf.adapters.kind import KINDS, find_kind
from pe_rlhf.adapters.specs import adapter_settings
from pe_rlhf.config.adapter import LowRankConfig
from pe_rlhf.model.backbone import FastPath, load_backbone
from reward.errors import InputError
from tests.failures import raises
from tests.runs import Tree
from tests.tiny import (
    outputs,
    perturb,
    ragged_sequences,
    role_logits,
    set_fast,
    tiny_model,
    with_system_prompt,
)
from tests.unit.adapters.test_kinds import FAMILIES, add, backbone_with, optimizer_of, train


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_roles_of_different_kinds_stand_side_by_side(kind: str) -> None:
    """Training one leaves another where it is, and a critic starts as a reward adapter of the same kind."""
    backbone = backbone_with(kind, tiny_model("llama"))
    add(backbone, "reward", kind)
    backbone.add_adapter("other", rank=2, init="pissa")
    train(backbone, optimizer_of(backbone), 3)
    assert torch.equal(role_logits(backbone, "other"), role_logits(backbone, "anchor"))
    with torch.no_grad():
        for parameter in backbone.role_parameters("reward").values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    backbone.copy_role("reward", "value")
    reward = {name: tensor.clone() for name, tensor in backbone.role_state("reward").items()}
    assert backbone.role_state("value").keys() == reward.keys()
    with torch.no_grad():
        for parameter in backbone.role_parameters("value").values():
            parameter.add_(1.0)  # of its own, whatever layers share
    for name, tensor in backbone.role_state("reward").items():
        assert torch.equal(tensor, reward[name])
        is_trained = name.startswith("head.") or name.rpartition(".")[2] in find_kind(kind).layer.trained
        assert torch.equal(backbone.role_state("value")[name], tensor + 1.0 if is_trained else tensor), name


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_recomputed_blocks_end_with_the_same_weights_and_statistics(kind: str) -> None:
    """Under gradient checkpointing a layer's forward pass runs twice: no hook or statistic may count twice.

    The statistics that choose entries, and the training, are both taken so.
    """
    found = []
    for checkpointing in (False, True):
        backbone = load_backbone(tiny_model("llama"), fast=FastPath(gradient_checkpointing=checkpointing))
        passes = 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        backbone.model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(count)
        add(backbone, "policy", kind)
        optimizer, before = optimizer_of(backbone), passes
        for _ in range(4):
            with backbone.role("policy"):
                optimizer.backward(-backbone.response_logprobs(ragged_sequences())[0].mean())
            optimizer.step()
        assert passes - before == 4 * (1 + checkpointing)
        found.append(backbone.role_state("policy"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("last_layers", [None, 1])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_packed_or_from_a_trunk_it_computes_what_padded_rows_do(
    kind: str, family: str, last_layers: int | None
) -> None:
    backbone = load_backbone(tiny_model(family), fast=FastPath(trunk_cache_mib=1))
    add(backbone, "policy", kind, last_layers=last_layers)
    perturb(backbone, "policy", 0.05)
    sequences = with_system_prompt()
    set_fast(backbone, packing=False)
    expected, gradients = outputs(backbone, "policy", sequences)
    set_fast(backbone, packing=True)
    ways = [outputs(backbone, "policy", sequences)]
    if last_layers:
        backbone.compute_once(sequences, token_budget=1000)
        ways.append(outputs(backbone, "policy", sequences))
    for found, of_packed in ways:
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        for name, gradient in gradients.items():
            assert (of_packed[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rslora_scales_what_holds_a_lora_and_others_say_why_not(kind: str) -> None:
    """√r times the change of the usual scale, which is read off the layers of the same factors."""
    if not issubclass(find_kind(kind).settings_type, LowRankConfig):
        with pytest.raises(InputError) as caught:
            adapter_settings(kind, scaling="rslora")
        assert (caught.value.kind, caught.value.key) == ("unknown", "adapter.scaling")
        assert caught.value.fields().get("fix")  # the reason
        return
    scales = []
    for scaling in ("standard", "rslora"):
        backbone = backbone_with(kind, tiny_model("llama"), rank=4, alpha=8.0, scaling=scaling)
        scales.append({layer.scale for layer in backbone.role_layers("policy").values()})  # type: ignore[attr-defined]
    assert scales == [{2.0}, {4.0}]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"lora"}))
def test_lora_plus_is_for_kinds_with_factors(kind: str) -> None:
    backbone = backbone_with(kind, tiny_model("llama"))
    if find_kind(kind).fast:
        optimizer_of(backbone, lora_plus_ratio=4.0)
    else:
        with raises("conflict", key="optimizer.lora_plus_ratio"):
            optimizer_of(backbone, lora_plus_ratio=4.0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in sorted(KINDS)), *(("lora", {"init": init}) for init in ("pissa", "lora_ga", "geora"))],
)
def test_where_weight_decay_ends_is_the_anchor(kind: str, settings: Tree) -> None:
    backbone = backbone_with(kind, tiny_model("llama"), **settings)
    perturb(backbone, "policy")
    anchor, trained = role_logits(backbone, "anchor"), role_logits(backbone, "policy")
    assert (trained - anchor).abs().max() > 1e-3
    starts = backbone.role_starts("policy")
    with torch.no_grad():
        for name, parameter in backbone.role_parameters("policy").items():
            parameter.copy_(starts.get(name, torch.zeros(())))
    torch.testing.assert_close(role_logits(backbone, "policy"), anchor, atol=2e-5, rtol=1e-5)
