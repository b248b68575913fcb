import math
from typing import Literal

import numpy as np
import pytest
import torch

from pe_rlhf.algo.ppo_losses import Aggregation, Mean, policy_loss, sequence_log_ratios, value_loss

# ρ = 1.5, 0.5, 1.1, 1.5, 0.5 under ε = 0.2
OLD_LOGPROBS_N = torch.tensor([-2.0, -1.0, -0.5, -1.5, -1.0])
LOGPROBS_N = OLD_LOGPROBS_N + torch.tensor([1.5, 0.5, 1.1, 1.5, 0.5]).log()
ADVANTAGES_N = torch.tensor([2.0, 2.0, 1.0, -1.0, -1.0])


def test_policy_loss_by_hand() -> None:
    # −min(ρA, clip(ρ)A):
    #   ρ 1.5, A  2: min(3, 2.4)    = 2.4   clipped
    #   ρ 0.5, A  2: min(1, 1.6)    = 1
    #   ρ 1.1, A  1: min(1.1, 1.1)  = 1.1
    #   ρ 1.5, A −1: min(−1.5, −1.2) = −1.5
    #   ρ 0.5, A −1: min(−0.5, −0.8) = −0.8 clipped
    # sum 2.2, over 10 tokens of the minibatch: −0.22
    result = policy_loss(LOGPROBS_N, OLD_LOGPROBS_N, ADVANTAGES_N, clip_range=0.2, divisor=10)
    assert float(result.loss) == pytest.approx(-0.22, abs=1e-6)
    assert int(result.clipped) == 2
    # k3 of KL(π_old ‖ π) is ρ − 1 − ln ρ: 2·(.5 − ln 1.5) + 2·(−.5 − ln .5) + (.1 − ln 1.1)
    expected_kl = 2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5)) + 0.1 - math.log(1.1)
    assert float(result.approx_kl) == pytest.approx(expected_kl, abs=1e-6)


def test_policy_loss_with_importance_weights_by_hand() -> None:
    # the five terms above times the weights: 2.4·1 + 1·.5 + 1.1·0 − 1.5·2 − .8·1 = −0.9, over 5: +0.18
    weights_N = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    result = policy_loss(LOGPROBS_N, OLD_LOGPROBS_N, ADVANTAGES_N, clip_range=0.2, divisor=5, weights_N=weights_N)
    assert float(result.loss) == pytest.approx(0.18, abs=1e-6)


