"""Preference records and the formats they are read from.

| format                  | prompt   | chosen, rejected                                                          |
|-------------------------|----------|---------------------------------------------------------------------------|
| explicit, plain         | text     | text                                                                      |
| explicit, chat          | messages | a list of one assistant message (or its text)                             |
| implicit, plain         | none     | text; both start with the prompt                                          |
| implicit, chat          | none     | messages; the same up to the last one, which is the assistant's           |
| Anthropic hh transcript | none     | text `"\\n\\nHuman: … \\n\\nAssistant: …"`; the same up to the last turn  |

The first four are TRL's preference types. Lists of one assistant message may stand beside a prompt of text, too, and a
prompt of messages may stand once more before each response. As in TRL, a prompt of text beside whole dialogues is a
copy of something the dialogues hold, and is ignored. A prompt that is a transcript itself is read as messages. Messages
may be their JSON text, as tables of text hold them; see `reward.messages`. No prompt ends with an assistant's turn: the
template would have that answered once more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

from reward.errors import InputError, Kind
from reward.messages import Message, assistant_text, parse_messages

Prompt = str | list[Message]
Columns = Mapping[str, Sequence[Any]]  # the other columns of the rows of prompts, by name
NO_COLUMNS: Columns = {}
Record = TypeVar("Record")

TRANSCRIPT_START = "\n\nHuman:"
TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
TRANSCRIPT_PROMPT = re.compile(r"\s*Human:.*\n\nAssistant:|\n\nHuman:", re.DOTALL)
WHOLE_DIALOGUES = "dialogues that are the same up to the last turn"
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PreferenceRecord:
    """Two responses to one prompt, the better one first.

    margin: how much better, in reward units. *_truncated: the response was cut at a length limit, so it gets no EOS.
    subset: what an evaluation splits its results by.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    chosen_truncated: bool = False
    rejected_truncated: bool = False
    subset: str = "all"


class Dropped(InputError):
    """A row that is sound but from which nothing can be learnt, such as a tie: listed, and not counted as unusable."""


@dataclass
class BadRecord:
    """A row that cannot be used: its number, counted from 1, and why, also as the kind of an `InputError`."""

    row: int
    reason: str
    kind: Kind = "invalid"


def load_records(
    rows: Iterable[Mapping[str, object]], file: str, max_bad_share: float = 0.05, key: str | None = None
) -> tuple[list[PreferenceRecord], list[BadRecord]]:
    """Parse all rows as preferences; see `parse_rows`."""
    return parse_rows(rows, parse_record, file, max_bad_share, key)


def parse_rows(
    rows: Iterable[Mapping[str, object] | InputError],
    parse: Callable[[Mapping[str, object]], Record],
    file: str,
    max_bad_share: float = 0.05,
    key: str | None = None,
    kind: Kind | None = "invalid",
) -> tuple[list[Record], list[BadRecord]]:
    """Parse all rows; return the records, and separately the rows that could not be parsed.

    Args:
        rows: an `InputError` in place of a row says why it could not be read.
        parse: raises `InputError` for a row that it cannot read.
        file, key: the data set and the recipe key that names it, for errors.
        max_bad_share: the share of rows that may be unusable.
        kind: of the error where too many are; None: that of the first. Of rows that cannot be read it is `unreadable`.

    Raises `InputError` where there are no rows, where no row can be used, and where more than `max_bad_share` cannot;
    its `row` is the first of those.
    """
    records: list[Record] = []
    left_out: list[BadRecord] = []
    bad: list[tuple[int, InputError]] = []
    for number, row in enumerate(rows, start=1):
        try:
            if isinstance(row, InputError):
                raise row
            records.append(parse(row))
        except InputError as error:
            left_out.append(BadRecord(number, str(error), error.kind))
            if not isinstance(error, Dropped):
                bad.append((number, error))

    place = file if key is None else f"{key}: {file}"
    total = len(records) + len(left_out)
    if total == 0:
        raise InputError(f"{place}: there are no rows", kind="empty", key=key, file=file)
    if not records and not bad:
        message = f"{place}: all {total} rows were dropped; the first is row 1: {left_out[0].reason}"
        raise InputError(message, kind="empty", key=key, file=file)
    if bad and (not records or len(bad) / total > max_bad_share):
        number, error = bad[0]
        share = f"no row of {total} can be used"
        if records:
            share = f"{len(bad)} of {total} rows ({len(bad) / total:.1%}) cannot be used"
            share += f", more than the {max_bad_share:.1%} allowed"
        message = f"{place}: {share}; the first is row {number}: {error}"
        of = error.kind if kind is None or error.kind == "unreadable" else kind
        raise InputError(message, kind=of, key=key, file=file, row=number)
    return records, left_out


