"""Chats as token ids, and the tokens that read as a label: shared by all local chat models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from reward.errors import InputError
from reward.judges.llm import Completion
from reward.records import Message

LEAST_ROOM = 16  # tokens of an answer in text: enough for "Response A is better."


class ChatTokens:
    """Encodes chats for a model; one without a chat template gets a plain transcript.

    Args:
        identity: of the model, for messages.
        longest: the most tokens that the model reads, answer included.
        vocabulary: how many token ids the model has.
        template_kwargs: arguments of the chat template, such as `enable_thinking: false`, and its `strftime_now`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        identity: str,
        longest: int,
        vocabulary: int,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self._identity, self.longest = tokenizer, identity, longest
        self._vocabulary, self._template_kwargs = vocabulary, dict(template_kwargs or {})
        self._label_ids: dict[str, list[int]] = {}

    @property
    def day(self) -> str:
        """The day that the template prints as today's, by the `strftime_now` of its arguments; "" for none."""
        clock = self._template_kwargs.get("strftime_now")
        return clock("%Y-%m-%d") if clock and "strftime_now" in str(self.tokenizer.chat_template) else ""

    def encode(self, chats: Sequence[list[Message]], room: int) -> tuple[dict[int, list[int]], dict[int, Completion]]:
        """Token ids of the chats that the model can read, and an error for those that are too long for it.

        room: the least number of tokens that an answer needs.
        """
        rows: dict[int, list[int]] = {}
        errors: dict[int, Completion] = {}
        for i, chat in enumerate(chats):
            ids = self._ids_of(chat)
            if len(ids) + room > self.longest:
                read = f"the judge reads {self.longest} with {room} left for its answer"
                errors[i] = Completion("", error=f"the question has {len(ids)} tokens, {read}")
            else:
                rows[i] = ids
        return rows, errors

    def label_ids(self, labels: Sequence[str]) -> dict[str, list[int]]:
        """All tokens that read as each label, with or without a space before it.

        A label of several characters that the tokenizer writes as several tokens is left out. Raises `InputError` for
        one of one character that there is no token of.
        """
        for label in labels:
            if label not in self._label_ids:
                self._label_ids[label] = self._tokens_of(label)
        return {label: ids for label in labels if (ids := self._label_ids[label])}

    def _tokens_of(self, label: str) -> list[int]:
        if len(label) > 1 and not any(
            len(self.tokenizer(start + label, add_special_tokens=False)["input_ids"]) == 1  # type: ignore[arg-type]
            for start in ("", " ")
        ):
            return []
        found = [i for i, text in enumerate(self._texts) if text.strip() == label]
        if not found:
            raise InputError(
                f"judge: the vocabulary of {self._identity} has no token {label!r}",
                kind="conflict",
                key="judge.verdict",
                fix="use verdict: text",
            )
        return found

    @cached_property
    def _texts(self) -> list[str]:
        count = min(self._vocabulary, len(self.tokenizer))
        return self.tokenizer.batch_decode([[i] for i in range(count)])

    def text_of(self, chat: list[Message]) -> str:
        """The text that the model reads. Raises `InputError` where the chat template fails."""
        if self.tokenizer.chat_template is None:
            text = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in chat)
            return f"{text}Assistant:"
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                chat, tokenize=False, add_generation_prompt=True, **self._template_kwargs
            )
        except Exception as error:  # a template is a program: it can fail in any way
            if len(chat) > 1 and chat[0]["role"] == "system":  # Gemma's and others' take none
                both = "\n\n".join(message["content"] for message in chat[:2])
                return self.text_of([{**chat[1], "content": both}, *chat[2:]])
            raise InputError(
                f"judge: the chat template of {self._identity} fails: {error}",
                kind="user_code",
                key="judge.chat_template_kwargs" if self._template_kwargs.keys() - {"strftime_now"} else "judge.target",
            ) from error

    def _ids_of(self, chat: list[Message]) -> list[int]:
        plain = self.tokenizer.chat_template is None  # a template writes its special tokens itself
        return self.tokenizer(self.text_of(chat), add_special_tokens=plain)["input_ids"]  # type: ignore[return-value]
