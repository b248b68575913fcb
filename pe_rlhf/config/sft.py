"""The sft stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pe_rlhf.config.model import AdapterConfig
from pe_rlhf.config.optimizer import OptimizerConfig
from pe_rlhf.config.section import Data, Positive, Section, Share


class SFTOptimizerConfig(OptimizerConfig):
    """AdamW for the sft stage."""

    schedule: Literal["constant", "linear"] = Field(default="linear", description="after warm-up; linear ends at 0")
    warmup_ratio: Share = Field(
        default=0.03, description="share of the optimizer steps over which the rate rises from 0"
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's ε")


class SFTConfig(Section):
    """Fine-tune the model on texts or on responses to prompts; what comes of it is the anchor of all later stages."""

    data: Data = Field(description="rows of prompt and completion (or response), of messages, or of text")
    eval_data: Data | None = Field(default=None, description="held-out rows; default: a share of data")
    eval_share: Share = Field(default=0.05, description="share of prompts held out where eval_data is not given")
    max_bad_share: Share = Field(default=0.05, description="more unusable rows than this is an error")
    max_length: int = Field(
        default=1024, ge=2, description="longest prompt and response, tokens; prompts are cut on the left"
    )
    completion_only: bool = Field(default=True, description="no loss on prompts; a row of text has none")
    adapter: AdapterConfig | None = Field(
        default=None,
        description="what differs from the recipe's, but for its init: TRL trains a plain LoRA here",
    )
    optimizer: SFTOptimizerConfig = SFTOptimizerConfig()
    learning_rate: float = Field(default=2e-4, gt=0, description="of the adapter, after warm-up")
    epochs: Positive = Field(default=1, description="passes over the rows")
    batch_size: Positive = Field(default=16, description="rows per optimizer step")
    micro_batch_size: Positive = Field(default=4, description="rows in one forward pass; a divisor of batch_size")
    eval_every: Positive = Field(default=50, description="optimizer steps between evaluations")
    checkpoint_every: Positive = Field(default=50, description="optimizer steps between checkpoints")

    @model_validator(mode="after")
    def _settings_fit(self) -> SFTConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.adapter is not None and self.adapter.init != "lora":
            raise ValueError(
                f"adapter.init: sft trains a plain LoRA and has no use for {self.adapter.init}; leave it out"
            )
        return self
