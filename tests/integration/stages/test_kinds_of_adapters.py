"""Whole runs with each kind of adapter: reward model, policy and critic of it, cut and resumed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.config.load import make_recipe
from tests.failures import raises
from tests.forked import Forked
from tests.runs import Outcome, read_jsonl, recipe, without_time, write_recipe
from tests.stage_support import gpt2_of_bytes

Cli = Callable[..., Outcome]
# What keeps every kind inside the tiny model, and lets what changes over time change within three steps.
SETTINGS = {
    "adalora": {"every": 1, "warmup_share": 0.0},
    "lora_dash": {"warmup_steps": 2, "directions": 2},
    "redrawn": {"every": 2},
}


# Scores by length, and fails at the call that a file `stop` numbers.
STOPPING = """
from pathlib import Path

def scores(prompts, responses):
    calls = Path("calls")
    calls.write_text(str(int(calls.read_text()) + 1) if calls.exists() else "1")
    if Path("stop").exists() and calls.read_text() == Path("stop").read_text():
        raise RuntimeError("stopped")
    return [len(response) / 10 for response in responses]
"""


@pytest.mark.parametrize(
    ("kind", "family", "dtype"),
    [(kind, *pair) for kind, pair in zip(sorted(KINDS), cycle((("gpt2", "bfloat16"), ("llama", "float32"))))],
)
def test_a_run_of_every_kind_resumes_to_the_same_numbers_and_weights(
    cli: Cli, tmp_path: Path, kind: str, family: str, dtype: str
) -> None:
    """Cut after the second of four steps: amid AdaLoRA's budget, at Dash's switch and at a draw.

    The log-probs are all of the trainer, so that the first step's KL is that of equal logits.
    """
    (tmp_path / "stopping.py").write_text(STOPPING)
    adapter = {"kind": kind, **SETTINGS.get(kind, {})}
    sources = {"ppo__reward": [{"function": "stopping:scores"}], "ppo__steps": 4}
    model = gpt2_of_bytes(tmp_path / "gpt2") if family == "gpt2" else "random:tiny-llama"
    of_the_trainer = {"model": model, "backbone": {"dtype": dtype}, "ppo__rollout__old_logprobs": "trainer"}
    path = write_recipe(tmp_path, recipe("ppo", adapter=adapter, **sources, **of_the_trainer))
    assert cli("run", path, "--run-dir", "whole").code == 0
    # The last but one call is that of the third step; kinds that look at the gradient ask before the first.
    (tmp_path / "stop").write_text(str(int((tmp_path / "calls").read_text()) - 1))
    (tmp_path / "calls").unlink()
    assert cli("run", path, "--run-dir", "cut").code != 0
    (tmp_path / "stop").unlink()
    assert len(read_jsonl(tmp_path / "cut" / "ppo" / "metrics.jsonl")) == 2
    assert cli("run", path, "--run-dir", "cut", "--resume").code == 0
    whole, cut = (read_jsonl(tmp_path / name / "ppo" / "metrics.jsonl") for name in ("whole", "cut"))
    assert whole[0]["kl"] == 0.0
    assert max(row["logprob_mismatch_max"] for row in whole) < (1e-4 if dtype == "float32" else 0.02)
    assert [without_time(row) for row in cut] == [without_time(row) for row in whole]
    for role in ("adapter", "value"):
        ends = [load_file(tmp_path / name / "ppo" / role / "role.safetensors") for name in ("whole", "cut")]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_reward_policy_and_critic_of_three_kinds_in_one_run(cli: Cli, tmp_path: Path) -> None:
    """Each with the common keys that its kind has; resumed to the same numbers."""
    own = {
        "reward__adapter": {"kind": "dora"},
        "ppo__adapter": {"kind": "miss"},
        "ppo__value_adapter": {"kind": "lora"},
    }
    path = write_recipe(tmp_path, recipe("reward", "ppo", adapter={"rank": 4, "last_layers": 1}, **own))
    assert cli("run", path, "--run-dir", "whole").code == 0
    specs = {
        folder: json.loads((tmp_path / "whole" / folder / "role.json").read_text())["spec"]
        for folder in ("reward/adapter", "ppo/adapter", "ppo/value")
    }
    assert [spec["kind"] for spec in specs.values()] == ["dora", "miss", "lora"]
    assert [spec["rank"] for spec in specs.values()] == [4, 4, 4]
    assert len({tuple(spec["modules"]) for spec in specs.values()}) == 1
    tensors = load_file(tmp_path / "whole" / "ppo" / "value" / "role.safetensors")
    assert any(name.endswith("lora_B") and tensor.any() for name, tensor in tensors.items())
    assert cli("run", path, "--run-dir", "cut", "ppo.steps=1").code == 0
    assert cli("run", path, "--run-dir", "cut", "--resume", "--may-change", "ppo.steps").code == 0
    whole, cut = (read_jsonl(tmp_path / name / "ppo" / "metrics.jsonl") for name in ("whole", "cut"))
    assert whole[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert [without_time(row) for row in cut] == [without_time(row) for row in whole]


# Kills the run `cut` with SIGKILL at the scores of the steps that a file `kills` numbers.
KILLING = """
import os, signal
from pathlib import Path