def parse_record(row: Mapping[str, object]) -> PreferenceRecord:
    """Read one row in any of the formats in this module's table.

    Optional columns: `margin` (a number), `chosen_truncated` and `rejected_truncated` (true or false), `subset`.
    Raises `InputError` with the reason and the column as its `key`; the caller knows the file and the row.
    """
    if not isinstance(row, Mapping):
        raise InputError("the row is not an object with named columns", kind="invalid")
    prompt, chosen, rejected = split_row(row)
    prompt = parse_prompt(prompt)
    for column, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise InputError(f"the {column} response is empty", kind="empty", key=column)
    if chosen.strip() == rejected.strip():
        raise InputError("the chosen and the rejected response are equal", kind="conflict", key="rejected")
    return PreferenceRecord(
        prompt,
        chosen,
        rejected,
        margin=_optional_number(row, "margin"),
        chosen_truncated=_optional_flag(row, "chosen_truncated"),
        rejected_truncated=_optional_flag(row, "rejected_truncated"),
        subset=str(row.get("subset") or "all"),
    )


def parse_prompt(value: object) -> Prompt:
    """A prompt, checked: text, or chat messages with role and content each. A transcript becomes messages.

    Other keys of a message are dropped: the loader fills in every key that any row of the data set has.
    Raises `InputError` with the reason, also where the last turn is the assistant's.
    """
    if not isinstance(value, str | list):
        raise InputError("the prompt must be text or a list of messages", kind="invalid", key="prompt")
    prompt: Prompt
    if isinstance(value, list):
        prompt = parse_messages(value, "prompt")
    elif TRANSCRIPT_PROMPT.match(value):
        prompt = _transcript_messages("\n\n" + value.lstrip())
        if prompt[-1]["role"] == "assistant" and not prompt[-1]["content"].strip():
            prompt.pop()  # "Assistant:", after which the response comes
    else:
        prompt = value
    contents = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if not any(content.strip() for content in contents):
        raise InputError("the prompt is empty", kind="empty", key="prompt")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        message = "the prompt ends with the assistant's turn, so that nothing is left to answer"
        raise InputError(message, kind="invalid", key="prompt")
    return prompt


def first_turn(prompt: Prompt) -> str:
    """What a prompt begins with, a system's turn aside: dialogues that share it go on from one another."""
    if isinstance(prompt, str):
        return repr(prompt)
    return repr([next((message for message in prompt if message["role"] != "system"), prompt[0])])


def layout_of(row: Mapping[str, object]) -> str:
    """What a row of preferences is taken for, in words."""
    chosen = row.get("chosen")
    if isinstance(chosen, list):
        return "responses to a prompt of messages" if isinstance(row.get("prompt"), list) else WHOLE_DIALOGUES
    if isinstance(chosen, str) and chosen.startswith(TRANSCRIPT_START):
        return f"transcripts, {WHOLE_DIALOGUES}"
    if row.get("prompt") is None:
        return "texts whose common start is the prompt"
    return "responses to a prompt of text" if isinstance(row["prompt"], str) else "responses to a prompt of messages"


