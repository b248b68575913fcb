"""The PPO stage."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pe_rlhf.config.adapter import Adapter
from pe_rlhf.config.optimizer import OptimizerConfig
from pe_rlhf.config.reward_source import RewardSource
from pe_rlhf.config.sampling import RolloutConfig
from pe_rlhf.config.section import Data, Positive, Rate, Section, Share, refusal
from pe_rlhf.system.progress import say

FORMER_COEFFICIENT = 0.1  # the default that recipes of earlier versions were saved with

_say_once = cache(say)

# The estimators of `algo/advantages.py`, which imports torch: those with a critic, those that compare the responses to
# a prompt with each other, and the keys that are only for some of them.
Advantage = Literal["gae", "rloo", "group_mean", "reinforce_pp"]
WITH_CRITIC, WITH_GROUPS = ("gae",), ("rloo", "group_mean")
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "value_init": WITH_CRITIC,
    "value_adapter": WITH_CRITIC,
    "value_learning_rate": WITH_CRITIC,
    "value_clip_range": WITH_CRITIC,
    "lam": ("gae",),
    "gamma": ("gae", "reinforce_pp"),
    "group_std": ("group_mean",),
}


class KLConfig(Section):
    """The penalty for distance from the anchor."""

    beta: Rate = Field(
        default=0.05, description="β of the objective (1−β)·r − β·KL (convex, β at most 1) or r − β·KL (penalty)"
    )
    form: Literal["convex", "penalty"] = Field(
        default="convex", description="objective: convex is (1−β)·r − β·KL, penalty is r − β·KL"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1",
        description="estimator of the KL from log-probs; default with place: loss: k2, whose gradient there is that of"
        " the KL of each token, without what the token does to the KL of later ones; that of k3 is the gradient of"
        " KL(anchor, policy), not of the KL that is reported and held; k1 has none there and is refused",
    )
    place: Literal["reward", "loss"] = Field(
        default="reward",
        description="where the KL enters: in the reward of each token, or as a term of the loss; there every token"
        " counts as it was sampled, whatever `ppo.ratio` and `rollout.correction` say",
    )
    controller: Literal["fixed", "adaptive"] = Field(
        default="fixed", description="fixed: β stays; adaptive: β follows the KL towards target (arXiv 1909.08593)"
    )
    target: float = Field(default=6.0, gt=0, description="adaptive: the KL to hold, nats per response")
    horizon: Positive = Field(
        default=10_000, description="adaptive: number of episodes over which β reacts; larger is slower"
    )
    limit: float | None = Field(
        default=None, gt=0, description="stop the run if the KL exceeds this, nats per response; default: no limit"
    )

    @model_validator(mode="before")
    @classmethod
    def _k2_in_the_loss(cls, tree: Any) -> Any:
        """k2's gradient in the loss is, on policy, that of the KL of each token.

        k1 in the reward has more: what a token does to the KL of later ones. k3's gradient in the loss is that of
        KL(anchor, policy), and k1's is zero.
        """
        wants_default = isinstance(tree, dict) and tree.get("place") == "loss" and "estimator" not in tree
        return {**tree, "estimator": "k2"} if wants_default else tree

    @model_validator(mode="after")
    def _no_k1_in_the_loss(self) -> KLConfig:
        if self.place == "loss" and self.estimator == "k1":
            raise refusal("estimator", "with place: loss, the gradient of k1 ignores the anchor; use k2 or k3")
        return self

    @model_validator(mode="after")
    def _convex_ends_at_one(self) -> KLConfig:
        if self.form == "convex" and self.beta > 1:
            raise refusal("beta", f"{self.beta:g} is over 1, where form: convex ends; use form: penalty")
        return self

    @model_validator(mode="after")
    def _adaptive_from_something(self) -> KLConfig:
        if self.controller == "adaptive" and self.beta == 0:
            raise refusal("controller", "adaptive multiplies beta, and 0 stays 0; start from a beta above 0")
        return self


class PPOConfig(Section):
    """PPO with policy and value adapters and a KL to the anchor, or one of its relatives without a critic."""

    prompts: Data
    max_bad_share: Share = Field(default=0.05, description="fail if more than this share of the prompts is unusable")
    adapter: Adapter | None = Field(
        default=None,
        description="settings that differ from the recipe's adapter, for the policy, and for the critic with"
        " value_init: fresh",
    )
    start: str | None = Field(
        default=None,
        description="start the policy as that of a run, or as a PEFT LoRA (a folder or hub id), on a base that stays"
        " bare and is what the KL is measured to; its rank, alpha and targets hold; default: a fresh adapter",
    )
    value_adapter: Adapter | None = Field(
        default=None, description="settings of a fresh critic's adapter; default: the policy's"
    )
    reward: list[RewardSource] = Field(default_factory=lambda: [RewardSource(adapter="stage")], min_length=1)
    rollout: RolloutConfig = RolloutConfig()
    kl: KLConfig = KLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: Positive = Field(default=100, description="PPO steps: one rollout and one update each")
    batch_size: Positive = Field(default=64, description="prompts in each rollout, over all processes")
    epochs: Positive = Field(default=2, description="passes over each rollout")
    minibatches: Positive = Field(default=2, description="minibatches, and so optimizer steps, in each pass")
    micro_batch_tokens: Positive = Field(
        default=1024,
        description="tokens in one forward pass with gradients, per process; passes without gradients take four"
        " times as many; a row counts an eighth of the prefix that it shares with other rows; default: on a GPU as many"
        " as the memory plan has room for, up to 32,768",
    )
    max_prompt_tokens: Positive = Field(
        default=512, description="longest prompt, tokens; longer ones are left out and counted"
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="learning rate of the policy")
    value_learning_rate: float | None = Field(
        default=None, gt=0, description="learning rate of the critic; default: the policy's"
    )
    value_init: Literal["reward", "fresh"] | None = Field(
        default=None,
        description="start the critic as a copy of the reward adapter and head (fitted to the returns of the first"
        " rollout by a scale and a shift), or fresh; default: reward if a reward adapter gives the scores",
    )
    advantage: Advantage = Field(
        default="gae",
        description="the estimator of advantages: gae (PPO) learns a critic; rloo and group_mean (GRPO) compare the"
        " responses to a prompt with each other, at least two `rollout.samples_per_prompt`; reinforce_pp (REINFORCE++)"
        " compares all responses of a rollout; docs/algorithms.md says which when",
    )
    group_std: bool = Field(
        default=True,
        description="group_mean: divide by the standard deviation of the group (GRPO); false: do not (Dr. GRPO)",
    )
    gamma: Share = Field(default=1.0, description="γ of gae and reinforce_pp: discount per token")
    lam: Share = Field(default=0.95, description="λ of GAE: 1 uses returns only, 0 uses the critic's next value only")
    clip_range: float = Field(default=0.2, gt=0, description="clip the probability ratio to 1 ± this")
    clip_range_high: float | None = Field(
        default=None, gt=0, description="clip the ratio to 1 + this above (DAPO); default: clip_range"
    )
    ratio: Literal["token", "sequence", "sequence_mean"] = Field(
        default="token",
        description="the probability ratio π/π_old that is clipped: of each token; of the whole response (sequence,"
        " as RLOO); or its mean over the tokens, geometric (sequence_mean, GSPO)",
    )
    loss_aggregation: Literal["token", "sequence", "constant"] = Field(
        default="token",
        description="how the policy's loss comes from those of tokens: token (mean over the tokens of a minibatch, as"
        " DAPO), sequence (mean over responses of their means, as GRPO), constant (sum over responses ×"
        " max_new_tokens, as Dr. GRPO)",
    )
    value_clip_range: float = Field(
        default=0.2, gt=0, description="clip the new value to this distance from the old one"
    )
    whiten_advantages: bool = Field(
        default=True,
        description="scale advantages to mean 0 and variance 1 over the tokens of a rollout; default with rloo and"
        " group_mean: false",
    )
    whiten_rewards: bool = Field(default=False, description="divide the shaped rewards by their standard deviation")
    missing_eos_penalty: float | None = Field(
        default=None, description="subtracted from the score of a response without an end token; default: no penalty"
    )
    missing_eos_replaces: bool = Field(
        default=False,
        description="a response without an end token scores minus the penalty, instead of its score less the penalty",
    )
    length_penalty: float = Field(default=0.0, description="subtracted from the score for each response token")
    checkpoint_every: Positive = Field(
        default=10,
        description="steps between checkpoints; each is saved after its weights have produced a scored rollout",
    )
    keep_checkpoints: Positive = Field(
        default=2, description="newest checkpoints to keep, besides the one with the best objective of `kl.form`"
    )
    eval_every: Positive | None = Field(
        default=None, description="steps between small evaluations by the judge of the evaluate section; default: none"
    )
    eval_prompts: Positive = Field(
        default=32, description="prompts in each of these evaluations: the first ones of evaluate.prompts"
    )
    samples_every: Positive = Field(default=5, description="steps between samples in samples.jsonl")

    @model_validator(mode="before")
    @classmethod
    def _critics_loss_has_no_weight(cls, tree: Any) -> Any:
        """Recipes of earlier versions have `value_coefficient`; it did little more than scale the clipped gradient."""
        if not isinstance(tree, dict) or "value_coefficient" not in tree:
            return tree
        if tree["value_coefficient"] != FORMER_COEFFICIENT:
            _say_once(
                "ppo.value_coefficient does nothing: the critic has an optimizer of its own; use"
                " ppo.value_learning_rate"
            )
        return {key: value for key, value in tree.items() if key != "value_coefficient"}

    @model_validator(mode="before")
    @classmethod
    def _keys_of_the_estimator(cls, tree: Any) -> Any:
        """Keys of other estimators are refused, except null; advantages of groups are not whitened by default."""
        if not isinstance(tree, dict) or (advantage := tree.get("advantage", "gae")) not in get_args(Advantage):
            return tree
        foreign = [key for key in ONLY_FOR if key in tree and advantage not in ONLY_FOR[key]]
        if given := [key for key in foreign if tree[key] is not None]:
            names = " or ".join(ONLY_FOR[given[0]])
            why = ", which has no critic" if ONLY_FOR[given[0]] is WITH_CRITIC else ""
            raise refusal(given[0], f"it is for advantage: {names}, and this is {advantage}{why}; leave it out")
        tree = {key: value for key, value in tree.items() if key not in foreign}
        return {"whiten_advantages": advantage not in WITH_GROUPS, **tree}

    @model_serializer(mode="wrap")
    def _without_keys_of_other_estimators(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that a recipe that was saved with all its keys can be read again."""
        return {key: value for key, value in dump(self).items() if self.advantage in ONLY_FOR.get(key, self.advantage)}

    @property
    def has_critic(self) -> bool:
        """Whether there is a value role."""
        return self.advantage in WITH_CRITIC

    @property
    def compares_groups(self) -> bool:
        """Whether advantages come from comparing the responses to a prompt with each other."""
        return self.advantage in WITH_GROUPS

    @model_validator(mode="after")
    def _critic_is_fresh(self) -> PPOConfig:
        if self.value_adapter is not None and self.value_init == "reward":
            raise refusal("value_adapter", "the critic is to be a copy of the reward adapter; use value_init: fresh")
        return self

    @model_validator(mode="after")
    def _enough_to_compare(self) -> PPOConfig:
        samples = self.rollout.samples_per_prompt
        if self.compares_groups and samples < 2:
            reason = f"{self.advantage} compares the responses to a prompt with each other; set at least 2"
            raise refusal("rollout.samples_per_prompt", reason, "missing")
        if not self.has_critic and self.batch_size * samples < 2:
            reason = f"{self.advantage} compares the responses of a rollout, and this is one; set at least 2"
            raise refusal("batch_size", reason, "missing")
        return self

    @model_validator(mode="after")
    def _cross_checks(self) -> PPOConfig:
        episodes = self.batch_size * self.rollout.samples_per_prompt
        if self.minibatches > episodes:
            raise refusal("minibatches", f"{self.minibatches} is more than the {episodes} responses of a rollout")
        if self.missing_eos_replaces and self.missing_eos_penalty is None:
            raise refusal("missing_eos_replaces", "it needs a missing_eos_penalty", "missing")
        return self
