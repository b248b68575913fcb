"""Adapters on a base in 4 and 8 bit, by bitsandbytes on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor
from typer.testing import CliRunner

from pe_rlhf.adapters.layer import WrappedLayer
from pe_rlhf.cli.main import app
from pe_rlhf.config import SamplingConfig
from pe_rlhf.config.load import make_recipe
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.hf import HFRollout
from reward.errors import InputError
from tests.failures import raises
from tests.runs import read_jsonl, recipe, write_recipe
from tests.tiny import ALL_INITS, IDS_BT, add_role, perturb, ragged_sequences, role_logits

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

KINDS = ["4bit", "8bit"]


def quantised(quantisable_model: Path, kind: str) -> Backbone:
    return load_backbone(str(quantisable_model), quantization=kind)


def base_bytes(backbone: Backbone) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in backbone.model.named_parameters() if ".adapters." not in n}


@pytest.fixture(scope="module")
def bases(quantisable_model: Path) -> dict[str, tuple[Backbone, Tensor]]:
    """A base of each kind, and its logits before it had an adapter."""
    made = {kind: quantised(quantisable_model, kind) for kind in KINDS}
    return {kind: (backbone, role_logits(backbone, "anchor")) for kind, backbone in made.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_a_quantised_one(
    quantisable_model: Path, bases: dict[str, tuple[Backbone, Tensor]], kind: str
) -> None:
    backbone, expected = bases[kind]
    whole = role_logits(load_backbone(str(quantisable_model)), "anchor")
    assert 0 < (expected - whole).norm() < 0.5 * whole.norm()
    assert sum(parameter.dtype in (torch.uint8, torch.int8) for parameter in backbone.model.parameters()) == 14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ALL_INITS)
def test_step_0_is_the_quantised_base_to_the_bit(
    bases: dict[str, tuple[Backbone, Tensor]], kind: str, init: str
) -> None:
    backbone, expected = bases[kind]
    add_role(backbone, init, init, rank=3)
    assert torch.equal(role_logits(backbone, init), expected)
    assert torch.equal(role_logits(backbone, "anchor"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_pissa_is_that_of_the_dequantised_weight(quantisable_model: Path, kind: str) -> None:
    """Against numpy's SVD of what bitsandbytes itself makes of the layer."""
    backbone = quantised(quantisable_model, kind)
    add_role(backbone, "policy", "pissa", rank=3, alpha=3)
    state = backbone.role_state("policy")
    for name in backbone.adapter_spec("policy").modules:
        layer: Any = backbone.model.get_submodule(name)
        assert isinstance(layer, WrappedLayer)
        base: Any = layer.base
        weight = base.weight
        if kind == "4bit":
            dense = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        else:
            dense = weight.data.float() * base.state.SCB[:, None] / 127
        u, s, vh = torch.linalg.svd(dense.double(), full_matrices=False)
        expected = (u[:, :3] * s[:3]) @ vh[:3]
        product = state[f"{name}.initial_B_OR"].double() @ state[f"{name}.initial_A_RI"].double()
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)
        assert product.norm() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_loftq_is_that_of_peft_for_what_quantising_lost(quantisable_model: Path, kind: str) -> None:
    backbone, whole = quantised(quantisable_model, kind), load_backbone(str(quantisable_model))
    backbone.add_adapter("policy", init="loftq", rank=3, alpha=6)
    whole.add_adapter("policy", rank=1)
    state = backbone.role_state("policy")
    for name in backbone.adapter_spec("policy").modules:
        lost_OI = whole.base_weight(name) - backbone.base_weight(name).float()
        theirs = _low_rank_decomposition(lost_OI.double(), reduced_rank=3)
        product = 2.0 * state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
        torch.testing.assert_close(product, theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-6)
        assert product.norm() > 0.1 * lost_OI.norm()


def test_loftq_is_refused_where_nothing_was_quantised(quantisable_model: Path) -> None:
    with raises("conflict", key="adapter.init"):
        load_backbone(str(quantisable_model)).add_adapter("policy", init="loftq", rank=3)
    with raises("conflict", key="adapter.init"):
        make_recipe(recipe("reward", adapter={"init": "loftq"}), quantisable_model / "recipe.yaml")


