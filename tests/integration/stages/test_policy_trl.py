"""Advantages, losses and gradients against TRL's GRPOTrainer and RLOOTrainer on the same rollouts.

TRL's trainers hold the policy as a plain model with merged weights; only their sampling is replaced, by the responses
that our sampler gave. They score them, estimate the advantages with the old policy, and give the loss of a newer one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from pe_rlhf.config import PPOConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.prompt_order import PromptSet
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.export import merged_state
from pe_rlhf.stages.ppo_collect import collect_experience
from pe_rlhf.stages.ppo_update import update
from pe_rlhf.types import Experience, Rollout
from tests.runs import Tree
from tests.stage_support import byte_model
from tests.tiny import perturb

GROUP, TOKENS, BETA = 4, 9, 0.2
PROMPTS = [f"Prompt {i}:" for i in (1, 22, 333) for _ in range(GROUP)]
SCORES = [1.0, 0.0, 0.5, 2.0, 3.0, 3.0, 3.0, -1.0, 0.25, 0.5, -2.0, 0.0]
IN_REWARD: Tree = {"beta": BETA, "form": "penalty"}
IN_LOSS: Tree = {**IN_REWARD, "place": "loss", "estimator": "k3"}
NO_KL: Tree = {"beta": 0.0, "form": "penalty"}

# TRL's settings, then ours.
GRPO: dict[str, tuple[Tree, Tree]] = {
    "grpo": ({"loss_type": "grpo", "beta": BETA}, {"loss_aggregation": "sequence", "kl": IN_LOSS}),
    "dr grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": BETA},
        {"loss_aggregation": "constant", "group_std": False, "kl": IN_LOSS},
    ),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"loss_aggregation": "token", "clip_range_high": 0.28}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02},
        {"loss_aggregation": "sequence", "ratio": "sequence_mean", "clip_range": 0.01, "clip_range_high": 0.02},
    ),
    "gspo by tokens": (
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "beta": BETA},
        {"loss_aggregation": "token", "ratio": "sequence_mean", "kl": IN_LOSS},
    ),
}
RLOO: dict[str, tuple[Tree, Tree]] = {
    "rloo": ({"beta": BETA}, {"kl": IN_REWARD}),
    "rloo without a KL": ({"beta": 0.0, "epsilon_high": 0.3}, {"clip_range_high": 0.3}),
}


class Given:
    """A reward source whose scores are given."""

    def score(self, *_: Any) -> Tensor:
        return torch.tensor(SCORES)


class Recorder(RoleOptimizer):
    """An optimizer that keeps the loss and the gradients of an update, and takes no step."""

    loss = 0.0

    def backward(self, loss: Tensor) -> None:
        self.loss += loss.item()
        super().backward(loss)

    def step(self, again: Callable[[], object] | None = None) -> dict[str, float]:
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self._groups[0].parameters.items()
        }
        return {}


def trl_trainer(kind: type, config: type, model: Path, rollout: Rollout, settings: Tree, folder: Path) -> Any:
    class Replayed(kind):
        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            ids = [list(response) for response in rollout.responses]
            return (ids, None) if kind is GRPOTrainer else ids

    arguments: Tree = {
        "per_device_train_batch_size": len(PROMPTS),
        "num_generations": GROUP,
        "max_completion_length": TOKENS,
        # Two updates on each rollout, so that the old log-probs are kept.
        "num_iterations": 2,
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 1,
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "temperature": 1.0,
        **settings,
    }
    if kind is GRPOTrainer:  # the KL as it was published, not times the ratio (DeepSeek-V3.2)
        arguments["use_bias_correction_kl"] = False
    trainer = Replayed(
        model=str(model),
        args=config(str(folder), **arguments),
        reward_funcs=lambda completions, **_: SCORES,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def load_policy(model: PreTrainedModel, backbone: Backbone) -> None:
    model.load_state_dict(merged_state(backbone, "policy"), strict=False)


def ours(backbone: Backbone, rollout: Rollout, config: PPOConfig) -> Experience:
    codec, prompts = TextCodec(backbone.tokenizer), PromptSet([*PROMPTS], rollout.prompts, {})
    return collect_experience(backbone, Given(), codec, prompts, rollout, config.kl.beta, config)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*GRPO, *RLOO])
def test_losses_and_gradients_are_those_of_trl(tmp_path: Path, name: str) -> None:
    model = byte_model(tmp_path / "model", pad_is_eos=False, initializer_range=0.2, eos_token_id=0)
    backbone = load_backbone(model)
    backbone.add_adapter("policy", rank=4, alpha=8)
    perturb(backbone, "policy", 0.1)
    theirs, settings = (GRPO | RLOO)[name]
    own: Tree = {"advantage": "group_mean"} if name in GRPO else {"advantage": "rloo", "ratio": "sequence"}
    own |= {} if name in GRPO else {"loss_aggregation": "sequence"}
    rollout_settings = {"max_new_tokens": TOKENS, "samples_per_prompt": GROUP, "mismatch_limit": 9}
    config = PPOConfig.model_validate(
        {"prompts": "unused", "rollout": rollout_settings, "epochs": 1, "minibatches": 1, "kl": NO_KL}
        | {"micro_batch_tokens": 64, **own, **settings}
    )
    ids = [backbone.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    rollout = HFRollout(backbone, "policy", config.rollout).generate(ids, seed=2)
    # Some end early.
    rollout = Rollout(
        ids,
        [row[: 3 + i % 7] for i, row in enumerate(rollout.responses)],
        [row[: 3 + i % 7] for i, row in enumerate(rollout.logprobs)],
        ["length"] * len(ids),
        0,
    )
    kind, arguments = (GRPOTrainer, GRPOConfig) if name in GRPO else (RLOOTrainer, RLOOConfig)
    trainer = trl_trainer(kind, arguments, model, rollout, theirs, tmp_path / "trl")
    load_policy(trainer.model, backbone)
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS])
    experience = ours(backbone, rollout, config)

    assert [row[: len(ids)] for row, ids in zip(batch["completion_ids"].tolist(), rollout.responses, strict=True)] == (
        rollout.responses
    )
    advantages_B = experience.advantages_BR[:, 0]
    torch.testing.assert_close(advantages_B, batch["advantages"], atol=1e-5, rtol=1e-5)

    perturb(backbone, "policy", 0.05)  # the newer policy
    load_policy(trainer.model, backbone)
    trainer.model.zero_grad()
    wanted = trainer.compute_loss(trainer.model, batch)
    wanted.backward()
    groups = [RoleGroup("policy", backbone.role_parameters("policy"), 1e-3)]
    optimizer = Recorder(groups, config.optimizer, 100)
    metrics = update(backbone, optimizer, experience, config.kl.beta, config, 0, 0)

    assert optimizer.loss == pytest.approx(wanted.item(), abs=1e-5)
    assert abs(wanted.item()) > 1e-3
    assert 0 < metrics["clip_fraction"] < 1
    weights = dict(trainer.model.named_parameters())
    parameters = backbone.role_parameters("policy")
    for module in {key.rpartition(".")[0] for key in parameters}:
        gradient_OI = weights[f"{module}.weight"].grad
        A_RI, B_OR = (parameters[f"{module}.lora_{side}"].detach() for side in "AB")
        for side, expected in (("A", 2 * B_OR.T @ gradient_OI), ("B", 2 * gradient_OI @ A_RI.T)):
            torch.testing.assert_close(optimizer.gradients[f"{module}.lora_{side}"], expected, atol=1e-5, rtol=1e-3)
