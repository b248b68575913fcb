"""The embedded rollout engine: transformers' `generate` with the KV cache, on the trainer's own backbone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from pe_rlhf.config import RolloutConfig, SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.loading import position_arguments, turns_by_length
from pe_rlhf.model.probes import decoder_of
from pe_rlhf.rollout.interface import stop_strings
from pe_rlhf.rollout.reading import FORCED_BR, ONE_TOKEN, PROMPTS, Reading, find_reading
from pe_rlhf.rollout.stops import StopsEarly
from pe_rlhf.system.determinism import cumulative
from pe_rlhf.system.distributed import is_sharded
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.system.progress import Advance
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.types import FinishReason, Rollout
from reward.errors import InputError

MERGED_UNASKED = 4 * 2**30  # bytes; by free memory instead, a resumed run might sample otherwise


class HFRollout:
    """Samples from a role by `generate`; there is nothing to sync, since the adapter is the trainer's own.

    In fp32 each rollout is sampled from fresh merged copies of the adapter's layers, up to 4 GiB of them, which are
    dropped after it.

    `on_progress` gets the number of finished responses.
    """

    def __init__(
        self, backbone: Backbone, role: str, config: SamplingConfig, on_progress: Advance | None = None
    ) -> None:
        self._backbone, self._role, self._config = backbone, role, config
        self._on_progress = on_progress
        self._version = 0
        self._readings: dict[bool, Reading] = {}  # of prompts of one token, and of longer ones
        self._stops = stop_strings(backbone, config)

    def sync(self, version: int, role: str | None = None) -> None:
        self._version, self._role = version, role or self._role

    def close(self) -> None: ...

    def generate(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Rollout:
        """One response per prompt; prompts of like length together, so that little padding is computed, and equal
        ones side by side, so that each is read once. What all of a batch start with is read once, too. Models with a
        recurrent state read less together: see `Reading`.

        Raises `InputError` where the recipe wants merged layers of a base that has none.
        """
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        finish: list[FinishReason] = ["length" for _ in prompts]
        drawn = (_uniform(derive_seed(seed, row), self._config.max_new_tokens) for row in rows or range(len(prompts)))
        uniform_BR = torch.stack(list(drawn)).to(self._backbone.device)
        play = self._backbone.merged_role if _merges(self._config, self._backbone, self._role) else self._backbone.role
        with torch.no_grad(), play(self._role):
            for group, reading in self._batches(prompts):
                finished = self._sample([prompts[i] for i in group], uniform_BR[group], reading)
                for i, (ids, values, reason) in zip(group, finished, strict=True):
                    responses[i], logprobs[i], finish[i] = ids, values, reason
                if self._on_progress is not None:
                    self._on_progress(len(group))
        return Rollout(prompts, responses, logprobs, finish, self._version, self._stops.texts)

    @property
    def _arguments(self) -> Mapping[str, inspect.Parameter]:
        """What the model's pass can be given; its decoder may take more."""
        return inspect.signature(self._backbone.active_model.forward).parameters

    @property
    def reading(self) -> Reading:
        """What prompts of more than one token are read like; found in the first rollout."""
        return self._readings[False]

    def _batches(self, prompts: list[list[int]]) -> list[tuple[list[int], Reading]]:
        """Indices of the prompts of each batch, and how it is read."""
        if not self._readings:
            self._readings = {False: self._find_reading(PROMPTS), True: self._find_reading(ONE_TOKEN)}
        if self._readings[True] >= self._readings[False]:  # short ones need no batches of their own
            batches = self._readings[False].batches(prompts, self._config.batch_size)
            return [(batch, self._readings[False]) for batch in batches]
        found: list[tuple[list[int], Reading]] = []
        for is_one, reading in self._readings.items():
            own = [i for i, prompt in enumerate(prompts) if (len(prompt) == 1) == is_one]
            batches = reading.batches([prompts[i] for i in own], self._config.batch_size)
            found += [([own[i] for i in batch], reading) for batch in batches]
        return found

    def _sample(
        self, prompts: list[list[int]], uniform_BR: Tensor, reading: Reading
    ) -> list[tuple[list[int], list[float], FinishReason]]:
        """Ids and log-probs of a response to each prompt, and why it ended."""
        sampler = _Sampler(self._config, uniform_BR)
        eos = self._backbone.eos_token_ids or None
        output_BR = self._generate(prompts, sampler, reading, self._config.max_new_tokens, eos)
        found: list[tuple[list[int], list[float], FinishReason]] = []
        for ids, values in zip(output_BR.tolist(), sampler.logprobs().tolist(), strict=True):
            # What follows the end is filling, even where pad and EOS are one id.
            length, reason = self._stops.end(ids)
            found.append((ids[:length], values[:length], reason))
        return found

    def _generate(
        self,
        prompts: list[list[int]],
        choose: LogitsProcessor,
        reading: Reading,
        max_new_tokens: int,
        eos_token_ids: list[int] | None = None,
    ) -> Tensor:
        """New tokens _BR, of which `choose` leaves `generate` one at a time."""
        backbone = self._backbone
        sharded = is_sharded(backbone.model)
        start = _shared_start(prompts) if self._may_share_starts() else 0
        ids_BT, attends_BT = self._padded(prompts, start)
        # Some states take no mask at all. To a model that takes one generate would give its own, made by comparing ids.
        takes_mask = "attention_mask" in self._arguments
        reads_before = reading >= Reading.EQUAL_ONCE and not sharded
        output_BT = backbone.active_model.generate(  # type: ignore[operator]  # a decorator of transformers hides its type
            input_ids=ids_BT,
            attention_mask=attends_BT if takes_mask else None,
            past_key_values=self._read(prompts, start) if reads_before else None,
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=[StopsEarly(self._stops, ids_BT.shape[1])] if self._stops.texts else None,
            synced_gpus=sharded,  # ZeRO-3: go on as long as any rank does
            generation_config=GenerationConfig(
                do_sample=False,  # `choose` has chosen
                use_cache=reading > Reading.WITHOUT_CACHE,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_ids,
                pad_token_id=backbone.pad_token_id,
            ),
        )
        assert isinstance(output_BT, Tensor)
        return output_BT[:, ids_BT.shape[1] :]

    def _find_reading(self, prompts: list[list[int]]) -> Reading:
        """What of such prompts may be read together; all where packed batches have shown it, else by a trial."""
        backbone = self._backbone
        if backbone.can_pack and "position_ids" in self._arguments:
            return Reading.EQUAL_ONCE
        found = find_reading(
            lambda prompts, forced, reading: self._generate(prompts, forced, reading, FORCED_BR.shape[1]),
            lambda ids_1T: backbone.active_model(input_ids=ids_1T, use_cache=False).logits,
            prompts,
            vocabulary=backbone.vocabulary,
            device=backbone.device,
            tolerance=1e-4 if backbone.precision == torch.float32 else 0.05,
        )
        if found < Reading.PADDED and is_sharded(backbone.model):  # ranks would have different numbers of batches
            raise InputError(
                "rollout: with zero3, sampling by hf needs a model that takes padding on the left",
                kind="conflict",
                key="ppo.rollout.engine",
                fix="use ZeRO 2 at most, or engine: vllm",
            )
        return found

    def _padded(self, prompts: list[list[int]], start: int) -> tuple[Tensor, Tensor]:
        """Ids _BT and attention mask _BT: what all have in common, padding, and what is left of each."""
        width, pad, device = max(map(len, prompts)), self._backbone.pad_token_id, self._backbone.device
        ids = [p[:start] + [pad] * (width - len(p)) + p[start:] for p in prompts]
        attends = [[1] * start + [0] * (width - len(p)) + [1] * (len(p) - start) for p in prompts]
        return torch.tensor(ids, device=device), torch.tensor(attends, device=device)

    def _may_share_starts(self) -> bool:
        """Whether a start may be read in a pass of its own, and padding may then stand amid a row, where it takes up a
        window's room and a recurrent state sees it."""
        model = self._backbone.active_model
        layers = DynamicCache(config=model.config).layers
        plain = all(type(layer) is DynamicLayer for layer in layers) and not turns_by_length(model)
        return plain and self._backbone.packs

    def _read(self, prompts: list[list[int]], start: int) -> DynamicCache | None:
        """The KV cache of what is best read before, or None: the start that all prompts share, read once, and where
        some prompts are equal, all but their last tokens, each read once."""
        unique = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
        cache, (ids_UT, attends_UT) = DynamicCache(config=self._backbone.model.config), self._padded(unique, start)
        if start:
            self._extend(cache, ids_UT[:1, :start], attends_UT[:1, :start])
            cache.batch_repeat_interleave(len(unique))
        if len(unique) < len(prompts):
            self._extend(cache, ids_UT[:, start:-1], attends_UT[:, :-1])
        if not cache.get_seq_length():
            return None
        place = {tuple(prompt): i for i, prompt in enumerate(unique)}
        cache.batch_select_indices(torch.tensor([place[tuple(p)] for p in prompts], device=ids_UT.device))
        return cache

    def _extend(self, cache: DynamicCache, ids_BT: Tensor, attends_BT: Tensor) -> None:
        """Read tokens after those in the cache; the mask is of both."""
        if (tokens := ids_BT.shape[1]) == 0:
            return
        arguments = position_arguments(attends_BT)
        arguments["position_ids"] = arguments["position_ids"][:, -tokens:]
        decoder_of(self._backbone.active_model)(input_ids=ids_BT, **arguments, past_key_values=cache, use_cache=True)


