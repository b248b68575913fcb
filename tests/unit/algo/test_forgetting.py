"""Penalties against forgetting: values and gradients worked by hand or in numpy, and what follows from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pe_rlhf.algo.forgetting import collision_rate, elastic, joined_quadratics, orthogonality, sparsity


def test_orthogonality_by_hand() -> None:
    """Σ (earlier·own)²: rows (1,2)·(3,-1) = 1 and (0,1)·(3,-1) = −1; gradient 2·Σ (earlier·own)·earlier."""
    earlier, own = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, -1.0]], requires_grad=True)
    loss = orthogonality(earlier, own)
    loss.backward()
    assert loss.item() == 2.0
    assert own.grad is not None
    assert own.grad.tolist() == [[2.0, 2.0]]  # 2·(1·(1,2) − 1·(0,1))


def test_sparsity_in_numpy() -> None:
    random = np.random.default_rng(0)
    A, B = random.normal(size=(2, 5)), random.normal(size=(4, 2))
    own_A, own_B = (torch.tensor(m, requires_grad=True) for m in (A, B))
    loss = sparsity(own_A, own_B)
    loss.backward()
    assert loss.item() == pytest.approx(np.abs(B @ A).sum())
    assert own_A.grad is not None
    assert own_B.grad is not None
    np.testing.assert_allclose(own_A.grad.numpy(), B.T @ np.sign(B @ A))
    np.testing.assert_allclose(own_B.grad.numpy(), np.sign(B @ A) @ A.T)


def test_elastic_by_hand() -> None:
    theta = torch.tensor([3.0, 1.0], requires_grad=True)
    loss = elastic({"a": theta, "unknown": theta}, {"a": torch.tensor([2.0, 5.0])}, {"a": torch.tensor([1.0, 1.0])})
    loss.backward()
    assert loss.item() == 4.0  # ½·2·(3 − 1)²
    assert theta.grad is not None
    assert theta.grad.tolist() == [4.0, 0.0]


def test_several_tasks_are_one_quadratic() -> None:
    """Kept per task, the gradient is the sum of the tasks' own; summed, all are around the last weights."""
    random = torch.Generator().manual_seed(0)
    fishers = [torch.rand(6, generator=random) * (torch.arange(6) != i) for i in range(3)]
    centres = [torch.randn(6, generator=random) for _ in range(3)]
    theta = torch.randn(6, generator=random, requires_grad=True)
    for per_task in (True, False):
        fisher, centre = {}, {}
        for f, c in zip(fishers, centres, strict=True):
            fisher, centre = joined_quadratics(fisher, centre, {"a": f}, {"a": c}, per_task=per_task)
        (found,) = torch.autograd.grad(elastic({"a": theta}, fisher, centre), theta)
        around = centres if per_task else [centres[-1]] * 3
        wanted = sum(f * (theta.detach() - c) for f, c in zip(fishers, around, strict=True))
        torch.testing.assert_close(found, wanted)


def test_a_weight_that_no_task_cared_about_is_free() -> None:
    fisher, centre = joined_quadratics({}, {}, {"a": torch.zeros(2)}, {"a": torch.ones(2)}, per_task=True)
    assert elastic({"a": torch.tensor([9.0, 9.0])}, fisher, centre).item() == 0
    assert torch.isfinite(centre["a"]).all()


def test_collisions_by_hand() -> None:
    first, second = torch.tensor([[1.0, 0.0], [-2.0, 0.01]]), torch.tensor([[-1.0, 3.0], [0.05, 0.01]])
    assert collision_rate(first, second, 0.02) == 0.5
    assert collision_rate(first, second, 0.0) == 0.75


def train(penalty: str, strength: float) -> tuple[float, float]:
    """A second task on a toy layer, drawn to the same inputs as the first; its overlap and collision rate."""
    random = torch.Generator().manual_seed(1)
    earlier_A, earlier_B = torch.randn(2, 12, generator=random), torch.randn(6, 2, generator=random)
    A = (0.3 * torch.randn(2, 12, generator=random)).requires_grad_()
    B = torch.zeros(6, 2).requires_grad_()
    goal = earlier_B @ earlier_A + torch.randn(6, 12, generator=random)
    adam = torch.optim.Adam([A, B], lr=0.02)
    for _ in range(400):
        loss = (B @ A - goal).square().mean()
        loss = loss + strength * (orthogonality(earlier_A, A) if penalty == "olora" else sparsity(A, B))
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        return orthogonality(earlier_A, A).sqrt().item(), collision_rate(earlier_B @ earlier_A, B @ A, 0.1)


def test_olora_keeps_tasks_apart_where_plain_training_does_not() -> None:
    plain, apart = train("olora", 0.0)[0], train("olora", 20.0)[0]
    assert plain > 3
    assert apart < 0.1


def test_the_collision_rate_falls_with_lambda() -> None:
    rates = [train("nlora", strength)[1] for strength in (0.0, 0.005, 0.02, 0.1, 0.5)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.5
    assert rates[-1] < 0.05
