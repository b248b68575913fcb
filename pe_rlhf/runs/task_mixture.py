"""The policies of several tasks as one: W0 + Σ_t k_t·s_t·B_t·A_t, as a plain LoRA of rank Σ r_t.

k_t is a number for the task, one for each of its rank-one parts, or either of them by layer. It is chosen after
training: each task's part was trained with 1. Of a policy that is routed by task, a task's part is all that its route
gives it, and the part of all tasks has 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pe_rlhf.adapters.kinds.routed import RoutedLoRA, check_patterns, number_at
from pe_rlhf.adapters.kinds.stacked import parts_of
from pe_rlhf.adapters.layer import AdapterLayer, LowRankFactors
from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.config import LoRAConfig, Recipe
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.saved_roles import find_role, load_base, load_role, starting_model
from reward.errors import InputError, did_you_mean

Number = float | Sequence[float]  # of a whole task, or of each rank-one part of it
Weight = Number | Mapping[str, Number]  # or by a pattern of layers' names; a layer that matches none has 0
Parts = dict[str, list[LowRankFactors]]  # of each layer, task after task


def mixed_policy(recipe: Recipe, run_dir: Path, weights: Mapping[str, Weight], role: str = "policy") -> Backbone:
    """The base of a run with tasks, and on it the mixture of their policies as a role.

    A task that is not named has the weight 0. Raises `InputError` for a task or a number of parts that there is not,
    and where the tasks have one adapter between them.
    """
    names = [task.name for task in recipe.tasks or []]
    for name in weights:
        if name not in names:
            message = f"--mix {name}: the run has no such task"
            raise InputError(message, kind="unknown", key=name, file=run_dir, fix=did_you_mean(name, names))
        _check(name, weights[name])
    if not weights:
        raise InputError("--mix: no task is named", kind="empty", key="--mix")
    last = recipe.task_recipe(len(names) - 1)
    backbone = load_base(last, starting_model(last, run_dir), "cpu")
    parts, numbers = _parts(recipe, run_dir, names, backbone), [weights.get(name, 0.0) for name in names]
    if recipe.is_joint:
        names, numbers = ["the part of all tasks", *names], [1.0 if any(map(_is_some, numbers)) else 0.0, *numbers]
    backbone.load_role(role, *mixture(parts, numbers, names))
    return backbone


def mixture(parts: Parts, weights: Sequence[Weight], names: Sequence[str]) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """Spec and tensors of a LoRA that is the weighted sum of each layer's parts; `names` of the parts for errors.

    With the weight 1 for one task and 0 for all others it has that task's own factors, to the bit.
    """
    kept = [t for t, weight in enumerate(weights) if _is_some(weight)]
    if not kept:
        raise InputError("--mix: all weights are 0, which is the base", kind="empty", key="--mix")
    for weight in weights:
        check_patterns(weight if isinstance(weight, Mapping) else (), parts, "--mix")
    scale = next(iter(parts.values()))[kept[0]].scale
    tensors: dict[str, Tensor] = {}
    for layer, own in parts.items():
        chosen = [own[t] for t in kept]
        factors = [_factors(_at(weights[t], layer), own[t], names[t]) * (own[t].scale / scale) for t in kept]
        tensors[f"{layer}.lora_A"] = torch.cat([part.A_RI for part in chosen])
        tensors[f"{layer}.lora_B"] = torch.cat(
            [part.B_OR * each for part, each in zip(chosen, factors, strict=True)], dim=1
        )
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_A")}
    rank = max(ranks)
    settings = LoRAConfig(rank=rank, alpha=scale * rank, targets=sorted(parts))
    return AdapterSpec(settings, tuple(parts)), {name: _padded(name, tensor, rank) for name, tensor in tensors.items()}


def _parts(recipe: Recipe, run_dir: Path, names: Sequence[str], backbone: Backbone) -> Parts:
    """What each task has added to each layer."""
    files = RunFiles(run_dir)
    if recipe.continual is not None and recipe.continual.method == "separate":
        found: list[Mapping[str, AdapterLayer]] = []
        for number, name in enumerate(names):
            load_role(backbone, f"task_{number}", find_role(files.task(name).folder, "policy").folder)
            found.append(backbone.role_layers(f"task_{number}"))
        return {layer: [part for own in found for part in parts_of(own[layer])] for layer in found[0]}
    load_role(backbone, "all_tasks", find_role(files.task(recipe.last_policy).folder, "policy").folder)
    if backbone.tasks_of("all_tasks"):
        routed = {n: own for n, own in backbone.role_layers("all_tasks").items() if isinstance(own, RoutedLoRA)}
        return {n: [own.shared(), *map(own.without_shared, range(len(names)))] for n, own in routed.items()}
    parts = {layer: parts_of(adapter) for layer, adapter in backbone.role_layers("all_tasks").items()}
    if any(len(own) != len(names) for own in parts.values()):
        raise InputError(
            f"{run_dir}: its {len(names)} tasks have not an adapter each, of which a mixture could be made",
            kind="conflict",
            key="continual.adapter",
            file=run_dir,
            fix="train them with continual: {adapter: new}, with method: separate, or joint with a route",
        )
    return parts


def _check(name: str, weight: object) -> None:
    """Raise `InputError` for what is no weight, such as a text."""
    found = [*weight.values()] if isinstance(weight, Mapping) else [weight]
    numbers = [each for one in found for each in (one if isinstance(one, list | tuple) else [one])]
    if not numbers or not all(isinstance(each, int | float) and math.isfinite(each) for each in numbers):
        message = f"--mix {name}: {weight!r} is neither a number, nor a list of them, nor numbers by layer"
        raise InputError(message, kind="invalid", key=name)


def _is_some(weight: Weight) -> bool:
    return isinstance(weight, Mapping) or any(_listed(weight))


def _at(weight: Weight, layer: str) -> Number:
    if not isinstance(weight, Mapping):
        return weight
    return number_at(weight, layer)


def _factors(weight: Number, part: LowRankFactors, task: str) -> Tensor:
    """The weight of each rank-one part; a start that is subtracted has each of them twice."""
    numbers, rank = _listed(weight), len(part.A_RI)
    if len(numbers) == 1:
        numbers *= rank
    if 2 * len(numbers) == rank:
        numbers *= 2
    if len(numbers) != rank:
        message = f"--mix {task}: {len(numbers)} weights, and the adapter has rank {rank}"
        raise InputError(message, kind="invalid", key=task, fix="give one for the task, or one for each rank")
    return torch.tensor(numbers, dtype=part.B_OR.dtype)


def _listed(weight: Number) -> list[float]:
    return [weight] if isinstance(weight, int | float) else [*weight]


def _padded(name: str, tensor: Tensor, rank: int) -> Tensor:
    """Zeros up to the common rank: layers whose initial product is zero have fewer parts than others."""
    dim = 0 if name.endswith("lora_A") else 1
    missing = rank - tensor.shape[dim]
    if not missing:
        return tensor.contiguous()
    shape = [missing, tensor.shape[1]] if dim == 0 else [tensor.shape[0], missing]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
