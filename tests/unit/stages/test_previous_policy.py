"""Tasks one after the other: a policy on top of an earlier one, the penalties in real runs, Fisher information."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pe_rlhf.adapters.kinds.stacked import StackedLoRA, stacked
from pe_rlhf.config import ContinualConfig, Recipe
from pe_rlhf.config.load import load_recipe
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.runs.saved_roles import load_role
from pe_rlhf.stages.pipeline import run_recipe
from pe_rlhf.stages.previous_policy import PENALTIES, fisher_of, full_layers
from reward.errors import Kind
from tests.failures import raises, refuses
from tests.runs import Tree, read_jsonl
from tests.stage_support import byte_model, run, write_prompts
from tests.tiny import IDS_BT, backbone_with, perturb, ragged_sequences, tiny_model


def logits(backbone: Backbone, role: str) -> Tensor:
    with torch.no_grad(), backbone.role(role):
        return backbone(IDS_BT).logits


def three_tasks(dtype: torch.dtype = torch.float32) -> tuple[Backbone, list[Tensor]]:
    """A policy of three tasks, of different ranks, scales and inits, and what it computed after each."""
    backbone = load_backbone(tiny_model("llama", dtype))
    backbone.add_adapter("policy", init="pissa", rank=2, alpha=4)
    perturb(backbone, "policy", 0.05)
    seen = [logits(backbone, "policy")]
    later: list[Tree] = [{"rank": 3, "alpha": 5, "scaling": "rslora"}, {"rank": 1, "alpha": 2}]
    for number, settings in enumerate(later):
        below = f"before_{number}"
        backbone.copy_role("policy", below)
        backbone.add_adapter(f"new_{number}", seed=number, **settings)
        made = stacked(
            backbone.adapter_spec(f"new_{number}"), backbone.role_state(f"new_{number}"), backbone.role_layers(below)
        )
        backbone.load_role("policy", *made)
        assert torch.equal(logits(backbone, "policy"), seen[-1])
        perturb(backbone, "policy", 0.05)
        seen.append(logits(backbone, "policy"))
    return backbone, seen


def second_task(rank: int) -> list[StackedLoRA]:
    """The layers of a policy of two tasks, the first of rank 20."""
    backbone = load_backbone(tiny_model("llama"))
    for role, ranks in (("before", 20), ("new", rank)):
        backbone.add_adapter(role, rank=ranks)
        perturb(backbone, role, 0.1)
    made = stacked(backbone.adapter_spec("new"), backbone.role_state("new"), backbone.role_layers("before"))
    backbone.load_role("policy", *made)
    return [layer for layer in backbone.role_layers("policy").values() if isinstance(layer, StackedLoRA)]


@pytest.mark.parametrize(("rank", "of_A", "of_B"), [(12, 0, 2 * 2), (13, 2 * 6, 2 * 5)])
def test_layers_without_room_for_one_more_orthogonal_adapter_are_counted(rank: int, of_A: int, of_B: int) -> None:
    """A block of the tiny Llama: 32 inputs except of down_proj; 16 outputs of two layers, 32 of three. 20 + 13 = 33."""
    layers = second_task(rank)
    assert len(layers) == 14
    assert (full_layers(layers, "A"), full_layers(layers, "B")) == (of_A, of_B)


def test_penalties_by_their_factor_in_numpy() -> None:
    for own in second_task(3):
        assert own.earlier_A_PI is not None
        assert own.earlier_B_OP is not None
        A, B, earlier_A, earlier_B = (
            t.detach().double().numpy() for t in (own.lora_A, own.lora_B, own.earlier_A_PI, own.earlier_B_OP)
        )
        wanted = {
            ("olora", "A"): ((earlier_A @ A.T) ** 2).sum(),
            ("olora", "B"): ((earlier_B.T @ B) ** 2).sum(),
            ("nlora", "BA"): np.abs(B @ A).sum(),
            ("nlora", "B"): np.abs(B).sum(),
        }
        assert {key: penalty(own).item() for key, penalty in PENALTIES.items()} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("method", "factor"), [("olora", "BA"), ("nlora", "A"), ("ewc", "B"), ("sequential", "A")])
def test_a_factor_that_a_penalty_is_not_on_is_refused(method: str, factor: str) -> None:
    with refuses("penalty_on"):
        ContinualConfig.model_validate({"method": method, "penalty_on": factor})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_later_task_starts_as_the_earlier_policy_to_the_bit(dtype: torch.dtype) -> None:
    backbone, seen = three_tasks(dtype)
    assert (seen[2] - seen[1]).abs().max() > 1e-3
    names = {name.rpartition(".")[2] for name in backbone.role_parameters("policy")}
    assert names == {"lora_A", "lora_B"}  # the earlier tasks are frozen


def test_all_tasks_are_one_lora_of_the_sum_of_their_ranks() -> None:
    backbone, seen = three_tasks()
    for name, layer in backbone.role_layers("policy").items():
        factors, change = layer.lora_factors(), layer.delta_weight(backbone.base_weight(name))
        assert factors is not None
        assert change is not None
        assert len(factors.A_RI) == 2 * 2 + 3 + 1  # PiSSA's difference has two factors
        torch.testing.assert_close(factors.scale * factors.B_OR @ factors.A_RI, change, atol=1e-6, rtol=1e-5)
    with torch.no_grad(), backbone.merged_role("policy"):
        torch.testing.assert_close(backbone(IDS_BT).logits, seen[-1], atol=2e-5, rtol=1e-5)


def test_gradients_of_a_stack_are_autograds() -> None:
    """Against the dense weights W0 + ΔW, for what is trained; x gets its gradient through the frozen parts, too."""
    backbone, _ = three_tasks()
    name, layer = next(iter(backbone.role_layers("policy").items()))
    x = torch.randn(4, backbone.base_weight(name).shape[1], requires_grad=True)
    goal = torch.randn(4, backbone.base_weight(name).shape[0])
    parameters = [x, *layer.parameters()]
    found = torch.autograd.grad((layer(x, backbone.base_layer(name)) * goal).sum(), parameters)
    own_A, own_B = (p.detach().clone().requires_grad_() for p in layer.parameters())
    scale = 2.0
    whole = layer.delta_weight(backbone.base_weight(name))
    assert whole is not None
    frozen = whole - scale * (own_B @ own_A).detach()
    weight = backbone.base_weight(name) + frozen + scale * own_B @ own_A
    wanted = torch.autograd.grad((x @ weight.T * goal).sum(), [x, own_A, own_B])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_fisher_information_is_the_mean_of_squared_gradients() -> None:
    backbone = backbone_with("policy")
    perturb(backbone, "policy", 0.05)
    sequences = ragged_sequences()
    found = fisher_of(backbone, sequences, 0.7)
    parameters = backbone.role_parameters("policy")
    wanted = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in range(3):
        prompt, whole = int(sequences.prompt_lengths_B[row]), int(sequences.lengths_B[row])
        ids = sequences.ids_BT[row : row + 1, :whole]
        with backbone.role("policy"):
            logprobs = torch.log_softmax(backbone(ids).logits[0] / 0.7, dim=-1)
        chosen = torch.stack([logprobs[t - 1, ids[0, t]] for t in range(prompt, whole)]).sum()
        for name, gradient in zip(parameters, torch.autograd.grad(chosen, [*parameters.values()]), strict=True):
            wanted[name] += gradient.square() / 3
    for name, fisher in wanted.items():
        torch.testing.assert_close(found[name], fisher, atol=1e-4, rtol=1e-3)


# ---- runs -----------------------------------------------------------------------------------------------------------


def recipe(folder: Path, continual: Tree | None, function: str = "reward.scores:length", **ppo: Any) -> Tree:
    model = folder / "model"
    if not model.is_dir():
        byte_model(model, pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    section = {
        "prompts": write_prompts(folder / "prompts.jsonl", [f"Prompt {i}:" for i in range(6)]),
        "reward": [{"function": function}],
        "rollout": {"max_new_tokens": 6, "samples_per_prompt": 2},
        "steps": 2,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "checkpoint_every": 1,
        "advantage": "rloo",
    }
    tree = {"model": str(model), "adapter": {"rank": 2, "alpha": 4}, "threads": 1, "ppo": {**section, **ppo}}
    return tree if continual is None else {**tree, "continual": continual}


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / name / "ppo" / "adapter" / "role.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], tensor) for name, tensor in other.items())


def own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "lora_" in name}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a first task, with Fisher information."""
    folder = tmp_path_factory.mktemp("tasks")
    run(recipe(folder, {"method": "ewc", "fisher_samples": 4}), folder / "first")
    return folder


