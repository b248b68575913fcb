"""A whole PPO update with SAM against two gradients of dense models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pe_rlhf.stages.ppo_update import update
from pe_rlhf.system.seeding import permutation
from tests.stage_support import plain_role
from tests.unit.stages.test_ppo_update import (
    BETA,
    ROLES,
    SEED,
    STEP,
    config_of,
    experience_of,
    naive_losses,
    optimizer_of,
    trainable,
    trained,
)


@pytest.mark.parametrize("batches", ["one", "two"])
def test_sam_is_two_gradients_of_a_dense_model(batches: str) -> None:
    """Two passes; the norm that ρ is divided by is of each role apart, the head's gradient included."""
    sharpness = {"sharpness": "sam", "rho": 0.3, "sharpness_batches": batches}
    config = config_of(epochs=2, optimizer={"max_grad_norm": 0.5, **sharpness})
    backbone = trained()
    experience = experience_of(backbone)
    plains = {role: plain_role(backbone, role) for role in ROLES}
    leaves = {role: trainable(plain, backbone, role) for role, plain in plains.items()}
    optimizers = {
        role: torch.optim.AdamW(leaves[role].values(), lr=rate, eps=1e-5, weight_decay=0.0)
        for role, rate in (("policy", 1e-2), ("value", 3e-2))
    }

    def gradients(rows: list[int]) -> dict[str, list[Tensor]]:
        policy_loss, value_loss, _ = naive_losses(plains["policy"], plains["value"], experience, rows, config)
        losses = {"policy": policy_loss, "value": value_loss}
        return {role: list(torch.autograd.grad(losses[role], [*leaves[role].values()])) for role in ROLES}

    for epoch in range(2):
        rows = permutation(5, SEED, "minibatches", STEP, epoch)
        half = len(rows) // 2
        first, second = (rows[:half], rows[half:]) if batches == "two" else (rows, rows)
        moves: dict[str, list[Tensor]] = {}
        for role, found in gradients(first).items():
            norm = math.sqrt(sum(g.double().square().sum().item() for g in found))
            moves[role] = [0.3 / norm * g for g in found]
        with torch.no_grad():
            for role in ROLES:
                for leaf, move in zip(leaves[role].values(), moves[role], strict=True):
                    leaf += move
        beside = gradients(second)
        for role in ROLES:
            with torch.no_grad():
                for leaf, move in zip(leaves[role].values(), moves[role], strict=True):
                    leaf -= move
            for leaf, gradient in zip(leaves[role].values(), beside[role], strict=True):
                leaf.grad = gradient
            torch.nn.utils.clip_grad_norm_(leaves[role].values(), 0.5)
            optimizers[role].step()

    before = backbone.base_fingerprint()
    update(backbone, optimizer_of(backbone, config), experience, BETA, config, SEED, STEP)
    assert backbone.base_fingerprint() == before
    for role in ROLES:
        for name, parameter in backbone.role_parameters(role).items():
            wanted = leaves[role][f"{role}/{name}"]
            torch.testing.assert_close(parameter.detach(), wanted.detach(), atol=3e-4, rtol=1e-3, msg=f"{role} {name}")
