"""Inits and small kinds that were made for reinforcement learning, against PEFT and dense numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pe_rlhf.adapters.layer import weight_out_in
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.optim.role_optimizer import RoleGroup
from pe_rlhf.runs.saved_roles import load_role, save_role
from tests.failures import raises
from tests.tiny import role_logits, tiny_model
from tests.unit.adapters.dense import base_layer, check_all
from tests.unit.adapters.first_steps import matrix
from tests.unit.adapters.test_init_oracles import SHAPES, run
from tests.unit.adapters.test_kinds import backbone_with, optimizer_of, train


def in_peft(weight_OI: Tensor, rank: int, init: Any) -> nn.Module:
    """PEFT's layer on a weight, with its model around it kept alive."""
    linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    linear.weight.data.copy_(weight_OI)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=init, target_modules=["0"])
    return get_peft_model(nn.Sequential(linear), config)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_mica_is_that_of_peft_and_trains_a_only(shape: tuple[int, int]) -> None:
    weight_OI = matrix(shape)
    A, B = run("mica", weight_OI, 3)
    named = dict(in_peft(weight_OI, 3, "mica").named_parameters())
    theirs = named["base_model.model.0.lora_B.default.weight"]
    torch.testing.assert_close(B * torch.sign((B * theirs).sum(0)), theirs.detach(), atol=1e-4, rtol=1e-4)
    assert not A.any()
    trained = {name.split(".")[-3] for name, parameter in named.items() if parameter.requires_grad}
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_adapter("policy", init="mica", rank=3)
    assert {name.rsplit(".", 1)[1] for name in backbone.role_parameters("policy")} == trained == {"lora_A"}


def test_lora_plus_is_refused_where_b_is_frozen() -> None:
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_adapter("policy", init="mica", rank=3)
    with raises("conflict", key="optimizer.lora_plus_ratio"):
        RoleGroup.of(backbone, "policy", 1e-3).by_rate(16.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("share", "rank"), [(0.2, 3), (0.05, 1), (1.0, 4)])
def test_geora_is_the_dense_computation_of_its_paper(shape: tuple[int, int], share: float, rank: int) -> None:
    weight_OI = matrix(shape)
    A, B = run("geora", weight_OI, rank, scale=2.0, share=share)
    W = weight_OI.double().numpy()
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    approximation = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    count = round(share * W.size)
    masks = [np.abs(M) <= np.sort(np.abs(M), axis=None)[count - 1] for M in (W, approximation)]
    assert [int(mask.sum()) for mask in masks] == [count, count]
    U, S, Vh = np.linalg.svd(W * (masks[0] | masks[1]), full_matrices=False)
    np.testing.assert_allclose((B @ A).numpy(), (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-4)
    np.testing.assert_allclose((A @ A.T).numpy(), np.diag(S[:rank]), atol=1e-4)
    np.testing.assert_allclose((B.T @ B).numpy(), np.diag(S[:rank]), atol=1e-4)
    if share == 1:  # nothing is masked out: the weight's own main directions
        torch.testing.assert_close(B @ A, torch.matmul(*run("pissa", weight_OI, rank)[::-1]), atol=1e-4, rtol=1e-4)


def mixed(tensors: dict[str, Tensor]) -> Tensor:
    """U1 √S1 (Σ v_i P_i) √S1 V1ᵀ, by numpy's SVD of the base of `dense`."""
    U, S, Vh = np.linalg.svd(weight_out_in(base_layer()).double().numpy(), full_matrices=False)
    signs = np.sign(U[np.abs(U).argmax(0), np.arange(len(S))])
    left, right = torch.tensor(U * signs * np.sqrt(S)), torch.tensor((Vh.T * signs * np.sqrt(S)).T)
    core = sum(v * P for v, P in zip(tensors["tinylora_v"], tensors["projections_KRR"], strict=True))
    return left[:, :4] @ core @ right[:4]


def test_tinylora_is_the_papers_product() -> None:
    check_all("tinylora", mixed, rank=4, size=6)


def test_thirteen_parameters_train_a_role_are_saved_copied_and_go_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank": 2, "size": 13, "vectors": 1}
    backbone = backbone_with("tinylora", tiny_model("llama"), **settings)
    optimizer = optimizer_of(backbone)
    train(backbone, optimizer, 4)
    (vector,) = backbone.role_parameters("policy").values()
    assert vector.numel() == 13
    assert all(layer.tinylora_v is vector for layer in backbone.role_layers("policy").values())
    state = backbone.role_state("policy", copy=False)
    save_role(backbone, "policy", tmp_path / "policy")
    later = load_backbone(tiny_model("llama"))
    load_role(later, "policy", tmp_path / "policy")
    assert all(torch.equal(tensor, later.role_state("policy")[name]) for name, tensor in state.items())
    resumed = optimizer_of(later)
    resumed.load_state(optimizer.state())
    for role_model, role_optimizer in ((backbone, optimizer), (later, resumed)):
        train(role_model, role_optimizer, 3)
    assert torch.equal(role_logits(later, "policy"), role_logits(backbone, "policy"))
    backbone.copy_role("policy", "policy_2")
    (copied,) = backbone.role_parameters("policy_2").values()
    assert copied is not vector
    assert torch.equal(copied, vector)


@pytest.mark.parametrize("vectors", [None, 1, 3, 5, 14])
def test_layers_share_vectors_as_those_of_peft_do(vectors: int | None, tmp_path: Path) -> None:
    backbone = backbone_with("tinylora", tiny_model("llama"), rank=2, size=3, vectors=vectors)
    for i, vector in enumerate(backbone.role_parameters("policy").values()):
        vector.data.fill_(i + 1)
    save_role(backbone, "policy", tmp_path / "policy")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "policy"))
    for name, layer in backbone.role_layers("policy").items():
        theirs: Any = loaded.get_submodule(f"base_model.model.{name}")
        own_OI = layer.delta_weight(backbone.base_weight(name))
        assert own_OI is not None
        torch.testing.assert_close(theirs.get_delta_weight("default"), own_OI, atol=1e-5, rtol=1e-5)


def test_more_vectors_than_layers_are_refused_and_nothing_is_added() -> None:
    backbone = load_backbone(tiny_model("llama"))
    with raises("conflict", key="adapter.vectors"):
        backbone.add_adapter("policy", kind="tinylora", vectors=15)
    assert backbone.roles == ["anchor"]
