"""Signs that nothing is learnt, or something else than was meant: each a sentence that ends with what to do.

They are worked out from the record, so that the console, the summary and the page say the same. docs/metrics.md has the
healthy ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

RECENT = 5  # steps that a share is averaged over
LONG = 10  # steps for which a critic may be worse than a constant
FAR_KL, NEGATIVE_KL = 50.0, -2.0  # nats per response
LOW_ENTROPY = 0.1  # share of the first step's
CUT = 0.9  # share of responses


def reward_flags(summary: Row) -> list[str]:
    """What is wrong with a reward model, by the summary of its stage."""
    low, high, accuracy = (summary.get(f"eval_accuracy{end}") for end in ("_low", "_high", ""))
    if low is None or high is None or accuracy is None or low > 0.5:
        return []
    shown = f"{accuracy:.3f} on {summary.get('eval_pairs')} held-out pairs, interval {low:.3f} – {high:.3f}"
    if high < 0.5:
        return [f"eval_accuracy is below chance ({shown}): see whether chosen and rejected are swapped"]
    return [
        f"eval_accuracy is not above chance ({shown}): PPO would learn noise from this reward model; give it more or"
        " clearer pairs, or train it longer"
    ]


def ppo_flags(metrics: Sequence[Row]) -> list[str]:
    """What is wrong with a PPO run, by its metrics so far."""
    if not metrics:
        return []
    checks = (_rewards, _kl, _entropy, _critic, _truncated)
    return [sentence for check in checks if (sentence := check(metrics))]


def _rewards(metrics: Sequence[Row]) -> str:
    recent = _values(metrics[-RECENT:], "reward_std")
    if not recent or max(recent) > 0:
        return ""
    return (
        f"reward_std is 0 in the last {len(recent)} steps: all responses score alike, so nothing is learnt; look at"
        " the reward function, use easier prompts or a larger ppo.batch_size"
    )


def _kl(metrics: Sequence[Row]) -> str:
    recent = _values(metrics[-RECENT:], "kl")
    mean = sum(recent) / len(recent) if recent else 0.0
    if mean > FAR_KL:
        return f"kl is {mean:.1f} nats per response, over {FAR_KL:g}: raise ppo.kl.beta or set ppo.kl.limit"
    if mean < NEGATIVE_KL and len(recent) == RECENT:
        return (
            f"kl is {mean:.1f} nats per response over {RECENT} steps, which no KL is: look at logprob_mismatch, and"
            " use a larger ppo.batch_size"
        )
    return ""


def _entropy(metrics: Sequence[Row]) -> str:
    values = _values(metrics, "entropy")
    if len(values) < 2 or values[0] <= 0 or values[-1] >= LOW_ENTROPY * values[0]:
        return ""
    return (
        f"entropy fell from {values[0]:.2f} to {values[-1]:.3f} nats per token: the policy repeats itself; raise"
        " ppo.kl.beta or lower ppo.learning_rate"
    )


def _critic(metrics: Sequence[Row]) -> str:
    recent = _values(metrics[-LONG:], "explained_variance")
    if len(recent) < LONG or max(recent) >= 0:
        return ""
    return (
        f"explained_variance has been below 0 for {LONG} steps: the critic is worse than a constant; raise"
        " ppo.value_learning_rate, or start it from the reward model (ppo.value_init: reward)"
    )


def _truncated(metrics: Sequence[Row]) -> str:
    recent = _values(metrics[-RECENT:], "truncated")
    mean = sum(recent) / len(recent) if recent else 0.0
    if mean < CUT:
        return ""
    return (
        f"truncated is {mean:.2f}: nearly all responses are cut at max_new_tokens, and none is seen to end; raise"
        " ppo.rollout.max_new_tokens or set ppo.missing_eos_penalty, unless short responses are what you want"
    )


def _values(rows: Sequence[Row], metric: str) -> list[float]:
    return [value for row in rows if isinstance(value := row.get(metric), int | float)]
