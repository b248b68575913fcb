"""Combined scores by hand: three members, two responses. Diversity against numpy and a dense gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pe_rlhf.algo.ensembles import COMBINE, disagreement, diversity

SCORES = torch.tensor([[1.0, 4.0], [2.0, 4.0], [6.0, 7.0]])
# Means 3 and 5; variances (4 + 1 + 9)/3 = 14/3 and (1 + 1 + 4)/3 = 2.


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("mean", [3.0, 5.0]),
        ("mean_minus_std", [3 - 0.5 * (14 / 3) ** 0.5, 5 - 0.5 * 2**0.5]),
        ("worst", [1.0, 4.0]),
        ("uwo", [3 - 0.5 * 14 / 3, 5 - 0.5 * 2]),
    ],
)
def test_by_hand(combine: str, expected: list[float]) -> None:
    assert COMBINE[combine](SCORES, 0.5).tolist() == pytest.approx(expected)


def test_disagreement_by_hand() -> None:
    assert disagreement(SCORES) == pytest.approx(((14 / 3) ** 0.5 + 2**0.5) / 2)
    assert disagreement(SCORES[:1]) == 0


def layers(members: int = 3, widths: tuple[int, ...] = (7, 12, 4), rank: int = 2) -> list[list[torch.Tensor]]:
    """Factors of layers of several widths; of the last the rows are more than its width."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(rank, width, generator=generator) for _ in range(members)] for width in widths]


def test_diversity_is_the_mean_of_numpys_norms() -> None:
    factors = layers()
    stacks = [np.concatenate([factor.numpy() for factor in members]) for members in factors]
    expected = [np.linalg.norm(A, "nuc") / np.linalg.norm(A, "fro") for A in stacks]
    assert diversity(factors).item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_diversity_has_the_gradient_of_the_dense_formula() -> None:
    """d‖A‖_*/dA = U·Vᵀ, so of ‖A‖_*/‖A‖_F it is U·Vᵀ/‖A‖_F − ‖A‖_*·A/‖A‖_F³, a third of it a layer."""
    factors = [[factor.requires_grad_() for factor in members] for members in layers()]
    diversity(factors).backward()
    for members in factors:
        A = np.concatenate([factor.detach().numpy() for factor in members]).astype(np.float64)
        U, values, V = np.linalg.svd(A, full_matrices=False)
        norm = np.linalg.norm(A)
        expected = (U @ V / norm - values.sum() * A / norm**3) / 3
        found = torch.cat([factor.grad for factor in members if factor.grad is not None]).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_diversity_by_hand() -> None:
    row = torch.tensor([[1.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 2.0, 0.0]])
    assert diversity([[row, row, row]]).item() == pytest.approx(1)  # one direction
    assert diversity([[row, other]]).item() == pytest.approx(3 / 5**0.5)
    assert diversity([[row, other], [row, row]]).item() == pytest.approx((3 / 5**0.5 + 1) / 2)
    assert diversity([[row, 0 * row], [0 * row, 0 * row]]).item() == pytest.approx(1 / 2)


def test_members_that_are_alike_or_zero_have_finite_gradients() -> None:
    for start in (torch.ones(2, 5), torch.zeros(2, 5)):
        factors = [start.clone().requires_grad_() for _ in range(3)]
        diversity([factors]).backward()
        gradients = [factor.grad for factor in factors]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        torch.testing.assert_close(gradients[0], gradients[2])
