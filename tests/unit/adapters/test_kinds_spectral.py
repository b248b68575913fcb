"""`spectral_a` and `spectral_r`: the top singular vectors of the weight, moved or rotated."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pe_rlhf.adapters.kind import LayerContext, kind_of
from pe_rlhf.adapters.layer import weight_out_in
from reward.errors import InputError
from tests.unit.adapters.dense import base_layer, batches, check_all, inputs, made, perturbed, settings

RANK = 4


def dense_svd() -> tuple[Tensor, Tensor, Tensor]:
    """All of U, S and V of the base's weight, by numpy, with the greatest entry of each u positive."""
    U, S, Vh = np.linalg.svd(weight_out_in(base_layer()).double().numpy(), full_matrices=False)
    signs = np.sign(U[np.abs(U).argmax(0), np.arange(len(S))])
    return torch.tensor(U * signs), torch.tensor(S), torch.tensor(Vh.T * signs)


def moved(tensors: dict[str, Tensor]) -> Tensor:
    """[U1 + A_U, U2] S [V1 + A_V, V2]ᵀ − W0, of whole matrices."""
    U, S, V = dense_svd()
    new_U = torch.cat([U[:, :RANK] + tensors["move_U"], U[:, RANK:]], 1)
    new_V = torch.cat([V[:, :RANK] + tensors["move_V"].T, V[:, RANK:]], 1)
    return new_U @ S.diag() @ new_V.T - U @ S.diag() @ V.T


def cayley(skew: Tensor) -> Tensor:
    entries, nothing = iter(skew), torch.zeros((), dtype=torch.double)
    rows = [[next(entries) if column < row else nothing for column in range(RANK)] for row in range(RANK)]
    lower = torch.stack([torch.stack(row) for row in rows])
    K, eye = lower - lower.T, torch.eye(RANK, dtype=torch.double)
    return (eye - K) @ torch.linalg.inv(eye + K)


def rotated(tensors: dict[str, Tensor]) -> Tensor:
    """[U1 R_U, U2] S [V1 R_V, V2]ᵀ − W0, of whole matrices."""
    U, S, V = dense_svd()
    new_U = torch.cat([U[:, :RANK] @ cayley(tensors["skew_U"]), U[:, RANK:]], 1)
    new_V = torch.cat([V[:, :RANK] @ cayley(tensors["skew_V"]), V[:, RANK:]], 1)
    return new_U @ S.diag() @ new_V.T - U @ S.diag() @ V.T


@pytest.mark.parametrize(("name", "delta"), [("spectral_a", moved), ("spectral_r", rotated)])
def test_it_is_the_papers_product_of_whole_matrices(name: str, delta: Any) -> None:
    check_all(name, delta, rank=RANK)


def test_rotations_stay_orthogonal_while_they_train() -> None:
    base = base_layer()
    _, layer = made(base, "spectral_r", rank=12)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.3)
    for x, target in batches(100):
        optimizer.zero_grad()
        (layer(x, base) - target).square().mean().backward()
        optimizer.step()
    for R in layer.rotations():
        assert (R - torch.eye(12)).norm() > 1
        assert (R.double().T @ R.double() - torch.eye(12, dtype=torch.double)).abs().max() < 1e-6
        assert torch.linalg.det(R.double()) == pytest.approx(1)


def test_rotations_keep_the_singular_values_of_the_weight() -> None:
    base = base_layer()
    _, layer = made(base, "spectral_r", rank=RANK)
    perturbed(layer)
    W0 = weight_out_in(base)
    found = torch.linalg.svdvals((W0 + layer.delta_weight(W0)).double())
    torch.testing.assert_close(found, torch.linalg.svdvals(W0.double()), atol=1e-5, rtol=1e-5)


def test_spectral_a_has_twice_loras_rank_with_as_many_parameters() -> None:
    base = base_layer()
    ranks, counts = {}, {}
    for name in ("spectral_a", "lora"):
        _, layer = made(base, name, rank=RANK)
        perturbed(layer)
        ranks[name] = int(torch.linalg.matrix_rank(layer.delta_weight(base.weight).double(), rtol=1e-5))
        counts[name] = sum(parameter.numel() for parameter in layer.parameters())
    assert ranks == {"spectral_a": 2 * RANK, "lora": RANK}
    assert counts["spectral_a"] == counts["lora"]


@pytest.mark.parametrize("name", ["spectral_a", "spectral_r"])
def test_the_randomised_svd_finds_the_same_directions(name: str) -> None:
    U, S, V = (part[..., :2] for part in dense_svd())
    W0 = U @ (S * torch.tensor([100.0, 10.0])).diag() @ V.T + weight_out_in(base_layer()).double() * 0.01
    context = LayerContext(W0.float(), torch.Generator())
    exact, quick = (kind_of(settings(name, rank=2, niter=n)).tensors(context) for n in (None, 4))
    for part in ("U_OR", "S_R", "Vh_RI"):
        torch.testing.assert_close(quick[part], exact[part], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["spectral_a", "spectral_r"])
def test_more_directions_than_a_layer_has_are_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        made(base_layer(), name, rank=14)
    assert (caught.value.kind, caught.value.key) == ("conflict", "adapter.rank")


def test_one_direction_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match="rank"):
        settings("spectral_r", rank=1)


def test_the_input_gets_the_gradient_of_the_whole_weight() -> None:
    """As in a stack of layers, where the layer below trains too."""
    base = base_layer()
    _, layer = made(base, "spectral_a", rank=RANK)
    perturbed(layer)
    x = inputs().requires_grad_()
    layer(x, base).sum().backward()
    W = weight_out_in(base) + layer.delta_weight(base.weight)
    torch.testing.assert_close(x.grad, W.sum(0).expand_as(x), atol=1e-4, rtol=1e-4)
