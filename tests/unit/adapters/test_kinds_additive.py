"""`additive`: a sum of two tiled factors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from reward.errors import InputError
from tests.unit.adapters.dense import IN, OUT, base_layer, check_all, made


def tiled(tensors: dict[str, Tensor]) -> Tensor:
    """Products with rows of r×r identities, cut to the weight's size."""
    A, B = tensors["additive_A"], tensors["additive_B"]
    rank = A.shape[1]
    along_inputs = torch.tensor(np.tile(np.eye(rank), IN)[:, :IN])
    along_outputs = torch.tensor(np.tile(np.eye(rank), OUT).T[:OUT])
    return A @ along_inputs + along_outputs @ B


@pytest.mark.parametrize("rank", [1, 3, 5, 11, 13])  # 13 is the inputs, 11 divides the outputs; the others cut a tile
def test_it_is_the_dense_sum_of_tiles(rank: int) -> None:
    check_all("additive", tiled, rank=rank)


def test_of_width_one_it_has_the_row_and_column_sums_of_the_gradient() -> None:
    base = base_layer()
    _, layer = made(base, "additive", rank=1)
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(1))
    dy = torch.randn(6, OUT, generator=torch.Generator().manual_seed(2))
    (layer(x, base) * dy).sum().backward()
    G = dy.T @ x
    torch.testing.assert_close(layer.additive_A.grad[:, 0], G.sum(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.additive_B.grad[0], G.sum(0), atol=1e-4, rtol=1e-4)


def test_a_tile_that_is_wider_than_a_layer_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        made(base_layer(), "additive", rank=14)
    assert (caught.value.kind, caught.value.key) == ("conflict", "adapter.rank")
