"""`pe-rlhf export`: what other programs load of a run computes what the role computes here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from pe_rlhf.config import BackboneConfig
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.names import resolve_model
from pe_rlhf.runs.export import export_role, write_merged
from pe_rlhf.runs.saved_roles import load_role
from reward.errors import Failure, InputError
from tests.model_types import MODELS, build
from tests.runs import Outcome, recipe, write_recipe
from tests.tiny import perturb, role_logits

Cli = Callable[..., Outcome]
IDS_BT = torch.tensor([[5, 6, 7, 8, 9], [20, 21, 22, 23, 24]])


@pytest.mark.parametrize("init", ["lora_ga", "eva", "olora"])
def test_exports_of_a_run_load_in_peft_and_transformers(cli: Cli, tmp_path: Path, init: str) -> None:
    changes = {"adapter__init": init, "reward__learning_rate": 0.05, "ppo__learning_rate": 0.05}
    path = write_recipe(tmp_path, recipe("reward", "ppo", **changes))
    assert cli("run", path, "--run-dir", tmp_path / "run").code == 0
    base = resolve_model("random:tiny-llama")
    backbone = load_backbone("random:tiny-llama")
    load_role(backbone, "policy", tmp_path / "run" / "ppo" / "adapter")
    load_role(backbone, "reward", tmp_path / "run" / "reward" / "adapter")

    for form in ("lora", "merged"):
        done = cli("export", tmp_path / "run", "--format", form)
        assert done.code == 0, done
        folder = Path(done.out.strip())
        assert folder == tmp_path / "run" / "export" / f"policy-{form}"
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nbase_model: ")
        assert f"`{init}`" in card
        if form == "lora":
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
            rank = json.loads((folder / "adapter_config.json").read_text())["r"]
            assert rank == (2 if init == "eva" else 4)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad(), backbone.role("policy"):
            expected = backbone(IDS_BT).logits
            torch.testing.assert_close(model(input_ids=IDS_BT).logits, expected, atol=2e-5, rtol=1e-4)
        with torch.no_grad():
            assert (expected - backbone(IDS_BT).logits).abs().max() > 1e-3

    done = cli("export", tmp_path / "run", "--format", "merged", "--role", "reward", "--to", tmp_path / "judge")
    assert done.code == 0, done
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    bias = load_file(tmp_path / "judge" / "head.safetensors")["bias"]
    with torch.no_grad(), backbone.role("reward"):
        torch.testing.assert_close(judge(input_ids=IDS_BT).logits + bias, backbone(IDS_BT).logits, atol=2e-5, rtol=1e-4)


def test_an_export_is_prompted_as_the_run_was(cli: Cli, tmp_path: Path) -> None:
    template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    path = write_recipe(tmp_path, {**recipe("ppo"), "chat_template": template})
    assert cli("run", path, "--run-dir", tmp_path / "run").code == 0
    for form in ("lora", "merged"):
        assert cli("export", tmp_path / "run", "--format", form).code == 0
        card = (tmp_path / "run" / "export" / f"policy-{form}" / "README.md").read_text(encoding="utf-8")
        assert f"```jinja\n{template}\n```" in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "export" / "policy-merged")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "<abc>"


def test_a_merged_checkpoint_in_float32_of_a_run_in_bfloat16(
    cli: Cli, fails: Callable[..., Failure], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe("ppo", backbone__dtype="bfloat16"))
    assert cli("run", path, "--run-dir", "run").code == 0
    wide = cli("export", "run", "--format", "merged", "--dtype", "float32", "--to", "wide")
    narrow = cli("export", "run", "--format", "merged")
    assert (wide.code, narrow.code) == (0, 0)
    assert "%" in narrow.err  # the share of the change that is left
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    backbone = load_backbone("random:tiny-llama", dtype="bfloat16")
    load_role(backbone, "policy", tmp_path / "run" / "ppo" / "adapter")
    name = "model.layers.0.mlp.down_proj"
    base_OI = backbone.model.get_submodule(name).base.weight.float()  # type: ignore[union-attr, operator]
    change_OI = backbone.model.get_submodule(name).change("policy")  # type: ignore[operator]
    assert torch.equal(tensors[f"{name}.weight"], base_OI + change_OI)
    assert change_OI.any()
    failure = fails("export", "run", "--dtype", "float32", "--to", "lora")
    assert (failure.kind, failure.key) == ("conflict", "--dtype")


def test_what_cannot_be_exported(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused("export", tmp_path / "none") == f"{tmp_path / 'none'} is not a directory"
    (tmp_path / "empty").mkdir()
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "missing"),
        ({"role": "polcy"}, "unknown"),
        ({"checkpoint": "best"}, "missing"),
    )
    for options, kind in wrong:
        with pytest.raises(InputError) as raised:
            export_role(tmp_path / "empty", "lora", **options)
        assert raised.value.kind == kind


def test_a_checkpoint_of_a_run_that_has_a_reward_role_alone(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("reward", reward__checkpoint_every=1))
    assert cli("run", path, "--run-dir", "run").code == 0
    for place in ("run", "run/reward"):
        done = cli("export", place, "--checkpoint", "newest")
        assert done.code == 0, done
        folder = tmp_path / done.out.strip()
        assert re.fullmatch(r"reward-step-\d+-lora", folder.name)
        ended = tmp_path / "run" / "reward" / "adapter"
        assert (folder / "adapter_model.safetensors").read_bytes() == (ended / "adapter_model.safetensors").read_bytes()
        shutil.rmtree(folder)


def test_a_checkpoint_is_exported(cli: Cli, refused: Callable[..., str], tmp_path: Path) -> None:
    settings = {"ppo__steps": 4, "ppo__keep_checkpoints": 4, "ppo__learning_rate": 0.05}
    path = write_recipe(tmp_path, recipe("ppo", adapter__init="pissa", **settings))
    assert cli("run", path, "--run-dir", "run").code == 0
    assert cli("run", path, "--run-dir", "short", "ppo.steps=2").code == 0  # the schedule has no part in it: constant
    run = tmp_path / "run"
    states = {
        p.name: json.loads((p / "state.json").read_text()) for p in sorted((run / "ppo" / "checkpoints").iterdir())
    }
    best = max(states.values(), key=lambda state: state["score"])["step"]  # the first of equal ones
    for which, step in (("2", 2), ("newest", 4), ("best", best)):
        done = cli("export", "run", "--checkpoint", which)
        assert done.code == 0, done
        folder = tmp_path / done.out.strip()
        assert folder.name == f"policy-step-{step}-lora"
        if step in (2, 4):
            ended = tmp_path / {2: "short", 4: "run"}[step] / "ppo" / "adapter"
            name = "adapter_model.safetensors"
            assert (folder / name).read_bytes() == (ended / name).read_bytes()
        shutil.rmtree(folder)
    there = "there are best, newest, 1, 2, 3, 4"
    assert there in refused("export", "run", "--checkpoint", "7")
    (run / "ppo" / "checkpoints" / "step-abc").mkdir()
    assert there in refused("export", "run", "--checkpoint", "abc")
    (run / "ppo" / "checkpoints" / "step-000003" / "state.safetensors").write_bytes(b"damaged")
    wrong: tuple[tuple[dict[str, Any], str, Path], ...] = (
        ({"role": "reward", "checkpoint": "best"}, "missing", Path("run")),
        ({"role": "polcy", "checkpoint": "best"}, "unknown", Path("None")),
        ({"checkpoint": "7"}, "missing", Path("run/ppo/checkpoints")),
        ({"checkpoint": "3"}, "unreadable", Path("run/ppo/checkpoints/step-000003")),
    )
    for options, kind, file in wrong:
        with pytest.raises(InputError) as raised:
            export_role(Path("run"), "lora", **options)
        assert (raised.value.kind, raised.value.file) == (kind, None if file == Path("None") else str(file))


@torch.no_grad()
def test_the_text_part_of_a_composite_checkpoint_is_exported_as_that(
    saved_model: Callable[[PreTrainedModel], Path], tmp_path: Path
) -> None:
    """transformers loads Qwen3.5's text model from a config that has a vision part as well."""
    sizes = build("qwen3_5_text").config.to_dict()
    config = Qwen3_5Config(text_config=sizes, vision_config=MODELS["qwen3_5"]["vision_config"])
    backbone = load_backbone(saved_model(Qwen3_5ForConditionalGeneration(config)))
    backbone.add_adapter("policy", init="pissa", rank=1)
    perturb(backbone, "policy")
    write_merged(backbone, "policy", BackboneConfig(), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = role_logits(backbone, "policy", IDS_BT)
    torch.testing.assert_close(merged(input_ids=IDS_BT).logits, expected, atol=2e-5, rtol=1e-4)
