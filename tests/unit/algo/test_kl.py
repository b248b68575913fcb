import math

import pytest
import torch

from pe_rlhf.algo.kl import KLEstimator, adapt_beta, kl_estimate

# π and the anchor over three tokens, few enough to take expectations exactly.
PI = [0.7, 0.2, 0.1]
ANCHOR = [0.3, 0.3, 0.4]
KL = sum(p * math.log(p / q) for p, q in zip(PI, ANCHOR, strict=True))


def expectation(estimator: KLEstimator) -> float:
    pi_V = torch.tensor(PI, dtype=torch.float64)
    anchor_V = torch.tensor(ANCHOR, dtype=torch.float64)
    return float((pi_V * kl_estimate(pi_V.log(), anchor_V.log(), estimator)).sum())


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: KLEstimator) -> None:
    assert expectation(estimator) == pytest.approx(KL, rel=1e-12)


def test_k2_has_half_the_second_moment_of_the_log_ratio() -> None:
    expected = sum(p * math.log(p / q) ** 2 / 2 for p, q in zip(PI, ANCHOR, strict=True))
    assert expectation("k2") == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(KL, rel=0.01)  # it is biased


def test_hand_worked_values() -> None:
    # d = ln 2: k1 = .693147, k2 = .693147²/2 = .240227, k3 = 1/2 − 1 + .693147 = .193147
    # d = −ln 2: k1 = −.693147, k2 = .240227, k3 = 2 − 1 − .693147 = .306853
    logprobs, anchor = torch.tensor([math.log(2), -math.log(2)]), torch.zeros(2)
    assert kl_estimate(logprobs, anchor).tolist() == pytest.approx([0.693147, -0.693147], abs=1e-6)
    assert kl_estimate(logprobs, anchor, "k1").tolist() == pytest.approx([0.693147, -0.693147], abs=1e-6)
    assert kl_estimate(logprobs, anchor, "k2").tolist() == pytest.approx([0.240227, 0.240227], abs=1e-6)
    assert kl_estimate(logprobs, anchor, "k3").tolist() == pytest.approx([0.193147, 0.306853], abs=1e-6)


def test_k3_is_not_negative_where_the_two_almost_agree() -> None:
    # With exp(−d) − 1 + d instead of expm1, rounding makes about half of these negative.
    d = torch.linspace(-1e-3, 1e-3, 1001)
    assert (kl_estimate(d, torch.zeros_like(d), "k3") >= 0).all()


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 10000)),  # 10 % above: 0.100064
        (60.0, 0.1 * (1 + 0.2 * 64 / 10000)),  # clipped at +0.2: 0.100128
        (0.0, 0.1 * (1 - 0.2 * 64 / 10000)),  # clipped at −0.2: 0.099872
    ],
)
def test_adapt_beta_by_hand(kl: float, expected: float) -> None:
    assert adapt_beta(0.1, kl, target=6.0, horizon=10000, episodes=64) == pytest.approx(expected, rel=1e-12)


def test_adapt_beta_keeps_its_sign_where_a_batch_is_larger_than_the_horizon() -> None:
    """1 − 0.2 · 640/100 would be −0.28."""
    assert adapt_beta(0.05, 0.0, target=6.0, horizon=100, episodes=640) == pytest.approx(0.05 * 0.8, rel=1e-12)


def test_adapt_beta_stops_where_the_form_ends() -> None:
    assert adapt_beta(0.99, 100.0, target=1.0, horizon=10, episodes=10, highest=1.0) == 1.0
    assert adapt_beta(0.99, 100.0, target=1.0, horizon=10, episodes=10) == pytest.approx(0.99 * 1.2)
