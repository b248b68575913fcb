"""The reward stage."""

from __future__ import annotations

from pydantic import Field

from pe_rlhf.config.model import AdapterConfig
from pe_rlhf.config.optimizer import RewardOptimizerConfig
from pe_rlhf.config.section import Data, Positive, Rate, Section, Share


class RewardConfig(Section):
    """Train a reward model with the Bradley–Terry loss."""

    data: Data | None = Field(default=None, description="preference pairs; default: what the preferences stage wrote")
    eval_data: Data | None = Field(default=None, description="held-out pairs; default: a share of data")
    eval_share: Share = Field(default=0.1, description="share of prompts held out where eval_data is not given")
    max_bad_share: Share = Field(default=0.05, description="more unusable records than this is an error")
    max_length: int = Field(
        default=1024, ge=2, description="longest prompt and response, tokens; prompts are cut on the left"
    )
    adapter: AdapterConfig | None = Field(default=None, description="what differs from the recipe's")
    optimizer: RewardOptimizerConfig = RewardOptimizerConfig()
    learning_rate: float = Field(default=2e-4, gt=0, description="of adapter and head, after warm-up")
    epochs: Positive = Field(default=1, description="passes over the pairs")
    batch_size: Positive = Field(default=16, description="pairs per optimizer step")
    micro_batch_tokens: Positive = Field(
        default=1024,
        description="tokens in a pass with gradients, per process; passes without take four times as many; of the"
        " prompt that a pair shares each row counts an eighth",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of the labels that is taken to be the wrong way round"
    )
    centering: Rate = Field(default=0.0, description="weight of (r_chosen + r_rejected)²")
    eval_every: Positive = Field(default=20, description="optimizer steps between evaluations")
    checkpoint_every: Positive = Field(default=20, description="optimizer steps between checkpoints")
    keep_checkpoints: Positive = Field(
        default=2, description="the newest ones kept, besides the one of the lowest held-out loss"
    )
