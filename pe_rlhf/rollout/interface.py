"""What every rollout engine does. Tokens in, tokens out: text is never tokenised again on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from pe_rlhf.config import SamplingConfig
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.rollout.stops import StopStrings
from pe_rlhf.system.failures import TrainingError
from pe_rlhf.types import FinishReason, Rollout


class RolloutEngine(Protocol):
    """Samples responses from a role of the backbone, as of a known version of its adapter."""

    def generate(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Rollout:
        """One response per prompt (repeat a prompt for several).

        What is drawn for a response follows from the seed and its row in the whole batch, so the same prompts and seed
        give the same responses, on however many processes: `rows` are the rows of a process's share, 0, 1, … if left
        out.
        """
        ...

    def sync(self, version: int, role: str | None = None) -> None:
        """Sample from the adapter as it is now; that state is called `version`. `role` replaces the role before."""
        ...

    def close(self) -> None:
        """Leave nothing behind: no process, no file."""
        ...


class BackgroundEngine(RolloutEngine, Protocol):
    """An engine that samples outside this process, so that this one can train meanwhile."""

    def begin(self, prompts: list[list[int]], seed: int, rows: Sequence[int] | None = None) -> Callable[[], Rollout]:
        """Begin what `generate` does; the function returned waits for it.

        Nothing else may be asked of the engine before. Where the engine fails on the way, that function raises
        `TrainingError` of kind `server` or `process`, on all ranks; `sync` mends what can be mended.
        """
        ...


def checked_rollout(
    prompts: list[list[int]],
    responses: list[tuple[list[int], list[float]]],
    version: int,
    backbone: Backbone,
    config: SamplingConfig,
) -> Rollout:
    """A rollout from ids and log-probs that another process gave, checked by `check_response`."""
    stops = stop_strings(backbone, config)
    kept: list[tuple[list[int], list[float]]] = []
    finish: list[FinishReason] = []
    for ids, logprobs in responses:
        length, reason = stops.end(ids)  # an EOS at the very limit is an ending and not a cut
        # vLLM may see a stop string later than we do: where the token that completes it holds half a letter, too.
        at_stop = reason == "stop" and len(ids) == len(logprobs)
        kept.append((ids[:length], logprobs[:length]) if at_stop else (ids, logprobs))
        check_response(
            *kept[-1], eos_token_ids=backbone.eos_token_ids, max_new_tokens=config.max_new_tokens, stopped=at_stop
        )
        finish.append(reason)
    return Rollout(prompts, [ids for ids, _ in kept], [values for _, values in kept], finish, version, stops.texts)


def stop_strings(backbone: Backbone, config: SamplingConfig) -> StopStrings:
    """What ends responses by the recipe. Raises `InputError` for stop strings of a model without a tokenizer."""
    return StopStrings(config.stop, backbone.tokenizer if config.stop else None, backbone.eos_token_ids)


def check_response(
    response: list[int], logprobs: list[float], *, eos_token_ids: list[int], max_new_tokens: int, stopped: bool = False
) -> None:
    """Raise `ValueError` for what no engine may answer, `TrainingError` for log-probs that are not finite.

    stopped: it ends with a stop string.
    """
    if not 1 <= len(response) <= max_new_tokens:
        raise ValueError(f"a response has {len(response)} tokens, {max_new_tokens} are the limit")
    if len(logprobs) != len(response):
        raise ValueError(f"a response has {len(response)} tokens and {len(logprobs)} log-probs")
    if set(response[:-1]).intersection(eos_token_ids):
        raise ValueError("a response goes on after an end-of-sequence token")
    if not stopped and len(response) < max_new_tokens and response[-1] not in eos_token_ids:
        raise ValueError(f"a response ends after {len(response)} of {max_new_tokens} tokens without an end-of-sequence")
    if not all(map(math.isfinite, logprobs)):
        raise TrainingError(
            "the logits are not finite: the weights have diverged, or the base's dtype is too narrow", kind="not_finite"
        )
    if max(logprobs) > 1e-3:
        raise ValueError(f"a log-prob of {max(logprobs):.3g} is more than 0")
