"""The reward stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pe_rlhf.config.adapter import Adapter
from pe_rlhf.config.optimizer import RewardOptimizerConfig
from pe_rlhf.config.section import Data, Positive, Rate, Section, Share, refusal


class EnsembleConfig(Section):
    """Several reward adapters trained in one stage on the same backbone."""

    members: Positive = Field(default=5, description="reward adapters; the first is the one without an ensemble")
    vary: list[Literal["seed", "init", "bootstrap"]] = Field(
        default_factory=lambda: ["seed"],
        description="what the others differ in: seed (initial values, order of the pairs, dropout), init, bootstrap"
        " (pairs drawn with replacement)",
    )
    inits: list[str] = Field(
        default_factory=list, description="vary with init: the inits of the second member and on, in turn"
    )
    diversity: Rate = Field(
        default=0.0,
        description="weight of the loss term −‖A‖_*/‖A‖_F of the members' LoRA factors A below one another, mean over"
        " layers (UP-RLHF), which keeps them apart",
    )

    @model_validator(mode="after")
    def _differ(self) -> EnsembleConfig:
        if self.members > 1 and not self.vary:
            raise refusal("vary", "the members would all be the same; name seed, init or bootstrap", "missing")
        if ("init" in self.vary) != bool(self.inits):
            reason = "vary has init: name the inits, such as [lora, pissa]" if not self.inits else "vary has no init"
            raise refusal("inits", reason, "conflict" if self.inits else "missing")
        if self.diversity and self.members < 2:
            raise refusal("diversity", "one member has no others to differ from; use members: 5", "conflict")
        return self


class RewardConfig(Section):
    """Train a reward model with the Bradley–Terry loss."""

    data: Data | None = Field(default=None, description="preference pairs; default: those of the preferences stage")
    eval_data: Data | None = Field(default=None, description="held-out pairs; default: a share of data")
    eval_share: Share = Field(default=0.1, description="share of the prompts that is held out; only without eval_data")
    max_pairs: Positive | None = Field(
        default=None,
        description="train on at most so many pairs, drawn by the seed, while the held-out ones stay; default: on all",
    )
    max_bad_share: Share = Field(default=0.05, description="fail if more than this share of the records is unusable")
    max_length: int = Field(
        default=1024, ge=2, description="longest prompt and response together, tokens; prompts are cut on the left"
    )
    adapter: Adapter | None = Field(default=None, description="settings that differ from the recipe's adapter")
    start: str | None = Field(
        default=None,
        description="go on from the reward adapter of a run, or from a PEFT LoRA (a folder or hub id), also one for"
        " sequence classification with its score head; its rank, alpha and targets hold; default: a fresh adapter",
    )
    optimizer: RewardOptimizerConfig = RewardOptimizerConfig()
    learning_rate: float = Field(default=2e-4, gt=0, description="learning rate of adapter and head")
    epochs: Positive = Field(default=1, description="passes over the pairs")
    batch_size: Positive = Field(default=16, description="pairs in each optimizer step, over all processes")
    micro_batch_tokens: Positive = Field(
        default=1024,
        description="tokens in one forward pass with gradients, per process; passes without gradients take four"
        " times as many; a row counts an eighth of the prefix that it shares with other rows; default: on a GPU as many"
        " as the memory plan has room for, up to 32,768",
    )
    ensemble: EnsembleConfig | None = Field(default=None, description="train several reward adapters; default: one")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="assumed share of wrong labels")
    centering: Rate = Field(
        default=0.0, description="weight of the loss term (r_chosen + r_rejected)², which keeps scores near zero"
    )
    eval_every: Positive = Field(default=20, description="optimizer steps between evaluations on the held-out pairs")
    checkpoint_every: Positive = Field(default=20, description="optimizer steps between checkpoints")
    keep_checkpoints: Positive = Field(
        default=2, description="newest checkpoints to keep, besides the one with the lowest held-out loss"
    )

    @model_validator(mode="after")
    def _one_start(self) -> RewardConfig:
        if self.start is not None and self.ensemble is not None and self.ensemble.members > 1:
            raise refusal("start", "all members of the ensemble would start the same; leave one out", "conflict")
        return self
