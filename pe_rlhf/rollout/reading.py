"""How much of a batch of prompts a model may read at once, found by trying.

Attention over a KV cache reads rows of different lengths together, and equal prompts once. A recurrent state (Mamba,
RWKV, RecurrentGemma, gated delta nets) may see the padding, cannot be copied from row to row, or holds one row only.
No config says so reliably.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from itertools import groupby

import torch
from torch import Tensor
from transformers import LogitsProcessor

from reward.errors import InputError

# Prompts of different lengths, two of them equal, and how each goes on.
PROMPTS = [[2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [2, 3, 4, 5, 6, 7, 8, 9], [13, 14, 15]]
ONE_TOKEN = [[2], [3], [2], [4]]  # RecurrentGemma takes such a prompt for a step of the response before
FORCED_BR = torch.tensor([[16, 17, 18], [19, 20, 21], [22, 23, 24], [25, 26, 27]])


class Reading(IntEnum):
    """What may be read together; each does what is below it, too."""

    WITHOUT_CACHE = 0  # one row in each pass, and all of it again for each token
    SINGLY = 1  # one row
    EQUAL_LENGTHS = 2  # rows of one length
    PADDED = 3  # rows of any lengths, padded on the left
    EQUAL_ONCE = 4  # equal prompts once, by copying the cache's rows

    def batches(self, prompts: list[list[int]], size: int) -> list[list[int]]:
        """Indices of the prompts of each batch, `size` at most; like lengths together, equal prompts side by side."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        groups = [order]
        if self < Reading.PADDED:
            groups = [list(group) for _, group in groupby(order, key=lambda i: len(prompts[i]))]
        if self < Reading.EQUAL_LENGTHS:
            size = 1
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


class Forced(LogitsProcessor):
    """Lets `generate` take given tokens _BR, and notes the logits that it had for each."""

    def __init__(self, tokens_BR: Tensor) -> None:
        self._tokens_BR = tokens_BR
        self._logits: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        token_B1 = self._tokens_BR[:, len(self._logits), None]
        self._logits.append(scores.float())
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)  # type: ignore[return-value]

    def logits(self) -> Tensor:
        """Logits _BRV."""
        return torch.stack(self._logits, dim=1)


def find_reading(
    generate: Callable[[list[list[int]], Forced, Reading], object],
    logits: Callable[[Tensor], Tensor],
    prompts: list[list[int]],
    *,
    vocabulary: int,
    device: torch.device,
    tolerance: float,
    key: str = "ppo.rollout.engine",
) -> Reading:
    """The most that a model may read together, such that sampling has the logits of plain passes.

    Args:
        generate: goes on from some prompts by as many tokens as are forced, reading so.
        logits: of a plain pass over one row: _1T to _1TV.
        prompts: as many as `FORCED_BR` has rows.
        tolerance: as a share of the logits' norm.
        key: where the engine is chosen, for messages.

    Raises `InputError` of kind `conflict` where not even one row without a cache has them.
    """
    prompts = [[token % vocabulary for token in prompt] for prompt in prompts]
    forced_BR = FORCED_BR.remainder(vocabulary).to(device)
    expected: list[Tensor] = []
    for prompt, forced_R in zip(prompts, forced_BR, strict=True):
        ids_1T = torch.cat([torch.tensor(prompt, device=device), forced_R[:-1]])[None]
        expected.append(logits(ids_1T)[0, len(prompt) - 1 :].float())

    def agrees(reading: Reading) -> bool:
        for rows in reading.batches(prompts, len(prompts)):
            forced = Forced(forced_BR[rows])
            try:
                generate([prompts[i] for i in rows], forced, reading)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever a model raises for a cache that it does not know
                return False
            for i, found_RV in zip(rows, forced.logits(), strict=True):
                if not (found_RV - expected[i]).norm() <= tolerance * expected[i].norm():
                    return False
        return True

    for reading in sorted(Reading, reverse=True):
        if agrees(reading):
            return reading
    raise InputError(
        f"{key}: transformers' generate has other logits for this model than a plain pass over the same tokens",
        kind="conflict",
        key=key,
        fix="use engine: vllm",
    )