def test_the_dequantised_weight_is_near_the_original_after_any_pass(quantisable_model: Path) -> None:
    """Whatever layout a fast kernel may want: passes without a gradient come first."""
    whole = load_backbone(str(quantisable_model))
    for kind, near in (("4bit", 0.15), ("8bit", 0.02)):
        backbone = quantised(quantisable_model, kind)
        role_logits(backbone, "anchor")
        add_role(backbone, "policy", "lora", rank=3)
        whole.add_adapter(kind.replace("4", "four").replace("8", "eight"))
        for name in backbone.adapter_spec("policy").modules:
            original_OI = whole.base_weight(name)
            assert (backbone.base_weight(name).float() - original_OI).norm() < near * original_OI.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_base_as_it_was(quantisable_model: Path, kind: str) -> None:
    backbone = quantised(quantisable_model, kind)
    add_role(backbone, "policy", "lora", rank=3)
    perturb(backbone, "policy")
    before = base_bytes(backbone)
    assert backbone.packs
    parameters = backbone.role_parameters("policy")
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        with backbone.role("policy"):
            loss = -backbone.response_logprobs(ragged_sequences())[0].mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in parameters.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_bytes(backbone).items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_and_its_export(quantisable_model: Path, tmp_path: Path, kind: str) -> None:
    """Its exports in both forms are one model, loaded as their cards say; some layers have no adapter."""
    adapter = {"init": "pissa", "targets": ["q_proj", "down_proj"]}
    changes = {"model": str(quantisable_model), "backbone__quantization": kind, "adapter": adapter}
    tree = recipe("reward", "ppo", "evaluate", **changes)
    done = CliRunner().invoke(app, ["run", str(write_recipe(tmp_path, tree)), "--run-dir", str(tmp_path / "run")])
    assert done.exit_code == 0, (done.output, done.exception)
    first = read_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl")[0]
    assert first["kl"] == pytest.approx(0, abs=0.05 if kind == "8bit" else 1e-4)  # int8 rounds activations, too
    logits = []
    for form in ("lora", "merged"):
        to = tmp_path / form
        exported = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--format", form, "--to", str(to)])
        assert exported.exit_code == 0, (exported.output, exported.exception)
        scope = {"PATH": str(to)}
        code = re.findall(r"```python\n(.*?)```", (to / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
        exec(code.replace('"path/to/this/folder"', "PATH"), scope)
        model: Any = scope["model"]
        logits.append(model.train()(input_ids=IDS_BT).logits.detach())  # else bitsandbytes computes 4 bit in bf16
    torch.testing.assert_close(*logits, atol=0.05 if kind == "8bit" else 1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"tuning": "full"},
        {"ppo__rollout": {"engine": "vllm"}},
        {"ppo__rollout": {"sync": "merged"}},
        {"backbone__quantization": "3bit"},
    ],
)
def test_what_does_not_go_with_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    tree = recipe("ppo", **{"backbone__quantization": "4bit", **changes})
    done = CliRunner().invoke(app, ["run", str(write_recipe(tmp_path, tree)), "--dry-run"])
    assert isinstance(done.exception, InputError)
    assert done.exception.key == "backbone.quantization"


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_not_merged(quantisable_model: Path, kind: str) -> None:
    """Sampling leaves the adapter as it is; asked to merge, it refuses to dequantise everything."""
    backbone = quantised(quantisable_model, kind)
    backbone.add_adapter("policy", rank=3)
    perturb(backbone, "policy", 0.3)
    assert not backbone.can_merge("policy")
    assert backbone.can_merge("anchor")  # which has nothing to merge
    auto, adapter = (
        HFRollout(backbone, "policy", SamplingConfig(max_new_tokens=6, sync=s)) for s in ("auto", "adapter")
    )
    assert auto.generate([[5, 6]], seed=0) == adapter.generate([[5, 6]], seed=0)
    with raises("conflict", key="sync"):
        HFRollout(backbone, "policy", SamplingConfig(sync="merged")).generate([[5, 6]], seed=0)


def test_a_quantised_base_is_not_tuned_whole(quantisable_model: Path) -> None:
    with raises("conflict", key="tuning"):
        quantised(quantisable_model, "4bit").add_own_weights("policy")
