"""Rows to fine-tune on, and the formats they are read from.

| columns                            | trained on                                                             |
|------------------------------------|------------------------------------------------------------------------|
| prompt, completion (or response)   | the completion: text, or a list of one assistant message               |
| messages                           | the last message, which is the assistant's; those before are the prompt |
| text                               | all of it                                                              |

These are TRL's types for its SFTTrainer, and the good rows of its KTOTrainer: where the column `label` is false, the
completion is one to avoid, and the row is dropped; so is one whose last message has OpenAI's `weight` 0. A prompt is
text or a list of messages. Where a row has columns of several formats, the first of the table that it fills counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from reward.errors import InputError
from reward.messages import assistant_text, parse_messages
from reward.records import Dropped, Prompt, parse_prompt

COMPLETIONS = ("completion", "response")


@dataclass(frozen=True)
class Example:
    """A response to a prompt; without a prompt it is a text that is trained on as a whole."""

    prompt: Prompt | None
    response: str


def has_format(columns: Collection[str]) -> bool:
    """Whether rows with those columns can be of any format."""
    answered = "prompt" in columns and any(name in columns for name in COMPLETIONS)
    return answered or "messages" in columns or "text" in columns


def parse_example(row: Mapping[str, object]) -> Example:
    """Read one row in any of the formats in this module's table.

    Raises `InputError` with the reason and the column as its `key`, `Dropped` for a completion to avoid; the caller
    knows the file and the row.
    """
    completion = next((name for name in COMPLETIONS if row.get(name) is not None), None)
    if completion is not None and row.get("prompt") is not None:
        if str(row.get("label")).lower() == "false":
            raise Dropped("the label is false: the completion is one to avoid", kind="conflict", key="label")
        example = Example(parse_prompt(row["prompt"]), _completion(row[completion], completion))
    elif isinstance(messages := row.get("messages"), list):
        example = _dialogue(messages)
    elif isinstance(text := row.get("text"), str):
        example = Example(None, text)
    else:
        message = "the row holds neither a prompt and a completion (or response), nor messages, nor text"
        raise InputError(message, kind="missing")
    if not example.response.strip():
        what, column = ("text", "text") if example.prompt is None else ("response", completion or "messages")
        raise InputError(f"the {what} is empty", kind="empty", key=column)
    return example


def _completion(value: object, column: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) != 1:
        message = f"column {column!r} must be text or a list of one assistant message"
        raise InputError(message, kind="invalid", key=column)
    return assistant_text(parse_messages(value, column)[0], column)


def _dialogue(value: list[object]) -> Example:
    messages = parse_messages(value, "messages")
    if isinstance(last := value[-1], Mapping) and last.get("weight") == 0:  # OpenAI's fine-tuning
        raise Dropped("the weight of the last message is 0: it is not to be learnt", kind="conflict", key="messages")
    response = assistant_text(messages[-1], "messages")
    if len(messages) == 1:
        raise InputError("the messages hold no prompt before the response", kind="missing", key="messages")
    return Example(parse_prompt(messages[:-1]), response)
