"""`update` against autograd through the full logits of plain models, one unpadded sequence at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from pe_rlhf.config import PPOConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
from pe_rlhf.stages.ppo_update import update
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.seeding import permutation
from pe_rlhf.types import Experience
from tests.failures import raises
from tests.stage_support import PlainRole, plain_role
from tests.tiny import backbone_with, perturb, ragged_sequences, rows_of

BETA, SEED, STEP = 0.3, 5, 2
ROLES = ("policy", "value")


class RecordingEngine(RoleOptimizer):
    """An optimizer that keeps the gradients of every step, as they were before clipping."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gradients: list[dict[str, Tensor]] = []

    def step(self, again: Callable[[], object] | None = None) -> dict[str, float]:
        named = {f"{group.role}/{name}": p for group in self._groups for name, p in group.parameters.items()}
        self.gradients.append({k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in named.items()})
        return super().step(again)


def config_of(**changes: Any) -> PPOConfig:
    rollout = {"max_new_tokens": 10, "mismatch_limit": 10, **changes.pop("rollout", {})}
    steps = {"epochs": 1, "minibatches": 1, "learning_rate": 1e-2, "value_learning_rate": 3e-2}
    return PPOConfig.model_validate(
        {"prompts": "unused.jsonl", "batch_size": 6, "rollout": rollout, **steps, **changes}
    )


def trained() -> Backbone:
    backbone = backbone_with(*ROLES)
    for role in ROLES:
        perturb(backbone, role, 0.05)
    return backbone


def optimizer_of(backbone: Backbone, config: PPOConfig) -> RecordingEngine:
    rates = (config.learning_rate, config.value_learning_rate or config.learning_rate)
    groups = [RoleGroup(role, backbone.role_parameters(role), rate) for role, rate in zip(ROLES, rates, strict=True)]
    return RecordingEngine(groups, config.optimizer, 100)


def experience_of(backbone: Backbone, temperature: float = 1.0) -> Experience:
    """Random metrics around those of the backbone, so far off that all the clips bite."""
    sequences = ragged_sequences().take(torch.tensor([0, 1, 2, 1, 0]))
    mask_BR = sequences.mask_BR
    generator = torch.Generator().manual_seed(8)

    def noise(size: float) -> Tensor:
        return torch.where(mask_BR, size * torch.randn(mask_BR.shape, generator=generator), 0.0)

    with torch.no_grad():
        now_BR, values_BR = torch.zeros(mask_BR.shape), torch.zeros(mask_BR.shape)
        with backbone.role("policy"):
            now_BR[mask_BR] = backbone.response_logprobs(sequences, temperature)[0]
        with backbone.role("value"):
            values_BR[mask_BR] = backbone.response_values(sequences)
    weights_BR = torch.where(mask_BR, torch.rand(mask_BR.shape, generator=generator) + 0.5, 1.0)
    return Experience(
        sequences=sequences,
        mask_BR=mask_BR,
        old_logprobs_BR=now_BR + noise(0.3),
        anchor_logprobs_BR=now_BR + noise(0.5),
        values_BR=values_BR + noise(0.3),
        advantages_BR=noise(1.0),
        returns_BR=values_BR + noise(1.0),
        weights_BR=weights_BR,
        scores_B=torch.zeros(len(sequences)),
    )


# ---- the naive implementation ---------------------------------------------------------------------------------------


