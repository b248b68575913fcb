"""What the stages give an init that looks at data: a batch of their own, under their own loss, at the anchor.

reward: the pairwise loss. ppo: the policy gradient of responses that the anchor sampled, scored by the recipe's reward;
for a fresh critic the value loss on their returns.

A fresh head is zero, and behind it the loss has no gradient for any layer. So the gradient is taken with the head one
gradient step away from zero, in the direction of that step: it is the first gradient that training would see. The
length of the step only scales the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pe_rlhf.adapters.gradients import Probe, ProbedStatistics
from pe_rlhf.adapters.layer_statistics import Need
from pe_rlhf.adapters.lora.init_registry import init_of
from pe_rlhf.algo.gae import gae
from pe_rlhf.algo.logprobs import token_logprobs
from pe_rlhf.algo.masked import masked_whiten
from pe_rlhf.algo.ppo_losses import policy_loss, value_loss
from pe_rlhf.algo.rewards import adjust_scores, shape_rewards
from pe_rlhf.config import AdapterConfig, PPOConfig, RewardConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.preference_pairs import Pairs
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.micro_batches import micro_batches
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.scoring.scorers import Scorer
from pe_rlhf.stages.ppo_collect import per_token
from pe_rlhf.system.seeding import derive_seed, permutation
from pe_rlhf.types import Sequences
from reward.errors import InputError
from reward.losses import pairwise_loss
from reward.records import Prompt


@dataclass(frozen=True)
class Part:
    """One forward pass: the data rows in it, the tokens, and each token row's batch (0 or 1) and sample."""

    rows: list[int]
    sequences: Sequences
    batch_B: Tensor
    sample_B: Tensor

    def probe(self, loss: Callable[[Part], Tensor]) -> Probe:
        """The pass with a loss."""
        mask_BT = torch.arange(self.sequences.ids_BT.shape[1])[None, :] < self.sequences.lengths_B[:, None]
        return Probe(partial(loss, self), mask_BT, self.batch_B, self.sample_B)


# ---- the reward stage -----------------------------------------------------------------------------------------------


def reward_statistics(
    backbone: Backbone, pairs: Pairs, adapter: AdapterConfig, config: RewardConfig, seed: int
) -> ProbedStatistics:
    """Statistics under the pairwise loss of a batch of training pairs."""

    def probes(need: Need) -> list[Probe]:
        rows, batches = _batch_rows(len(pairs), need, adapter, seed, "reward")
        parts = []
        lengths_B = pairs.budget_lengths(rows, packed=False)
        for index in micro_batches(lengths_B, config.micro_batch_tokens, padded=True):
            part = [rows[i] for i in index.tolist()]
            batch_B = torch.tensor([batches[i] for i in index.tolist()]).repeat(2)
            parts.append(Part(part, pairs.pack(part, backbone.pad_token_id), batch_B, index.repeat(2)))

        def loss(scores_B: Tensor, part: Part) -> Tensor:
            chosen_B, rejected_B = scores_B.chunk(2)
            margin_B = torch.tensor([pairs.margins[row] for row in part.rows], device=scores_B.device)
            losses = pairwise_loss(
                chosen_B,
                rejected_B,
                margin_B=margin_B,
                label_smoothing=config.label_smoothing,
                centering=config.centering,
            )
            return losses.loss_B.sum() / len(rows)

        return _head_probes(backbone, parts, _last_hidden, loss)

    return ProbedStatistics(backbone.base_layer, probes)


# ---- the ppo stage --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnchorBatch:
    """Responses of the anchor with advantages and returns _BR, and each row's batch (0 or 1)."""

    sequences: Sequences
    advantages_BR: Tensor
    returns_BR: Tensor
    batches: list[int]


