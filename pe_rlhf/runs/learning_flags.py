"""Signs that nothing is learnt, or something else than was meant: each a sentence that ends with what to do.

They are worked out from the record, so that the console, the summary and the page say the same. docs/metrics.md has the
healthy ranges.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any

Row = dict[str, Any]

RECENT = 5  # steps that a share is averaged over
LONG = 10  # steps for which a critic may be worse than a constant
FAR_KL, NEGATIVE_KL = 50.0, -2.0  # nats per response
LOW_ENTROPY = 0.1  # share of the first step's
CUT = 0.9  # share of responses
APART = 2.0  # times the disagreement of the first steps
ALIKE = 0.9  # share of groups


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
    return [sentence for flag in PPO_FLAGS if (sentence := flag.sentence(metrics))]


@dataclass(frozen=True)
class Flag:
    """What is wrong where `is_wrong` holds for the values of a metric in the newest steps.

    `says` follows the metric's name; it may show the values' first, last, mean and their number n.
    """

    metric: str
    steps: int
    is_wrong: Callable[[Sequence[float]], bool]
    says: str

    def sentence(self, metrics: Sequence[Row]) -> str:
        """The sentence, or "" where nothing is wrong or the metric was not logged."""
        values = [value for row in metrics[-self.steps :] if isinstance(value := row.get(self.metric), int | float)]
        if not values or not self.is_wrong(values):
            return ""
        shown = self.says.format(first=values[0], last=values[-1], mean=mean(values), n=len(values))
        return f"{self.metric} {shown}"


PPO_FLAGS = (
    Flag(
        "reward_std",
        RECENT,
        lambda values: max(values) <= 0,
        "is 0 in the last {n} steps: all responses score alike, so nothing is learnt; look at the reward function, use"
        " easier prompts or a larger ppo.batch_size",
    ),
    Flag(
        "kl",
        RECENT,
        lambda values: mean(values) > FAR_KL,
        f"is {{mean:.1f}} nats per response, over {FAR_KL:g}: raise ppo.kl.beta or set ppo.kl.limit",
    ),
    Flag(
        "kl",
        RECENT,
        lambda values: len(values) == RECENT and mean(values) < NEGATIVE_KL,
        "is {mean:.1f} nats per response over {n} steps, which no KL is: look at logprob_mismatch, and use a larger"
        " ppo.batch_size",
    ),
    Flag(
        "entropy",
        sys.maxsize,
        lambda values: values[0] > 0 and values[-1] < LOW_ENTROPY * values[0],
        "fell from {first:.2f} to {last:.3f} nats per token: the policy repeats itself; raise ppo.kl.beta or lower"
        " ppo.learning_rate",
    ),
    Flag(
        "explained_variance",
        LONG,
        lambda values: len(values) == LONG and max(values) < 0,
        "has been below 0 for {n} steps: the critic is worse than a constant; lower ppo.value_learning_rate where"
        " value_loss grows, otherwise raise it, or start the critic from the reward model (ppo.value_init: reward)",
    ),
    Flag(
        "groups_alike",
        RECENT,
        lambda values: mean(values) >= ALIKE,
        "is {mean:.2f}: nearly all responses to a prompt score as the others to it, so next to nothing is learnt; use"
        " prompts that are neither too easy nor too hard, or more ppo.rollout.samples_per_prompt",
    ),
    Flag(
        "source_ensemble_disagreement",
        sys.maxsize,
        lambda values: len(values) >= LONG and mean(values[-RECENT:]) > APART * mean(values[:RECENT]),
        "rose from {first:.3g} to {last:.3g}: the policy goes where the reward models disagree, and what they reward"
        " there may be their error; combine them by mean_minus_std or uwo with a larger k, or raise ppo.kl.beta",
    ),
    Flag(
        "truncated",
        RECENT,
        lambda values: mean(values) >= CUT,
        "is {mean:.2f}: nearly all responses are cut at max_new_tokens, and none is seen to end; raise"
        " ppo.rollout.max_new_tokens or set ppo.missing_eos_penalty, unless short responses are what you want",
    ),
)
