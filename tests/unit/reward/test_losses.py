"""The pairwise loss against numbers worked by hand and against TRL's reward trainer, written again in numpy."""

import math

import numpy as np
import pytest
import torch

from reward.losses import pairwise_loss


def test_numbers_worked_by_hand() -> None:
    # σ(ln 3) = 3/4 and σ(−ln 3) = 1/4, so the losses are ln 4/3, ln 4, and ln 2 for the tie.
    chosen_B = torch.tensor([math.log(3.0), 0.0, 0.5])
    rejected_B = torch.tensor([0.0, math.log(3.0), 0.5])
    out = pairwise_loss(chosen_B, rejected_B)
    torch.testing.assert_close(out.loss_B, torch.tensor([math.log(4 / 3), math.log(4), math.log(2)]))
    assert out.loss.item() == pytest.approx((math.log(4 / 3) + math.log(4) + math.log(2)) / 3)
    assert out.accuracy.item() == pytest.approx(0.5)  # a win, a loss, a tie: 1 + 0 + 1/2 of 3
    assert out.margin.item() == pytest.approx(0.0, abs=1e-7)


def test_a_tie_counts_half() -> None:
    out = pairwise_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert out.accuracy.item() == 0.75
    assert out.margin.item() == 1.0


def test_margin_is_subtracted_from_the_difference() -> None:
    out = pairwise_loss(torch.tensor([math.log(3.0) + 1.0]), torch.tensor([0.0]), margin_B=torch.tensor([1.0]))
    assert out.loss.item() == pytest.approx(math.log(4 / 3))
    assert out.margin.item() == pytest.approx(math.log(3.0) + 1.0)  # the rewards' own difference


def test_label_smoothing_mixes_in_the_flipped_label() -> None:
    out = pairwise_loss(torch.tensor([math.log(3.0)]), torch.tensor([0.0]), label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_label_smoothing_has_its_minimum_where_the_model_says_the_label_noise() -> None:
    chosen_B = torch.tensor([math.log(0.8 / 0.2)], requires_grad=True)  # σ(Δ) = 1 − ε
    pairwise_loss(chosen_B, torch.tensor([0.0]), label_smoothing=0.2).loss.backward()
    assert chosen_B.grad is not None
    assert chosen_B.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_centering_is_the_square_of_the_sum() -> None:
    chosen_B, rejected_B = torch.tensor([2.0, 1.0]), torch.tensor([1.0, -1.0])
    out = pairwise_loss(chosen_B, rejected_B, centering=0.01)
    assert out.centering.item() == pytest.approx(0.01 * (9 + 0) / 2)
    ranking = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    assert out.ranking.item() == pytest.approx(ranking)
    assert out.loss.item() == pytest.approx(ranking + 0.045)


def test_agrees_with_trls_reward_trainer() -> None:
    rng = np.random.default_rng(0)
    chosen_B, rejected_B, margin_B = rng.normal(size=(3, 64)) * 3
    # trl 1.16, RewardTrainer.compute_loss: -logsigmoid(rewards_chosen - rewards_rejected - margin).mean(),
    # plus center_rewards_coefficient * mean((rewards_chosen + rewards_rejected) ** 2)
    expected = np.log1p(np.exp(-(chosen_B - rejected_B - margin_B))).mean()
    expected += 0.01 * np.mean((chosen_B + rejected_B) ** 2)
    out = pairwise_loss(
        torch.tensor(chosen_B), torch.tensor(rejected_B), margin_B=torch.tensor(margin_B), centering=0.01
    )
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    assert out.accuracy.item() == np.mean(chosen_B > rejected_B)


def test_gradient_is_sigma_of_minus_delta() -> None:
    chosen_B = torch.tensor([0.3, -2.0, 1.5], dtype=torch.float64, requires_grad=True)
    rejected_B = torch.tensor([1.0, -1.0, 0.2], dtype=torch.float64, requires_grad=True)
    pairwise_loss(chosen_B, rejected_B).loss.backward()
    delta_B = np.array([-0.7, -1.0, 1.3])
    expected = -1 / (1 + np.exp(delta_B)) / 3
    assert chosen_B.grad is not None
    assert rejected_B.grad is not None
    np.testing.assert_allclose(chosen_B.grad.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(rejected_B.grad.numpy(), -expected, rtol=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_differences_stay_finite(label_smoothing: float) -> None:
    chosen_B = torch.tensor([1e4, -1e4], requires_grad=True)
    out = pairwise_loss(chosen_B, torch.zeros(2), label_smoothing=label_smoothing)
    torch.testing.assert_close(out.loss_B, torch.tensor([1e4 * label_smoothing, 1e4 * (1 - label_smoothing)]))
    out.loss_B.sum().backward()
    torch.testing.assert_close(chosen_B.grad, torch.tensor([label_smoothing, -(1 - label_smoothing)]))


def test_uneven_micro_batches_add_up_to_the_global_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards_2B = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    whole = rewards_2B.clone().requires_grad_()
    expected = pairwise_loss(whole[0], whole[1], label_smoothing=0.1, centering=0.05).loss
    expected.backward()

    split = rewards_2B.clone().requires_grad_()
    total = 0.0
    for start, end in ((0, 3), (3, 4), (4, 7)):
        out = pairwise_loss(split[0, start:end], split[1, start:end], label_smoothing=0.1, centering=0.05)
        loss = out.loss_B.sum() / 7
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(split.grad, whole.grad)


def test_statistics_carry_no_gradient() -> None:
    out = pairwise_loss(torch.ones(2, requires_grad=True), torch.zeros(2), centering=0.1)
    assert out.loss.requires_grad
    assert not any(term.requires_grad for term in (out.ranking, out.centering, out.accuracy, out.margin))


@pytest.mark.parametrize("argument", ["rejected_B", "margin_B"])
def test_shapes_that_would_broadcast_are_refused(argument: str) -> None:
    shape_of = {"rejected_B": (3,), "margin_B": (3,), argument: (3, 1)}
    with pytest.raises(ValueError, match=r"\(3, 1\) against chosen_B \(3,\)"):
        pairwise_loss(torch.zeros(3), torch.zeros(shape_of["rejected_B"]), margin_B=torch.zeros(shape_of["margin_B"]))
