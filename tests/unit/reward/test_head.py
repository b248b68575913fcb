"""The scalar head against a numpy dot product; its start, its dtype, and its bias."""

import numpy as np
import pytest
import torch

from reward.head import ScalarHead


def random_head(hidden_size: int, *, train_bias: bool) -> ScalarHead:
    """A head as after training: it starts at zero."""
    head = ScalarHead(hidden_size, train_bias=train_bias)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(7))
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_is_the_fp32_dot_product(dtype: torch.dtype) -> None:
    head = random_head(16, train_bias=False)
    head.shift(0.25)
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    output = head(hidden)
    expected = hidden.double().numpy() @ head.weight.detach().double().numpy() + 0.25
    assert output.dtype == torch.float32
    np.testing.assert_allclose(output.detach().numpy(), expected, atol=1e-6)


def test_autocast_does_not_round_the_output() -> None:
    head = random_head(64, train_bias=True)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    outside = head(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(hidden)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_start_scores_everything_zero_and_still_learns() -> None:
    head = ScalarHead(16, train_bias=False)
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    assert head(hidden).tolist() == [0.0] * 5
    head(hidden).sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().min() > 0


def test_start_is_fp32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        head = ScalarHead(8, train_bias=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.weight.dtype == head.bias.dtype == torch.float32


@pytest.mark.parametrize("train_bias", [True, False])
def test_bias_trains_only_where_asked(train_bias: bool) -> None:
    head = ScalarHead(8, train_bias=train_bias)
    head(torch.ones(4, 8)).sum().backward()
    torch.testing.assert_close(head.weight.grad, torch.full((8,), 4.0))
    assert (head.bias.grad is not None) == train_bias
    if train_bias:
        torch.testing.assert_close(head.bias.grad, torch.tensor([4.0]))


@pytest.mark.parametrize("train_bias", [True, False])
def test_shift_moves_every_output_and_adds_up(train_bias: bool) -> None:
    head = random_head(8, train_bias=train_bias)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    before = head(hidden).detach()
    head.shift(1.5)
    head.shift(-0.5)
    torch.testing.assert_close(head(hidden).detach(), before + 1.0)
    assert head.bias.requires_grad == train_bias


def test_state_round_trip() -> None:
    head = random_head(8, train_bias=False)
    head.shift(2.0)
    other = ScalarHead(8, train_bias=False)
    other.load_state_dict(head.state_dict())
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    assert set(head.state_dict()) == {"weight", "bias"}
    assert torch.equal(other(hidden), head(hidden))