def _merges(config: SamplingConfig, backbone: Backbone, role: str) -> bool:
    """Whether to sample from merged layers; unasked only in fp32, and where there is likely room for them."""
    wanted = config.sync if config.engine == "hf" else "auto"  # what is said of vLLM's weights is not of these
    if wanted == "merged" and not backbone.can_merge(role):
        raise InputError(
            "sync: merged: a base that is quantised, or split by ZeRO-3, cannot be merged",
            kind="conflict",
            key="sync",
            fix="use sync: adapter",
        )
    # An adapter's small products cost more than the merging, in time on a CPU and in kernel launches on a GPU. Merged
    # in bf16, most of an early update would be rounded away.
    if wanted == "auto" and backbone.model.dtype == torch.float32 and backbone.can_merge(role):
        return backbone.merged_bytes(role) <= MERGED_UNASKED
    return wanted == "merged"


def _shared_start(prompts: list[list[int]]) -> int:
    """How many tokens all prompts start with, up to the last but one; 0 where that is less than a tenth of them."""
    shortest, longest = min(prompts), max(prompts)  # in the order of their tokens: what they share, all do
    length = next((i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), len(shortest))
    length = min(length, min(map(len, prompts)) - 1)
    return length if len(prompts) > 1 and length >= 0.1 * max(map(len, prompts)) else 0


