"""Messages that a table holds as text, or one by itself, as the lists that they are."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping

MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "messages", "completion", "response")
PACKED = re.compile(r"\s*\[\s*\{\s*[\"'](?:role|content|from|value)[\"']\s*:")  # a list of messages as text


def unpacked(row: Mapping[str, object]) -> Mapping[str, object]:
    """A row whose messages are lists: they come as JSON or as Python's own text from tables, and one by itself."""
    found = {name: messages for name in MESSAGE_COLUMNS if (messages := _messages_in(row.get(name))) is not None}
    return {**row, **found} if found else row


def _messages_in(value: object) -> list[object] | None:
    if isinstance(value, Mapping):
        return [value] if _is_message(value) else None
    if not isinstance(value, str) or not PACKED.match(value):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list) and found and all(map(_is_message, found)) else None
    return None


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())