def test_policy_loss_equals_numpy_with_its_gradient() -> None:
    rng = np.random.default_rng(0)
    old, advantages, weights = rng.normal(size=200), rng.normal(size=200), rng.uniform(0, 2, size=200)
    new = old + rng.normal(scale=0.3, size=200)
    ratio = np.exp(new - old)
    terms = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    expected_loss = -np.sum(weights * terms) / 256
    # The gradient is that of ρ·A where it is the smaller term, and zero where the clipped constant is.
    passes = ~(((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8)))
    expected_gradient = np.where(passes, -weights * advantages * ratio, 0.0) / 256

    logprobs_N = torch.tensor(new, requires_grad=True)
    result = policy_loss(
        logprobs_N,
        torch.tensor(old),
        torch.tensor(advantages),
        clip_range=0.2,
        divisor=256,
        weights_N=torch.tensor(weights),
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert logprobs_N.grad is not None
    np.testing.assert_allclose(logprobs_N.grad.numpy(), expected_gradient, rtol=1e-12)
    assert int(result.clipped) == int((~passes).sum())
    assert not result.approx_kl.requires_grad


def test_at_ratio_one_the_gradient_is_the_vanilla_policy_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens_N = torch.tensor([0, 1, 2, 3, 4, 0])
    advantages_N = torch.randn(6, generator=generator, dtype=torch.float64)
    logprobs_N = torch.log_softmax(logits_NV, -1)[torch.arange(6), tokens_N]
    loss = policy_loss(logprobs_N, logprobs_N.detach(), advantages_N, clip_range=0.2, divisor=6).loss
    (gradient_NV,) = torch.autograd.grad(loss, logits_NV)
    # REINFORCE by hand: d(−A log π(a))/d logits = −A (onehot(a) − π), averaged over tokens
    onehot_NV = torch.eye(5, dtype=torch.float64)[tokens_N]
    expected_NV = -advantages_N[:, None] * (onehot_NV - logits_NV.detach().softmax(-1)) / 6
    torch.testing.assert_close(gradient_NV, expected_NV)


def test_value_loss_by_hand() -> None:
    # With ε = 0.2:
    #   V 1.0, V_old 0.5, R 2: clip 0.7, errors 1 and 1.69   → 1.69 clipped
    #   V 1.0, V_old 0.5, R 0: clip 0.7, errors 1 and 0.49   → 1
    #   V 0.6, V_old 0.5, R 1: clip 0.6, errors .16 and .16  → .16
    #   V −1, V_old 0, R −2:   clip −.2, errors 1 and 3.24   → 3.24 clipped
    # ½ · 6.09 / 8 = 0.380625
    values_N = torch.tensor([1.0, 1.0, 0.6, -1.0])
    old_values_N = torch.tensor([0.5, 0.5, 0.5, 0.0])
    returns_N = torch.tensor([2.0, 0.0, 1.0, -2.0])
    result = value_loss(values_N, old_values_N, returns_N, clip_range=0.2, tokens=8)
    assert float(result.loss) == pytest.approx(0.380625, abs=1e-6)
    assert int(result.clipped) == 2


def test_value_loss_equals_numpy_with_its_gradient() -> None:
    rng = np.random.default_rng(1)
    old, returns = rng.normal(size=200), rng.normal(size=200)
    new = old + rng.normal(scale=0.3, size=200)
    error, clipped_error = (new - returns) ** 2, (np.clip(new, old - 0.2, old + 0.2) - returns) ** 2
    expected_loss = 0.5 * np.maximum(error, clipped_error).mean()
    passes = (np.abs(new - old) <= 0.2) | (error > clipped_error)

    values_N = torch.tensor(new, requires_grad=True)
    result = value_loss(values_N, torch.tensor(old), torch.tensor(returns), clip_range=0.2, tokens=200)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert values_N.grad is not None
    np.testing.assert_allclose(values_N.grad.numpy(), np.where(passes, new - returns, 0.0) / 200, rtol=1e-12)
    assert int(result.clipped) == int((clipped_error > error).sum())


def test_micro_batches_add_up_to_the_minibatch() -> None:
    whole = policy_loss(LOGPROBS_N, OLD_LOGPROBS_N, ADVANTAGES_N, clip_range=0.2, divisor=5).loss
    parts = [
        policy_loss(LOGPROBS_N[part], OLD_LOGPROBS_N[part], ADVANTAGES_N[part], clip_range=0.2, divisor=5).loss
        for part in (slice(0, 2), slice(2, 5))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-6)


# ---- settings of the policy's loss -----------------------------------------------------------------------------------


def test_the_upper_clip_by_hand() -> None:
    # As in the first test, with 1 + 0.4 above: ρ 1.5, A 2 is min(3, 2.8) = 2.8. Sum 2.6.
    result = policy_loss(LOGPROBS_N, OLD_LOGPROBS_N, ADVANTAGES_N, clip_range=0.2, clip_range_high=0.4, divisor=1)
    assert float(result.loss) == pytest.approx(-2.6, abs=1e-6)
    # A bound that no ratio reaches: ρ 1.5, A 2 is 3 and counts as not clipped.
    result = policy_loss(LOGPROBS_N, OLD_LOGPROBS_N, ADVANTAGES_N, clip_range=0.2, clip_range_high=9.0, divisor=1)
    assert float(result.loss) == pytest.approx(-2.8, abs=1e-6)
    assert int(result.clipped) == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    # Losses 1, 2, 3 | 10 | 4, 8: 28 over 6 tokens; (2 + 10 + 6) / 3; 28 over 3 responses × 5.
    [("token", 28 / 6), ("sequence", 6.0), ("constant", 28 / 15)],
)
def test_means_by_hand(kind: Aggregation, expected: float) -> None:
    loss_N, lengths_B = torch.tensor([1.0, 2.0, 3.0, 10.0, 4.0, 8.0]), torch.tensor([3, 1, 2])
    mean = Mean(kind, tokens=6, sequences=3, longest=5)
    assert float((loss_N * mean.weights(lengths_B)).sum()) / mean.divisor == pytest.approx(expected, rel=1e-6)
    # In two parts, which know of each other by the numbers only.
    parts = ((slice(0, 3), lengths_B[:1]), (slice(3, 6), lengths_B[1:]))
    total = sum(float((loss_N[part] * mean.weights(own_B)).sum()) for part, own_B in parts)
    assert total / mean.divisor == pytest.approx(expected, rel=1e-6)


def test_ratios_of_whole_responses_by_hand() -> None:
    # ρ = 2, 1/2, 4 | 3: products 4 and 3, geometric means 4^(1/3) and 3.
    log_ratio_N = torch.tensor([2.0, 0.5, 4.0, 3.0]).log()
    wanted = {False: [4.0] * 3 + [3.0], True: [4 ** (1 / 3)] * 3 + [3.0]}
    for mean, ratios in wanted.items():
        assert sequence_log_ratios(log_ratio_N, [3, 1], mean=mean).exp().tolist() == pytest.approx(ratios)


@pytest.mark.parametrize("ratio", ["sequence", "sequence_mean"])
def test_the_gradient_through_a_ratio_of_a_response(ratio: Literal["sequence", "sequence_mean"]) -> None:
    """Tokens that share an advantage: autograd through ρ itself. Else a token's gradient has its own advantage only."""
    lengths = [3, 1, 4]
    generator = torch.Generator().manual_seed(4)
    old_N = torch.randn(8, generator=generator, dtype=torch.float64)
    shift_N = 0.1 * torch.randn(8, generator=generator, dtype=torch.float64)
    shared_N = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64).repeat_interleave(torch.tensor(lengths))
    own_N = torch.randn(8, generator=generator, dtype=torch.float64)

    def gradient(advantages_N: torch.Tensor) -> torch.Tensor:
        new_N = (old_N + shift_N).requires_grad_()
        loss = policy_loss(new_N, old_N, advantages_N, clip_range=9, divisor=8, ratio=ratio, lengths=lengths).loss
        return torch.autograd.grad(loss, new_N)[0]

    new_N = (old_N + shift_N).requires_grad_()
    rows = [*zip((new_N - old_N).split(lengths), shared_N.split(lengths), strict=True)]
    logs = [row.sum() if ratio == "sequence" else row.mean() for row, _ in rows]
    loss = -torch.cat([log.exp() * a for log, (_, a) in zip(logs, rows, strict=True)]).sum() / 8
    torch.testing.assert_close(gradient(shared_N), torch.autograd.grad(loss, new_N)[0])
    torch.testing.assert_close(gradient(own_N) / own_N, gradient(shared_N) / shared_N)