def test_olora_trains_a_new_adapter_and_goes_on_after_a_stop(first: Path) -> None:
    continual = {"method": "olora", "strength": 5.0, "previous": "first", "anchor": "previous"}
    tree = recipe(first, continual, steps=3)
    summary = run(tree, first / "olora")["ppo"]
    lines = read_jsonl(first / "olora" / "ppo" / "metrics.jsonl")
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)  # to the policy before, which it is then
    before, whole = weights(first, "first"), weights(first, "olora")
    for name, tensor in before.items():
        layer, _, part = name.rpartition(".")
        place = {"lora_A": "earlier_A_PI", "lora_B": "earlier_B_OP"}[part]
        assert torch.equal(whole[f"{layer}.{place}"], tensor)
    assert summary["overlap"] > 0
    assert 0 <= summary["collision_rate"] <= 1

    stage = first / "olora" / "ppo"
    (stage / "summary.json").unlink()
    for name in ("state.json", "state.safetensors"):
        (stage / "checkpoints" / "step-000003" / name).unlink()
    run_recipe(Recipe.model_validate(tree), first / "olora", ["ppo"], "resume")
    assert equal(weights(first, "olora"), whole)

    without = run(recipe(first, continual | {"strength": 0}, steps=3), first / "olora-0")["ppo"]
    run(recipe(first, {"adapter": "new", "previous": "first", "anchor": "previous"}, steps=3), first / "plain")
    assert equal(weights(first, "olora-0"), weights(first, "plain"))
    assert summary["overlap"] < without["overlap"]


