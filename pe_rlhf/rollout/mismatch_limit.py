"""Whether the sampler held the trainer's policy: told in every step's metrics, and a reason to stop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pe_rlhf.algo.mismatch import anchor_test, mismatch
from pe_rlhf.config import RolloutConfig, SamplingConfig
from pe_rlhf.system.failures import TrainingError

# Mean of |log π_trainer − log π_sampler|, nats per token. Two implementations agree to about 1e-5 in fp32 and 1e-2 in
# bf16; a sampler that is a PPO step behind, or without the adapter, is soon above these.
LIMIT_FP32, LIMIT_NARROW = 0.01, 0.1


def mismatch_metrics(
    log_ratio_N: Tensor,
    config: SamplingConfig,
    dtype: torch.dtype,
    anchor_ratio_N: Tensor | None = None,
    *,
    limited: bool = True,
) -> dict[str, float]:
    """The mismatch as metrics by name, from log π_trainer − log π_sampler of sampled tokens.

    Args:
        anchor_ratio_N: log π_anchor − log π_sampler of the same tokens; None where the anchor itself was sampled from.
        limited: whether both are to hold the same policy.

    Raises `TrainingError` where the mean is over the limit or is not a number, and where the sampler is no nearer to
    the policy than to the anchor. Truncated sampling is from another distribution on purpose: it has no limit unless
    the recipe sets one.
    """
    found = mismatch(log_ratio_N)
    default = math.inf if truncates(config) else LIMIT_FP32 if dtype == torch.float32 else LIMIT_NARROW
    limit = config.mismatch_limit or default if limited else math.inf
    if not found.mean <= limit:
        raise TrainingError(
            f"the sampler's log-probs are {found.mean:.3g} nats per token away from the trainer's (at most"
            f" {found.max:.3g}), over mismatch_limit {limit:g}: it sampled from other weights than the trainer's, or"
            " computes in another precision",
            kind="mismatch",
            key="mismatch_limit",
            fix="if it is the precision, raise the limit and set correction: truncated_is",
        )
    metrics = {
        "logprob_mismatch": found.mean,
        "logprob_mismatch_max": found.max,
        "effective_sample_size": found.effective_sample_size,
    }
    if anchor_ratio_N is None or not limited or truncates(config):
        return metrics
    test = anchor_test(log_ratio_N, anchor_ratio_N)
    if test.is_anchor:
        raise TrainingError(
            f"the sampler is no nearer to the policy than to the anchor: its log-probs are {found.mean:.3g} nats per"
            f" token away from the policy's, {test.relative:.2f} times the policy's own distance from the anchor; the"
            " update does not reach the sampler",
            kind="mismatch",
            key="sync",
            fix="use sync: adapter, since merged weights of a narrow dtype lose small updates; for a server, see that"
            " it has loaded the adapter",
        )
    return metrics if test.relative is None else metrics | {"logprob_mismatch_relative": test.relative}


def truncates(config: SamplingConfig) -> bool:
    """Whether top-k or top-p keep tokens from being sampled."""
    return isinstance(config, RolloutConfig) and (config.top_k > 0 or config.top_p < 1)
