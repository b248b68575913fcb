"""PPO steps 2 to 4: from a rollout to experience. No gradients; every role is a pass over the same sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pe_rlhf.algo.advantages import Options, alike_share
from pe_rlhf.algo.experience import Shaping, shape_and_estimate
from pe_rlhf.algo.kl import kl_estimate
from pe_rlhf.algo.masked import explained_variance, masked_mean
from pe_rlhf.config import PPOConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.prompt_order import PromptSet
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.passes import for_each_token
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.rollout.mismatch_limit import mismatch_metrics, truncates
from pe_rlhf.scoring.scorers import Scorer
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.types import Experience, Rollout, Sequences


@torch.no_grad()
def collect_experience(
    backbone: Backbone,
    scorer: Scorer,
    codec: TextCodec,
    prompts: PromptSet,
    rollout: Rollout,
    beta: float,
    config: PPOConfig,
    stale: int = 0,
    anchor: str = ANCHOR,
) -> tuple[Experience, dict[str, float]]:
    """Score a rollout and turn the scores into advantages. Returns the experience and its metrics.

    stale: by how many updates the policy that was sampled from is older than the trainer's.
    anchor: the role that the KL is measured to.
    """
    sequences = Sequences.of(rollout, backbone.pad_token_id)
    backbone.compute_once(sequences, config.micro_batch_tokens)
    mask_BR = sequences.mask_BR

    # 2. anchor log-probs, values, scores
    anchor_BR = response_logprobs(backbone, anchor, sequences, config)
    values_BR = None
    if config.has_critic:
        values_BR = for_each_token(backbone, "value", sequences, config.micro_batch_tokens, backbone.response_values)
    texts = codec.texts(rollout)
    scores_B = scorer.score(prompts.prompts, texts, sequences, prompts.columns)
    old_BR, weights_BR, mismatch = _old_logprobs(backbone, rollout, sequences, anchor_BR, config, stale)

    # 3. and 4. one reward per token, the KL at each and the score at the last; advantages and returns
    kl_BR = kl_estimate(old_BR, anchor_BR, config.kl.estimator)
    groups_B = torch.arange(len(scores_B)) // config.rollout.samples_per_prompt  # as `PromptOrder` lays them out
    shaping = shaping_of(config, beta)
    estimate = shape_and_estimate(scores_B, kl_BR, values_BR, mask_BR, rollout.truncated_B, groups_B, shaping)

    metrics = {
        "reward": scores_B.mean().item(),
        "reward_shaped": estimate.shaped_B.mean().item(),
        "reward_std": scores_B.std(correction=0).item(),
        "kl": torch.where(mask_BR, old_BR - anchor_BR, 0.0).sum(dim=1).mean().item(),
        "kl_per_token": masked_mean(old_BR - anchor_BR, mask_BR).item(),
        **_critic_metrics(values_BR, estimate.returns_BR, mask_BR),
        "response_length": sequences.response_lengths_B.float().mean().item(),
        "truncated": rollout.truncated_B.float().mean().item(),
        **mismatch,
    }
    if config.compares_groups:
        metrics["groups_alike"] = alike_share(estimate.shaped_B, groups_B)
    if config.rollout.ahead:
        metrics["staleness"] = stale
    advantages_BR, returns_BR, _ = estimate
    estimates = (values_BR, advantages_BR, returns_BR)
    return Experience(sequences, mask_BR, old_BR, anchor_BR, *estimates, weights_BR, scores_B), metrics


def _critic_metrics(values_BR: Tensor | None, returns_BR: Tensor | None, mask_BR: Tensor) -> dict[str, float]:
    """How well the critic predicts; nothing without one. Raises `TrainingError` where it has diverged."""
    if values_BR is None or returns_BR is None:
        return {}
    explained = explained_variance(values_BR, returns_BR, mask_BR).item()
    if not math.isfinite(explained):
        raise TrainingError(
            "the critic has diverged: its values are not finite or too large",
            kind="not_finite",
            key="ppo.value_learning_rate",
            fix="lower ppo.value_learning_rate",
        )
    return {"explained_variance": explained, "value": masked_mean(values_BR, mask_BR).item()}


def shaping_of(config: PPOConfig, beta: float) -> Shaping:
    """The recipe's rules for rewards and advantages, with the β of the step."""
    return Shaping(
        beta=beta,
        form=config.kl.form,
        kl_in_reward=config.kl.place == "reward",
        missing_eos_penalty=config.missing_eos_penalty,
        missing_eos_replaces=config.missing_eos_replaces,
        length_penalty=config.length_penalty,
        whiten_rewards=config.whiten_rewards,
        advantage=config.advantage,
        options=Options(config.gamma, config.lam, config.group_std),
        whiten_advantages=config.whiten_advantages,
    )


def response_logprobs(backbone: Backbone, role: str, sequences: Sequences, config: PPOConfig) -> Tensor:
    """Log-probs _BR of all response tokens under a role, at the sampling temperature."""

    def compute(part: Sequences) -> Tensor:
        return backbone.response_logprobs(part, config.rollout.temperature)[0]

    return for_each_token(backbone, role, sequences, config.micro_batch_tokens, compute)


def _old_logprobs(
    backbone: Backbone, rollout: Rollout, sequences: Sequences, anchor_BR: Tensor, config: PPOConfig, stale: int
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """π_old and the importance weights: the sampler's log-probs as they are, or the trainer's, computed again.

    The mismatch is known here only in the second case. In the first the update sees it before its first step.
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
    policy_N, anchor_N = (trainer_BR - sampler_BR)[mask_BR], (anchor_BR - sampler_BR)[mask_BR]
    # An older policy may be the anchor, and is another one than the trainer's: that is no fault of the sampler.
    mismatch = mismatch_metrics(policy_N, config.rollout, backbone.precision, anchor_N, limited=not stale)
    return trainer_BR, weights_BR, mismatch


def recomputes_old_logprobs(backbone: Backbone, config: PPOConfig) -> bool:
    """Whether π_old is computed again. In fp32 sampler and trainer agree to rounding, and a pass can be saved."""
    # A truncated sampler's log-probs are of the distribution that it was left with, not of the policy's. Those of a
    # rollout ahead are of an older policy.
    if config.rollout.correction != "none" or config.rollout.ahead or truncates(config.rollout):
        return True
    if config.rollout.old_logprobs == "auto":
        return backbone.precision != torch.float32
    return config.rollout.old_logprobs == "trainer"
