"""Chat messages as people have them: with OpenAI's or ShareGPT's keys, other names of roles, and parts of a content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reward.errors import InputError

Message = dict[str, str]
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_NAMES = {
    "system": ("system",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "bing", "bard"),
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}


def role_of(message: Mapping[Any, object]) -> object:
    """Who speaks, by our names; what is none of them stays as it is."""
    role = message.get("role", message.get("from"))
    return ROLES.get(role.strip().lower(), role) if isinstance(role, str) else role


def parse_messages(value: list[object], column: str) -> list[Message]:
    """Check a list of chat messages; keep role and content of each, the parts of a content joined."""
    messages: list[Message] = []
    for item in value:
        if not isinstance(item, Mapping):
            what = f"column {column!r} holds {json.dumps(item, default=str)[:40]}, which is no message"
            raise InputError(what, kind="invalid", key=column)
        role, content = role_of(item), _joined(item.get("content", item.get("value")), column)
        if role == "system" and content is None:  # a column of structs has it in every row
            continue
        if role in TOOL_ROLES or item.get("tool_calls") or item.get("function_call"):
            raise InputError(f"column {column!r} holds tool calls", kind="invalid", key=column)
        if not isinstance(role, str) or not isinstance(content, str):
            message = f"column {column!r} holds a message without a text 'role' and a text 'content'"
            raise InputError(message, kind="invalid", key=column)
        messages.append({"role": role, "content": content})
    if not messages:
        raise InputError(f"column {column!r} holds no messages", kind="empty", key=column)
    return messages


def _joined(content: object, column: str) -> object:
    """The text of a content that is a list of parts, as messages with pictures have it."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or (isinstance(part, Mapping) and part.get("type", "text") != "text"):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"column {column!r} holds a part that is no text: {kind}", kind="invalid", key=column)
        texts.append(text)
    return "".join(texts)


def assistant_text(message: Message, column: str) -> str:
    """The text of an assistant's message in a column. Raises `InputError` for another role's."""
    if message["role"] != "assistant":
        reason = f"the last message of {column!r} has the role {message['role']!r}, not 'assistant'"
        raise InputError(reason, kind="invalid", key=column)
    return message["content"]
