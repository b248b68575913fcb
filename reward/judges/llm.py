"""A chat model as a judge.

It sees both responses as A and B. Its verdict is p(A) / (p(A) + p(B)), from the probabilities of the two labels as its
next token: one forward pass, no sampling. If a server gives no log-probs, its text is parsed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from reward.judges.base import Comparison, Verdict
from reward.judges.templates import JudgePrompt
from reward.records import Message

LABELS = ("A", "B")
ASK_AFTER_REASONING = "Now your verdict: which response is better? Answer with one letter, A or B, and nothing else."
TEXT_TOKENS = 16
RETRY_TEMPERATURE = 0.7

_BRACKETS = re.compile(r"\[\[\s*([AB])\s*\]\]")
_ALONE = re.compile(r"\W*(?:(?:response|answer|option|assistant|summary)\W+)?([AB])\b\W*", re.IGNORECASE)
_STATED = re.compile(
    r"\b(?i:answer|verdict|winner|choice|better(?: response| answer| one| summary)?)\b(?:\s+is)?\W{0,8}?"
    r"(?i:(?:response|answer|option|assistant|summary)\W+)?\b([AB])\b(?!\s+[a-z])"
)


@dataclass(frozen=True)
class Completion:
    """What a chat model said.

    label_logprobs: log-probs in nats of each label as the next token; None if the model gives none. A label that is
    missing was not among the tokens that the server reports. error: why this chat got no answer.
    """

    text: str
    label_logprobs: dict[str, float] | None = None
    error: str | None = None


class ChatBackend(Protocol):
    """A chat model: in this process, in a vLLM engine, or behind a server."""

    @property
    def identity(self) -> str: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def concurrency(self) -> int: ...

    def label_logprobs(self, chats: Sequence[list[Message]], labels: Sequence[str]) -> list[Completion]:
        """The log-probs of the labels as the first token of the answer to each chat."""
        ...

    def generate(
        self, chats: Sequence[list[Message]], max_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        """An answer to each chat; temperature 0 is greedy."""
        ...


class LLMJudge:
    """Asks a chat model which of two responses is better."""

    sees_order = True

    def __init__(
        self,
        backend: ChatBackend,
        prompt: JudgePrompt,
        *,
        reasoning: bool = False,
        reasoning_tokens: int = 256,
        verdict: Literal["auto", "probabilities", "text"] = "auto",
        attempts: int = 3,
    ) -> None:
        self._backend, self._prompt, self._verdict = backend, prompt, verdict
        self._reasoning, self._reasoning_tokens, self._attempts = reasoning, reasoning_tokens, attempts
        self.batch_size, self.concurrency = backend.batch_size, backend.concurrency
        how = f"reasoning {reasoning_tokens}" if reasoning else "no reasoning"
        self.identity = f"llm:{backend.identity}:{prompt.name} {prompt.fingerprint}:{verdict}:{how}"

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict per comparison; an answer that no attempt could parse is marked invalid."""
        chats: list[list[Message]] = [
            [{"role": "user", "content": self._prompt.render(c, reasoning=self._reasoning)}] for c in comparisons
        ]
        reasons: list[str | None] = [None] * len(chats)
        verdicts: list[Verdict | None] = [None] * len(chats)
        if self._reasoning:
            for i, said in enumerate(self._backend.generate(chats, self._reasoning_tokens, 0.0, 0)):
                if said.error:
                    verdicts[i] = Verdict.not_understood(said.error)
                reasons[i] = said.text.strip()
                thought: Message = {"role": "assistant", "content": said.text.strip()}
                chats[i] = [*chats[i], thought, {"role": "user", "content": ASK_AFTER_REASONING}]
        if self._verdict != "text":
            self._by_probabilities(chats, verdicts, reasons)
        if self._verdict != "probabilities":
            self._by_text(chats, verdicts, reasons)
        return [
            v or Verdict.not_understood("the labels have no probabilities", reason=r)
            for v, r in zip(verdicts, reasons, strict=True)
        ]

    def stop(self) -> None:
        """End the tries that are under way, because the evaluation has failed elsewhere."""
        if callable(stop := getattr(self._backend, "stop", None)):
            stop()

    def _by_probabilities(
        self, chats: list[list[Message]], verdicts: list[Verdict | None], reasons: list[str | None]
    ) -> None:
        open_rows = [i for i, verdict in enumerate(verdicts) if verdict is None]
        answers = self._backend.label_logprobs([chats[i] for i in open_rows], LABELS)
        for i, answer in zip(open_rows, answers, strict=True):
            if answer.error:
                verdicts[i] = Verdict.not_understood(answer.error, reason=reasons[i])
            elif (probability := probability_of_a(answer.label_logprobs)) is not None:
                raw = json.dumps({"logprobs": answer.label_logprobs, "text": answer.text}, ensure_ascii=False)
                verdicts[i] = Verdict(probability, raw=raw, reason=reasons[i])
            elif answer.text and (label := parse_label(answer.text)) is not None:
                verdicts[i] = Verdict(float(label == "A"), raw=answer.text, reason=reasons[i])

    def _by_text(self, chats: list[list[Message]], verdicts: list[Verdict | None], reasons: list[str | None]) -> None:
        """Ask for text, greedily at first; if the answer names no label, ask again at a temperature."""
        for attempt in range(self._attempts):
            open_rows = [i for i, verdict in enumerate(verdicts) if verdict is None]
            if not open_rows:
                return
            temperature = RETRY_TEMPERATURE if attempt else 0.0
            answers = self._backend.generate([chats[i] for i in open_rows], TEXT_TOKENS, temperature, attempt)
            for i, answer in zip(open_rows, answers, strict=True):
                label = parse_label(answer.text)
                if answer.error:
                    verdicts[i] = Verdict.not_understood(answer.error, answer.text, reasons[i])
                elif label is not None:
                    verdicts[i] = Verdict(float(label == "A"), raw=answer.text, reason=reasons[i])
                elif attempt + 1 == self._attempts:
                    verdicts[i] = Verdict.not_understood("the answer names neither A nor B", answer.text, reasons[i])


def probability_of_a(logprobs: dict[str, float] | None) -> float | None:
    """p(A) / (p(A) + p(B)); None if neither label is known. A label that is not reported counts as probability 0."""
    if not logprobs or not any(math.isfinite(value) for value in logprobs.values()):
        return None
    a, b = (logprobs.get(label, -math.inf) for label in LABELS)
    return 1 / (1 + math.exp(min(b - a, 700.0)))


def parse_label(text: str) -> str | None:
    """The label that an answer states; None if it states none, or both.

    `[[A]]`, a single letter ("A", "(b).", "Response A"), or a sentence that says so ("The better one is A").
    """
    if (alone := _ALONE.fullmatch(text.strip())) is not None:
        return alone[1].upper()
    for pattern in (_BRACKETS, _STATED):
        if found := set(pattern.findall(text)):
            return found.pop() if len(found) == 1 else None
    return None
