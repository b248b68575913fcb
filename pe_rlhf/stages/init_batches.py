"""The batch and the loss that a stage gives an init that looks at data; the gradient is taken at the anchor.

The reward stage gives the pairwise loss. The PPO stage gives the policy loss on responses of the anchor, scored by the
recipe's reward; for a fresh critic, the value loss on the returns of those responses.

A fresh head is zero, and with a zero head the loss has no gradient in any layer. So the gradient is taken after the
head has made one gradient step: it is the first gradient that training would see. The length of that step only scales
the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pe_rlhf.adapters.gradients import Probe, ProbedStatistics
from pe_rlhf.adapters.kind import kind_of
from pe_rlhf.adapters.layer_statistics import Need
from pe_rlhf.algo.experience import shape_and_estimate
from pe_rlhf.algo.logprobs import token_logprobs
from pe_rlhf.algo.ppo_losses import Mean, policy_loss, value_loss
from pe_rlhf.config import AdapterConfig, PPOConfig, RewardConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.preference_pairs import Pairs
from pe_rlhf.data.prompt_order import PromptTable
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.micro_batches import micro_batches
from pe_rlhf.model.passes import for_each_token
from pe_rlhf.model.probes import decoder_of
from pe_rlhf.model.roles import ANCHOR
from pe_rlhf.scoring.scorers import Scorer
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.critic_start import fit_to_returns
from pe_rlhf.stages.ppo_collect import shaping_of
from pe_rlhf.system.seeding import derive_seed, permutation
from pe_rlhf.types import Sequences
from reward.errors import InputError
from reward.losses import pairwise_loss


@dataclass(frozen=True)
class InitPass:
    """One forward pass: its rows of the batch, their tokens, and the batch (0 or 1) and sample of each sequence."""

    index: Tensor
    sequences: Sequences
    batch_B: Tensor
    sample_B: Tensor

    def probe(self, loss: Callable[[InitPass], Tensor]) -> Probe:
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
        batch, batch_B = pairs.subset(rows), torch.tensor(batches)
        cut = micro_batches(batch.costs(packed=False), config.micro_batch_tokens, padded=True)
        # Chosen and rejected response of a pair are one sample.
        parts = [InitPass(index, batch.take(index), batch_B[index].repeat(2), index.repeat(2)) for index in cut]

        def loss(scores_B: Tensor, part: InitPass) -> Tensor:
            chosen_B, rejected_B = scores_B.chunk(2)
            losses = pairwise_loss(
                chosen_B,
                rejected_B,
                margin_B=batch.margins(part.index).to(scores_B.device),
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
    returns_BR: Tensor | None
    batches_B: Tensor


class AnchorRollouts:
    """Responses of the anchor to some of the stage's prompts, sampled and scored when an init first asks for them."""

    def __init__(
        self,
        context: StageContext[PPOConfig],
        backbone: Backbone,
        scorer: Scorer,
        codec: TextCodec,
        prompts: PromptTable,
        adapter: AdapterConfig,
        critic_start: str | None = None,
    ) -> None:
        self._context, self._backbone, self._scorer, self._codec = context, backbone, scorer, codec
        self._prompts = prompts
        self._config, self._seed = context.config, context.recipe.seed
        self._adapter, self._critic_start = adapter, critic_start
        self._batch: AnchorBatch | None = None

    def policy_statistics(self) -> ProbedStatistics:
        """Statistics under the policy loss: at the anchor the ratio is 1, and its gradient the policy gradient."""
        return ProbedStatistics(self._backbone.base_layer, self._policy_probes)

    def value_statistics(self) -> ProbedStatistics:
        """Statistics under the value loss of a fresh critic."""
        return ProbedStatistics(self._backbone.base_layer, self._value_probes)

    def _policy_probes(self, need: Need) -> list[Probe]:
        batch = self._sampled(need)
        lengths_B, config = batch.sequences.response_lengths_B, self._config
        mean = Mean(config.loss_aggregation, int(lengths_B.sum()), len(lengths_B), config.rollout.max_new_tokens)

        def loss(part: InitPass) -> Tensor:
            hidden_NH = _response_hidden(_hidden(self._backbone, part.sequences), part.sequences)
            targets_N = part.sequences.targets_N.to(hidden_NH.device)
            temperature = config.rollout.temperature
            logprobs_N, _ = token_logprobs(hidden_NH, self._backbone.logits_head, targets_N, temperature)
            advantages_N = batch.advantages_BR[part.index][batch.sequences.mask_BR[part.index]].to(logprobs_N)
            return policy_loss(
                logprobs_N,
                logprobs_N.detach(),
                advantages_N,
                clip_range=config.clip_range,
                divisor=mean.divisor,
                weights_N=mean.weights(lengths_B[part.index]).to(logprobs_N),
                ratio=config.ratio,
                lengths=lengths_B[part.index].tolist(),
            ).loss

        return [part.probe(loss) for part in self._parts(batch)]

    def _value_probes(self, need: Need) -> list[Probe]:
        batch = self._sampled(need)
        returns_BR = batch.returns_BR
        assert returns_BR is not None  # asked for by a critic
        tokens = int(batch.sequences.response_lengths_B.sum())

        def loss(values_N: Tensor, part: InitPass) -> Tensor:
            mask_BR = batch.sequences.mask_BR[part.index]
            returns_N = returns_BR[part.index][mask_BR].to(values_N)
            clip_range = self._config.value_clip_range
            return value_loss(values_N, values_N.detach(), returns_N, clip_range=clip_range, tokens=tokens).loss

        return _head_probes(self._backbone, self._parts(batch), _response_hidden, loss)

    def _parts(self, batch: AnchorBatch) -> list[InitPass]:
        cut = micro_batches(batch.sequences.lengths_B, self._config.micro_batch_tokens, padded=True)
        return [InitPass(index, batch.sequences.take(index), batch.batches_B[index], index) for index in cut]

    @torch.no_grad()
    def _sampled(self, need: Need) -> AnchorBatch:
        if self._batch is not None:
            return self._batch
        config, backbone = self._config, self._backbone
        rows, batches = _batch_rows(len(self._prompts), need, self._adapter, self._seed, "ppo")
        # Estimators that compare the responses to a prompt get as many of each as in a rollout.
        samples = config.rollout.samples_per_prompt if config.compares_groups else 1
        rows, batches = ([each for each in of for _ in range(samples)] for of in (rows, batches))
        groups_B = torch.arange(len(rows)) // samples
        asked, seed = self._prompts.take(rows), derive_seed(self._seed, "init rollout")
        rollout = self._context.sample_once(backbone, ANCHOR, config.rollout, asked.ids, seed)
        sequences = Sequences.of(rollout, backbone.pad_token_id)
        texts = self._codec.texts(rollout)
        scores_B = self._scorer.score(asked.prompts, texts, sequences, asked.columns)
        mask_BR = sequences.mask_BR
        no_kl_BR = torch.zeros(mask_BR.shape)  # at the anchor the KL is zero, token by token
        values_BR = no_kl_BR if config.has_critic else None
        shaping = shaping_of(config, config.kl.beta)
        if (start := self._critic_start) is not None:
            budget, compute = config.micro_batch_tokens, backbone.response_values
            values_BR = for_each_token(backbone, start, sequences, budget, compute)
            scale, shift = fit_to_returns(values_BR, scores_B, mask_BR, rollout.truncated_B, shaping)
            values_BR = scale * values_BR + shift
        estimate = shape_and_estimate(scores_B, no_kl_BR, values_BR, mask_BR, rollout.truncated_B, groups_B, shaping)
        self._batch = AnchorBatch(sequences, estimate.advantages_BR, estimate.returns_BR, torch.tensor(batches))
        return self._batch


