"""Roles with weights of their own: full tuning, the baseline, in the same backbone, optimizer and files as adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from typer.testing import CliRunner

from pe_rlhf.cli.main import app
from pe_rlhf.config import OptimizerConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
from pe_rlhf.runs.saved_roles import load_role, save_role
from pe_rlhf.system.failures import TrainingError
from reward.errors import InputError
from tests.failures import raises
from tests.runs import read_jsonl, recipe, without_time, write_recipe
from tests.tiny import (
    FAMILIES,
    IDS_BT,
    add_role,
    perturb,
    ragged_sequences,
    randomise_head,
    role_logits,
    set_fast,
    tiny_model,
)


def full_backbone(*roles: str, family: str = "llama", **changes: Any) -> Backbone:
    backbone = load_backbone(tiny_model(family, **changes))
    for role in roles:
        backbone.add_own_weights(role)
    return backbone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_role_starts_as_the_anchor_to_the_bit(family: str, dtype: torch.dtype) -> None:
    original = tiny_model(family, dtype)
    expected = original(IDS_BT, use_cache=False).logits.detach()
    backbone = load_backbone(tiny_model(family, dtype))
    backbone.add_own_weights("policy")
    assert torch.equal(role_logits(backbone, "anchor"), expected)
    assert torch.equal(role_logits(backbone, "policy"), expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_training_a_role_moves_its_own_weights_alone(family: str) -> None:
    backbone = full_backbone("policy", "value", "reward", family=family)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    anchor = role_logits(backbone, "anchor")
    for role in ("policy", "value", "reward"):
        parameters = backbone.role_parameters(role)
        own_weights = [name for name in parameters if name.startswith("model.")]
        part = backbone.model if role == "policy" else backbone.model.base_model  # tied embeddings are one parameter
        assert len(own_weights) == len(list(part.named_parameters()))
        randomise_head(backbone, role) if role in backbone.heads else None
        state = backbone.role_state(role)
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
        with backbone.role(role):
            backbone(IDS_BT).logits.square().mean().backward()
        optimizer.step()
        moved = backbone.role_state(role)
        used = [name for name in parameters if "wpe" not in name and "head.bias" not in name]
        assert all((moved[name] != state[name]).any() for name in used if name in state), role
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())
    assert torch.equal(role_logits(backbone, "anchor"), anchor)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_the_gradients_are_those_of_the_plain_model() -> None:
    """Policy gradient of all weights, against the model as transformers make it."""
    backbone = full_backbone("policy")
    plain = tiny_model("llama").requires_grad_(True)
    sequences = ragged_sequences()
    with backbone.role("policy"):
        backbone.response_logprobs(sequences)[0].sum().backward()
    total = torch.zeros(())
    for ids, prompt, length in zip(
        sequences.ids_BT, sequences.prompt_lengths_B.tolist(), sequences.lengths_B.tolist(), strict=True
    ):
        logprobs = plain(ids[None, :length]).logits[0].log_softmax(-1)
        total = total + sum(logprobs[t - 1, ids[t]] for t in range(prompt, length))
    total.backward()
    own = backbone.role_parameters("policy")
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(own[f"model.{name}"].grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_a_critic_starts_from_an_adapter(init: str) -> None:
    """A reward adapter, then a critic of its own weights that computes the same."""
    backbone = load_backbone(tiny_model("llama"))
    add_role(backbone, "reward", init, rank=3)
    perturb(backbone, "reward")
    backbone.add_own_weights("value", "reward")
    scores_B1 = role_logits(backbone, "reward")
    assert scores_B1.abs().min() > 1e-4
    torch.testing.assert_close(role_logits(backbone, "value")[:, -1], scores_B1, rtol=1e-4, atol=1e-5)
    assert "value" in backbone.own_models
    assert not any("adapters" in name for name, _ in backbone.own_models.named_modules())


@pytest.mark.parametrize(("source", "target"), [("policy", "behaviour"), ("reward", "value"), ("policy", "value")])
def test_a_copy_is_of_the_role_and_not_of_the_anchor(source: str, target: str) -> None:
    backbone = full_backbone(source)
    perturb(backbone, source)
    backbone.copy_role(source, target)
    before, copied = backbone.role_state(source), backbone.role_state(target)
    moved = [name for name in copied if name.startswith("model.")]
    prefix = "model." if source == "policy" and target == "value" else ""  # a critic has only the decoder
    assert all(torch.equal(copied[name], before[name.replace("model.", f"model.{prefix}", 1)]) for name in moved)
    perturb(backbone, target)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.role_state(source).items())


def test_a_policy_does_not_start_from_a_critic() -> None:
    with raises("conflict", key="reward"):
        full_backbone("reward").add_own_weights("policy", "reward")


@pytest.mark.parametrize("role", ["policy", "value", "reward"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_role_comes_back(role: str, tied: bool, tmp_path: Path) -> None:
    backbone = full_backbone(role, tie_word_embeddings=tied)
    perturb(backbone, role)
    save_role(backbone, role, tmp_path / "adapter")
    fresh = load_backbone(tiny_model("llama", tie_word_embeddings=tied))
    load_role(fresh, role, tmp_path / "adapter")
    assert torch.equal(role_logits(fresh, role), role_logits(backbone, role))
    saved = load_file(tmp_path / "adapter" / "role.safetensors")
    assert len({tensor.data_ptr() for tensor in saved.values()}) == len(saved)
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


def test_a_role_of_another_model_is_refused() -> None:
    state = full_backbone("policy").role_state("policy")
    spec = full_backbone("policy").specs["policy"]
    other = load_backbone(tiny_model("llama", hidden_size=16))
    with raises("unreadable", key="policy"):
        other.load_role("policy", spec, state)
    assert other.roles == ["anchor"]


def test_it_has_no_adapter_to_export(tmp_path: Path) -> None:
    with raises("conflict", key="format"):
        full_backbone("policy").export_adapter("policy", tmp_path)


def test_recomputing_blocks_changes_no_gradient() -> None:
    def gradients(recompute: bool) -> dict[str, Tensor | None]:
        backbone = full_backbone("policy", "value")
        randomise_head(backbone, "value")
        if recompute:
            set_fast(backbone, gradient_checkpointing=True)
        for role in ("policy", "value"):
            with backbone.role(role):
                backbone(IDS_BT) if role == "policy" else None
                values = backbone.response_values(ragged_sequences()) if role == "value" else None
                loss = backbone.response_logprobs(ragged_sequences())[0].sum() if values is None else values.sum()
                loss.backward()
        return {f"{r} {n}": p.grad for r in ("policy", "value") for n, p in backbone.role_parameters(r).items()}

    plain, again = gradients(recompute=False), gradients(recompute=True)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, again[name], msg=name)


class TestMasters:
    """Weights in bf16 are stepped in fp32: an independent AdamW on fp32 weights, rounded after each step, agrees."""

    @staticmethod
    def parameters(head: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        wide = torch.randn(5, 3, generator=generator)
        return {"w": nn.Parameter(wide.bfloat16()), "head": nn.Parameter(torch.ones(3, dtype=head))}

    @staticmethod
    def loss(parameters: dict[str, nn.Parameter], step: int) -> Tensor:
        return ((parameters["w"].float() @ parameters["head"].float()) * (step + 1)).square().sum()

    @pytest.mark.parametrize("head", [torch.float32, torch.bfloat16], ids=["wide head", "all narrow"])
    @pytest.mark.parametrize("deepspeed", [None, {}, {"zero_optimization": {"stage": 2}}], ids=["plain", "ds", "zero2"])
    def test_small_steps_are_not_lost(self, deepspeed: dict[str, Any] | None, head: torch.dtype) -> None:
        if deepspeed is not None:
            from pe_rlhf.optim.zero import init_processes

            init_processes(wants_deepspeed=True)
        config, own = OptimizerConfig(max_grad_norm=1e9), self.parameters(head)
        optimizer = RoleOptimizer([RoleGroup("policy", own, 1e-5)], config, 40, deepspeed)
        masters = {name: parameter.detach().float().requires_grad_(True) for name, parameter in own.items()}
        adamw = torch.optim.AdamW(masters.values(), lr=1e-5, betas=config.betas, eps=config.eps, weight_decay=0.0)
        expected = self.parameters(head)
        for step in range(40):
            optimizer.backward(self.loss(own, step))
            optimizer.step()
            self.loss(expected, step).backward()
            for name, master in masters.items():
                gradient = expected[name].grad
                assert gradient is not None
                master.grad, expected[name].grad = gradient.float(), None
            adamw.step()
            with torch.no_grad():
                for name, master in masters.items():
                    expected[name].copy_(master)
        for name, parameter in own.items():
            assert torch.equal(parameter, expected[name]), name
        assert (optimizer.state()["policy/w/master"] != own["w"]).any()  # forty steps of 1e-5 are below bf16's
        torch.testing.assert_close(optimizer.state()["policy/w/master"], masters["w"].detach(), rtol=0, atol=1e-7)

    def test_a_resumed_run_goes_on_from_the_masters(self) -> None:
        def run(stop: int | None) -> Tensor:
            own = self.parameters()
            optimizer = RoleOptimizer([RoleGroup("policy", own, 1e-4)], OptimizerConfig(), 20)
            for step in range(20):
                if step == stop:
                    state, weights = optimizer.state(), {name: p.detach().clone() for name, p in own.items()}
                    own = {name: nn.Parameter(weight) for name, weight in weights.items()}
                    optimizer = RoleOptimizer([RoleGroup("policy", own, 1e-4)], OptimizerConfig(), 20)
                    optimizer.load_state(state)
                optimizer.backward(self.loss(own, step))
                optimizer.step()
            return optimizer.state()["policy/w/master"]

        assert torch.equal(run(stop=7), run(stop=None))

    def test_a_gradient_that_is_not_finite_changes_nothing(self) -> None:
        own = self.parameters()
        optimizer = RoleOptimizer([RoleGroup("policy", own, 1e-2)], OptimizerConfig(), 2)
        own["w"].grad = torch.full_like(own["w"], float("inf"))
        with raises("not_finite", TrainingError, key="policy"):
            optimizer.step()
        assert torch.equal(own["w"], self.parameters()["w"])


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """A whole run with full tuning, killed by nothing."""
    folder = tmp_path_factory.mktemp("full")
    tree = recipe("reward", "ppo", "evaluate", tuning="full", ppo__reward=[{"adapter": "stage"}])
    done = CliRunner().invoke(app, ["run", str(write_recipe(folder, tree)), "--run-dir", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return folder / "run"


def test_every_stage_takes_it(full_run: Path) -> None:
    lines = read_jsonl(full_run / "ppo" / "metrics.jsonl")
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["policy_grad_norm"] > 0
    reward = json.loads((full_run / "reward" / "summary.json").read_text())
    ppo = json.loads((full_run / "ppo" / "summary.json").read_text())
    base = load_backbone("random:tiny-llama")
    decoder = sum(parameter.numel() for parameter in base.model.base_model.parameters())
    assert reward["trainable_parameters"] == decoder + 32  # and the head
    assert ppo["trainable_parameters"] == 2 * decoder + 33  # the embeddings are tied; the critic's head has a bias
    assert (full_run / "report.html").is_file()


def test_a_merged_export_is_the_policy(full_run: Path, tmp_path: Path) -> None:
    for role in ("policy", "value", "reward"):
        arguments = ["export", str(full_run), "--format", "merged", "--role", role, "--to", str(tmp_path / role)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    backbone = load_backbone("random:tiny-llama")
    for role, folder in (("policy", "ppo/adapter"), ("reward", "reward/adapter"), ("value", "ppo/value")):
        load_role(backbone, role, full_run / folder)
    ids_BT = torch.tensor([[72, 101, 108, 108, 111]])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(policy(ids_BT).logits, role_logits(backbone, "policy", ids_BT))
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1)
    bias = load_file(tmp_path / "reward" / "head.safetensors")["bias"]
    torch.testing.assert_close(reward(ids_BT).logits + bias, role_logits(backbone, "reward", ids_BT))
    value: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "value")
    head = load_file(tmp_path / "value" / "head.safetensors")
    hidden_BTH = value.base_model(ids_BT).last_hidden_state
    values_BT1 = (hidden_BTH @ head["weight"] + head["bias"])[..., None]
    torch.testing.assert_close(values_BT1, role_logits(backbone, "value", ids_BT))
    assert "all weights of" in (tmp_path / "policy" / "README.md").read_text()
    refused = CliRunner().invoke(app, ["export", str(full_run), "--format", "lora", "--to", str(tmp_path / "lora")])
    assert isinstance(refused.exception, InputError)
    assert (refused.exception.kind, refused.exception.key) == ("conflict", "format")


def test_a_stopped_run_goes_on_to_the_same_end(full_run: Path, tmp_path: Path) -> None:
    """One PPO step of two, then the rest, as after a kill between two steps."""
    tree = yaml.safe_load((full_run / "recipe.yaml").read_text())
    path = write_recipe(tmp_path, tree)
    run = tmp_path / "run"
    done = CliRunner().invoke(app, ["run", str(path), "--run-dir", str(run), "--to", "ppo"])
    assert done.exit_code == 0, done.output
    for name in ("summary.json", "adapter", "value", "checkpoints/step-000002"):
        target = run / "ppo" / name
        target.unlink() if target.is_file() else target.rename(tmp_path / name.replace("/", "-"))
    done = CliRunner().invoke(app, ["run", str(path), "--run-dir", str(run), "--to", "ppo", "--resume"])
    assert done.exit_code == 0, done.output
    assert "ppo: continuing after step 1" in done.output
    rows = [list(map(without_time, read_jsonl(folder / "ppo" / "metrics.jsonl"))) for folder in (run, full_run)]
    assert rows[0] == rows[1]
    for role in ("adapter", "value"):
        assert (run / "ppo" / role / "role.safetensors").read_bytes() == (
            full_run / "ppo" / role / "role.safetensors"
        ).read_bytes()


def test_a_full_policy_against_a_reward_adapter(full_run: Path, tmp_path: Path) -> None:
    """Adapters and own weights may meet: a fully tuned policy and critic, scored by a LoRA reward model."""
    adapter = tmp_path / "adapter-run"
    path = write_recipe(tmp_path, recipe("reward"))
    assert CliRunner().invoke(app, ["run", str(path), "--run-dir", str(adapter)]).exit_code == 0
    tree = recipe("ppo", tuning="full", ppo__reward=[{"adapter": str(adapter / "reward")}])
    path = write_recipe(tmp_path, tree)
    done = CliRunner().invoke(app, ["run", str(path), "--run-dir", str(tmp_path / "mixed")])
    assert done.exit_code == 0, done.output

    tree = recipe("ppo", ppo__reward=[{"adapter": str(full_run / "reward")}])
    done = CliRunner().invoke(app, ["run", str(write_recipe(tmp_path, tree)), "--run-dir", str(tmp_path / "other")])
    assert isinstance(done.exception, InputError)
    assert (done.exception.kind, done.exception.key) == ("conflict", "ppo.value_init")
    done = CliRunner().invoke(
        app, ["run", str(tmp_path / "recipe.yaml"), "ppo.value_init=fresh", "--run-dir", str(tmp_path / "fresh")]
    )
    assert done.exit_code == 0, done.output
