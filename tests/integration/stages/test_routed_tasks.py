"""All tasks at once in one policy that is routed by task: trained, stopped and resumed, measured, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pe_rlhf.adapters.kinds.routed import RoutedConfig
from pe_rlhf.config import Recipe
from pe_rlhf.config.load import load_recipe
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.by_task import RoutedRollout
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.export import export_role
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.saved_roles import find_role
from pe_rlhf.runs.task_mixture import mixed_policy
from pe_rlhf.stages.tasks import run_tasks
from tests.failures import raises
from tests.integration.stages.test_tasks import NAMES, tree
from tests.runs import Tree, read_jsonl
from tests.stage_support import run
from tests.tiny import IDS_BT, role_logits

ROUTE: Tree = {"shared_rank": 1, "weights": "task", "values": {"long": {"long": 1, "short": 0.5}}}


def routed(folder: Path, route: Tree) -> Recipe:
    whole = tree(folder) | {"continual": {"method": "joint", "route": route}}
    whole["ppo"] |= {"steps": 1, "batch_size": 6}  # three steps in all, with two prompts of each task in each
    return Recipe.model_validate(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    run_tasks(routed(folder, ROUTE), folder / "whole", None, None)
    return folder / "whole"


def policy_of(run_dir: Path) -> Backbone:
    return find_role(run_dir, "policy").load("policy", dtype="float32", device="cpu")[0]


def test_each_task_is_measured_by_its_own_route(whole: Path) -> None:
    """And the sampler's log-probs were the trainer's: of another route they would be others."""
    files = RunFiles(whole)
    cells = json.loads(files.summary.read_text())["cells"]
    assert [(cell["after"], cell["on"]) for cell in cells] == [("joint", name) for name in NAMES]
    assert len({round(cell["kl"], 9) for cell in cells}) == 3
    lines = read_jsonl(files.task("joint").stage("ppo").metrics)
    assert len(lines) == 3
    assert all(line["logprob_mismatch"] < 1e-5 for line in lines)
    for name in NAMES:
        found = json.loads(files.task("joint").on_task(name).stage("evaluate").summary.read_text())
        assert found["logprob_mismatch"] < 1e-5
    ppo = load_recipe(files.task("joint").stage("ppo").recipe).ppo
    assert ppo is not None
    assert isinstance(ppo.adapter, RoutedConfig)
    assert (ppo.adapter.routes, ppo.adapter.whole_rank) == (tuple(NAMES), 1 + 3 * 2)
    moved = {name for name, t in load_file(files.task("joint").role("policy").tensors).items() if t.abs().sum() > 0}
    assert any(name.endswith("lora_B") for name in moved)


def test_a_run_that_was_cut_goes_on_to_the_bit(whole: Path) -> None:
    cut = whole.parent / "cut"
    shutil.copytree(whole, cut)
    joint = RunFiles(cut).task("joint")
    stage = joint.stage("ppo")
    shutil.rmtree(joint.on_tasks)
    stage.summary.unlink()
    shutil.rmtree(stage.checkpoint(3).folder)
    for role in ("policy", "value"):
        shutil.rmtree(stage.role(role).folder, ignore_errors=True)
    run_tasks(routed(whole.parent, ROUTE), cut, None, None, "resume")
    one, other = (load_file(RunFiles(each).task("joint").role("policy").tensors) for each in (whole, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads(RunFiles(cut).summary.read_text()) == json.loads(RunFiles(whole).summary.read_text())


def test_one_tasks_mixture_is_its_policy_to_the_bit_here_and_one_lora_for_peft(whole: Path, tmp_path: Path) -> None:
    backbone, recipe = policy_of(whole), routed(whole.parent, ROUTE)
    for task, name in enumerate(NAMES):
        mixed = mixed_policy(recipe, whole, {name: 1})
        with backbone.route(task):
            assert torch.equal(role_logits(mixed, "policy"), role_logits(backbone, "policy"))
    export_role(whole, "lora", tmp_path / "long", mix={"long": 1})
    assert json.loads((tmp_path / "long" / "adapter_config.json").read_text())["r"] == 1 + 2 * 2
    plain = AutoModelForCausalLM.from_pretrained(whole.parent / "model")
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "long"))
    with torch.no_grad(), backbone.route(0):
        torch.testing.assert_close(loaded(IDS_BT).logits, role_logits(backbone, "policy"), atol=1e-5, rtol=1e-5)


def test_the_sum_of_the_tasks_has_the_shared_part_once(whole: Path) -> None:
    """Against dense sums of what the tasks change: W_a + W_b + W_c − 2·shared."""
    mixed, backbone = mixed_policy(routed(whole.parent, ROUTE), whole, dict.fromkeys(NAMES, 1)), policy_of(whole)
    for name, layer in mixed.role_layers("policy").items():
        weight_OI, own = mixed.base_weight(name), backbone.role_layers("policy")[name]
        found, each = layer.delta_weight(weight_OI), []
        for task in range(3):
            with backbone.route(task):
                each.append(own.delta_weight(weight_OI))
        shared_OI = 2.0 * own.lora_B[:, :1] @ own.lora_A[:1]  # type: ignore[index]  # alpha 4 over rank 2
        assert found is not None
        torch.testing.assert_close(found, sum(each) - 2 * shared_OI, atol=1e-6, rtol=1e-5)


def test_what_is_another_policy_for_each_task_is_not_exported_as_one(whole: Path, tmp_path: Path) -> None:
    for form in ("lora", "merged"):
        with raises("missing", key="--mix"):
            export_role(whole, form, tmp_path / "all")  # type: ignore[arg-type]
    with raises("empty", key="--mix"):
        export_role(whole, "lora", tmp_path / "none", mix={"long": 0})
    after = tree(whole.parent, method="sequential", previous=str(whole / "tasks" / "joint"))
    with raises("conflict", key="continual.previous"):
        run_tasks(Recipe.model_validate(after), tmp_path / "after", None, None)


def test_responses_are_of_the_prompts_own_task(whole: Path) -> None:
    """In one batch: each as it is sampled by itself from its task's plain policy, with the same random numbers."""
    backbone, recipe = policy_of(whole), routed(whole.parent, ROUTE)
    ppo = recipe.task_recipe(0).ppo
    assert ppo is not None
    prompts, tasks = [[50 + i, 60, 70] for i in range(6)], [2, 0, 1, 0, 2, 1]
    engine = RoutedRollout(HFRollout(backbone, "policy", ppo.rollout), backbone, "policy")
    engine.sync(3)
    found = engine.generate(prompts, seed=7, tasks=tasks)
    assert (found.version, found.tasks) == (3, tuple(tasks))
    for task, name in enumerate(NAMES):
        rows = [i for i, each in enumerate(tasks) if each == task]
        plain = HFRollout(mixed_policy(recipe, whole, {name: 1}), "policy", ppo.rollout)
        single = plain.generate([prompts[i] for i in rows], 7, rows)
        assert single.responses == [found.responses[i] for i in rows]
    with raises("missing", key="task"):
        engine.generate(prompts, seed=7)
    engine.sync(0, "anchor")
    assert engine.generate(prompts, seed=7).tasks is None


