"""The gradients that the stages give to inits, of their own losses, against autograd on plain models without adapters.

And the theorem behind LoRA-GA on those gradients: no init of rank r takes a first step that is closer to G.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pe_rlhf.adapters.gradients import ProbedStatistics
from pe_rlhf.adapters.layer_statistics import LayerStatistics, Need
from pe_rlhf.config import LoRAConfig, PPOConfig, Recipe, RewardConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.preference_pairs import Pairs, PairTokens
from pe_rlhf.data.prompt_order import PromptSet
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.init_batches import AnchorRollouts, _batch_rows, reward_statistics
from pe_rlhf.system.seeding import derive_seed, permutation
from pe_rlhf.types import Sequences
from tests.failures import raises
from tests.runs import PPO
from tests.tiny import PAD, add_role, rows_of, tiny_model
from tests.unit.adapters.first_steps import assert_none_is_closer_than_lora_ga

RANK, SEED, BETA, LAMBDA = 3, 0, 0.25, 0.95
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
PAIRS = [
    PairTokens([5, 6], [20, 21, 1], [30, 1]),
    PairTokens([7], [22, 1], [31, 32, 33, 1], margin=0.5),
    PairTokens([8, 9, 10], [23, 24, 25, 1], [34, 1]),
]
ADAPTER = LoRAConfig(init="lora_ga", rank=RANK, init_options={"batch_size": 3})


class SumOfIds:
    """A reward that differs from response to response."""

    def score(self, prompts: object, responses: object, sequences: Sequences, columns: object = None) -> Tensor:
        return torch.tensor([float(sum(response) % 7) for _, response in rows_of(sequences)])


def hidden(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Last hidden states _TH of one sequence that stands by itself."""
    return model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]  # type: ignore[operator]


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    named = model.named_parameters()
    return {name.removesuffix(".weight"): p.grad for name, p in named if p.grad is not None and p.dim() == 2}


def head_after_one_step(states_NH: Tensor, weights_N: Tensor) -> Tensor:
    """A zero head's first step under a loss whose slope at row n is −weights_N[n]; of length 1/√H."""
    step_H = (weights_N[:, None] * states_NH.detach()).sum(0)
    return step_H / step_H.norm() / math.sqrt(len(step_H))


def of_the_reward_loss(model: PreTrainedModel) -> Tensor:
    chosen_H, rejected_H = (
        torch.stack([hidden(model, pair.prompt + response)[-1] for pair, response in side])
        for side in ([(pair, pair.chosen) for pair in PAIRS], [(pair, pair.rejected) for pair in PAIRS])
    )
    margins_B = torch.tensor([pair.margin for pair in PAIRS])
    # −log σ(z − m) falls by σ(m − z) per unit of z, which is 0 behind a zero head.
    head_H = head_after_one_step(chosen_H - rejected_H, torch.sigmoid(margins_B))
    return F.softplus(margins_B - (chosen_H - rejected_H) @ head_H).mean()


def sampled(backbone: Backbone, config: PPOConfig) -> list[tuple[list[int], list[int], list[float]]]:
    """Prompt, response and rewards-to-go of what the anchor says; the values before the critic has learnt are zero."""
    order = permutation(len(PROMPTS), SEED, "ppo", "init")
    engine = HFRollout(backbone, "anchor", config.rollout)
    rollout = engine.generate([PROMPTS[i] for i in order], derive_seed(SEED, "init rollout"))
    rows = []
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        reward = (1 - BETA) * (sum(response) % 7)
        rows.append((prompt, response, [reward * LAMBDA ** (len(response) - 1 - t) for t in range(len(response))]))
    return rows


def of_the_policy_loss(model: PreTrainedModel, backbone: Backbone, config: PPOConfig) -> Tensor:
    """REINFORCE with whitened advantages; GAE with no values is a discount by λ."""
    rows = sampled(backbone, config)
    every_N = torch.tensor([a for _, _, advantages in rows for a in advantages])
    mean, deviation = every_N.mean(), every_N.std(unbiased=False)
    loss = torch.zeros(())
    for prompt, response, advantages in rows:
        logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0]
        logprobs_TV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1] / config.rollout.temperature, -1)
        taken_T = logprobs_TV[torch.arange(len(response)), torch.tensor(response)]
        loss = loss - ((torch.tensor(advantages) - mean) / deviation * taken_T).sum()
    return loss / len(every_N)


def of_the_value_loss(model: PreTrainedModel, backbone: Backbone, config: PPOConfig) -> Tensor:
    """Half the squared error of a critic on the returns, which with no values are the advantages."""
    rows = sampled(backbone, config)
    states_NH = torch.cat([hidden(model, prompt + response)[len(prompt) - 1 : -1] for prompt, response, _ in rows])
    returns_N = torch.tensor([a for _, _, advantages in rows for a in advantages])
    head_H = head_after_one_step(states_NH, returns_N)
    return 0.5 * (states_NH @ head_H - returns_N).square().mean()


@pytest.fixture
def config() -> PPOConfig:
    rollout = {"max_new_tokens": 8, "temperature": 0.8}
    return PPOConfig.model_validate({**PPO, "rollout": rollout, "kl": {"beta": BETA}, "micro_batch_tokens": 12})


Found = tuple[ProbedStatistics, Callable[[PreTrainedModel], Tensor]]