class AnchorRollouts:
    """Responses of the anchor to some of the stage's prompts, sampled and scored when an init first asks for them."""

    def __init__(
        self,
        backbone: Backbone,
        scorer: Scorer,
        codec: TextCodec,
        prompts: tuple[Sequence[Prompt], Sequence[list[int]]],
        config: PPOConfig,
        adapter: AdapterConfig,
        seed: int,
    ) -> None:
        self._backbone, self._scorer, self._codec = backbone, scorer, codec
        self._texts, self._ids = prompts
        self._config, self._adapter, self._seed = config, adapter, seed
        self._batch: AnchorBatch | None = None

    def policy_statistics(self) -> ProbedStatistics:
        """Statistics under the policy loss: at the anchor the ratio is 1, and its gradient the policy gradient."""
        return ProbedStatistics(self._backbone.base_layer, self._policy_probes)

    def value_statistics(self) -> ProbedStatistics:
        """Statistics under the value loss of a fresh critic."""
        return ProbedStatistics(self._backbone.base_layer, self._value_probes)

    def _policy_probes(self, need: Need) -> list[Probe]:
        batch = self._sampled(need)
        tokens = int(batch.sequences.response_lengths_B.sum())

        def loss(part: Part) -> Tensor:
            hidden_NH = _response_hidden(_hidden(self._backbone, part.sequences), part.sequences)
            targets_N = part.sequences.targets_N.to(hidden_NH.device)
            temperature = self._config.rollout.temperature
            logprobs_N, _ = token_logprobs(hidden_NH, self._backbone.logits_head, targets_N, temperature)
            advantages_N = batch.advantages_BR[part.rows][batch.sequences.mask_BR[part.rows]].to(logprobs_N)
            old_N = logprobs_N.detach()
            clip_range = self._config.clip_range
            return policy_loss(logprobs_N, old_N, advantages_N, clip_range=clip_range, tokens=tokens).loss

        return [part.probe(loss) for part in self._parts(batch)]

    def _value_probes(self, need: Need) -> list[Probe]:
        batch = self._sampled(need)
        tokens = int(batch.sequences.response_lengths_B.sum())

        def loss(values_N: Tensor, part: Part) -> Tensor:
            mask_BR = batch.sequences.mask_BR[part.rows]
            returns_N = batch.returns_BR[part.rows][mask_BR].to(values_N)
            clip_range = self._config.value_clip_range
            return value_loss(values_N, values_N.detach(), returns_N, clip_range=clip_range, tokens=tokens).loss

        return _head_probes(self._backbone, self._parts(batch), _response_hidden, loss)

    def _parts(self, batch: AnchorBatch) -> list[Part]:
        batches_B = torch.tensor(batch.batches)
        return [
            Part(index.tolist(), batch.sequences.take(index), batches_B[index], index)
            for index in micro_batches(batch.sequences.lengths_B, self._config.micro_batch_tokens, padded=True)
        ]

    @torch.no_grad()
    def _sampled(self, need: Need) -> AnchorBatch:
        if self._batch is not None:
            return self._batch
        config, backbone = self._config, self._backbone
        rows, batches = _batch_rows(len(self._ids), need, self._adapter, self._seed, "ppo")
        seed = derive_seed(self._seed, "init rollout")
        rollout = HFRollout(backbone, "anchor", config.rollout).generate([self._ids[row] for row in rows], seed)
        sequences = Sequences.pack(rollout.prompts, rollout.responses, backbone.pad_token_id)
        texts = [self._codec.decode(ids) for ids in rollout.responses]
        scores_B = adjust_scores(
            self._scorer.score([self._texts[row] for row in rows], texts, sequences),
            rollout.truncated_B,
            sequences.response_lengths_B,
            missing_eos_penalty=config.missing_eos_penalty,
            missing_eos_replaces=config.missing_eos_replaces,
            length_penalty=config.length_penalty,
        )
        # At the anchor the KL is zero, token by token.
        mask_BR = sequences.mask_BR
        no_kl_BR = torch.zeros(mask_BR.shape)
        rewards_BR = shape_rewards(
            scores_B, no_kl_BR, mask_BR, beta=config.kl.beta, form=config.kl.form, kl_in_reward=True
        )
        values_BR = no_kl_BR
        if config.value_init != "fresh" and "reward" in backbone.roles:
            values_BR = per_token(backbone, sequences, config, self._values)
        advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, gamma=config.gamma, lam=config.lam)
        if config.whiten_advantages:
            advantages_BR = masked_whiten(advantages_BR, mask_BR)
        self._batch = AnchorBatch(sequences, advantages_BR, returns_BR, batches)
        return self._batch

    def _values(self, sequences: Sequences) -> Tensor:
        with self._backbone.role("reward"):
            return self._backbone.response_values(sequences)


