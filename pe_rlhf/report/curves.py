"""Which metrics of each stage are drawn over its steps, on the page of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curves:
    """A plot of metrics over steps: its title, the unit of y, and the label of each metric. band: the first one's."""

    title: str
    unit: str
    lines: dict[str, str]
    note: str = ""
    band: tuple[str, str] | None = None
    log: bool = False
    shares: bool = False
    reference: float | None = None


JUDGE = Curves(
    *("Win-rate by the judge", "share of prompts", {"judge_win_rate": "policy against the anchor"}),
    note="held-out prompts; band: 95 % interval; line at 50 %",
    band=("judge_ci_low", "judge_ci_high"),
    shares=True,
    reference=0.5,
)
MISMATCH = {"logprob_mismatch": "mean", "logprob_mismatch_max": "greatest"}
SECONDS = {"seconds_rollout": "rollout", "seconds_score": "score", "seconds_update": "update"}
PPO = (
    Curves(
        "Reward",
        "mean score",
        {"reward": "reward", "reward_shaped": "with penalties"},
        note="band: ± one standard deviation in a step",
        band=("reward_low", "reward_high"),
    ),
    JUDGE,
    Curves("KL to the anchor", "nats per response", {"kl": "KL"}),
    Curves("Entropy", "nats per token", {"entropy": "entropy"}),
    Curves("Policy loss", "clipped surrogate", {"policy_loss": "policy"}),
    Curves("Value loss", "squared error", {"value_loss": "value"}),
    Curves("Clipping", "share of tokens", {"clip_fraction": "policy", "value_clip_fraction": "value"}, shares=True),
    Curves("Explained variance", "of the returns", {"explained_variance": "critic"}, note="1: the critic is exact"),
    Curves("Groups that score alike", "share of groups", {"groups_alike": "groups"}, shares=True),
    Curves("Mismatch", "nats per token", MISMATCH, note="log-probs of sampler and trainer, |difference|", log=True),
    Curves("Response length", "tokens", {"response_length": "mean length"}),
    Curves("Time per step", "seconds", SECONDS),
)
LOSSES = {"loss": "training", "eval_loss": "held out"}
ACCURACIES = {"accuracy": "training", "eval_accuracy": "held out", "ensemble_eval_accuracy": "ensemble, held out"}
REWARD = (
    Curves("Pairwise loss", "nats per pair", LOSSES),
    Curves("Accuracy", "share of pairs", ACCURACIES, shares=True),
)
SFT = (Curves("Loss", "nats per token", LOSSES),)