def scores(prompts, responses):
    kills, metrics = Path("kills"), Path("cut/ppo/metrics.jsonl")
    first, *others = kills.read_text().split() if kills.exists() and kills.read_text() else [""]
    if first and metrics.exists() and metrics.read_bytes().count(b"\\n") + 1 == int(first):
        kills.write_text(" ".join(others))
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(responses)
"""
# A step of PPO has one of its optimizer: a checkpoint is before the change of the policy, at it, and after it.
CHANGING = {"lora_dash": {"warmup_steps": 4, "directions": 2}, "redrawn": {"every": 4}}


@pytest.mark.parametrize(("kind", "policy"), [("adalora", "lora_dash"), ("miss", "redrawn")])
def test_a_critic_starts_as_the_reward_of_its_kind_and_a_killed_run_goes_on(
    tmp_path: Path, model_cache: Path, kind: str, policy: str
) -> None:
    """`kill -9` around the policy's switch or draw, amid the falling budget of the critic's AdaLoRA.

    The critic hardly learns, so its start is seen.
    """
    (tmp_path / "killing.py").write_text(KILLING)
    tree = recipe(
        "reward",
        "ppo",
        threads=1,
        adapter={"kind": kind, **SETTINGS.get(kind, {})},
        reward__learning_rate=1e-2,
        ppo__adapter={"kind": policy, **CHANGING[policy]},
        ppo__reward=[{"adapter": "stage"}, {"function": "killing:scores"}],
        ppo__steps=10,
        ppo__epochs=1,
        ppo__minibatches=1,
        ppo__checkpoint_every=1,
        ppo__learning_rate=1e-3,
        ppo__value_learning_rate=1e-9,
    )
    command = ["run", str(write_recipe(tmp_path, tree))]
    Forked([*command, "--run-dir=whole"], tmp_path, model_cache).finish()
    # Killed at the scores of a step, a run goes on after the last step but one.
    steps = (5, 6, 7)
    (tmp_path / "kills").write_text(" ".join(map(str, steps)))
    Forked([*command, "--run-dir=cut"], tmp_path, model_cache).finish(code=-signal.SIGKILL)
    for step, code in zip(steps, (-signal.SIGKILL, -signal.SIGKILL, 0), strict=True):
        said = Forked([*command, "--run-dir=cut", "--resume"], tmp_path, model_cache).finish(code)
        assert f"continuing after step {step - 2}" in said
    roles = ("reward/adapter", "ppo/adapter", "ppo/value")
    whole, cut = (
        [load_file(tmp_path / name / role / "role.safetensors") for role in roles] for name in ("whole", "cut")
    )
    for expected, found in zip(whole, cut, strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    lines = [
        [without_time(row) for row in read_jsonl(tmp_path / name / "ppo" / "metrics.jsonl")]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]

    reward, _, value = whole
    moved = 0
    for name in reward:
        _, _, part = name.rpartition(".")
        if part in ("lora_A", "lora_B", "miss_block"):
            torch.testing.assert_close(value[name], reward[name], atol=1e-6, rtol=0)
        if part in ("lora_E", "miss_block"):  # zero at the start; a λ may be put out
            near = (value[name] - reward[name]).abs() < 1e-6
            assert (near | (value[name] == 0)).all()
            moved += int((near & (reward[name].abs() > 1e-3)).sum())
    assert moved > 20


def test_a_critic_that_is_a_copy_has_no_adapter_of_its_own(tmp_path: Path) -> None:
    tree = recipe("reward", "ppo", ppo__value_adapter={"kind": "lora"}, ppo__value_init="reward")
    with raises("conflict", key="ppo.value_adapter"):
        make_recipe(tree, tmp_path / "recipe.yaml")
    with raises("conflict", key="ppo.value_adapter"):
        make_recipe(recipe("ppo", ppo__advantage="rloo", ppo__value_adapter={"kind": "lora"}), tmp_path / "recipe.yaml")
