"""What the sft stage leaves: its weights against W0 + s·B·A, and who starts from them."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pe_rlhf.config.load import load_recipe
from pe_rlhf.evaluation.sources import find_policy
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.report.run_page import write_report
from pe_rlhf.runs.saved_roles import find_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.outcome_table import outcome_table
from tests.failures import raises
from tests.model_types import build
from tests.runs import Tree, recipe, write_jsonl, write_recipe
from tests.tiny import FAMILIES, tiny_model
from tests.unit.report.parsed import parse, plots, section, table
from tests.unit.stages.sft_runs import CHATS, PAIRS, TEMPLATE, TEXTS, Cli, sft, train

# ---- what it leaves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "float32") for family in sorted(FAMILIES)), ("llama", "bfloat16")]
)
def test_the_merged_model_is_the_base_and_its_adapter(
    tmp_path: Path, family: str, dtype: str, saved_model: Callable[[PreTrainedModel], Path]
) -> None:
    base = saved_model(tiny_model(family))
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(5, 15)]
    adapter = {"rank": 3, "alpha": 5, "scaling": "rslora", "targets": "attention", "dropout": 0.1, "init": "pissa"}
    tree = sft(base, tmp_path, rows) | {"adapter": adapter, "backbone": {"dtype": dtype}}
    train(tree, tmp_path / "run")

    folder = tmp_path / "run" / "sft"
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, str(base))
    assert config["lora_alpha"] / 3 == pytest.approx(5 / math.sqrt(3))
    before = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")  # in the dtype that its config names
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    changed = 0
    for name, weight in after.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = before[name]
        if (A_RI := factors.get(f"{prefix}.lora_A.weight")) is not None:
            delta_OI = 5 / math.sqrt(3) * factors[f"{prefix}.lora_B.weight"] @ A_RI
            delta = delta_OI.T if family == "gpt2" else delta_OI  # GPT-2 keeps its weights the other way round
            expected = (before[name].float() + delta).to(weight.dtype)
            changed += int(not torch.equal(weight, before[name]))
        assert weight.dtype == getattr(torch, dtype)
        torch.testing.assert_close(weight, expected, rtol=1e-6 if dtype == "float32" else 1e-2, atol=1e-7)
    assert changed == len(factors) // 2 > 0

    if dtype == "float32":
        ids_BT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
        torch.testing.assert_close(loaded(ids_BT).logits, peft(input_ids=ids_BT).logits, atol=1e-5, rtol=1e-5)


def test_the_model_is_complete_and_nothing_of_the_trainer_is_in_it(
    tmp_path: Path, saved_model: Callable[[PreTrainedModel], Path], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    base = saved_model(tiny_model("llama", use_cache=True))
    train(sft(base, tmp_path, [{"text": f"w{i} w{i + 1}"} for i in range(9)]), tmp_path / "run")
    made = tmp_path / "run/sft/model"
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        old, new = (json.loads((folder / name).read_text()) for folder in (base, made))
        assert new.pop("transformers_version", None) == old.pop("transformers_version", None)
        assert new | old == new, name
        assert not new.keys() - old.keys() - {"is_local", "local_files_only"}, name
    assert (made / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "run/sft").iterdir()) == [
        *("adapter", "checkpoints", "metrics.jsonl", "model", "recipe.yaml", "summary.json")
    ]


def test_the_hub_is_sent_no_telemetry(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(*_: object, **__: object) -> None:
        raise AssertionError("telemetry was sent")

    for name in ("CI", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.utils._telemetry._start_telemetry_thread", sent)
    train(sft(model, tmp_path, TEXTS), tmp_path / "run")


def test_lora_plus_gives_b_a_rate_of_its_own(model: Path, tmp_path: Path) -> None:
    """One step of Adam without decay moves each entry with a gradient by the learning rate."""
    moved = {}
    for ratio in (1, 8):
        optimizer = {"warmup_ratio": 0, "lora_plus_ratio": ratio}
        train(sft(model, tmp_path, PAIRS, batch_size=10, optimizer=optimizer), tmp_path / f"ratio-{ratio}")
        factors = load_file(tmp_path / f"ratio-{ratio}/sft/adapter/adapter_model.safetensors")
        moved[ratio] = max(float(B_OR.abs().max()) for name, B_OR in factors.items() if "lora_B" in name)
    assert moved[1] == pytest.approx(1e-2, rel=1e-3)
    assert moved[8] == pytest.approx(8e-2, rel=1e-3)


def test_the_chat_template_it_was_trained_with_is_kept(model: Path, tmp_path: Path) -> None:
    train(sft(model, tmp_path, CHATS) | {"chat_template": TEMPLATE}, tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run/sft/model").chat_template == TEMPLATE
    assert AutoTokenizer.from_pretrained(model).chat_template is None


# ---- later stages ----------------------------------------------------------------------------------------------------


def test_all_later_stages_start_from_the_merged_model(cli: Cli, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    changes: Tree = {
        "sft": {"data": str(rows), "batch_size": 4, "learning_rate": 0.05, "epochs": 2, "eval_share": 0.1},
        "adapter__init": "pissa",
        "preferences__sampling__max_new_tokens": 12,
        "preferences__pairs_per_prompt": 3,
        "ppo__learning_rate": 0.05,
        "ppo__reward": [{"adapter": "stage"}],
    }
    path = write_recipe(tmp_path, recipe("preferences", "reward", "ppo", "evaluate", **changes))
    loaded = load_recipe(path, ["reward.data=null", "reward.eval_share=0.3"])
    train(loaded.model_dump(mode="json"), tmp_path / "run")

    # A run that is moved is whole: nothing in it says where it was but as a hint.
    moved = tmp_path / "elsewhere"
    (tmp_path / "run").rename(moved)
    ids_BT = torch.tensor([[5, 6, 7, 8, 9], [20, 21, 22, 23, 24]])
    anchor = AutoModelForCausalLM.from_pretrained(moved / "sft/model")
    original = load_backbone("random:tiny-llama")
    backbone = StageContext(load_recipe(moved / "recipe.yaml"), moved, "ppo").backbone()
    assert backbone.base_fingerprint() != original.base_fingerprint()
    for stage, role in (("reward", "reward"), ("ppo", "policy")):
        recorded = json.loads((moved / stage / "adapter/role.json").read_text())
        assert recorded["base_sha256"] == backbone.base_fingerprint()
        assert find_role(moved, role).base == str(moved / "sft/model")
    policy = find_policy(str(moved))
    assert policy is not None
    assert policy.base == str(moved / "sft/model")
    with torch.no_grad():
        expected = anchor(ids_BT).logits
        torch.testing.assert_close(backbone(ids_BT).logits, expected, atol=0, rtol=0)
        assert (expected - original(ids_BT).logits).abs().max() > 1e-2

    # Exports are for the merged model, too.
    assert cli("export", moved, "--format", "lora").code == 0
    assert cli("export", moved, "--format", "merged", "--checkpoint", "newest").code == 0
    lora, merged = moved / "export/policy-lora", moved / "export/policy-step-2-merged"
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved / "sft/model")
    assert f'base_model: "{moved / "sft/model"}"' in (lora / "README.md").read_text()
    with torch.no_grad():
        policy = PeftModel.from_pretrained(anchor, lora)(input_ids=ids_BT).logits
        torch.testing.assert_close(
            AutoModelForCausalLM.from_pretrained(merged)(ids_BT).logits, policy, atol=2e-5, rtol=1e-4
        )
        assert (policy - expected).abs().max() > 1e-3

    # …and without it there is nothing to start from.
    shutil.rmtree(moved / "sft")
    with raises("unfinished", key="sft", file=moved):
        StageContext(load_recipe(moved / "recipe.yaml"), moved, "ppo").backbone()


def test_the_report_and_the_table_tell_of_it(model: Path, tmp_path: Path) -> None:
    summary = train(sft(model, tmp_path, PAIRS, eval_every=1), tmp_path / "run")
    page = parse(write_report(tmp_path / "run"))
    assert list(plots(section(page, "Supervised fine-tuning"))) == ["Loss"]
    done = table(section(page, "Stages"))["sft"]["What it did"]
    assert re.findall(r"\d+ (?:steps|rows|held)", done) == ["3 steps", "10 rows", "2 held"]
    console = Console(file=io.StringIO(), width=100)
    console.print(outcome_table("x", {"sft": summary}))
    line = next(line for line in console.file.getvalue().splitlines() if "sft" in line)  # type: ignore[attr-defined]
    before, after = (f"{summary[key]:.3f}" for key in ("eval_loss_before", "eval_loss"))
    assert [cell.strip() for cell in line.split("│")[2:5]] == [before, after, "2 rows"]


def test_experts_are_trained_by_peft_and_merged_each(
    tmp_path: Path, saved_model: Callable[[PreTrainedModel], Path]
) -> None:
    """PEFT has the ranks of all experts along one axis, and its adapter on the base is the merged model."""
    base = saved_model(build("mixtral"))
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3}"} for i in range(5, 15)]
    train(sft(base, tmp_path, rows), tmp_path / "run")
    folder, ids_BT = tmp_path / "run" / "sft", torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = AutoModelForCausalLM.from_pretrained(base)
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        assert not torch.equal(loaded.get_parameter(name), before.get_parameter(name))
    peft = PeftModel.from_pretrained(before, folder / "adapter")
    torch.testing.assert_close(loaded(ids_BT).logits, peft(input_ids=ids_BT).logits, atol=1e-5, rtol=1e-5)


def test_layers_that_peft_takes_for_experts_are_refused_before_training(
    tmp_path: Path, saved_model: Callable[[PreTrainedModel], Path]
) -> None:
    base = saved_model(build("deepseek_v3"))
    with raises("conflict", key="adapter.targets"):
        train(sft(base, tmp_path, TEXTS), tmp_path / "run")
    assert not [*(tmp_path / "run" / "sft" / "checkpoints").glob("*")]
