"""What a run leaves behind and where: every path below a run's directory, and the table of the stages.

No other file spells one of these names. A new stage is a section of the recipe, a loop in `stages/`, and a row here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pe_rlhf.config.load import SAVED_RECIPE, load_recipe
from reward.errors import InputError

# ---- the stages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageInfo:
    """One stage: its section in the recipe and its folder in the run have its name too.

    `roles` are the roles that it trains, each with the folder below the stage's that it is written to.
    """

    name: str
    sentence: str
    roles: Mapping[str, str] = field(default_factory=dict)


# In the order they run.
STAGE_INFO: Mapping[str, StageInfo] = {
    info.name: info
    for info in (
        StageInfo("sft", "fine-tunes the model, which later stages then start from", {"sft": "adapter"}),
        StageInfo("preferences", "samples two responses for each prompt and has a judge choose"),
        StageInfo("reward", "trains the reward model on preference pairs", {"reward": "adapter"}),
        StageInfo("ppo", "trains the policy, often with a critic", {"policy": "adapter", "value": "value"}),
        StageInfo("evaluate", "has a judge compare the policy with the model it started from"),
    )
}
# The roles that stages train, those of later stages first: what a run is about comes before what led to it.
ROLES: Mapping[str, StageInfo] = {role: info for info in reversed(STAGE_INFO.values()) for role in info.roles}

# ---- the files -------------------------------------------------------------------------------------------------------


class _Below:
    """A path with a fixed name below an object's `folder`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: _Files, kind: type[_Files] | None = None) -> Path:
        return owner.folder / self._name


@dataclass(frozen=True)
class _Files:
    folder: Path


class RunFiles(_Files):
    """A run's directory."""

    recipe = _Below(SAVED_RECIPE)  # as it was resolved, with every default
    changes = _Below("changes.jsonl")  # settings that changed when it was resumed, each with the step it did at
    report = _Below("report.html")
    failure = _Below("failure.json")  # why the last command on it failed; not there where it did not
    log = _Below("log.txt")  # what the run printed, where `compare` started it
    tasks = _Below("tasks")  # of a recipe with tasks: a run's directory for each
    on_tasks = _Below("on")  # of the run of one task: its policy on the prompts of the other tasks
    summary = _Below("summary.json")  # of a recipe with tasks: every task after every task
    task_table = _Below("task_table.csv")

    def stage(self, name: str) -> StageFiles:
        return StageFiles(self.folder / STAGE_INFO[name].name)

    def task(self, name: str) -> RunFiles:
        """The run of one of several tasks."""
        return RunFiles(self.tasks / name)

    def on_task(self, name: str) -> RunFiles:
        """Where the policy of this task's run is evaluated on another task: a run that has that stage only."""
        return RunFiles(self.on_tasks / name)

    def role(self, role: str) -> RoleFiles:
        """Where the stage that trains a role leaves it."""
        return self.stage(ROLES[role.partition("_")[0]].name).role(role)

    @property
    def sft_model(self) -> Path:
        """The merged checkpoint of the sft stage, which later stages load as the base model."""
        return self.stage("sft").model

    def export(self, role: str, form: str, step: int | None = None) -> Path:
        """Where `pe-rlhf export` writes to unless another place is named; `step` is that of a checkpoint."""
        name = role if step is None else f"{role}-step-{step}"
        return self.folder / "export" / f"{name}-{form}"


class StageFiles(_Files):
    """The folder of one stage in a run's directory. Which of these files it has depends on the stage."""

    recipe = _Below(SAVED_RECIPE)
    metrics = _Below("metrics.jsonl")  # one line per step
    summary = _Below("summary.json")  # written last: a stage that has one has finished
    checkpoints = _Below("checkpoints")
    model = _Below("model")  # sft: the merged checkpoint
    preferences = _Below("preferences.jsonl")
    reliability = _Below("reliability.jsonl")  # reward: the reliability table of each evaluation
    verdicts = _Below("verdicts.jsonl")
    best_of_verdicts = _Below("best_of_verdicts.jsonl")  # evaluate: of the anchor's best of n against the anchor
    judged_rewards = _Below("judged_rewards.jsonl")  # ppo, evaluate: scores of a judge that is a reward, by text
    open_questions = _Below("judged_rewards_open.jsonl")  # those of a batch that has not all its answers
    anchor_responses = _Below("anchor_responses.jsonl")  # what they were compared with
    samples = _Below("samples.jsonl")
    samples_table = _Below("samples.md")
    fisher = _Below("fisher.safetensors")  # ppo: for `continual: {method: ewc}` of the next task
    drift = _Below("drift.json")  # ppo: how `compare` found the weights changed
    tensorboard = _Below("tensorboard")
    vllm_log = _Below("vllm.log")

    @property
    def run(self) -> RunFiles:
        return RunFiles(self.folder.absolute().parent)

    def role(self, role: str) -> RoleFiles:
        """The folder of a role; `reward_2` is the second member of an ensemble, in `adapter_2`."""
        name, _, number = role.partition("_")
        folder = ROLES[name].roles[name]
        return RoleFiles(self.folder / (f"{folder}_{number}" if number else folder))

    def left_out(self, key: str) -> Path:
        """The unusable rows of a data set, which the recipe names under `key`, maybe in another stage's section."""
        section, _, name = key.rpartition(".")
        return self.folder / f"left_out_{name if section == self.folder.name else key.replace('.', '_')}.jsonl"

    def judged(self, step: int) -> Path:
        """The verdicts of the judge evaluation after a PPO step."""
        return self.folder / "judge" / f"step-{step:06d}.jsonl"

    def checkpoint(self, step: int) -> CheckpointFiles:
        return CheckpointFiles(self.checkpoints / f"step-{step:06d}")

    def checkpoints_there(self) -> list[tuple[int, CheckpointFiles]]:
        """The checkpoints by step, the newest last. What else is in their folder is nobody's business here."""
        found = ((path.name.removeprefix("step-"), path) for path in self.checkpoints.glob("step-*"))
        return sorted(
            ((int(step), CheckpointFiles(path)) for step, path in found if step.isdecimal()), key=lambda pair: pair[0]
        )


