import pytest
import torch

from pe_rlhf.algo.rewards import adjust_scores, kl_objective, shape_rewards

# Two responses, of three tokens and of one; at padding the KL holds rubbish.
SCORES_B = torch.tensor([2.0, -1.0])
KL_BR = torch.tensor([[0.5, 1.0, -0.5], [2.0, 99.0, float("nan")]])
MASK_BR = torch.tensor([[True, True, True], [True, False, False]])


def test_convex_form_by_hand() -> None:
    # (1 − .25)·2 − .25·(−.5) = 1.625 at the last token of row 0; .75·(−1) − .25·2 = −1.25 at the only one of row 1
    rewards_BR = shape_rewards(SCORES_B, KL_BR, MASK_BR, beta=0.25, form="convex")
    assert rewards_BR.tolist() == [[-0.125, -0.25, 1.625], [-1.25, 0.0, 0.0]]


def test_penalty_form_by_hand() -> None:
    # 2 − .25·(−.5) = 2.125; −1 − .25·2 = −1.5
    rewards_BR = shape_rewards(SCORES_B, KL_BR, MASK_BR, beta=0.25, form="penalty")
    assert rewards_BR.tolist() == [[-0.125, -0.25, 2.125], [-1.5, 0.0, 0.0]]


@pytest.mark.parametrize(("form", "weight"), [("convex", 0.75), ("penalty", 1.0)])
def test_without_the_kl_the_score_stands_alone_on_the_last_token(form: str, weight: float) -> None:
    rewards_BR = shape_rewards(SCORES_B, KL_BR, MASK_BR, beta=0.25, form=form, kl_in_reward=False)  # type: ignore[arg-type]
    assert rewards_BR.tolist() == [[0.0, 0.0, 2.0 * weight], [-1.0 * weight, 0.0, 0.0]]


def test_the_objective_by_hand() -> None:
    # (1 − .25)·2 − .25·4 = .5; 2 − .25·4 = 1
    assert kl_objective(2.0, 4.0, beta=0.25, form="convex") == 0.5
    assert kl_objective(2.0, 4.0, beta=0.25, form="penalty") == 1.0


def test_scores_pass_where_no_rule_is_set() -> None:
    scores_B = adjust_scores(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.tensor([3, 4]))
    assert scores_B.tolist() == [1.0, 2.0]


def test_missing_eos_lowers_the_score_of_cut_responses_alone() -> None:
    scores_B = adjust_scores(
        torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.tensor([3, 4]), missing_eos_penalty=1.5
    )
    assert scores_B.tolist() == [-0.5, 2.0]


def test_missing_eos_replaces_the_score_of_cut_responses_alone() -> None:
    scores_B = adjust_scores(
        torch.tensor([100.0, 2.0]),
        torch.tensor([True, False]),
        torch.tensor([3, 4]),
        missing_eos_penalty=1.5,
        missing_eos_replaces=True,
    )
    assert scores_B.tolist() == [-1.5, 2.0]


def test_length_penalty_is_per_token_and_adds_to_the_missing_eos_penalty() -> None:
    # 1 − .25·4 − 1 = −1; 2 − .25·8 = 0
    scores_B = adjust_scores(
        torch.tensor([1.0, 2.0]),
        torch.tensor([True, False]),
        torch.tensor([4, 8]),
        missing_eos_penalty=1.0,
        length_penalty=0.25,
    )
    assert scores_B.tolist() == [-1.0, 0.0]