def test_a_role_of_several_tasks_loads_without_the_earlier_runs(first: Path) -> None:
    run(recipe(first, {"method": "nlora", "previous": str(first / "first")}), first / "nlora")
    backbone = load_backbone(first / "model")
    load_role(backbone, "policy", first / "nlora" / "ppo" / "adapter")
    config = json.loads((first / "nlora" / "ppo" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4
    run(recipe(first, {"method": "nlora", "previous": "nlora"}), first / "third")
    config = json.loads((first / "third" / "ppo" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 6


def test_ewc_without_strength_is_sequential_and_with_much_it_freezes(first: Path) -> None:
    before = weights(first, "first")
    run(recipe(first, {"method": "sequential", "previous": "first"}), first / "sequential")
    moved = {}
    for strength in (0, 1e9):
        continual = {"method": "ewc", "strength": strength, "previous": "first", "fisher_samples": 4}
        # Clipped, a penalty of any size takes steps of AdamW's size: they have to be small to see it hold.
        run(recipe(first, continual), first / f"ewc-{strength}")
        moved[strength] = weights(first, f"ewc-{strength}")
    assert equal(moved[0], weights(first, "sequential"))
    assert not equal(moved[0], before)
    fisher = load_file(first / "first" / "ppo" / "fisher.safetensors")

    def distance(state: dict[str, Tensor]) -> float:
        return sum((fisher[f"fisher/{name}"] * (state[name] - before[name]).square()).sum().item() for name in before)

    assert distance(moved[1e9]) < 0.5 * distance(moved[0])
    after = load_file(first / "ewc-0" / "ppo" / "fisher.safetensors")
    assert all((after[name] >= fisher[name]).all() for name in fisher if name.startswith("fisher/"))
    assert all(torch.equal(after[f"centre/{name}"], tensor) for name, tensor in moved[0].items())


@pytest.mark.parametrize(
    ("continual", "changes", "kind", "key"),
    [
        ({"previous": "nowhere"}, {}, "missing", "continual.previous"),
        ({"method": "olora", "previous": "first"}, {"init": "pissa"}, "conflict", "adapter.init"),
        ({"method": "nlora", "previous": "first"}, {"kind": "dora"}, "conflict", "adapter.kind"),
        ({"method": "nlora", "previous": "first"}, {"init": "lora_ga"}, "conflict", "adapter.init"),
        ({"method": "nlora", "previous": "first"}, {"last_layers": 1}, "conflict", "adapter.targets"),
        ({"method": "ewc", "adapter": "new"}, {}, "conflict", "continual.adapter"),
        ({"method": "olora", "adapter": "same"}, {}, "conflict", "continual.adapter"),
        ({"anchor": "previous"}, {}, "missing", "continual.anchor"),
        ({"adapter": "new"}, {}, "missing", "continual.adapter"),
    ],
)
def test_what_does_not_fit_is_refused(first: Path, continual: Tree, changes: Tree, kind: Kind, key: str) -> None:
    tree = recipe(first, continual)
    tree["adapter"] |= changes
    path = first / "bad.yaml"
    path.write_text(json.dumps(tree))
    with raises(kind, key=key):
        run_recipe(load_recipe(path), first / f"bad-{key}-{kind}-{len(str(changes))}", ["ppo"])


def test_ewc_needs_what_the_task_before_has_kept(first: Path) -> None:
    run(recipe(first, None), first / "ordinary")
    with raises("missing", key="continual.previous"):
        run(recipe(first, {"method": "ewc", "previous": "ordinary"}), first / "none")
