"""Advantage estimators: from one reward per token to one advantage per token, each a pure function.

`ESTIMATORS` has them by the name that a recipe gives to `ppo.advantage`. To add one: a function here, a row in that
dict, its name in `config/ppo.py`, a row in docs/algorithms.md. Nothing else knows which it is.

A reward is the score at a response's last token and, with `kl.place: reward`, −β·KL at every token. Estimators that
compare whole responses take the sum over a response, R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pe_rlhf.algo.gae import generalised_advantages
from pe_rlhf.algo.masked import masked_mean

STD_EPS = 1e-4  # added to a group's standard deviation, as in TRL: a group that scores alike has advantages of zero


@dataclass(frozen=True)
class Options:
    """What a recipe says about estimators: γ and λ of returns, and whether a group's spread is divided out."""

    gamma: float = 1.0
    lam: float = 1.0
    group_std: bool = True


@dataclass(frozen=True)
class Rewarded:
    """A rollout of all ranks with its rewards.

    Attributes:
        rewards_BR: one reward per token; what it is at padding does not matter.
        mask_BR: True at the real response tokens.
        groups_B: the number of each response's group: the responses to one prompt. They may come in any order.
        values_BR: the critic's, for estimators that have one.
    """

    rewards_BR: Tensor
    mask_BR: Tensor
    groups_B: Tensor
    values_BR: Tensor | None = None

    def of_responses(self) -> Tensor:
        """R _B: the sum of each response's rewards, fp64."""
        return torch.where(self.mask_BR, self.rewards_BR, 0.0).double().sum(dim=1)

    def at_tokens(self, x_B: Tensor) -> Tensor:
        """One number per response as one per token, _BR, zero at padding."""
        return torch.where(self.mask_BR, x_B[:, None], 0.0).to(self.rewards_BR.dtype)


# Advantages _BR, and the returns _BR that a critic learns, None without one; both zero at padding.
Estimator = Callable[[Rewarded, Options], tuple[Tensor, Tensor | None]]


def gae(batch: Rewarded, options: Options) -> tuple[Tensor, Tensor | None]:
    """Generalised advantage estimation with a critic (arXiv 1506.02438)."""
    assert batch.values_BR is not None
    return generalised_advantages(
        batch.rewards_BR, batch.values_BR, batch.mask_BR, gamma=options.gamma, lam=options.lam
    )


def rloo(batch: Rewarded, options: Options) -> tuple[Tensor, Tensor | None]:
    """REINFORCE leave-one-out: A = R − mean R of the other responses to the prompt (arXiv 2402.14740)."""
    rewards_B = batch.of_responses()
    mean_B, _, size_B = _of_groups(rewards_B, batch.groups_B)
    # R − (n·mean − R) / (n − 1)
    return batch.at_tokens((rewards_B - mean_B) * size_B / (size_B - 1)), None


def group_mean(batch: Rewarded, options: Options) -> tuple[Tensor, Tensor | None]:
    """A = (R − mean R of the group) / standard deviation of the group: GRPO (arXiv 2402.03300).

    Without `group_std` A = R − mean: Dr. GRPO (arXiv 2503.20783). Prompts whose responses score nearly alike then weigh
    no more than others.
    """
    rewards_B = batch.of_responses()
    mean_B, std_B, _ = _of_groups(rewards_B, batch.groups_B)
    centred_B = rewards_B - mean_B
    return batch.at_tokens(centred_B / (std_B + STD_EPS) if options.group_std else centred_B), None


def reinforce_pp(batch: Rewarded, options: Options) -> tuple[Tensor, Tensor | None]:
    """REINFORCE++: A_t = Σ_{k≥t} γ^(k−t)·r_k less its mean over all tokens of the batch (arXiv 2501.03262).

    The paper's normalisation is this with `whiten_advantages`, which divides by the deviation over the same tokens.
    """
    no_values_BR = torch.zeros_like(batch.rewards_BR)
    to_go_BR, _ = generalised_advantages(batch.rewards_BR, no_values_BR, batch.mask_BR, gamma=options.gamma, lam=1.0)
    return torch.where(batch.mask_BR, to_go_BR - masked_mean(to_go_BR, batch.mask_BR), 0.0), None


ESTIMATORS: Mapping[str, Estimator] = {
    "gae": gae,
    "rloo": rloo,
    "group_mean": group_mean,
    "reinforce_pp": reinforce_pp,
}


def alike_share(scores_B: Tensor, groups_B: Tensor) -> float:
    """The share of groups whose responses all score alike: they have nothing to teach."""
    _, std_B, size_B = _of_groups(scores_B.double(), groups_B)
    share_B = 1 / size_B  # each group counts once
    return ((std_B < 1e-8) * share_B).sum().item() / share_B.sum().item()


def _of_groups(x_B: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation (of a sample, n − 1) and size of each row's group, _B."""
    _, row_B, size_G = groups_B.unique(return_inverse=True, return_counts=True)
    if int(size_G.min()) < 2:
        raise ValueError("a group of one response has no others to be compared with")
    sums_G = torch.zeros(len(size_G), dtype=x_B.dtype)
    mean_B = (sums_G.index_add(0, row_B, x_B) / size_G)[row_B]
    variance_G = sums_G.index_add(0, row_B, (x_B - mean_B) ** 2) / (size_G - 1)
    return mean_B, variance_G.sqrt()[row_B], size_G[row_B]
