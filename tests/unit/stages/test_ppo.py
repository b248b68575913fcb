"""The PPO stage as a whole: dtypes, what it reports, and β from step to step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pe_rlhf.config import PPOConfig, Recipe
from pe_rlhf.data.prompt_order import PromptOrder, PromptSet
from pe_rlhf.model.backbone import FastPath, load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.saved_roles import save_role
from pe_rlhf.stages.pipeline import run_recipe
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import derive_seed
from tests.runs import Tree, read_jsonl, without_time
from tests.stage_support import byte_model, run, write_prompts
from tests.tiny import perturb

PROMPTS = [f"Prompt {i}:" for i in range(10)]


def recipe(folder: Path, **settings: Any) -> Tree:
    """Three steps on a byte model whose every twelfth byte ends a response."""
    model = byte_model(folder / "model", pad_is_eos=True, initializer_range=0.3, eos_token_id=list(range(0, 258, 12)))
    ppo = {
        "prompts": write_prompts(folder / "prompts.jsonl", PROMPTS),
        "reward": [{"function": "reward.scores:length"}],
        "rollout": {"max_new_tokens": 8},
        "steps": 3,
        "batch_size": 6,
        "learning_rate": 1e-2,
        **settings,
    }
    return {"model": str(model), "adapter": {"rank": 2, "alpha": 4}, "threads": 1, "ppo": ppo}


def metrics(folder: Path) -> list[Tree]:
    return read_jsonl(folder / "run" / "ppo" / "metrics.jsonl")


@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_a_bf16_base_trains_fp32_adapters(tmp_path: Path, init: str) -> None:
    tree = recipe(tmp_path)
    tree["backbone"] = {"dtype": "bfloat16", "packing": False}  # padded rows, as the ones by hand below
    tree["adapter"]["init"] = init
    run(tree, tmp_path / "run")
    for role in ("adapter", "value"):
        state = load_file(tmp_path / "run" / "ppo" / role / "role.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    lines = metrics(tmp_path)
    assert lines[0]["kl"] == 0  # π_old and the anchor are computed alike, and the policy starts as the anchor
    assert lines[-1]["kl"] != 0

    # Step 1 by hand: the sampler works with a cache and the trainer without, and in bf16 they differ. By how much
    # follows from the padding too, so the rows stand here as the trainer has them: longest first, padded on the right.
    # And the sampler reads prompts as the run's does, which without packing reads no common start before.
    backbone = load_backbone(tree["model"], dtype="bfloat16", fast=FastPath(packing=False))
    ids = [backbone.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    batch = PromptOrder(PromptSet(list(PROMPTS), ids, {}), 6, 1, seed=0).batch(0)
    config = PPOConfig.model_validate(tree["ppo"])
    rollout = HFRollout(backbone, "anchor", config.rollout).generate(batch.ids, derive_seed(0, "rollout", 0))
    rows = list(zip(rollout.prompts, rollout.responses, rollout.logprobs, strict=True))
    rows.sort(key=lambda row: -len(row[0] + row[1]))
    width = len(rows[0][0] + rows[0][1])
    padded_BT = torch.tensor([(prompt + response + [0] * width)[:width] for prompt, response, _ in rows])
    with torch.no_grad():
        logprobs_BTV = torch.log_softmax(backbone(padded_BT).logits.float(), dim=-1)
    differences = [
        abs(float(logprobs_BTV[i, t, token]) - value)
        for i, (prompt, response, sampler) in enumerate(rows)
        for t, (token, value) in enumerate(zip(response, sampler, strict=True), start=len(prompt) - 1)
    ]
    mean = sum(differences) / len(differences)
    assert mean > 1e-3
    assert lines[0]["logprob_mismatch"] == pytest.approx(mean, rel=0.05)


def test_an_fp32_base_needs_no_second_pass(tmp_path: Path) -> None:
    run(recipe(tmp_path), tmp_path / "run")
    assert [0 < line["logprob_mismatch"] < 1e-5 for line in metrics(tmp_path)] == [True] * 3


def saved_reward(tree: Tree, folder: Path, dropout: float = 0.0) -> str:
    backbone = load_backbone(tree["model"])
    backbone.add_adapter("reward", rank=3, dropout=dropout)
    perturb(backbone, "reward", 0.2)
    backbone.head("reward").shift(0.7)
    save_role(backbone, "reward", folder / "trained")
    return str(folder / "trained")


def test_responses_of_another_version_of_the_policy_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = HFRollout.sync
    monkeypatch.setattr(HFRollout, "sync", lambda self, version, role=None: sync(self, min(version, 1), role))
    with pytest.raises(TrainingError) as raised:
        run(recipe(tmp_path), tmp_path / "run")
    assert (raised.value.kind, raised.value.step) == ("mismatch", 3)
    assert len(metrics(tmp_path)) == 2


def test_dropout_is_off_in_policy_critic_and_reward(tmp_path: Path) -> None:
    """Also where the adapters that the recipe describes and that the critic starts from were made with it."""
    found = []
    for dropout in (0.0, 0.5):
        folder = tmp_path / str(dropout)
        folder.mkdir()
        tree = recipe(folder)
        tree["adapter"]["dropout"] = dropout
        tree["ppo"]["reward"] = [{"adapter": saved_reward(tree, folder, dropout)}]
        run(tree, folder / "run")
        found.append([*map(without_time, metrics(folder))])
        policy = json.loads((folder / "run" / "ppo" / "adapter" / "role.json").read_text())
        assert policy["spec"]["dropout"] == 0
    assert found[0] == found[1]


def test_an_adaptive_beta_follows_the_kl(tmp_path: Path) -> None:
    """β ← β·(1 + clip(KL/target − 1, ±0.2)·episodes/horizon), from each step to the next."""
    kl = {"beta": 0.1, "controller": "adaptive", "target": 0.5, "horizon": 20}
    run(recipe(tmp_path, kl=kl, steps=5), tmp_path / "run")
    lines = metrics(tmp_path)
    beta = 0.1
    for line in lines:
        assert line["beta"] == pytest.approx(beta, rel=1e-5)
        beta *= 1 + max(-0.2, min(0.2, line["kl"] / 0.5 - 1)) * 6 / 20
    assert lines[1]["beta"] == pytest.approx(0.1 * 0.94)  # the KL of the first step is 0


def test_samples_show_scores_and_kl(tmp_path: Path) -> None:
    tree = recipe(tmp_path, samples_every=2, steps=4)
    run(tree, tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "ppo" / "samples.jsonl")
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [4] * 4
    assert all(row["score"] == len(row["response"]) for row in rows)
    assert {row["kl"] for row in rows[:4]} == {0.0}
    assert all(row["kl"] != 0 for row in rows[4:])


def test_several_samples_of_a_prompt(tmp_path: Path) -> None:
    run(recipe(tmp_path, rollout={"max_new_tokens": 8, "samples_per_prompt": 3}, steps=2), tmp_path / "run")
    assert [line["episodes"] for line in metrics(tmp_path)] == [18, 36]
    rows = read_jsonl(tmp_path / "run" / "ppo" / "samples.jsonl")
    assert rows[0]["prompt"] == rows[1]["prompt"] == rows[2]["prompt"] != rows[3]["prompt"]
    assert len({row["response"] for row in rows[:3]}) > 1


def test_the_schedule_ends_with_the_last_minibatch(tmp_path: Path) -> None:
    """Two steps of two epochs of three minibatches are 12 optimizer steps: the rate falls by a twelfth with each."""
    optimizer = {"schedule": "linear", "warmup_ratio": 0.0}
    run(recipe(tmp_path, steps=2, epochs=2, minibatches=3, optimizer=optimizer, learning_rate=1.2e-3), tmp_path / "run")
    rates = [1.2e-3 * (12 - k) / 12 for k in range(12)]
    means = [sum(rates[:6]) / 6, sum(rates[6:]) / 6]
    assert [line["lr_policy"] for line in metrics(tmp_path)] == pytest.approx(means)
    assert [line["lr_value"] for line in metrics(tmp_path)] == pytest.approx(means)


@pytest.mark.parametrize(("form", "weight"), [("convex", 0.7), ("penalty", 1.0)])
def test_checkpoints_are_ranked_by_the_objective_penalties_included(tmp_path: Path, form: str, weight: float) -> None:
    """A checkpoint's score is that of the rollout from its own weights, which is the next step's; the last has none."""
    settings = {"checkpoint_every": 1, "keep_checkpoints": 9, "learning_rate": 5e-2, "length_penalty": 0.2}
    run(recipe(tmp_path, steps=4, kl={"beta": 0.3, "form": form}, **settings), tmp_path / "run")
    for line in metrics(tmp_path):
        assert line["reward_shaped"] == pytest.approx(line["reward"] - 0.2 * line["response_length"], abs=1e-5)
    worth = [weight * line["reward_shaped"] - 0.3 * line["kl"] for line in metrics(tmp_path)]
    assert max(line["kl"] for line in metrics(tmp_path)) > 0.05
    states = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "ppo").glob("checkpoints/*/state.json"))
    ]
    assert [state["step"] for state in states] == [1, 2, 3, 4]
    assert [state["score"] for state in states] == pytest.approx([*worth[1:], worth[-1]], abs=1e-5)


def test_samples_of_a_step_that_is_repeated_are_there_once(tmp_path: Path) -> None:
    tree = recipe(tmp_path, samples_every=1, checkpoint_every=1, keep_checkpoints=9)
    run(tree, tmp_path / "run")
    folder = tmp_path / "run" / "ppo"
    before = read_jsonl(folder / "samples.jsonl")
    (folder / "summary.json").unlink()  # as if it had been killed after the samples of step 3, before its checkpoint
    shutil.rmtree(folder / "checkpoints" / "step-000003")
    parsed = Recipe.model_validate(tree)
    run_recipe(parsed, tmp_path / "run", ["ppo"], "resume")
    assert read_jsonl(folder / "samples.jsonl") == before
    assert [row["step"] for row in before] == [1] * 4 + [2] * 4 + [3] * 4


@pytest.mark.parametrize("controller", ["fixed", "adaptive"])
def test_a_repeated_step_has_the_beta_of_its_place_or_a_new_one_of_the_recipe(tmp_path: Path, controller: str) -> None:
    """An adaptive β is what it was at that step; a fixed one is the recipe's, also where that has changed."""
    kl = {"beta": 0.1, "controller": controller, "target": 0.5, "horizon": 20}
    tree = recipe(tmp_path, checkpoint_every=1, kl=kl)
    run(tree, tmp_path / "run")
    before, folder = [*map(without_time, metrics(tmp_path))], tmp_path / "run" / "ppo"
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000003")
    changed = ["ppo.kl.beta"] if controller == "fixed" else []
    tree["ppo"]["kl"]["beta"] = 0.3 if changed else 0.1
    run_recipe(Recipe.model_validate(tree), tmp_path / "run", ["ppo"], "resume", changed)
    again = [*map(without_time, metrics(tmp_path))]
    if controller == "adaptive":
        assert again == before
    assert again[:2] == before[:2]
    assert [line["step"] for line in again] == [1, 2, 3]
    assert (again[2]["beta"] == 0.3) is (controller == "fixed")


