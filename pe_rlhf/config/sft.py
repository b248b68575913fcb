"""The sft stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pe_rlhf.config.adapter import Adapter, LoRAConfig
from pe_rlhf.config.optimizer import AdamWConfig
from pe_rlhf.config.section import Data, Positive, Section, Share, refusal


class SFTOptimizerConfig(AdamWConfig):
    """AdamW for the sft stage."""

    schedule: Literal["constant", "linear"] = Field(
        default="linear", description="constant, or linear decay to 0, after the warm-up"
    )
    warmup_ratio: Share = Field(
        default=0.03, description="share of the optimizer steps over which the learning rate rises from 0"
    )
    eps: float = Field(default=1e-8, gt=0, description="ε of AdamW")


class SFTConfig(Section):
    """Fine-tune the model on texts, or on responses to prompts. The result is the anchor of all later stages."""

    data: Data = Field(
        description="training rows with prompt and completion (or response), with messages, or with text"
    )
    eval_data: Data | None = Field(default=None, description="held-out rows; default: a share of data")
    eval_share: Share = Field(default=0.05, description="share of the prompts that is held out; only without eval_data")
    max_bad_share: Share = Field(default=0.05, description="fail if more than this share of the rows is unusable")
    max_length: int = Field(
        default=1024, ge=2, description="longest prompt and response together, tokens; prompts are cut on the left"
    )
    completion_only: bool = Field(default=True, description="compute no loss on prompts; rows of text have no prompt")
    adapter: Adapter | None = Field(
        default=None,
        description="settings that differ from the recipe's adapter, except the init: TRL trains a plain LoRA",
    )
    optimizer: SFTOptimizerConfig = SFTOptimizerConfig()
    learning_rate: float = Field(default=2e-4, gt=0, description="learning rate of the adapter")
    epochs: Positive = Field(default=1, description="passes over the rows")
    batch_size: Positive = Field(default=16, description="rows in each optimizer step")
    micro_batch_size: Positive = Field(default=4, description="rows in one forward pass; must divide batch_size")
    eval_every: Positive = Field(default=50, description="optimizer steps between evaluations on the held-out rows")
    checkpoint_every: Positive = Field(default=50, description="optimizer steps between checkpoints")

    @model_validator(mode="after")
    def _settings_fit(self) -> SFTConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.adapter is not None and not isinstance(self.adapter, LoRAConfig):
            raise refusal("adapter.kind", f"sft trains a plain LoRA and no {self.adapter.kind}; leave it out")
        if self.adapter is not None and self.adapter.init != "lora":
            raise refusal(
                "adapter.init", f"sft trains a plain LoRA and has no use for {self.adapter.init}; leave it out"
            )
        return self
