"""A chat model as a judge, and how any judge asks one.

It sees both responses as A and B. Its verdict is p(A) / (p(A) + p(B)), from the probabilities of the two labels as its
next token: one forward pass, no sampling. Where the labels have little probability, the model was about to say
something else, such as its thoughts, and their ratio means nothing: then, and where a server gives no log-probs, its
text is read.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

from reward.errors import InputError
from reward.judges.answers import parse_label, parse_verdict, without_thoughts
from reward.judges.base import Comparison, Verdict
from reward.judges.guest import rest
from reward.judges.labels import TIE, lone_label
from reward.judges.templates import JudgePrompt
from reward.records import Message

__all__ = ["ChatBackend", "ChatJudge", "Completion", "LLMJudge", "parse_label", "probability_of_a"]

LABELS = ("A", "B")
ASK_AFTER_REASONING = "Now your verdict: which response is better? Answer with one letter, A or B, and nothing else."
RETRY_TEMPERATURE = 0.7
PREFERENCES = {"A": 1.0, "B": 0.0, TIE: 0.5}


@dataclass(frozen=True)
class Completion:
    """What a chat model said.

    label_logprobs: log-probs in nats of each label as the next token; None if the model gives none. A label that is
    missing was not among the tokens that the server reports, and has at most `unreported`, a log-prob. cut: the text
    ends at the limit of tokens. error: why this chat got no answer.
    """

    text: str
    label_logprobs: dict[str, float] | None = None
    unreported: float = -math.inf
    cut: bool = False
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


class ChatJudge(ABC):
    """How a chat model is asked: for its reasoning, for the probabilities of labels, for text. Judges extend it.

    answer_tokens: room for an answer in text, the thoughts of a reasoning model included. min_label_mass: the least
    probability that the labels have together at which it is an answer.
    """

    sees_order: bool
    kind: ClassVar[str]
    labels: tuple[str, ...]
    mass_of: ClassVar[str]  # how the probability of all labels is written
    ask_after_reasoning: ClassVar[str]
    unread: ClassVar[str]  # why a text is no answer
    no_use: ClassVar[str] = "the model was about to say something else"
    one_token_is_all: ClassVar[bool] = True  # whether an answer of one token that was not cut can be read

    def __init__(
        self,
        backend: ChatBackend,
        prompt: JudgePrompt,
        *,
        reasoning: bool = False,
        reasoning_tokens: int = 256,
        verdict: Literal["auto", "probabilities", "text"] = "auto",
        attempts: int = 3,
        answer_tokens: int = 4096,
        min_label_mass: float = 0.5,
    ) -> None:
        self._backend, self._prompt, self._verdict = backend, prompt, verdict
        self._reasoning, self._reasoning_tokens, self._attempts = reasoning, reasoning_tokens, attempts
        self._answer_tokens, self._min_mass = answer_tokens, min_label_mass
        self.batch_size, self.concurrency = backend.batch_size, backend.concurrency
        how = f"reasoning {reasoning_tokens}" if reasoning else "no reasoning"
        how += f", label mass {min_label_mass:g}" if min_label_mass != 0.5 else ""
        self.identity = f"{self.kind}:{backend.identity}:{prompt.name} {prompt.fingerprint}:{verdict}:{how}"

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return one verdict per comparison; an answer that no attempt could parse is marked invalid."""
        return self._answers(comparisons)

    def stop(self) -> None:
        """End the tries that are under way, because the evaluation has failed elsewhere."""
        if callable(stop := getattr(self._backend, "stop", None)):
            stop()

    @abstractmethod
    def _of_logprobs(self, answer: Completion) -> Verdict | None:
        """What the probabilities of the labels say; None where they say nothing."""

    @abstractmethod
    def _of_text(self, said: str, first_line: bool) -> Verdict | None:
        """What a text says; None where it cannot be understood. first_line: the text was cut after this line."""

    def _answers(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One answer to each question; one that no attempt could parse is marked invalid."""
        questions = [_Question(self._prompt.chat(c, reasoning=self._reasoning)) for c in comparisons]
        if self._reasoning:
            self._reason(questions)
        if self._verdict != "text":
            self._by_probabilities(questions)
        if self._verdict != "probabilities":
            self._by_text(questions)
        return [self._answered(question) for question in questions]

    def rest(self) -> None:
        rest(self._backend)

    def _reason(self, questions: list[_Question]) -> None:
        chats = [question.chat for question in questions]
        answers = self._backend.generate(chats, self._reasoning_tokens, 0.0, 0)
        for question, answer in zip(questions, answers, strict=True):
            if answer.error:
                question.verdict = Verdict.not_understood(answer.error)
            # Where there are only thoughts, they are the reasoning.
            question.reason = without_thoughts(answer.text) or answer.text.strip()
            thought: Message = {"role": "assistant", "content": question.reason}
            question.chat = [*question.chat, thought, {"role": "user", "content": self.ask_after_reasoning}]

    def _by_probabilities(self, questions: list[_Question]) -> None:
        waiting = [question for question in questions if question.verdict is None]
        answers = self._backend.label_logprobs([question.chat for question in waiting], self.labels)
        for question, answer in zip(waiting, answers, strict=True):
            if answer.error:
                question.verdict = Verdict.not_understood(answer.error)
                continue
            question.mass = label_mass(answer.label_logprobs)
            if question.mass is not None and question.mass >= self._min_mass:
                question.verdict = self._of_logprobs(answer)
            if question.verdict is None and self.one_token_is_all and answer.text and not answer.cut:
                question.verdict = self._read(answer)

    def _by_text(self, questions: list[_Question]) -> None:
        """Ask for text, greedily at first; if the answer cannot be read, ask again at a temperature."""
        for attempt in range(self._attempts):
            waiting = [question for question in questions if question.verdict is None]
            if not waiting:
                return
            chats = [question.chat for question in waiting]
            temperature = RETRY_TEMPERATURE if attempt else 0.0
            answers = self._backend.generate(chats, self._answer_tokens, temperature, attempt)
            for question, answer in zip(waiting, answers, strict=True):
                if answer.error:
                    question.verdict = Verdict.not_understood(answer.error, answer.text)
                else:
                    question.verdict = self._read(answer)
                if question.verdict is None and attempt + 1 == self._attempts:
                    why = self.unread
                    if answer.cut:
                        why = (
                            f"the answer was cut after {self._answer_tokens} tokens, before its verdict (finish_reason:"
                            " length); raise judge.answer_tokens, or turn thinking off by judge.chat_template_kwargs"
                        )
                    question.verdict = Verdict.not_understood(why, answer.text)

    def _read(self, answer: Completion) -> Verdict | None:
        """What a text says. One that was cut has no last statement: only what is by itself on line 1 counts."""
        said = without_thoughts(answer.text)
        if answer.cut:
            first, more, _ = said.partition("\n")
            said = first if more else ""
        found = self._of_text(said, answer.cut) if said else None
        return None if found is None else replace(found, raw=answer.text)

    def _answered(self, question: _Question) -> Verdict:
        verdict = question.verdict
        if verdict is None:
            why = "the labels have no probabilities"
            if self._verdict == "probabilities" and question.mass is not None:
                why = f"{self.mass_of} is {question.mass:.3g}: {self.no_use}; use verdict: auto"
            verdict = Verdict.not_understood(why)
        return replace(verdict, reason=question.reason, label_mass=question.mass)


class LLMJudge(ChatJudge):
    """Asks a chat model which of two responses is better."""

    sees_order = True
    version = "7"  # of the rules by which answers are read; verdicts by other rules are not reused
    kind = "llm"
    labels = LABELS
    mass_of = "p(A) + p(B)"
    ask_after_reasoning = ASK_AFTER_REASONING
    unread = "the answer names neither A nor B"

    def __init__(self, backend: ChatBackend, prompt: JudgePrompt, *, reasoning: bool = False, **settings: Any) -> None:
        super().__init__(backend, prompt, reasoning=reasoning, **settings)
        self.labels = prompt.labels
        if reasoning and self.labels != LABELS:
            raise InputError(
                f"judge.reasoning: {prompt.name} asks for {' or '.join(self.labels)} and says itself when",
                kind="conflict",
                key="judge.reasoning",
                fix="leave it out",
            )

    def _of_logprobs(self, answer: Completion) -> Verdict | None:
        probability = probability_of_a(answer.label_logprobs, answer.unreported, self.labels)
        return None if probability is None else Verdict(probability, raw=raw_logprobs(answer))

    def _of_text(self, said: str, first_line: bool) -> Verdict | None:
        if self.labels != LABELS:  # of another case only, such as m and M: AlpacaEval reads the last word
            last = re.search(r"(?<!\w)(\w)\W*$", said)
            return Verdict(1.0 - self.labels.index(last[1])) if last and last[1] in self.labels else None
        found = lone_label(said) if first_line else parse_verdict(said)
        return Verdict(PREFERENCES[found]) if found is not None and (found != TIE or self._prompt.allows_ties) else None


@dataclass
class _Question:
    """A question on its way to a verdict."""

    chat: list[Message]
    reason: str | None = None
    mass: float | None = None
    verdict: Verdict | None = None


def raw_logprobs(answer: Completion) -> str:
    return json.dumps({"logprobs": answer.label_logprobs, "text": answer.text}, ensure_ascii=False)


def label_mass(logprobs: dict[str, float] | None) -> float | None:
    """p(A) + p(B) as far as they are reported; None if a model gives no log-probs."""
    return None if logprobs is None else min(1.0, sum(math.exp(value) for value in logprobs.values()))


def probability_of_a(
    logprobs: dict[str, float] | None, unreported: float = -math.inf, labels: Sequence[str] = LABELS
) -> float | None:
    """p(A) / (p(A) + p(B)); None if neither label is known.

    unreported: the log-prob that a label that is missing has at most, and is counted with.
    """
    if not logprobs or not any(math.isfinite(value) for value in logprobs.values()):
        return None
    a, b = (logprobs.get(label, unreported) for label in labels)
    return 1 / (1 + math.exp(min(b - a, 700.0)))