class _Sampler(LogitsProcessor):
    """Samples a token per row by inverse CDF, notes its log-prob, and leaves `generate` nothing but to take it.

    One uniform number per row and token decides, so a response does not depend on what else is in the batch.
    """

    def __init__(self, config: SamplingConfig, uniform_BR: Tensor) -> None:
        self._temperature, self._warpers, self._uniform_BR = config.temperature, _warpers(config), uniform_BR
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        warped: Any = scores.float() / self._temperature
        for warp in self._warpers:
            warped = warp(input_ids, warped)
        logprobs_BV = torch.log_softmax(warped, dim=-1)
        token_B1 = sample_tokens(logprobs_BV.exp(), self._uniform_BR[:, len(self._logprobs), None])
        self._logprobs.append(logprobs_BV.gather(1, token_B1)[:, 0])
        return torch.full_like(logprobs_BV, -torch.inf).scatter_(1, token_B1, 0.0)  # type: ignore[return-value]

    def logprobs(self) -> Tensor:
        """Log-probs _BR of all tokens that were sampled."""
        return torch.stack(self._logprobs, dim=1)


def sample_tokens(probabilities_BV: Tensor, uniform_B1: Tensor, block: int = 256) -> Tensor:
    """Tokens _B1 by inverse CDF at `uniform_B1` in [0, 1): first a block of the vocabulary, then a token in it.

    On a CPU the sums over blocks take a tenth of the time of one cumulative sum over a large vocabulary, and that less
    than the vocabulary-wide noise of `torch.multinomial`. Raises `TrainingError` for probabilities that are not finite.
    """
    padding = -probabilities_BV.shape[1] % block
    blocks_BNK = torch.nn.functional.pad(probabilities_BV, (0, padding)).unflatten(1, (-1, block))
    cdf_BN = cumulative(blocks_BNK.sum(dim=-1).double())
    if not cdf_BN[:, -1].isfinite().all():
        raise TrainingError(
            "the logits are not finite: the weights have diverged, or the base's dtype is too narrow", kind="not_finite"
        )
    block_B1, fraction_B1 = _find(cdf_BN, uniform_B1)
    inside_BK = blocks_BNK.gather(1, block_B1[..., None].expand(-1, 1, block))[:, 0]
    token_B1, _ = _find(cumulative(inside_BK.double()), fraction_B1)
    return block_B1 * block + token_B1


def _uniform(seed: int, n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _find(cdf_BN: Tensor, fraction_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Which step of a CDF a fraction of its total falls in, and how far into that step, in [0, 1)."""
    point_B1 = fraction_B1 * cdf_BN[:, -1:]
    # A parallel cumulative sum on a GPU need not rise to the last bit: the search could end one past the last token.
    index_B1 = torch.searchsorted(cdf_BN, point_B1, right=True).clamp_(max=cdf_BN.shape[1] - 1)
    upper_B1 = cdf_BN.gather(1, index_B1)
    lower_B1 = torch.where(index_B1 > 0, cdf_BN.gather(1, (index_B1 - 1).clamp(min=0)), 0.0)
    return index_B1, ((point_B1 - lower_B1) / (upper_B1 - lower_B1)).clamp(max=1 - 2**-53)


def _warpers(config: SamplingConfig) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if isinstance(config, RolloutConfig) and config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if isinstance(config, RolloutConfig) and config.top_p < 1:
        warpers.append(TopPLogitsWarper(config.top_p))
    return warpers