@pytest.fixture(params=["reward", "policy", "value"])
def stage(
    request: pytest.FixtureRequest, config: PPOConfig, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Found:
    """What a stage gives to inits, and the loss that it is to be the gradient of."""
    backbone = load_backbone(tiny_model("llama"))
    if request.param == "reward":
        settings = RewardConfig.model_validate({"data": "pairs.jsonl", "micro_batch_tokens": 12})
        return reward_statistics(backbone, Pairs(PAIRS, PAD), ADAPTER, settings, SEED), of_the_reward_loss
    codec = TextCodec(tiny_tokenizer, "none")
    texts = [" ".join(f"w{i}" for i in ids) for ids in PROMPTS]
    context: StageContext[PPOConfig] = StageContext(Recipe(model="unused", seed=SEED, ppo=config), tmp_path, "ppo")
    rollouts = AnchorRollouts(context, backbone, SumOfIds(), codec, PromptSet([*texts], PROMPTS, {}), ADAPTER)
    if request.param == "policy":
        return rollouts.policy_statistics(), lambda model: of_the_policy_loss(model, backbone, config)
    return rollouts.value_statistics(), lambda model: of_the_value_loss(model, backbone, config)


def test_a_stage_gives_the_gradient_of_its_own_loss(stage: Found) -> None:
    source, loss = stage
    model = tiny_model("llama").requires_grad_(True)
    expected = gradients(model, loss(model))
    modules = [name for name in expected if ".layers." in name]
    assert len(modules) == 14
    found: dict[str, LayerStatistics] = {}
    source.visit(modules, "gradient", found.__setitem__)
    for name in modules:
        (gradient_OI,) = found[name].gradients_OI
        assert float(expected[name].norm()) > 1e-6
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient_OI, expected[name], atol=1e-4 * scale, rtol=1e-3, msg=name)


def test_behind_a_narrow_base_head_and_loss_are_wide() -> None:
    """The gradient of the reward loss on a bf16 base is that on an fp32 one, up to bf16's rounding."""
    settings = RewardConfig.model_validate({"data": "pairs.jsonl", "micro_batch_tokens": 12})
    found: list[dict[str, LayerStatistics]] = [{}, {}]
    modules = [name for name, _ in tiny_model("llama").named_modules() if name.endswith("_proj")]
    for dtype, statistics in zip((torch.float32, torch.bfloat16), found, strict=True):
        backbone = load_backbone(tiny_model("llama", dtype))
        source = reward_statistics(backbone, Pairs(PAIRS, PAD), ADAPTER, settings, SEED)
        source.visit(modules, "gradient", statistics.__setitem__)
    for name in modules:
        wide_OI, narrow_OI = (statistics[name].gradients_OI[0].float() for statistics in found)
        assert float((narrow_OI - wide_OI).norm() / wide_OI.norm()) < 0.1, name


def test_rewards_without_any_difference_give_a_critic_no_direction(
    config: PPOConfig, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Where every return is 0 the head's first step is 0 too, and so is the gradient: a number all the same."""

    class Nothing:
        def score(self, prompts: object, responses: object, sequences: Sequences, columns: object = None) -> Tensor:
            return torch.zeros(len(sequences))

    backbone, codec = load_backbone(tiny_model("llama")), TextCodec(tiny_tokenizer, "none")
    context: StageContext[PPOConfig] = StageContext(Recipe(model="unused", seed=SEED, ppo=config), tmp_path, "ppo")
    prompts = PromptSet([" ".join(f"w{i}" for i in ids) for ids in PROMPTS], PROMPTS, {})
    found: dict[str, LayerStatistics] = {}
    rollouts = AnchorRollouts(context, backbone, Nothing(), codec, prompts, ADAPTER)
    rollouts.value_statistics().visit(["model.layers.0.mlp.up_proj"], "gradient", found.__setitem__)
    (gradient_OI,) = found["model.layers.0.mlp.up_proj"].gradients_OI
    assert not gradient_OI.any()


def test_no_init_takes_a_first_step_closer_to_that_gradient_than_lora_ga(stage: Found) -> None:
    source, loss = stage
    model = tiny_model("llama").requires_grad_(True)

    def with_policy(init: str) -> Backbone:
        backbone = load_backbone(tiny_model("llama"))
        if init == "lora_ga":
            backbone.add_adapter("policy", init=init, rank=RANK, alpha=RANK, statistics=source)
        else:
            add_role(backbone, "policy", init, rank=RANK, alpha=RANK)
        return backbone

    assert_none_is_closer_than_lora_ga(gradients(model, loss(model)), RANK, with_policy)


@pytest.mark.parametrize(
    ("count", "need", "batches"),
    [
        (9, "gradient", [0, 0, 0]),
        (2, "gradient", [0, 0]),
        (9, "two gradients", [0, 0, 0, 1, 1, 1]),
        (5, "two gradients", [0, 0, 0, 1, 1]),
        (2, "two gradients", [0, 1]),
    ],
)
def test_the_rows_of_one_batch_or_two(count: int, need: Need, batches: list[int]) -> None:
    """Three rows a batch, the same ones for both needs; with little data smaller batches, but none that is empty."""
    rows, found = _batch_rows(count, need, ADAPTER, SEED, "reward")
    assert found == batches
    assert rows == permutation(count, SEED, "reward", "init")[: len(batches)]


def test_two_batches_of_one_row_are_refused() -> None:
    for stage, key in (("reward", "reward.data"), ("ppo", "ppo.prompts")):
        with raises("empty", key=key):
            _batch_rows(1, "two gradients", ADAPTER, SEED, stage)
