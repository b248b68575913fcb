"""`collect` against plain models run on one unpadded sequence at a time, and loops over tokens."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pe_rlhf.config import PPOConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.prompt_order import PromptSet
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.scoring.scorers import AdapterScorer
from pe_rlhf.stages.ppo_collect import collect_experience, recomputes_old_logprobs
from pe_rlhf.types import Experience, Rollout
from tests.stage_support import plain_role
from tests.tiny import PAD, perturb, tiny_model

PROMPTS = [[5, 6, 7], [8], [9, PAD, 11, 12, 13], [8, 41], [33, 34, 35, 36], [22, 23], [14], [2, 3, 4]]
ENDS = [1, 7, 9, 30]
BETA = 0.1


def config_of(**changes: Any) -> PPOConfig:
    rollout = {"max_new_tokens": 10, "mismatch_limit": 10, **changes.pop("rollout", {})}
    return PPOConfig.model_validate({"prompts": "unused.jsonl", "batch_size": 8, "rollout": rollout, **changes})


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """All roles of a run, each moved away from where it starts; the policy's init has a B0 that is not zero."""
    backbone = load_backbone(tiny_model("llama", eos_token_id=ENDS))
    for role, init in (("policy", "pissa"), ("value", "lora"), ("reward", "lora")):
        backbone.add_adapter(role, init=init, rank=3, alpha=6)
        perturb(backbone, role, 0.1)
    return backbone


def sampled(backbone: Backbone, config: PPOConfig) -> Rollout:
    """A rollout with responses that ended, and ones that were cut."""
    rollout = HFRollout(backbone, "policy", config.rollout).generate(PROMPTS, seed=5)
    assert {"eos", "length"} == set(rollout.finish)
    assert len({len(response) for response in rollout.responses}) > 2
    return rollout


def collected(
    backbone: Backbone, tokenizer: PreTrainedTokenizerBase, rollout: Rollout, config: PPOConfig
) -> tuple[Experience, dict[str, float]]:
    scorer = AdapterScorer(backbone, "reward", config.micro_batch_tokens)
    prompts = PromptSet([str(tokenizer.decode(ids)) for ids in rollout.prompts], rollout.prompts, {})
    return collect_experience(backbone, scorer, TextCodec(tokenizer), prompts, rollout, BETA, config)


# ---- the naive implementation ---------------------------------------------------------------------------------------


@dataclass
class Naive:
    """Ragged lists, a list per response."""

    policy: list[list[float]]
    anchor: list[list[float]]
    values: list[list[float]]
    scores: list[float]
    rewards: list[list[float]]
    advantages: list[list[float]]
    returns: list[list[float]]
    old: list[list[float]]
    weights: list[list[float]]


@torch.no_grad()
def naive(backbone: Backbone, rollout: Rollout, config: PPOConfig) -> Naive:
    policy, anchor, value, reward = (plain_role(backbone, role) for role in ("policy", "anchor", "value", "reward"))
    n = Naive([], [], [], [], [], [], [], [], [])
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        whole, first = prompt + response, len(prompt) - 1
        for model, rows in ((policy, n.policy), (anchor, n.anchor)):
            logprobs_TV = torch.log_softmax(model.outputs(whole)[0] / config.rollout.temperature, dim=-1)
            rows.append([float(logprobs_TV[first + t, token]) for t, token in enumerate(response)])
        n.values.append(value.numbers(whole)[first:-1].tolist())
        n.scores.append(float(reward.numbers(whole)[-1]))
    rows = range(len(rollout.responses))
    correct = config.rollout.correction == "truncated_is"
    trainer = correct or config.rollout.old_logprobs == "trainer"
    n.old = n.policy if trainer else rollout.logprobs
    cap = config.rollout.correction_cap
    for i in rows:
        pairs = zip(n.policy[i], rollout.logprobs[i], strict=True)
        n.weights.append([min(math.exp(mine - its), cap) if correct else 1.0 for mine, its in pairs])
    for i in rows:
        n.rewards.append(naive_rewards(n, i, rollout, config))
    if config.whiten_rewards:
        everything = [r for row in n.rewards for r in row]
        deviation = math.sqrt(variance(everything))
        n.rewards = [[r / deviation for r in row] for row in n.rewards]
    for i in rows:
        advantages = naive_advantages(n, i, config)
        n.advantages.append(advantages)
        n.returns.append([a + v for a, v in zip(advantages, n.values[i], strict=True)])
    if config.whiten_advantages:
        everything = [a for row in n.advantages for a in row]
        mean, deviation = sum(everything) / len(everything), math.sqrt(variance(everything))
        n.advantages = [[(a - mean) / deviation for a in row] for row in n.advantages]
    return n