def split_row(row: Mapping[str, object]) -> tuple[Prompt, str, str]:
    """Tell the format by the types of the columns; return prompt, chosen and rejected response."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            raise InputError(f"column {column!r} is missing", kind="missing", key=column)
    if prompt is not None and not isinstance(prompt, str | list):
        raise InputError("column 'prompt' must be text or a list of messages", kind="invalid", key="prompt")

    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, list):
            return parse_messages(prompt, "prompt"), chosen, rejected
        if chosen.startswith(TRANSCRIPT_START) and rejected.startswith(TRANSCRIPT_START):
            return _split_dialogues(_transcript_messages(chosen), _transcript_messages(rejected))
        if isinstance(prompt, str) and TRANSCRIPT_PROMPT.match(prompt):  # the space after "Assistant:" is the format's
            return prompt, chosen.removeprefix(" "), rejected.removeprefix(" ")
        return (prompt, chosen, rejected) if isinstance(prompt, str) else _split_texts(chosen, rejected)

    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen_messages, rejected_messages = parse_messages(chosen, "chosen"), parse_messages(rejected, "rejected")
        asked: Prompt
        if isinstance(prompt, list):
            asked = parse_messages(prompt, "prompt")
            start = len(asked)
            if asked == chosen_messages[:start] == rejected_messages[:start]:  # the responses come after a copy of it
                chosen_messages, rejected_messages = chosen_messages[start:], rejected_messages[start:]
        elif isinstance(prompt, str) and len(chosen_messages) == len(rejected_messages) == 1:
            asked = prompt
        else:
            return _split_dialogues(chosen_messages, rejected_messages)
        if len(chosen_messages) != 1 or len(rejected_messages) != 1:
            message = "beside a prompt of messages, each response must be a single assistant message"
            raise InputError(message, kind="invalid", key="chosen" if len(chosen_messages) != 1 else "rejected")
        better, worse = assistant_text(chosen_messages[0], "chosen"), assistant_text(rejected_messages[0], "rejected")
        return asked, better, worse

    message = "columns 'chosen' and 'rejected' must both be text or both be lists of messages"
    raise InputError(message, kind="conflict", key="rejected")


def _split_dialogues(chosen: list[Message], rejected: list[Message]) -> tuple[Prompt, str, str]:
    """Split whole dialogues: the last message is the response, all before it the prompt, which they must share."""
    if chosen[:-1] != rejected[:-1]:
        message = "the dialogues must be the same up to one final assistant message each"
        raise InputError(message, kind="conflict", key="rejected")
    if len(chosen) == 1:
        raise InputError("the dialogues hold no prompt before the response", kind="missing", key="prompt")
    return chosen[:-1], assistant_text(chosen[-1], "chosen"), assistant_text(rejected[-1], "rejected")


def _split_texts(chosen: str, rejected: str) -> tuple[Prompt, str, str]:
    """Split texts that start with the same prompt: their longest common prefix, cut back to a word boundary.

    TRL's `extract_prompt` cuts after the last common character, also inside a word: "is bl" + "ue" / "ack". Tokens do
    not end there, so the word stays whole here: "is" + " blue" / " black". The space before a word belongs to the word
    (as in TRL), a line break to the prompt. Languages written without spaces need their prompt in its own column.
    """
    left, right = chosen.rstrip(), rejected.rstrip()  # a text that ends here is no response: give it its last word back
    end = _common_prefix_length(left, right)
    both_at_word_end = left[end : end + 1].isspace() and right[end : end + 1].isspace()
    if not both_at_word_end:
        while end > 0 and not chosen[end - 1].isspace():
            end -= 1
    if end > 0 and chosen[end - 1] == " ":
        end -= 1
    if end == 0:
        message = "the texts start with no common prompt, and there is no column 'prompt'"
        raise InputError(message, kind="missing", key="prompt")
    return chosen[:end], chosen[end:], rejected[end:]


def _common_prefix_length(left: str, right: str) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _transcript_messages(text: str) -> list[Message]:
    """Read an Anthropic transcript, one message a turn; only a marker after an empty line starts a turn.

    The one space after the marker belongs to the format; all other white space is kept, and so are turns of one role in
    a row, which real data holds: the messages give the text back exactly.
    """
    parts = TRANSCRIPT_TURN.split(text)  # "", "Human", " Hello", "Assistant", " Hi", …
    return [
        {"role": TRANSCRIPT_ROLES[speaker], "content": content.removeprefix(" ")}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _optional_number(row: Mapping[str, object], column: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"column {column!r} must be a finite number", kind="invalid", key=column)
    return number


def _optional_flag(row: Mapping[str, object], column: str) -> bool:
    value = row.get(column)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InputError(f"column {column!r} must be true or false", kind="invalid", key=column)
    return value