class CheckpointFiles(_Files):
    """One checkpoint of a stage."""

    state = _Below("state.json")  # step, score, how the roles are made; the checksum of both files
    tensors = _Below("state.safetensors")


class RoleFiles(_Files):
    """A role as a stage writes it: for the next stage, and for PEFT."""

    description = _Below("role.json")  # the role, its base model, how its adapter is made
    tensors = _Below("role.safetensors")
    adapter_config = _Below("adapter_config.json")  # PEFT's
    adapter_tensors = _Below("adapter_model.safetensors")  # PEFT's
    head = _Below("head.safetensors")

    @property
    def stage(self) -> StageFiles:
        return StageFiles(self.folder.absolute().parent)

    def for_peft(self) -> Iterator[Path]:
        """The files that PEFT and vLLM load, those that are there."""
        return (path for path in (self.adapter_config, self.adapter_tensors, self.head) if path.is_file())


class EvaluationFiles(_Files):
    """The folder of `pe-rlhf evaluate` or `evaluate-reward`."""

    summary = _Below("summary.json")
    report = _Below("report.html")
    verdicts = _Below("verdicts.jsonl")
    best_of_verdicts = _Below("best_of_verdicts.jsonl")

    def responses(self, side: str) -> Path:
        """The responses of one side, `candidate` or `baseline`, or of the anchor's `best_of` n."""
        return self.folder / f"{side}.jsonl"


class ComparisonFiles(_Files):
    """The directory of `pe-rlhf compare`; each run below it has a directory of its own."""

    recipe = _Below("comparison.yaml")
    summary = _Below("summary.json")
    report = _Below("report.html")
    results = _Below("results.csv")
    win_rates = _Below("win_rates.svg")  # not there where no run was evaluated
    gold = _Below("gold_over_kl.svg")  # not there without `ppo.eval_every` and a judge that gives scores
    shared = _Below("shared")
    runs = _Below("runs")
    trials = _Below("trials")

    def a_recipe(self) -> Path | None:
        """The recipe of any run below it; None where no run is there."""
        return next(self.folder.rglob(SAVED_RECIPE), None)


# ---- where roles are -------------------------------------------------------------------------------------------------


def wanted_roles(place: Path, role: str | None) -> tuple[str, ...]:
    """The roles to look for, in that order. Raises `InputError` for no directory, or a role that does not exist."""
    if role is not None and role not in ROLES:
        raise InputError(f"there is no role {role!r}; there are {', '.join(ROLES)}", kind="unknown", key="role")
    if not place.is_dir():
        raise InputError(f"{place} is not a directory", kind="missing", file=place)
    return tuple(ROLES) if role is None else (role,)


def role_folders(place: Path, role: str) -> list[Path]:
    """Where a role of that name may be: `place` is its own folder, that of its stage, or that of the run.

    The role of a run with several tasks is what its last task ended with.
    """
    if RunFiles(place).tasks.is_dir():
        place = RunFiles(place).task(load_recipe(RunFiles(place).recipe).last_policy).folder
    stage = StageFiles(place).role(role)
    folders = (place, stage.folder, RunFiles(place).role(role).folder)
    return [folder for folder in folders if RoleFiles(folder).description.is_file()]


def refuse_without_roles(place: Path, role: str | None = None) -> None:
    """Raise `InputError` as `wanted_roles`, and where no role at all has been saved in a place."""
    wanted_roles(place, role)
    if not any(role_folders(place, name) for name in ROLES):
        message = f"{place} holds no {role or 'role'}; no stage that trains one has finished there"
        raise InputError(message, kind="missing", key=role, file=place)