def test_learned_weights_are_trained_and_saved(tmp_path: Path) -> None:
    """And on the run's page: the mean of the layers' softmaxes."""
    run_tasks(routed(tmp_path, {"weights": "learned"}), tmp_path / "run", None, None)
    logits = [t for n, t in load_file(find_role(tmp_path / "run", "policy").files.tensors).items() if "logits" in n]
    assert logits
    assert all(t.shape == (3, 3) and bool(t.any()) for t in logits)
    files = RunFiles(tmp_path / "run")
    weights = json.loads(files.task("joint").stage("ppo").summary.read_text())["task_weights"]
    wanted_TT = torch.stack([t.exp() / t.exp().sum(dim=1, keepdim=True) for t in logits]).mean(dim=0)
    found = torch.tensor([[weights[task][part] for part in NAMES] for task in NAMES])
    torch.testing.assert_close(found, wanted_TT)
    page = files.report.read_text()
    assert all(f"{name}’s part" in page for name in NAMES)


def test_an_init_that_tasks_cannot_share_is_told_before_the_first_one(tmp_path: Path) -> None:
    for init in ("pissa", "lora_ga"):
        whole = tree(tmp_path) | {"continual": {"method": "joint", "route": {}}}
        whole["adapter"] |= {"init": init}
        with raises("conflict", key="adapter.init"):
            run_tasks(Recipe.model_validate(whole), tmp_path / "run", None, None)
        assert not (tmp_path / "run").exists()


def test_prompts_without_a_task_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    whole = tree(tmp_path)
    whole["ppo"] |= {
        "reward": [{"function": "reward.scores:length"}],
        "adapter": {"kind": "routed", "rank": 2, "tasks": ["a", "b"]},
    }
    del whole["tasks"], whole["continual"], whole["evaluate"]
    with raises("missing", key="ppo.prompts"):
        run(whole, tmp_path / "none")
    path = tmp_path / "prompts.jsonl"
    whole["ppo"]["prompts"] = {"mix": [{"path": str(path), "label": "a"}, {"path": str(path), "label": "c"}]}
    with raises("unknown", key="ppo.prompts"):
        run(whole, tmp_path / "other")