def test_the_summary_and_the_rates_are_those_of_the_lines(tmp_path: Path) -> None:
    summary = run(recipe(tmp_path, length_penalty=0.2, epochs=3, minibatches=1), tmp_path / "run")["ppo"]
    lines = metrics(tmp_path)
    assert (summary["steps"], summary["episodes"]) == (3, 18)
    assert (summary["reward_first"], summary["reward_last"]) == tuple(lines[i]["reward_shaped"] for i in (0, -1))
    assert summary["kl_last"] == lines[-1]["kl"]
    for line in lines:
        assert line["tokens"] == pytest.approx(6 * line["response_length"])
        for phase, passes in (("rollout", 1), ("score", 1), ("update", 3)):
            product = line[f"tokens_per_second_{phase}"] * line[f"seconds_{phase}"]
            assert product == pytest.approx(passes * line["tokens"], rel=1e-5)
    seconds = sum(line[f"seconds_{phase}"] for line in lines for phase in ("rollout", "score", "update"))
    assert summary["seconds"] == pytest.approx(seconds, abs=0.01)
    assert summary["seconds_per_step"] == pytest.approx(seconds / 3, abs=1e-3)
    assert summary["tokens_per_second"] == pytest.approx(sum(line["tokens"] for line in lines) / seconds, rel=1e-3)
    roles = [load_file(tmp_path / "run" / "ppo" / role / "role.safetensors") for role in ("adapter", "value")]
    assert summary["trainable_parameters"] == sum(tensor.numel() for state in roles for tensor in state.values())


def test_a_failure_in_a_step_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as raised:
        run(recipe(tmp_path, kl={"limit": 1e-3}), tmp_path / "run")
    assert (raised.value.kind, raised.value.key, raised.value.step) == ("kl_limit", "ppo.kl.limit", 2)