# ---- shared ---------------------------------------------------------------------------------------------------------


def _batch_rows(count: int, need: Need, adapter: AdapterConfig, seed: int, stage: str) -> tuple[list[int], list[int]]:
    """The rows of the init's batch or batches, and which batch each belongs to.

    The same on every rank: it is a few sequences once, and every rank needs the whole gradient.
    """
    size = kind_of(adapter).batch_size
    batches = 2 if need == "two gradients" else 1
    rows = permutation(count, seed, stage, "init")[: size * batches]
    if len(rows) < batches:
        raise InputError(
            f"{stage}: the adapter's init needs two batches, and there is {count} row of data",
            kind="empty",
            key=f"{stage}.{'data' if stage == 'reward' else 'prompts'}",
            fix="give it more data, or use another init",
        )
    # With little data the batches get smaller, but none is empty.
    numbered = [(row, position * batches // len(rows)) for position, row in enumerate(rows)]
    return [row for row, _ in numbered], [batch for _, batch in numbered]


def _hidden(backbone: Backbone, sequences: Sequences) -> Tensor:
    """The anchor's last hidden states _BTH. Not through the backbone: it may recompute blocks, and hooks fire twice."""
    return decoder_of(backbone.model)(input_ids=sequences.ids_BT.to(backbone.device), use_cache=False).last_hidden_state


def _last_hidden(hidden_BTH: Tensor, sequences: Sequences) -> Tensor:
    """At the last token of each row, _BH."""
    rows_B = torch.arange(len(sequences), device=hidden_BTH.device)
    return hidden_BTH[rows_B, sequences.lengths_B.to(hidden_BTH.device) - 1]


def _response_hidden(hidden_BTH: Tensor, sequences: Sequences) -> Tensor:
    """At the positions that predict response tokens, _NH."""
    return hidden_BTH[sequences.predicts_BT.to(hidden_BTH.device)]


def _head_probes(
    backbone: Backbone,
    parts: list[InitPass],
    features: Callable[[Tensor, Sequences], Tensor],
    loss: Callable[[Tensor, InitPass], Tensor],
) -> list[Probe]:
    """Probes of a loss on the numbers that a fresh head makes of some hidden states, one step on from zero."""
    weight_H = _first_head_step(backbone, parts, features, loss)

    def probe(part: InitPass) -> Tensor:
        return loss(features(_hidden(backbone, part.sequences), part.sequences).float() @ weight_H, part)

    return [part.probe(probe) for part in parts]


def _first_head_step(
    backbone: Backbone,
    parts: list[InitPass],
    features: Callable[[Tensor, Sequences], Tensor],
    loss: Callable[[Tensor, InitPass], Tensor],
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
