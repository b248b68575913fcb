"""A PEFT LoRA as a role: what PEFT computes with it, on a base that stays as it is; no other adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.names import find_adapter, resolve_model
from pe_rlhf.runs.peft_roles import check_start, load_start
from pe_rlhf.scoring.classifier import Classifier
from pe_rlhf.stages.add_roles import REWARD
from tests.failures import raises
from tests.runs import Tree, read_jsonl
from tests.stage_support import byte_model, run, write_prompts
from tests.tiny import tiny_model

IDS_BT = torch.tensor([[5, 6, 7, 8, 9], [20, 21, 22, 23, 24]])


def lora(base: Path, folder: Path, task: TaskType, **settings: Any) -> Path:
    """A LoRA of another make after training."""
    kind: Any = AutoModelForSequenceClassification if task == TaskType.SEQ_CLS else AutoModelForCausalLM
    more = {"num_labels": 1, "pad_token_id": 0} if task == TaskType.SEQ_CLS else {}
    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"} | settings
    model = get_peft_model(kind.from_pretrained(base, **more), LoraConfig(task_type=task, **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "score" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    model.save_pretrained(str(folder))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_role_computes_what_peft_computes(
    saved_model: Callable[[PreTrainedModel], Path], tmp_path: Path, family: str, rslora: bool
) -> None:
    base = saved_model(tiny_model(family))
    policy = lora(base, tmp_path / "policy", TaskType.CAUSAL_LM, use_rslora=rslora)
    rewards = lora(base, tmp_path / "rewards", TaskType.SEQ_CLS, use_rslora=rslora)
    backbone = load_backbone(base)
    before = backbone.base_fingerprint()
    load_start(backbone, "policy", str(policy), "ppo.start")
    load_start(backbone, "reward", str(rewards), "reward.start")
    plain = AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(backbone(IDS_BT).logits, plain(IDS_BT).logits)  # the anchor is the bare base
    with backbone.role("policy"):
        found = backbone(IDS_BT).logits
    torch.testing.assert_close(
        found, PeftModel.from_pretrained(plain, str(policy))(IDS_BT).logits, atol=1e-5, rtol=1e-5
    )
    with backbone.role("reward"):
        scores = backbone(IDS_BT).logits
    one_label = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    expected = PeftModel.from_pretrained(one_label, str(rewards))(IDS_BT).logits[:, 0]
    torch.testing.assert_close(scores[:, -1], expected, atol=1e-5, rtol=1e-5)
    assert backbone.base_fingerprint() == before


@pytest.mark.parametrize(
    ("said", "role"),
    [
        ({"use_dora": True}, "policy"),
        ({"rank_pattern": {"q_proj": 8}}, "policy"),
        ({"init_lora_weights": "pissa"}, "policy"),
        ({"bias": "all"}, "policy"),
        ({"peft_type": "IA3"}, "policy"),
        ({"task_type": "SEQ_CLS"}, "policy"),
        ({"modules_to_save": ["embed_tokens"]}, "reward"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    saved_model: Callable[[PreTrainedModel], Path], tmp_path: Path, said: Tree, role: str
) -> None:
    folder = lora(saved_model(tiny_model("llama")), tmp_path / "lora", TaskType.CAUSAL_LM)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with raises("conflict", key="ppo.start", file=folder):
        check_start(str(folder), role, "ppo.start")


def test_a_lora_of_another_model_and_no_lora_at_all(
    saved_model: Callable[[PreTrainedModel], Path], tmp_path: Path
) -> None:
    base = saved_model(tiny_model("llama"))
    folder = lora(base, tmp_path / "lora", TaskType.CAUSAL_LM)
    with raises("conflict", key="ppo.start", file=folder):
        load_start(load_backbone(tiny_model("gpt2")), "policy", str(folder), "ppo.start")
    for nothing in (str(base), str(tmp_path / "absent")):
        with raises("missing", key="reward.start", file=nothing):
            check_start(nothing, REWARD, "reward.start")


def test_an_adapter_of_the_hub(
    saved_model: Callable[[PreTrainedModel], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's client leaves it in its cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = saved_model(tiny_model("llama"))
    repository = tmp_path / "hub" / "models--org--sft-lora"
    folder = lora(base, repository / "snapshots" / ("a" * 40), TaskType.CAUSAL_LM)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert find_adapter("org/sft-lora") == folder
    assert resolve_model("org/sft-lora") == resolve_model(str(folder))
    backbone = load_backbone(base)
    load_start(backbone, "policy", "org/sft-lora", "ppo.start")
    assert backbone.adapter_spec("policy").settings.rank == 3  # type: ignore[attr-defined]
    with raises("missing", key="ppo.start", file="org/another"):
        load_start(backbone, "policy", "org/another", "ppo.start")


def test_runs_that_start_from_loras(tmp_path: Path) -> None:
    """A reward run from a LoRA, PPO from one, scored by it in three ways: as a role, merged, and as trained further."""
    base = byte_model(tmp_path / "model", pad_is_eos=True, initializer_range=0.3)
    policy = lora(base, tmp_path / "policy", TaskType.CAUSAL_LM)
    rewards = lora(base, tmp_path / "rewards", TaskType.SEQ_CLS)
    pairs = [{"prompt": f"P{i}:", "chosen": "a" * (i + 1), "rejected": "z"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    same = {"weight": 0.5, "normalise": "none"}
    tree: Tree = {
        "model": str(base),
        "threads": 1,
        "reward": {"data": str(tmp_path / "pairs.jsonl"), "start": str(rewards), "learning_rate": 1e-9},
        "ppo": {
            "prompts": write_prompts(tmp_path / "prompts.jsonl", ["One:", "Two:", "Three:", "Four:"]),
            "start": str(policy),
            "reward": [{"adapter": str(rewards), **same}, {"model": str(rewards), **same}, {"adapter": "stage"}],
            "rollout": {"max_new_tokens": 4},
            "steps": 1,
            "batch_size": 4,
        },
    }
    run(tree, tmp_path / "run")
    (line,) = read_jsonl(tmp_path / "run" / "ppo" / "metrics.jsonl")
    assert line["source_adapter_std"] == pytest.approx(line["source_adapter_2_std"], abs=1e-4)  # it has been centred
    assert line["kl"] > 1e-3  # the anchor is the bare base
    one_label = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=None)
    ids = [*AutoTokenizer.from_pretrained(base)("One:a")["input_ids"], 0]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(one_label, str(rewards))(torch.tensor([ids])).logits[0]
    scores = Classifier(str(rewards), torch.device("cpu"), torch.float32).score(["One:"], ["a"])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
