import numpy as np
import pytest
import torch

from pe_rlhf.algo.masked import explained_variance, least_squares, masked_mean, masked_var, masked_whiten

LENGTHS = [4, 1, 7, 3]
MASK = torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]


def ragged(seed: int, padding: float = float("nan")) -> tuple[torch.Tensor, np.ndarray]:
    """Random rows with rubbish at the padding, and their valid entries for numpy."""
    x_BR = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed)) * 3 + 5
    valid = np.concatenate([row[:n] for row, n in zip(x_BR.double().numpy(), LENGTHS, strict=True)])
    return torch.where(MASK, x_BR, padding), valid


@pytest.mark.parametrize("padding", [float("nan"), 1e30])
def test_mean_and_variance_equal_numpy_on_ragged_rows(padding: float) -> None:
    x_BR, valid = ragged(0, padding)
    assert float(masked_mean(x_BR, MASK)) == pytest.approx(valid.mean(), rel=1e-6)
    assert float(masked_var(x_BR, MASK)) == pytest.approx(valid.var(), rel=1e-5)


def test_of_one_entry_the_mean_is_the_entry() -> None:
    x, mask = torch.tensor([7.0, 3.0]), torch.tensor([False, True])
    assert float(masked_mean(x, mask)) == 3.0
    assert float(masked_var(x, mask)) == 0.0


def test_mean_of_nothing_is_zero() -> None:
    assert float(masked_mean(torch.tensor([1.0, 2.0]), torch.tensor([False, False]))) == 0.0


def test_whitened_entries_equal_numpy_and_padding_is_zero() -> None:
    x_BR, valid = ragged(1)
    whitened_BR = masked_whiten(x_BR, MASK)
    np.testing.assert_allclose(whitened_BR[MASK].numpy(), (valid - valid.mean()) / valid.std(), atol=1e-5)
    assert not whitened_BR[~MASK].any()


def test_whitening_one_value_many_times_gives_zero() -> None:
    assert masked_whiten(torch.full((2, 3), 0.5), torch.ones(2, 3, dtype=torch.bool)).abs().max() == 0


def test_explained_variance_equals_numpy() -> None:
    values_BR, values = ragged(2)
    noise_BR, noise = ragged(3)
    returns_BR, returns = values_BR + noise_BR, values + noise
    expected = 1 - np.var(returns - values) / np.var(returns)
    assert float(explained_variance(values_BR, returns_BR, MASK)) == pytest.approx(expected, rel=1e-4)


def test_explained_variance_of_a_perfect_critic_and_of_one_that_knows_the_mean() -> None:
    # A constant offset costs nothing: a critic is judged by what it explains, not by its bias.
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert float(explained_variance(returns + 10, returns, mask)) == pytest.approx(1.0)
    assert float(explained_variance(torch.full((1, 3), 2.0), returns, mask)) == pytest.approx(0.0)


def test_the_nearest_line_equals_numpy_and_padding_does_not_count() -> None:
    x_BR, x = ragged(2)
    noise_BR, noise = ragged(3)
    line = least_squares(x_BR, 0.3 * x_BR - noise_BR, MASK)
    assert line == pytest.approx(np.polyfit(x, 0.3 * x - noise, deg=1), rel=1e-5)


def test_of_a_constant_the_nearest_line_is_the_mean() -> None:
    y = torch.tensor([[1.0, 2.0, 6.0]])
    assert least_squares(torch.full((1, 3), 7.3), y, torch.ones(1, 3, dtype=torch.bool)) == pytest.approx((0, 3))