def naive_rewards(n: Naive, i: int, rollout: Rollout, config: PPOConfig) -> list[float]:
    """One reward per token of response i."""
    score = n.scores[i] - config.length_penalty * len(rollout.responses[i])
    if rollout.finish[i] == "length" and config.missing_eos_penalty is not None:
        score = -config.missing_eos_penalty if config.missing_eos_replaces else score - config.missing_eos_penalty
    rewards = []
    for log_p, log_q in zip(n.old[i], n.anchor[i], strict=True):
        d = log_p - log_q
        estimate = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[config.kl.estimator]
        rewards.append(-BETA * estimate if config.kl.place == "reward" else 0.0)
    rewards[-1] += (1 - BETA) * score if config.kl.form == "convex" else score
    return rewards


def naive_advantages(n: Naive, i: int, config: PPOConfig) -> list[float]:
    """Advantages of response i; the responses to a prompt come one after the other."""
    if config.advantage == "gae":
        return naive_gae(n.rewards[i], n.values[i], config.gamma, config.lam)
    if config.advantage == "reinforce_pp":
        to_go = [naive_gae(row, [0.0] * len(row), config.gamma, 1.0) for row in n.rewards]
        mean = sum(map(sum, to_go)) / sum(map(len, to_go))
        return [a - mean for a in to_go[i]]
    size = config.rollout.samples_per_prompt
    group = [sum(n.rewards[j]) for j in range(i - i % size, i - i % size + size)]
    own, mean = sum(n.rewards[i]), sum(group) / size
    if config.advantage == "rloo":
        return [own - (sum(group) - own) / (size - 1)] * len(n.rewards[i])
    deviation = math.sqrt(variance(group) * size / (size - 1)) + 1e-4 if config.group_std else 1.0
    return [(own - mean) / deviation] * len(n.rewards[i])


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_k (γλ)^k δ_{t+k}, as a double sum."""
    T = len(rewards)
    ahead = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * ahead[t] - values[t] for t in range(T)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, T)) for t in range(T)]


def variance(x: list[float]) -> float:
    mean = sum(x) / len(x)
    return sum((value - mean) ** 2 for value in x) / len(x)


def ragged(values_BR: Tensor, rollout: Rollout) -> list[list[float]]:
    """The rows of a padded tensor; there must be zeros in its padding."""
    rows = []
    for row, response in zip(values_BR.tolist(), rollout.responses, strict=True):
        rows.append(row[: len(response)])
        assert set(row[len(response) :]) <= {0.0}
    return rows


def assert_same(values_BR: Tensor, expected: list[list[float]], rollout: Rollout, tolerance: float = 2e-4) -> None:
    for found, wanted in zip(ragged(values_BR, rollout), expected, strict=True):
        assert found == pytest.approx(wanted, abs=tolerance)


# ---- the comparison -------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "penalty": {"kl": {"form": "penalty"}},
    "convex k2": {"kl": {"estimator": "k2"}},
    "penalty k3": {"kl": {"form": "penalty", "estimator": "k3"}},
    "convex, KL in the loss": {"kl": {"place": "loss"}},
    "penalty, KL in the loss": {"kl": {"place": "loss", "form": "penalty", "estimator": "k3"}},
    "missing EOS lowers": {"missing_eos_penalty": 1.5},
    "missing EOS replaces": {"missing_eos_penalty": 1.5, "missing_eos_replaces": True, "length_penalty": 0.1},
    "length": {"length_penalty": 0.2},
    "whitened rewards": {"whiten_rewards": True},
    "plain advantages": {"whiten_advantages": False, "gamma": 0.9, "lam": 0.7},
    "cool": {"rollout": {"temperature": 0.7}},
    "hot": {"rollout": {"temperature": 1.4}, "kl": {"estimator": "k3"}},
    "sampler": {"rollout": {"old_logprobs": "sampler"}},
    "trainer": {"rollout": {"old_logprobs": "trainer", "temperature": 0.9}},
    "correction": {"rollout": {"correction": "truncated_is", "correction_cap": 1.1}},
    "many micro-batches": {"micro_batch_tokens": 16},
    "rloo": {"advantage": "rloo", "rollout": {"samples_per_prompt": 4}},
    "rloo whitened": {"advantage": "rloo", "rollout": {"samples_per_prompt": 2}, "whiten_advantages": True},
    "grpo": {"advantage": "group_mean", "rollout": {"samples_per_prompt": 4}, "kl": {"place": "loss"}},
    "dr grpo": {"advantage": "group_mean", "group_std": False, "rollout": {"samples_per_prompt": 2}},
    "reinforce++": {"advantage": "reinforce_pp", "gamma": 0.9, "kl": {"form": "penalty", "estimator": "k2"}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_collect_agrees_with_loops(backbone: Backbone, tiny_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    config = config_of(**SETTINGS[name])
    rollout = sampled(backbone, config)
    if name in ("sampler", "trainer", "correction"):
        # A sampler that is a little off, as one of another dtype would be: now it matters whose log-probs are used.
        noise = torch.Generator().manual_seed(0)
        off = [[v + 0.2 * float(torch.randn((), generator=noise)) for v in row] for row in rollout.logprobs]
        rollout = dataclasses.replace(rollout, logprobs=off)
    expected = naive(backbone, rollout, config)
    experience, metrics = collected(backbone, tiny_tokenizer, rollout, config)

    assert experience.mask_BR.sum(dim=1).tolist() == [len(response) for response in rollout.responses]
    assert_same(experience.anchor_logprobs_BR, expected.anchor, rollout)
    assert_same(experience.old_logprobs_BR, expected.old, rollout)
    assert experience.scores_B.tolist() == pytest.approx(expected.scores, abs=2e-4)
    assert_same(experience.advantages_BR, expected.advantages, rollout, 1e-3)
    for found, wanted in zip(experience.weights_BR.tolist(), expected.weights, strict=True):
        assert found[: len(wanted)] == pytest.approx(wanted, abs=2e-4)

    old, anchor = ([x for row in rows for x in row] for rows in (expected.old, expected.anchor))
    flat_kl = [p - q for p, q in zip(old, anchor, strict=True)]
    assert metrics["kl"] == pytest.approx(sum(flat_kl) / len(PROMPTS), abs=1e-3)
    assert metrics["kl_per_token"] == pytest.approx(sum(flat_kl) / len(flat_kl), abs=1e-3)
    assert metrics["reward"] == pytest.approx(sum(expected.scores) / len(PROMPTS), abs=1e-3)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(variance(expected.scores)), abs=1e-3)
    assert metrics["response_length"] == pytest.approx(sum(map(len, rollout.responses)) / len(PROMPTS))
    assert metrics["truncated"] == pytest.approx(rollout.finish.count("length") / len(PROMPTS))
    if experience.values_BR is None or experience.returns_BR is None:
        assert config.advantage != "gae"
        assert experience.values_BR is experience.returns_BR is None
        assert not {"value", "explained_variance"} & metrics.keys()
    else:
        assert_same(experience.values_BR, expected.values, rollout)
        assert_same(experience.returns_BR, expected.returns, rollout, 1e-3)
        values, returns = ([x for row in rows for x in row] for rows in (expected.values, expected.returns))
        assert metrics["value"] == pytest.approx(sum(values) / len(values), abs=1e-3)
        residuals = [r - v for r, v in zip(returns, values, strict=True)]
        assert metrics["explained_variance"] == pytest.approx(1 - variance(residuals) / variance(returns), rel=1e-2)
    if name in ("trainer", "correction"):
        sampler = [x for row in rollout.logprobs for x in row]
        mismatch = sum(abs(a - b) for a, b in zip(old, sampler, strict=True)) / len(old)
        assert metrics["logprob_mismatch"] == pytest.approx(mismatch, abs=1e-3)
        assert mismatch > 0.1
    else:
        assert "logprob_mismatch" not in metrics


@pytest.mark.parametrize("truncation", [{"top_k": 8}, {"top_p": 0.5}])
def test_old_logprobs_are_computed_again_where_the_sampler_s_are_not_those_of_the_policy(
    backbone: Backbone, tiny_tokenizer: PreTrainedTokenizerBase, truncation: dict[str, float]
) -> None:
    """Truncation renormalises the sampler's log-probs; π_old is the full distribution's all the same."""
    settings = {**truncation, "allow_truncated_sampling": True, "old_logprobs": "sampler"}
    config = config_of(rollout=settings)
    rollout = sampled(backbone, config)
    experience, metrics = collected(backbone, tiny_tokenizer, rollout, config)
    assert_same(experience.old_logprobs_BR, naive(backbone, rollout, config).policy, rollout)
    assert metrics["logprob_mismatch"] > 0.05


@pytest.mark.parametrize(
    ("rollout", "fp32", "bf16"),
    [
        ({}, False, True),
        ({"old_logprobs": "sampler"}, False, False),
        ({"old_logprobs": "trainer"}, True, True),
        ({"old_logprobs": "sampler", "correction": "truncated_is"}, True, True),
        ({"old_logprobs": "sampler", "top_p": 0.9, "allow_truncated_sampling": True}, True, True),
        ({"old_logprobs": "sampler", "top_k": 5, "allow_truncated_sampling": True}, True, True),
        ({"old_logprobs": "sampler", "engine": "vllm", "ahead": 1}, True, True),
    ],
)
def test_when_old_logprobs_are_computed_again(
    backbone: Backbone, rollout: dict[str, Any], fp32: bool, bf16: bool
) -> None:
    config = config_of(rollout=rollout)
    assert recomputes_old_logprobs(backbone, config) is fp32
    assert recomputes_old_logprobs(load_backbone(tiny_model("llama", torch.bfloat16)), config) is bf16
