"""Stop strings: texts that end a response, as an end token does.

The token that completes a stop string is the last one of the response and keeps its log-prob: it is what the policy has
sampled. What engines sample after it is cut off here, so that all of them end a response at the same token. The text
that judges and functions read ends before the stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from pe_rlhf.types import FinishReason

# A letter may be four bytes of one token each: the newest tokens that a stop string of n letters can reach over.
TOKENS_OF_A_LETTER = 4


class StopStrings:
    """Finds the end of responses; `texts` may be empty, and then only `eos_token_ids` end one."""

    def __init__(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, eos_token_ids: Sequence[int]
    ) -> None:
        self.texts, self._eos = tuple(texts), frozenset(eos_token_ids)
        self._tokenizer = tokenizer
        self._window = TOKENS_OF_A_LETTER * max(map(len, self.texts), default=0) + 1
        # Some tokenizers drop the first space of what they decode: a line break stands before it.
        self._lead: list[int] = []
        if self.texts and tokenizer is not None:
            line_break: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
            self._lead = line_break if tokenizer.decode(line_break) == "\n" else []

    def end(self, ids: Sequence[int]) -> tuple[int, FinishReason]:
        """How many of the ids are the response, and why it ended: at an EOS, at a stop string, or at the limit."""
        length = next((i + 1 for i, token in enumerate(ids) if token in self._eos), len(ids))
        if self.texts and self._holds(ids[:length]):
            first, last = 1, length  # the fewest tokens that hold one
            while first < last:
                middle = (first + last) // 2
                first, last = (first, middle) if self._holds(ids[:middle]) else (middle + 1, last)
            if first < length or ids[length - 1] not in self._eos:
                return first, "stop"
        return length, "eos" if length and ids[length - 1] in self._eos else "length"

    def may_end(self, ids: Sequence[int]) -> bool:
        """Whether a response ends with the last of the ids by a stop string; quick where it does not."""
        return self._holds(ids[-self._window :]) and self._holds(ids)

    def _holds(self, ids: Sequence[int]) -> bool:
        assert self._tokenizer is not None
        decoded = self._tokenizer.decode(
            [*self._lead, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text = str(decoded)[1 if self._lead else 0 :]
        return any(stop in text for stop in self.texts)


class StopsEarly(StoppingCriteria):
    """For transformers' `generate`: a row whose response holds a stop string is sampled no further."""

    def __init__(self, stops: StopStrings, prompt_tokens: int) -> None:
        self._stops, self._start = stops, prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object) -> Tensor:  # type: ignore[override]
        rows = input_ids[:, self._start :].tolist()
        return torch.tensor([self._stops.may_end(row) for row in rows], device=input_ids.device)
