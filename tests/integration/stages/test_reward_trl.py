"""The reward stage against TRL's RewardTrainer: same model, adapter, data and order, so the same losses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.system.seeding import permutation
from tests.runs import Tree, read_jsonl, write_jsonl
from tests.stage_support import byte_model, run

PAIRS = 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 1e-2


def pairs() -> list[Tree]:
    """Plain explicit pairs of many lengths; a space starts each response, so tokens do not straddle the seam."""
    words = ["stone", "river", "lamp", "cloud", "paper", "green", "quick", "seven"]
    rows = []
    for i in range(PAIRS):
        prompt = f"Say {words[i % 8]} {'again ' * (i % 3)}and then:"
        rows.append({"prompt": prompt, "chosen": f" {words[-i % 8]}" * (1 + i % 5), "rejected": f" no {words[i % 7]}"})
    return rows


class Recorder(RewardTrainer):
    """TRL's trainer, noting the loss and the scores of each step."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.losses: list[float] = []
        super().__init__(*arguments, **named)

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        loss = super().compute_loss(*arguments, **named)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss


def trl_trainer(model: Path, rows: list[Tree], initial: dict[str, Tensor], folder: Path) -> Recorder:
    """TRL's trainer with our initial A and head in PEFT's adapter."""
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    settings: Tree = {"max_grad_norm": 1e9, "adam_epsilon": 1e-5, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    batches: Tree = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    quiet: Tree = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False, "use_cpu": True}
    trainer = Recorder(
        model=classifier,
        args=RewardConfig(
            str(folder), learning_rate=LEARNING_RATE, gradient_checkpointing=False, **settings | batches | quiet
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["score"], task_type="SEQ_CLS"
        ),
    )
    assert trainer.model is not None
    named = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            if "lora_A" in name:
                parameter.copy_(initial[name.removeprefix("base_model.model.").removesuffix(".default.weight")])
            elif "modules_to_save" in name:
                parameter.copy_(initial["head.weight"][None])
            elif "lora_B" in name:
                assert not parameter.any()
    return trainer


def test_losses_are_those_of_trl(tmp_path: Path) -> None:
    model = byte_model(tmp_path / "model", pad_is_eos=False, initializer_range=0.1)
    rows, seed = pairs(), 3
    tree = {
        "model": str(model),
        "seed": seed,
        "adapter": {"rank": 4, "alpha": 8},
        "reward": {
            "data": str(write_jsonl(tmp_path / "train.jsonl", rows)),
            "eval_data": str(write_jsonl(tmp_path / "held_out.jsonl", rows[:4])),
            "optimizer": {"max_grad_norm": 1e9, "schedule": "constant", "warmup_ratio": 0.0, "eps": 1e-5},
            "learning_rate": LEARNING_RATE,
            "batch_size": 4,
        },
    }
    run(tree, tmp_path / "run")
    ours = [line["loss"] for line in read_jsonl(tmp_path / "run" / "reward" / "metrics.jsonl")]

    backbone = load_backbone(model)
    backbone.add_adapter("reward", rank=4, alpha=8, seed=seed)
    ordered = [rows[i] for i in permutation(PAIRS, seed, "reward", 0)]
    trainer = trl_trainer(model, ordered, backbone.role_state("reward"), tmp_path / "trl")
    assert_same_tokens(backbone, trainer, ordered)
    trainer.train()

    assert len(ours) == len(trainer.losses) == 8
    assert ours == pytest.approx(trainer.losses, rel=1e-4)
    assert min(ours) < 0.8 * max(ours)  # it moved far enough for a difference to show


def assert_same_tokens(backbone: Backbone, trainer: Recorder, rows: list[Tree]) -> None:
    """Both sides train on the prompt's tokens, the response's, and EOS."""
    codec = TextCodec(backbone.tokenizer)
    assert isinstance(trainer.train_dataset, Dataset)
    for row, tokenised in zip(rows, trainer.train_dataset.to_list(), strict=True):
        for side in ("chosen", "rejected"):
            prompt, response = codec.encode_pair(row["prompt"], row[side])
            assert prompt + response == tokenised[f"{side}_ids"]
            assert response[-1] == backbone.eos_token_ids[0] != backbone.pad_token_id
