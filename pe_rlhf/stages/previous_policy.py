"""A policy that goes on from that of an earlier task: its adapter, its penalty, and what it leaves for the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pe_rlhf.adapters.kind import LayerContext, kind_of
from pe_rlhf.adapters.kinds.stacked import StackedLoRA, refuse_other_kind, stacked
from pe_rlhf.adapters.layer import AdapterLayer
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.algo.forgetting import collision_rate, elastic, joined_quadratics, orthogonality, sparsity
from pe_rlhf.config import AdapterConfig, ContinualConfig, PPOConfig, Recipe
from pe_rlhf.config.continual import NEW
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.model.tensors import with_prefix, without_prefix
from pe_rlhf.rollout.interface import RolloutEngine
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.runs.saved_roles import SavedRole, find_role, load_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.progress import say
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.system.tensor_files import load_tensors, save_tensors
from pe_rlhf.types import Sequences
from reward.errors import InputError

POLICY, PREVIOUS = "policy", "previous"
NOTICEABLE = 1e-3  # of the base weights' deviation: a smaller change of an entry is no collision
FISHER, CENTRE = "fisher/", "centre/"


@dataclass(frozen=True)
class PreviousPolicy:
    """The policy before this task, on the backbone as the frozen role `previous`."""

    backbone: Backbone
    config: ContinualConfig
    saved: SavedRole

    @classmethod
    def of(cls, recipe: Recipe, run_dir: Path, backbone: Backbone) -> PreviousPolicy | None:
        """The one that a recipe goes on from; None for a first task. Raises `InputError` where it is not there."""
        if (saved := find_previous(recipe, run_dir)) is None or recipe.continual is None:
            return None
        load_role(backbone, PREVIOUS, saved.folder)
        for parameter in backbone.role_parameters(PREVIOUS).values():
            parameter.requires_grad_(False)
        return cls(backbone, recipe.continual, saved)

    @property
    def anchor(self) -> str:
        """The role that the KL is measured to."""
        return PREVIOUS if self.config.anchor == "previous" else ANCHOR

    def add_policy(self, adapter: AdapterConfig, add_fresh: Callable[[], None]) -> None:
        """Add the policy; to the bit it is this one. `add_fresh` adds one with a fresh adapter.

        Raises `InputError` where its adapter cannot be put on top of this one's.
        """
        backbone = self.backbone
        if not self.config.stacks:
            backbone.load_role(POLICY, backbone.specs[PREVIOUS], backbone.role_state(PREVIOUS))
            return
        add_fresh()
        spec, state = backbone.adapter_spec(POLICY), backbone.role_state(POLICY)
        backbone.load_role(POLICY, *stacked(spec, state, backbone.role_layers(PREVIOUS)))

    def penalty(self) -> Callable[[], Tensor] | None:
        """λ times the method's penalty on the policy as it is; None without one."""
        strength, method = self.config.strength, self.config.method
        if not strength or method == "sequential":
            return None
        if method == "ewc":
            fisher, centre = load_fisher(self.saved.files.stage, self.backbone.device)
            parameters = self.backbone.role_parameters(POLICY)
            return lambda: strength * elastic(parameters, fisher, centre)
        layers = self._stacked_layers()
        of_layer = PENALTIES[method, self.config.penalised]
        if method == "olora":
            self._say_where_full(layers)
        return lambda: strength * torch.stack(list(map(of_layer, layers))).sum()

    def metrics(self) -> dict[str, float]:
        """How far the task's change gets in the way of the earlier ones', for adapters that are on top of each other.

        `overlap`: √Σ‖A_i A_tᵀ‖² over layers; `collision_rate`: the share of weights that both change noticeably.
        """
        layers = self.backbone.role_layers(POLICY)
        if not all(isinstance(layer, StackedLoRA) for layer in layers.values()):
            return {}
        overlap, rates = 0.0, []
        with torch.no_grad():
            for name, own in zip(layers, self._stacked_layers(), strict=True):
                overlap += _overlap(own).item()
                weight_OI = self.backbone.base_weight(name).float()
                earlier_OI, whole_OI = (_change(layer, weight_OI) for layer in (self._before(name), own))
                size = NOTICEABLE * weight_OI.std().item()
                rates.append(collision_rate(earlier_OI, whole_OI - earlier_OI, size))
        return {"overlap": overlap**0.5, "collision_rate": sum(rates) / len(rates)}

    def _before(self, name: str) -> AdapterLayer:
        return self.backbone.role_layers(PREVIOUS)[name]

    def _stacked_layers(self) -> list[StackedLoRA]:
        return [layer for layer in self.backbone.role_layers(POLICY).values() if isinstance(layer, StackedLoRA)]

    def _say_where_full(self, layers: list[StackedLoRA]) -> None:
        factor, sides = self.config.penalised, "inputs" if self.config.penalised == "A" else "outputs"
        if full := full_layers(layers, factor):
            say(
                f"warning: olora: in {full} of {len(layers)} layers the tasks have more ranks than the layer has"
                f" {sides}, so {factor} cannot be orthogonal to all earlier ones; lower adapter.rank"
            )


