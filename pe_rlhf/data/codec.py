"""Text to token ids and back: the one place that knows the chat template.

A prompt is rendered through the chat template where there is one, and a response is its text and the EOS token that
ends the turn, so a response means the same tokens whether it was sampled, labelled or trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from reward.errors import InputError
from reward.records import Message, Prompt

TRANSCRIPT_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}


class TextCodec:
    """Encodes prompts and responses for one tokenizer.

    `chat_template` is the recipe's key: `auto`, `none`, a Jinja template, or the path of one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str = "auto", eos_token_id: int | None = None
    ):
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.eos_token_id = own if isinstance(own, int) else eos_token_id
        self.template = find_template(tokenizer, chat_template)

    def render(self, prompt: Prompt) -> str:
        """The text that the model is given for a prompt. Raises `InputError` where the chat template fails on it."""
        if self.template is None:
            return prompt if isinstance(prompt, str) else transcript(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program: it can fail in any way
            start = repr(messages[0]["content"])[:60]
            message = f"chat_template: it fails on the prompt that starts with {start}: {error}"
            raise InputError(message, kind="user_code", key="chat_template") from error
        assert isinstance(text, str)
        return text

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; special tokens come from the template, or from the tokenizer where there is none."""
        ids: list[int] = self.tokenizer(self.render(prompt), add_special_tokens=self.template is None)["input_ids"]
        return ids

    def encode_pair(self, prompt: Prompt, response: str, truncated: bool = False) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of a response to it; EOS ends the response unless it was cut."""
        return self.encode_prompt(prompt), self.encode_response(prompt, response, truncated=truncated)

    def encode_response(self, prompt: Prompt, response: str, *, truncated: bool = False) -> list[int]:
        """Token ids of a response to a prompt; EOS ends it unless it was cut."""
        if self.template is None and not isinstance(
            prompt, str
        ):  # in a transcript; a sampled one has its space already
            response = f" {response.removeprefix(' ')}"
        ids: list[int] = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return ids if truncated or self.eos_token_id is None else [*ids, self.eos_token_id]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a whole text with the tokenizer's special tokens, and EOS at its end if it has none there."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if self.eos_token_id is not None and ids[-1:] != [self.eos_token_id]:
            return [*ids, self.eos_token_id]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without special tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def cut_pair(prompt: list[int], response: list[int], limit: int) -> tuple[list[int], list[int]]:
    """At most `limit` tokens: the start of the prompt goes first, then the end of the response."""
    response = response[: limit - 1]
    return prompt[-(limit - len(response)) :], response


def transcript(messages: list[Message]) -> str:
    """A dialogue as plain text for a model without a chat template, in the form of Anthropic's hh-rlhf."""
    turns = [f"\n\n{TRANSCRIPT_NAMES.get(m['role'], m['role'])}: {m['content']}" for m in messages]
    return "".join(turns) + "\n\nAssistant:"


def find_template(tokenizer: PreTrainedTokenizerBase, setting: str) -> str | None:
    """The Jinja template that a recipe's `chat_template` names; None for plain text."""
    if setting == "none":
        return None
    if setting == "auto":
        template: Any = tokenizer.chat_template
        if isinstance(template, dict):  # several by name
            if "default" not in template:
                message = f"chat_template: auto: the tokenizer has {', '.join(template)}, and none is the default"
                raise InputError(message, kind="conflict", key="chat_template", fix="give the template's file instead")
            template = template["default"]
        return template if isinstance(template, str) else None
    return read_template(setting)


def read_template(setting: str) -> str:
    """A Jinja template, or the text of the file that holds one. Raises `InputError` for anything else."""
    if "{" in setting:
        return setting
    path = Path(setting)
    if not path.is_file():
        message = f"chat_template: {setting!r} is neither auto, none, a Jinja template nor the path of one"
        raise InputError(message, kind="missing", key="chat_template", file=path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"chat_template: {path} cannot be read: {error}"
        raise InputError(message, kind="unreadable", key="chat_template", file=path) from error
