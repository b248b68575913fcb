"""The PPO stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pe_rlhf.config.model import AdapterConfig
from pe_rlhf.config.optimizer import OptimizerConfig
from pe_rlhf.config.sampling import RolloutConfig
from pe_rlhf.config.section import Data, Positive, Rate, Section, Share


class KLConfig(Section):
    """The tie to the anchor."""

    beta: Rate = Field(default=0.05, description="β of (1−β)·r − β·KL, where it is at most 1, or of r − β·KL")
    form: Literal["convex", "penalty"] = Field(
        default="convex", description="convex: (1−β)·r − β·KL; penalty: r − β·KL"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(default="k1", description="default in the loss: k2")
    place: Literal["reward", "loss"] = Field(default="reward", description="where the KL enters")
    controller: Literal["fixed", "adaptive"] = Field(
        default="fixed", description="of β; adaptive: it follows the KL to its target (arXiv 1909.08593)"
    )
    target: float = Field(default=6.0, gt=0, description="adaptive: the KL to hold, nats per response")
    horizon: Positive = Field(default=10_000, description="adaptive: episodes over which β reacts")
    limit: float | None = Field(default=None, gt=0, description="stop the run above this KL, nats per response")

    @model_validator(mode="before")
    @classmethod
    def _k2_in_the_loss(cls, tree: Any) -> Any:
        """k2's gradient in the loss is, on policy, that of k1 in the reward."""
        wants_default = isinstance(tree, dict) and tree.get("place") == "loss" and "estimator" not in tree
        return {**tree, "estimator": "k2"} if wants_default else tree

    @model_validator(mode="after")
    def _no_k1_in_the_loss(self) -> KLConfig:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("k1 in the loss has a gradient that the anchor is no part of; use k2 or k3 there")
        return self

    @model_validator(mode="after")
    def _convex_ends_at_one(self) -> KLConfig:
        if self.form == "convex" and self.beta > 1:
            raise ValueError(f"beta: {self.beta:g} is over 1, where form: convex ends; use form: penalty")
        return self

    @model_validator(mode="after")
    def _adaptive_from_something(self) -> KLConfig:
        if self.controller == "adaptive" and self.beta == 0:
            raise ValueError("controller: adaptive multiplies beta, which stays 0; start from a beta above 0")
        return self


class RewardSource(Section):
    """Where scores come from: exactly one of the three, times a weight."""

    adapter: str | None = Field(default=None, description="a reward stage's directory; `stage` is this run's own")
    model: str | None = Field(default=None, description="a sequence-classification model with one label")
    function: str | None = Field(default=None, description="module:callable, (prompts, responses) → scores")
    weight: float = Field(default=1.0, description="what its scores are multiplied by in the sum")

    @model_validator(mode="after")
    def _exactly_one(self) -> RewardSource:
        if sum(source is not None for source in (self.adapter, self.model, self.function)) != 1:
            raise ValueError("name exactly one of adapter, model and function")
        return self


class PPOConfig(Section):
    """PPO with policy and value adapters and a KL to the anchor."""

    prompts: Data
    adapter: AdapterConfig | None = Field(
        default=None, description="what differs from the recipe's, for the policy and a critic with value_init: fresh"
    )
    reward: list[RewardSource] = Field(default_factory=lambda: [RewardSource(adapter="stage")], min_length=1)
    rollout: RolloutConfig = RolloutConfig()
    kl: KLConfig = KLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: Positive = Field(default=100, description="rollouts, each followed by an update")
    batch_size: Positive = Field(default=64, description="prompts per rollout")
    epochs: Positive = Field(default=2, description="passes over each rollout")
    minibatches: Positive = Field(default=2, description="optimizer steps per pass")
    micro_batch_tokens: Positive = Field(
        default=1024,
        description="tokens in a pass with gradients, per process; passes without take four times as many; of a prefix"
        " that all rows share each row counts an eighth",
    )
    max_prompt_tokens: Positive = Field(default=512, description="longer prompts are left out, and counted")
    learning_rate: float = Field(default=1e-4, gt=0, description="of the policy")
    value_learning_rate: float | None = Field(default=None, gt=0, description="default: the policy's")
    value_init: Literal["reward", "fresh"] | None = Field(
        default=None,
        description="the critic starts as the reward adapter, or anew; default: reward where one gives the scores",
    )
    gamma: Share = Field(default=1.0, description="γ of GAE: discount per token")
    lam: Share = Field(default=0.95, description="λ of GAE: 1 is returns alone, 0 the critic's next value alone")
    clip_range: float = Field(default=0.2, gt=0, description="how far the ratio to the old policy counts from 1")
    value_clip_range: float = Field(default=0.2, gt=0, description="how far a value counts from the old one")
    value_coefficient: Rate = Field(default=0.1, description="weight of the value loss beside the policy loss")
    whiten_advantages: bool = Field(default=True, description="mean 0 and variance 1 over the tokens of a rollout")
    whiten_rewards: bool = Field(default=False, description="divide the shaped rewards by their standard deviation")
    missing_eos_penalty: float | None = Field(
        default=None, description="taken off the score of a response that was cut"
    )
    missing_eos_replaces: bool = Field(default=False, description="a cut response scores minus the penalty instead")
    length_penalty: float = Field(default=0.0, description="taken off the score per response token")
    checkpoint_every: Positive = Field(
        default=10, description="steps between checkpoints; one is written when its weights have been sampled from"
    )
    keep_checkpoints: Positive = Field(
        default=2, description="the newest ones kept, besides the one of the highest reward after the KL"
    )
    eval_every: Positive | None = Field(
        default=None, description="steps between small evaluations by the judge of the evaluate section"
    )
    eval_prompts: Positive = Field(default=32, description="prompts of such an evaluation, the first ones")
    samples_every: Positive = Field(default=5, description="steps between samples written to samples.jsonl")

    @model_validator(mode="after")
    def _cross_checks(self) -> PPOConfig:
        episodes = self.batch_size * self.rollout.samples_per_prompt
        if self.minibatches > episodes:
            raise ValueError(f"minibatches: {self.minibatches} is more than the {episodes} responses of a rollout")
        if self.missing_eos_replaces and self.missing_eos_penalty is None:
            raise ValueError("missing_eos_replaces needs a missing_eos_penalty")
        return self