def full_layers(layers: Iterable[StackedLoRA], factor: str) -> int:
    """In how many layers the tasks have more ranks than the layer has inputs (A) or outputs (B).

    There no new factor is orthogonal to all earlier ones.
    """
    return sum(
        sum(len(part.A_RI) for part in own.earlier()) + len(own.lora_A)
        > (own.lora_A.shape[1] if factor == "A" else len(own.lora_B))
        for own in layers
    )


def _overlap(own: StackedLoRA) -> Tensor:
    assert own.earlier_A_PI is not None
    return orthogonality(own.earlier_A_PI, own.lora_A)


def _overlap_of_B(own: StackedLoRA) -> Tensor:
    assert own.earlier_B_OP is not None
    return orthogonality(own.earlier_B_OP.T, own.lora_B.T)


# The penalty of a layer, by the method and the factor that it is on.
PENALTIES: dict[tuple[str, str], Callable[[StackedLoRA], Tensor]] = {
    ("olora", "A"): _overlap,
    ("olora", "B"): _overlap_of_B,
    ("nlora", "BA"): lambda own: sparsity(own.lora_A, own.lora_B),
    ("nlora", "B"): lambda own: own.lora_B.abs().sum(),
}


def _change(layer: AdapterLayer, weight_OI: Tensor) -> Tensor:
    delta_OI = layer.delta_weight(weight_OI)
    assert delta_OI is not None
    return delta_OI


def check_adapter(recipe: Recipe) -> None:
    """Raise `InputError` for an adapter that cannot be put on top of an earlier policy as the recipe wants it."""
    config = recipe.continual
    if config is None or not config.stacks or recipe.ppo is None:
        return
    adapter = recipe.adapter_for("ppo")
    refuse_other_kind(adapter)
    if kind_of(adapter).needs is not None:
        raise InputError(
            "continual: an init that looks at data would look at the base, not at the policy before the task",
            kind="conflict",
            key="adapter.init",
            fix="use another init, or continual: {adapter: same}",
        )
    if config.method in NEW and "initial_B_OR" in kind_of(adapter).tensors(any_layer(adapter)):
        raise InputError(
            f"continual.method: {config.method} is about B·A, which has to start at 0",
            kind="conflict",
            key="adapter.init",
            fix="use an init with B0 = 0, such as lora",
        )


def any_layer(adapter: AdapterConfig) -> LayerContext:
    """A random layer, as large as the adapter's rank needs, to see what an init makes of one."""
    rank: int = getattr(adapter, "whole_rank", getattr(adapter, "rank", 8))
    size = 2 * rank + 1
    generator = torch.Generator().manual_seed(0)
    return LayerContext(torch.randn(size, size, generator=generator), generator)