# ---- shared ---------------------------------------------------------------------------------------------------------


def _batch_rows(count: int, need: Need, adapter: AdapterConfig, seed: int, stage: str) -> tuple[list[int], list[int]]:
    """The rows of the init's batch or batches, and which batch each belongs to.

    The same on every rank: it is a few sequences once, and every rank needs the whole gradient.
    """
    _, options = init_of(adapter)
    size: int = getattr(options, "batch_size", 8)
    batches = 2 if need == "two gradients" else 1
    rows = permutation(count, seed, stage, "init")[: size * batches]
    if len(rows) < batches:
        raise InputError(f"{stage}: the init {adapter.init!r} needs two batches, and there is {count} row of data")
    # With little data the batches get smaller, but none is empty.
    numbered = [(row, position * batches // len(rows)) for position, row in enumerate(rows)]
    return [row for row, _ in numbered], [batch for _, batch in numbered]


def _hidden(backbone: Backbone, sequences: Sequences) -> Tensor:
    """The anchor's last hidden states _BTH. Not through the backbone: it may recompute blocks, and hooks fire twice."""
    return backbone.model.base_model(input_ids=sequences.ids_BT.to(backbone.device), use_cache=False).last_hidden_state


def _last_hidden(hidden_BTH: Tensor, sequences: Sequences) -> Tensor:
    """At the last token of each row, _BH."""
    rows_B = torch.arange(len(sequences), device=hidden_BTH.device)
    return hidden_BTH[rows_B, sequences.lengths_B.to(hidden_BTH.device) - 1]


def _response_hidden(hidden_BTH: Tensor, sequences: Sequences) -> Tensor:
    """At the positions that predict response tokens, _NH."""
    return hidden_BTH[sequences.predicts_BT.to(hidden_BTH.device)]


def _head_probes(
    backbone: Backbone,
    parts: list[Part],
    features: Callable[[Tensor, Sequences], Tensor],
    loss: Callable[[Tensor, Part], Tensor],
) -> list[Probe]:
    """Probes of a loss on the numbers that a fresh head makes of some hidden states, one step on from zero."""
    weight_H = _first_head_step(backbone, parts, features, loss)

    def probe(part: Part) -> Tensor:
        return loss(features(_hidden(backbone, part.sequences), part.sequences).float() @ weight_H, part)

    return [part.probe(probe) for part in parts]


def _first_head_step(
    backbone: Backbone,
    parts: list[Part],
    features: Callable[[Tensor, Sequences], Tensor],
    loss: Callable[[Tensor, Part], Tensor],
) -> Tensor:
    """The weight of a head after a gradient step from zero, of length 1/√H: a number of ordinary size per state."""
    size: int = backbone.model.get_input_embeddings().embedding_dim  # type: ignore[assignment]
    weight_H = torch.zeros(size, device=backbone.device, requires_grad=True)
    for part in parts:
        with torch.no_grad():
            states = features(_hidden(backbone, part.sequences), part.sequences).float()
        with torch.enable_grad():
            loss(states @ weight_H, part).backward()
    assert weight_H.grad is not None
    step_H = -weight_H.grad
    return step_H / step_H.norm().clamp(min=1e-30) / size**0.5