def naive_losses(
    policy: PlainRole, value: PlainRole, experience: Experience, rows: list[int], config: PPOConfig
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss of the policy, loss of the critic, and the statistics, each a plain mean over the tokens of those rows.

    The loss of the policy is the mean that the recipe names.
    """
    policy_terms: list[list[Tensor]] = []
    value_terms = []
    statistics: dict[str, list[float]] = {name: [] for name in ("clip_fraction", "value_clip_fraction", "entropy")}
    clip, value_clip = config.clip_range, config.value_clip_range
    high = config.clip_range_high or clip
    texts = rows_of(experience.sequences)
    for i in rows:
        prompt, response = texts[i]
        logits_TV = policy.outputs(prompt + response)[0] / config.rollout.temperature
        values_T = value.numbers(prompt + response)
        policy_terms.append([])
        chosen_R = torch.log_softmax(logits_TV[len(prompt) - 1 : -1], dim=-1)[range(len(response)), response]
        log_ratio_R = chosen_R - experience.old_logprobs_BR[i, : len(response)]
        whole = {"token": None, "sequence": log_ratio_R.sum(), "sequence_mean": log_ratio_R.mean()}[config.ratio]
        for t, token in enumerate(response):
            distribution_V = torch.log_softmax(logits_TV[len(prompt) - 1 + t], dim=-1)
            log_p, v = distribution_V[token], values_T[len(prompt) - 1 + t]
            old, anchor = float(experience.old_logprobs_BR[i, t]), float(experience.anchor_logprobs_BR[i, t])
            advantage, weight = float(experience.advantages_BR[i, t]), float(experience.weights_BR[i, t])
            ratio = torch.exp(log_p - old if whole is None else whole)
            clipped = min(max(ratio.item(), 1 - clip), 1 + high)
            is_clipped = -advantage * clipped > -advantage * ratio.item()
            term = weight * (torch.tensor(-advantage * clipped) if is_clipped else -advantage * ratio)
            if config.kl.place == "loss":
                d = log_p - anchor
                term = term + BETA * {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[config.kl.estimator]
            policy_terms[-1].append(term)

            assert experience.values_BR is not None
            assert experience.returns_BR is not None
            old_v, target = float(experience.values_BR[i, t]), float(experience.returns_BR[i, t])
            error, now = (v - target) ** 2, v.item()
            clipped_error = (min(max(now, old_v - value_clip), old_v + value_clip) - target) ** 2
            value_is_clipped = clipped_error > (now - target) ** 2
            value_terms.append(0.5 * (torch.tensor(clipped_error) if value_is_clipped else error))
            statistics["clip_fraction"].append(float(is_clipped))
            statistics["value_clip_fraction"].append(float(value_is_clipped))
            statistics["entropy"].append(-(distribution_V.exp() * distribution_V).sum().item())
    means = {name: sum(values) / len(values) for name, values in statistics.items()}
    return aggregated(policy_terms, config), torch.stack(value_terms).mean(), means


def aggregated(terms: list[list[Tensor]], config: PPOConfig) -> Tensor:
    """The mean of terms of rows and tokens that the recipe names."""
    if config.loss_aggregation == "sequence":
        return torch.stack([torch.stack(row).mean() for row in terms]).mean()
    whole = torch.stack([term for row in terms for term in row])
    return whole.mean() if config.loss_aggregation == "token" else whole.sum() / (len(terms) * 10)


def trainable(role: PlainRole, backbone: Backbone, name: str) -> dict[str, Tensor]:
    return {f"{name}/{key}": role.factors[key] for key in backbone.role_parameters(name)}


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "micro-batches": {"micro_batch_tokens": 16},
    "clips": {"clip_range": 0.05, "value_clip_range": 0.4},
    "temperature": {"rollout": {"temperature": 0.6}},
    "k2 in the loss": {"kl": {"place": "loss", "estimator": "k2"}, "micro_batch_tokens": 16},
    "k3 in the loss": {"kl": {"place": "loss", "estimator": "k3"}, "rollout": {"temperature": 1.5}},
    "sequences": {"loss_aggregation": "sequence", "micro_batch_tokens": 16, "kl": {"place": "loss"}},
    "constant": {"loss_aggregation": "constant", "micro_batch_tokens": 16, "clip_range_high": 0.4},
    "gspo": {"ratio": "sequence_mean", "loss_aggregation": "sequence", "micro_batch_tokens": 16, "clip_range": 0.05},
    "whole responses": {"ratio": "sequence", "loss_aggregation": "sequence", "clip_range_high": 0.3},
    "whole responses, tokens": {"ratio": "sequence", "loss_aggregation": "token", "micro_batch_tokens": 16},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_the_whole_batch(name: str) -> None:
    config = config_of(**SETTINGS[name])
    backbone = trained()
    experience = experience_of(backbone, config.rollout.temperature)
    if config.ratio != "token":  # a response has one ratio, and so one advantage and one weight
        experience.weights_BR.fill_(1.0)
        advantages_B1 = torch.tensor([[1.0], [-0.5], [2.0], [0.7], [-1.2]])
        experience.advantages_BR.copy_(torch.where(experience.mask_BR, advantages_B1, 0.0))
    policy, value = plain_role(backbone, "policy"), plain_role(backbone, "value")
    policy_loss, value_loss, expected = naive_losses(policy, value, experience, list(range(5)), config)
    (policy_loss + value_loss).backward()

    optimizer = optimizer_of(backbone, config)
    base = backbone.base_fingerprint()
    metrics = update(backbone, optimizer, experience, BETA, config, SEED, STEP)
    wanted = trainable(policy, backbone, "policy") | trainable(value, backbone, "value")
    (gradients,) = optimizer.gradients
    assert gradients.keys() == wanted.keys()
    for key, leaf in wanted.items():
        assert leaf.grad is not None
        assert leaf.grad.any(), key
        torch.testing.assert_close(gradients[key], leaf.grad, atol=1e-5, rtol=1e-3)

    assert backbone.base_fingerprint() == base
    assert 0 < expected["clip_fraction"] < 1
    assert 0 < expected["value_clip_fraction"] < 1
    for statistic, mean in expected.items():
        assert metrics[statistic] == pytest.approx(mean, abs=1e-4)
    assert metrics["value_loss"] == pytest.approx(value_loss.item(), abs=1e-4)
    if config.kl.place == "reward":
        assert metrics["policy_loss"] == pytest.approx(policy_loss.item(), abs=1e-4)
    norms = {
        role: torch.cat([leaf.grad.flatten() for key, leaf in wanted.items() if key.startswith(role)]).norm().item()  # type: ignore[union-attr]
        for role in ROLES
    }
    for role, norm in norms.items():
        assert metrics[f"{role}_grad_norm"] == pytest.approx(norm, rel=1e-3)
    mask_BR = experience.mask_BR
    with torch.no_grad():
        fresh = trained()
        with fresh.role("policy"):
            now_N, _ = fresh.response_logprobs(experience.sequences, config.rollout.temperature)
    mismatch = (now_N - experience.old_logprobs_BR[mask_BR]).abs().mean().item()
    assert metrics["logprob_mismatch"] == pytest.approx(mismatch, rel=1e-3)
    weights_N = (now_N - experience.old_logprobs_BR[mask_BR]).double().exp()
    assert metrics["logprob_mismatch_max"] == pytest.approx(weights_N.log().abs().max().item(), rel=1e-3)
    share = weights_N.sum().item() ** 2 / (len(weights_N) * weights_N.square().sum().item())
    assert metrics["effective_sample_size"] == pytest.approx(share, rel=1e-3)


def test_nothing_is_trained_on_a_batch_of_another_policy() -> None:
    config = config_of(rollout={"mismatch_limit": 0.01})
    backbone = trained()
    optimizer = optimizer_of(backbone, config)
    before = backbone.role_state("policy")
    with raises("mismatch", TrainingError, key="mismatch_limit"):
        update(backbone, optimizer, experience_of(backbone), BETA, config, SEED, STEP)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.role_state("policy").items())
    assert optimizer.gradients == []


def test_a_whole_update_is_adamw_on_those_losses() -> None:
    """Two epochs of two minibatches, with clipping and a learning rate for each role."""
    config = config_of(epochs=2, minibatches=2, optimizer={"max_grad_norm": 0.5, "weight_decay": 0.1})
    backbone = trained()
    experience = experience_of(backbone)
    policy, value = plain_role(backbone, "policy"), plain_role(backbone, "value")
    leaves = {role: trainable(plain, backbone, role) for role, plain in (("policy", policy), ("value", value))}
    settings: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.1}
    optimizers = {
        role: torch.optim.AdamW(leaves[role].values(), lr=rate, **settings)
        for role, rate in (("policy", 1e-2), ("value", 3e-2))
    }
    for epoch in range(2):
        order = permutation(5, SEED, "minibatches", STEP, epoch)
        for rows in (order[:3], order[3:]):
            policy_loss, value_loss, _ = naive_losses(policy, value, experience, rows, config)
            for role, loss in (("policy", policy_loss), ("value", value_loss)):
                optimizers[role].zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(leaves[role].values(), 0.5)
                optimizers[role].step()

    optimizer = optimizer_of(backbone, config)
    metrics = update(backbone, optimizer, experience, BETA, config, SEED, STEP)
    assert optimizer.steps == 4
    assert (metrics["lr_policy"], metrics["lr_value"]) == pytest.approx((1e-2, 3e-2))
    for role in ROLES:
        for name, parameter in backbone.role_parameters(role).items():
            wanted = leaves[role][f"{role}/{name}"]
            torch.testing.assert_close(parameter.detach(), wanted.detach(), atol=2e-4, rtol=1e-3, msg=f"{role} {name}")


def parameters_after(config: PPOConfig, seed: int = SEED) -> dict[str, Tensor]:
    backbone = trained()
    experience = experience_of(backbone)
    update(backbone, optimizer_of(backbone, config), experience, BETA, config, seed, STEP)
    return {f"{role} {name}": p.detach() for role in ROLES for name, p in backbone.role_parameters(role).items()}


def test_micro_batches_change_rounding_only() -> None:
    whole, parts = (
        parameters_after(config_of(epochs=2, minibatches=2, learning_rate=1e-3, micro_batch_tokens=tokens))
        for tokens in (10_000, 16)
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_without_a_critic_the_policy_learns_the_same(aggregation: Literal["token", "sequence", "constant"]) -> None:
    config = config_of(epochs=2, minibatches=2, loss_aggregation=aggregation)
    with_critic = parameters_after(config)
    backbone = trained()
    experience = dataclasses.replace(experience_of(backbone), values_BR=None, returns_BR=None)
    groups = [RoleGroup("policy", backbone.role_parameters("policy"), config.learning_rate)]
    metrics = update(backbone, RoleOptimizer(groups, config.optimizer, 100), experience, BETA, config, SEED, STEP)
    assert not [name for name in metrics if "value" in name]
    for name, parameter in backbone.role_parameters("policy").items():
        assert torch.equal(parameter, with_critic[f"policy {name}"])


def test_the_order_inside_a_minibatch_changes_rounding_only() -> None:
    config = config_of(epochs=2, minibatches=1, learning_rate=1e-3)
    assert permutation(5, 1, "minibatches", STEP, 0) != permutation(5, 2, "minibatches", STEP, 0)
    first, second = parameters_after(config, seed=1), parameters_after(config, seed=2)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_every_pass_takes_every_response_once() -> None:
    """Advantages that are 1 in one response and 0 in all others: over a pass, each has its gradient exactly once."""
    config = config_of(minibatches=3, epochs=2, clip_range=10.0)
    for row in range(5):
        backbone = trained()
        experience = experience_of(backbone)
        experience.advantages_BR.zero_()
        experience.advantages_BR[row] = experience.mask_BR[row].float()
        optimizer = optimizer_of(backbone, config)
        update(backbone, optimizer, experience, BETA, config, SEED, STEP)
        moved = [any(g.any() for key, g in step.items() if key.startswith("policy")) for step in optimizer.gradients]
        assert len(moved) == 6
        assert (sum(moved[:3]), sum(moved[3:])) == (1, 1)