def find_previous(recipe: Recipe, run_dir: Path) -> SavedRole | None:
    """The policy that a recipe goes on from, by a path or beside the run's directory.

    Raises `InputError` where it has not finished or is not an adapter.
    """
    if recipe.continual is None or (name := recipe.continual.previous) is None:
        return None
    beside = run_dir.absolute().parent / name
    try:
        found = find_role(beside if beside.is_dir() else Path(name).expanduser(), POLICY)
    except InputError as error:
        message = f"continual.previous: {name} holds no policy"
        raise InputError(message, kind="missing", key="continual.previous", file=name) from error
    if found.is_full:
        message = f"continual.previous: the policy of {name} was fully tuned, it has no adapter"
        raise InputError(message, kind="conflict", key="continual.previous", file=name)
    if isinstance(found.spec, AdapterSpec) and (tasks := found.spec.settings.routes):
        raise InputError(
            f"continual.previous: the policy of {name} is another one for each task ({', '.join(tasks)})",
            kind="conflict",
            key="continual.previous",
            file=name,
        )
    if recipe.continual.method == "ewc" and recipe.continual.strength and not found.files.stage.fisher.is_file():
        raise InputError(
            f"continual.previous: {name} has no Fisher information, which ewc needs",
            kind="missing",
            key="continual.previous",
            file=found.files.stage.fisher,
            fix="run it with continual: {method: ewc}",
        )
    return found


# ---- Fisher information ---------------------------------------------------------------------------------------------


def leave_fisher(
    context: StageContext[PPOConfig],
    backbone: Backbone,
    sampler: RolloutEngine,
    prompts: Sequence[list[int]],
    previous: PreviousPolicy | None,
) -> None:
    """Where the method is EWC, write the Fisher information of the trained policy, of responses of its own."""
    config = context.recipe.continual
    if config is None or config.method != "ewc":
        return
    sampler.sync(context.config.steps, POLICY)
    asked = [prompts[i % len(prompts)] for i in range(config.fisher_samples)]
    sampled = sampler.generate(asked, derive_seed(context.recipe.seed, "fisher"))
    sequences = Sequences.of(sampled, backbone.pad_token_id)
    own = fisher_of(backbone, sequences, context.config.rollout.temperature)
    save_fisher(backbone, config, previous, own, context.files.fisher)


def fisher_of(backbone: Backbone, sequences: Sequences, temperature: float) -> dict[str, Tensor]:
    """The diagonal Fisher information of the policy by parameter: mean over responses of (∇ log π(response))².

    Every rank computes all of it: a pass for each response, and the same numbers everywhere.
    """
    parameters = backbone.role_parameters(POLICY)
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    rows = len(sequences)
    for row in range(rows):
        with backbone.role(POLICY):
            logprobs_N, _ = backbone.response_logprobs(sequences.take(torch.tensor([row])), temperature)
        gradients = torch.autograd.grad(logprobs_N.sum(), [*parameters.values()], allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.square() / rows
    return sums


def save_fisher(
    backbone: Backbone, config: ContinualConfig, previous: PreviousPolicy | None, own: dict[str, Tensor], path: Path
) -> None:
    """Write the Fisher information of this task and the earlier ones, and what it is around."""
    before = ({}, {}) if previous is None else load_fisher(previous.saved.files.stage, backbone.device)
    weights = {name: p.detach() for name, p in backbone.role_parameters(POLICY).items()}
    fisher, centre = joined_quadratics(*before, own, weights, per_task=config.fisher == "per_task")
    tensors = with_prefix(FISHER, dict(fisher)) | with_prefix(CENTRE, dict(centre))
    on_main(lambda: save_tensors({name: t.cpu().contiguous() for name, t in tensors.items()}, path))


def load_fisher(stage: StageFiles, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fisher and centre that `save_fisher` wrote; nothing where a first task was run without it."""
    if not stage.fisher.is_file():
        return {}, {}
    tensors = load_tensors(stage.fisher, device)
    return without_prefix(FISHER, tensors), without_prefix(CENTRE, tensors)
