"""Inits and small kinds that were made for reinforcement learning, against PEFT and dense numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.optim.role_optimizer import RoleGroup
from tests.failures import raises
from tests.tiny import tiny_model
from tests.unit.adapters.first_steps import matrix
from tests.unit.adapters.test_init_oracles import SHAPES, run


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
