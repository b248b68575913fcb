"""PPO steps 2 to 4: from a rollout to experience. No gradients; every role is a pass over the same sequences."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pe_rlhf.algo.gae import gae
from pe_rlhf.algo.kl import kl_estimate
from pe_rlhf.algo.masked import explained_variance, masked_mean, masked_var, masked_whiten
from pe_rlhf.algo.rewards import adjust_scores, shape_rewards
from pe_rlhf.config import PPOConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.mismatch_limit import mismatch_metrics
from pe_rlhf.scoring.scorers import Scorer
from pe_rlhf.system.distributed import sum_over_ranks
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.types import Experience, Rollout, Sequences
from reward.records import Prompt


@torch.no_grad()
def collect_experience(
    backbone: Backbone,
    scorer: Scorer,
    codec: TextCodec,
    prompts: list[Prompt],
    rollout: Rollout,
    beta: float,
    config: PPOConfig,
) -> tuple[Experience, dict[str, float]]:
    """Score a rollout and turn the scores into advantages. Returns the experience and the step's metrics about it."""
    packed = Sequences.pack(rollout.prompts, rollout.responses, backbone.pad_token_id)
    sequences = backbone.with_trunk(packed, config.micro_batch_tokens)
    mask_BR = sequences.mask_BR

    # 2. anchor log-probs, values, scores
    anchor_BR = response_logprobs(backbone, "anchor", sequences, config)
    values_BR = per_token(backbone, sequences, config, lambda part: _values(backbone, part))
    texts = [codec.decode(ids) for ids in rollout.responses]
    scores_B = scorer.score(prompts, texts, sequences)
    old_BR, weights_BR, mismatch = _old_logprobs(backbone, rollout, sequences, config)

    # 3. one reward per token: the KL at each, the score at the last
    shaped_B = adjust_scores(
        scores_B,
        rollout.truncated_B,
        sequences.response_lengths_B,
        missing_eos_penalty=config.missing_eos_penalty,
        missing_eos_replaces=config.missing_eos_replaces,
        length_penalty=config.length_penalty,
    )
    kl_BR = kl_estimate(old_BR, anchor_BR, config.kl.estimator)
    in_reward = config.kl.place == "reward"
    rewards_BR = shape_rewards(shaped_B, kl_BR, mask_BR, beta=beta, form=config.kl.form, kl_in_reward=in_reward)
    if config.whiten_rewards:
        rewards_BR = rewards_BR * torch.rsqrt(masked_var(rewards_BR, mask_BR) + 1e-8)

    # 4. advantages and returns
    advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, gamma=config.gamma, lam=config.lam)
    metrics = {
        "reward": scores_B.mean().item(),
        "reward_std": scores_B.std(correction=0).item(),
        "kl": torch.where(mask_BR, old_BR - anchor_BR, 0.0).sum(dim=1).mean().item(),
        "kl_per_token": masked_mean(old_BR - anchor_BR, mask_BR).item(),
        "explained_variance": explained_variance(values_BR, returns_BR, mask_BR).item(),
        "value": masked_mean(values_BR, mask_BR).item(),
        "response_length": sequences.response_lengths_B.float().mean().item(),
        "truncated": rollout.truncated_B.float().mean().item(),
        **mismatch,
    }
    if not math.isfinite(metrics["explained_variance"]):
        raise TrainingError(
            "the critic has diverged: its values are not finite or too large; lower its learning rate",
            kind="not_finite",
        )
    if config.whiten_advantages:
        advantages_BR = masked_whiten(advantages_BR, mask_BR)
    experience = Experience(
        sequences, mask_BR, old_BR, anchor_BR, values_BR, advantages_BR, returns_BR, weights_BR, scores_B
    )
    return experience, metrics


def response_logprobs(backbone: Backbone, role: str, sequences: Sequences, config: PPOConfig) -> Tensor:
    """Log-probs _BR of all response tokens under a role, at the sampling temperature."""

    def compute(part: Sequences) -> Tensor:
        with backbone.role(role):
            return backbone.response_logprobs(part, config.rollout.temperature)[0]

    return per_token(backbone, sequences, config, compute)


def per_token(
    backbone: Backbone, sequences: Sequences, config: PPOConfig, compute: Callable[[Sequences], Tensor]
) -> Tensor:
    """Compute a number per response token in micro-batches of like length; _BR, fp32, on the CPU, 0 at padding."""
    mask_BR = sequences.mask_BR
    result_BR = torch.zeros(mask_BR.shape)
    for index, counts in backbone.own_micro_batches(backbone.budget_lengths(sequences), config.micro_batch_tokens):
        rows = torch.zeros(mask_BR[index].shape)
        rows[mask_BR[index]] = compute(sequences.take(index)).float().cpu()
        if counts:
            result_BR[index] = rows
    return sum_over_ranks(result_BR)  # each rank has filled in its own rows


def _values(backbone: Backbone, sequences: Sequences) -> Tensor:
    with backbone.role("value"):
        return backbone.response_values(sequences)


def _old_logprobs(
    backbone: Backbone, rollout: Rollout, sequences: Sequences, config: PPOConfig
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """π_old and the importance weights: the sampler's log-probs as they are, or the trainer's, computed again.

    The mismatch is known here only in the second case; in the first the update sees it before its first step.
    """
    mask_BR = sequences.mask_BR
    sampler_BR = torch.zeros(mask_BR.shape)
    sampler_BR[mask_BR] = torch.tensor([value for row in rollout.logprobs for value in row])
    weights_BR = torch.ones(mask_BR.shape)
    if not recomputes_old_logprobs(backbone, config):
        return sampler_BR, weights_BR, {}
    trainer_BR = response_logprobs(backbone, "policy", sequences, config)
    if config.rollout.correction == "truncated_is":
        weights_BR = (trainer_BR - sampler_BR).exp().clamp(max=config.rollout.correction_cap)
    return (
        trainer_BR,
        weights_BR,
        mismatch_metrics((trainer_BR - sampler_BR)[mask_BR], config.rollout, backbone.precision),
    )


def recomputes_old_logprobs(backbone: Backbone, config: PPOConfig) -> bool:
    """Whether π_old is computed again. In fp32 sampler and trainer agree to rounding, and a pass can be saved."""
    if config.rollout.correction != "none" or config.rollout.top_k or config.rollout.top_p < 1:
        return True
    if config.rollout.old_logprobs == "auto":
        return backbone.precision != torch.float32
    return config.rollout.old_logprobs == "trainer"
