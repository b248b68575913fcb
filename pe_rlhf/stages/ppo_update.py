"""PPO step 5: epochs of minibatches with the clipped losses."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pe_rlhf.algo.kl import kl_estimate
from pe_rlhf.algo.ppo_losses import Mean, policy_loss, value_loss
from pe_rlhf.config import PPOConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.micro_batches import own_micro_batches, sequence_costs
from pe_rlhf.optim.role_optimizer import RoleOptimizer
from pe_rlhf.rollout.mismatch_limit import mismatch_metrics
from pe_rlhf.system.distributed import concat_over_ranks, sum_metrics
from pe_rlhf.system.seeding import permutation
from pe_rlhf.types import Experience


def update(
    backbone: Backbone,
    optimizer: RoleOptimizer,
    experience: Experience,
    beta: float,
    config: PPOConfig,
    seed: int,
    step: int,
) -> dict[str, float]:
    """Train the policy, and the critic where there is one, on one rollout.

    Returns the means of losses and statistics over all minibatches.
    """
    means: dict[str, list[float]] = defaultdict(list)
    metrics: dict[str, float] = {}
    costs_B = sequence_costs(experience.sequences, packed=backbone.packs)
    for epoch in range(config.epochs):
        order = torch.tensor(permutation(len(experience.sequences), seed, "minibatches", step, epoch))
        for rows in order.tensor_split(config.minibatches):
            own, others = optimizer.batches(rows)
            sums, log_ratios_N2 = _accumulate(backbone, optimizer, experience, own, costs_B[own], beta, config)
            if not means:
                # No step was taken yet: what differs from π_old now is the sampler against the trainer.
                metrics = mismatch_metrics(log_ratios_N2[:, 0], config.rollout, backbone.precision, log_ratios_N2[:, 1])
            rates = optimizer.learning_rates()
            norms = optimizer.step(
                partial(_accumulate, backbone, optimizer, experience, others, costs_B[others], beta, config)
            )
            for name, value in sums.items():
                means[name].append(value)
            for role in norms:
                means[f"{role}_grad_norm"].append(norms[role])
                means[f"lr_{role}"].append(rates[role])
    return metrics | {name: sum(values) / len(values) for name, values in means.items()}


def _accumulate(
    backbone: Backbone,
    optimizer: RoleOptimizer,
    experience: Experience,
    rows: Tensor,
    costs_B: Tensor,
    beta: float,
    config: PPOConfig,
) -> tuple[dict[str, float], Tensor]:
    """Gradients of one minibatch, micro-batch by micro-batch, of this rank's rows.

    Returns, for the minibatch of all ranks, its losses, means over tokens, and of each token log π − log π_old and
    log π_anchor − log π_old, as _N2.
    """
    tokens = int(experience.mask_BR[rows].sum())
    mean = Mean(config.loss_aggregation, tokens, len(rows), config.rollout.max_new_tokens)
    totals: dict[str, float] = defaultdict(float)
    log_ratios: list[Tensor] = [torch.zeros(0, 2)]
    for index, counts in own_micro_batches(costs_B, config.micro_batch_tokens, padded=not backbone.packs):
        part = _Part(experience, rows[index], backbone.device)
        sequences, share = experience.sequences.take(part.rows), float(counts)
        old_N, anchor_N = part.flat(experience.old_logprobs_BR), part.flat(experience.anchor_logprobs_BR)
        weights_N = mean.weights(part.lengths_B).to(backbone.device)
        # The roles share no trainable weight, so each has a backward pass of its own and half the activations at once.
        with backbone.role("policy"):
            logprobs_N, entropies_N = backbone.response_logprobs(sequences, config.rollout.temperature)
        policy = policy_loss(
            logprobs_N,
            old_N,
            part.flat(experience.advantages_BR),
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            divisor=mean.divisor,
            weights_N=part.flat(experience.weights_BR) * weights_N,
            ratio=config.ratio,
            lengths=part.lengths_B.tolist(),
        )
        loss = policy.loss
        if config.kl.place == "loss":
            kl_N = kl_estimate(logprobs_N, anchor_N, config.kl.estimator)
            loss = loss + beta * (kl_N * weights_N).sum() / mean.divisor
        optimizer.backward(share * loss)
        totals["policy_loss"] += share * policy.loss.item()
        totals["clip_fraction"] += share * policy.clipped.item() / tokens
        totals["approx_kl"] += share * policy.approx_kl.item() / tokens
        totals["entropy"] += share * entropies_N.sum().item() / tokens
        if counts:
            log_ratios.append(torch.stack([logprobs_N.detach() - old_N, anchor_N - old_N], dim=1).cpu())

        if experience.values_BR is not None and experience.returns_BR is not None:
            with backbone.role("value"):
                values_N = backbone.response_values(sequences)
            old_values_N, returns_N = part.flat(experience.values_BR), part.flat(experience.returns_BR)
            value = value_loss(values_N, old_values_N, returns_N, clip_range=config.value_clip_range, tokens=tokens)
            optimizer.backward(share * value.loss)
            totals["value_loss"] += share * value.loss.item()
            totals["value_clip_fraction"] += share * value.clipped.item() / tokens
    return sum_metrics(totals), concat_over_ranks(torch.cat(log_ratios))


class _Part(NamedTuple):
    """The rows of a micro-batch."""

    experience: Experience
    rows: Tensor
    device: torch.device

    @property
    def lengths_B(self) -> Tensor:
        """Of the responses, tokens."""
        return self.experience.sequences.response_lengths_B[self.rows]

    def flat(self, x_BR: Tensor) -> Tensor:
        """What a tensor of the experience has at the response tokens of these rows, _N."""
        return x_BR[self.rows][self.experience.mask_BR[self.rows]].to(self.device)
