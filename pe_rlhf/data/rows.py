"""Data sets of a recipe as prompts, preference pairs and examples to fine-tune on, unusable rows aside."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pe_rlhf.config import DataFile, DataPart, DataSource
from pe_rlhf.data.data_sources import load_rows, names_of
from pe_rlhf.data.examples import COMPLETIONS, Example, has_format, parse_example
from pe_rlhf.data.formats import begins_with_prompt, format_like
from pe_rlhf.data.local_files import ending
from pe_rlhf.data.mixture import mixed
from pe_rlhf.data.regrouping import are_responses
from pe_rlhf.data.row_table import Row, Rows
from pe_rlhf.system.files import write_jsonl
from pe_rlhf.system.processes import is_main
from pe_rlhf.system.progress import say
from pe_rlhf.system.seeding import permutation
from reward.errors import InputError, did_you_mean
from reward.records import (
    BadRecord,
    PreferenceRecord,
    Prompt,
    layout_of,
    parse_prompt,
    parse_record,
    parse_rows,
    split_row,
)

Record = TypeVar("Record")
T = TypeVar("T")
PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected", "margin", "chosen_truncated", "rejected_truncated", "subset")
EXAMPLE_COLUMNS = ("prompt", *COMPLETIONS, "messages", "text", "label")
SOURCE = "source"  # the column that names the part of a mixture
MAX_BAD_SHARE = 0.05
SHOWN = 300  # letters of the first row
# What chat templates of known families write before a turn.
MARKS = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant)\|>")
ASKS = ("question", "instruction", "query", "input", "problem", "context", "post")  # what others call a prompt

SYSTEMS = ("system", "system_prompt")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt and the other columns of its row, which reward functions see.

    `again` reads the row from the data set once more: of a million rows that is what is kept.
    """

    prompt: Prompt
    columns: dict[str, Any]
    again: Callable[[], PromptRow]

    def of_part(self, part: DataPart) -> PromptRow:
        """The row with the part of the mixture that it comes from in the column `source`."""
        label = {SOURCE: part.label or part.short_name}
        columns = self.columns | label if part.label else label | self.columns
        return PromptRow(self.prompt, columns, partial(_of_part, self.again, part))


def _of_part(again: Callable[[], PromptRow], part: DataPart) -> PromptRow:
    return again().of_part(part)


def task_numbers(given: Sequence[object], names: Sequence[str], key: str) -> list[int]:
    """The number among `names` of the task that each prompt's column `source` names; `given` are its values.

    Raises `InputError` with the data set's `key` where there is no such column, or the task is another.
    """
    for number, value in enumerate(given):
        if value not in names:
            is_there = any(each is not None for each in given)
            what = (
                f"prompt {number} has {value!r} in the column {SOURCE}" if is_there else f"there is no column {SOURCE}"
            )
            raise InputError(
                f"{key}: {what}, which has to name the task of a prompt: one of {', '.join(names)}",
                kind="unknown" if is_there else "missing",
                key=key,
                fix="mix the tasks' prompts, each with its label, or use continual: {method: joint, route: …}",
            )
    return [names.index(value) for value in given]  # type: ignore[arg-type]  # it is one of them


def load_prompts(source: DataSource, key: str, max_bad_share: float = MAX_BAD_SHARE) -> list[Prompt]:
    """The prompts of a data set, without their other columns."""
    rows, bad = load_prompt_rows(source, key, lambda row: row, max_bad_share)
    say_bad_rows(key, bad)
    return [row.prompt for row in rows]


def load_prompt_rows(
    source: DataFile,
    key: str,
    then: Callable[[PromptRow], T],
    max_bad_share: float = MAX_BAD_SHARE,
    select: Callable[[list[T], DataFile, str], list[T]] | None = None,
) -> tuple[list[T], list[BadRecord]]:
    """Prompts, and separately the unusable rows.

    They are the column `prompt` (in a .txt file the lines), else what the responses of preference pairs answer, else
    the messages before a final one of the assistant. `then` is applied to each; what it refuses is unusable, too. Rows
    of a mixture have the label of their part in the column `source`; without a label its name, unless they have such a
    column. `select` takes some of a data set's usable prompts, before they are mixed, so that shares are of those.
    """

    if isinstance(source, DataSource) and source.mix is not None:

        def load(part: DataPart, key: str) -> tuple[str, list[T], list[BadRecord]]:
            return "", *load_prompt_rows(part, key, lambda row: then(row.of_part(part)), max_bad_share, select)

        _, of_all, bad = _mixture(source, key, load)
        return of_all, bad
    rows = load_rows(source, key)
    given = "text" if ending(Path(source.path)) == ".txt" and not source.columns else "prompt"
    names = set(names_of(rows, lambda names: given in names))
    _say_what_is_odd(rows, source, key)
    if given in names or not names:  # without a row that can be read, the reasons are said below

        def find(row: Row) -> Prompt:
            return parse_prompt(row.get(given))

    elif {"chosen", "rejected"} <= names:

        def find(row: Row) -> Prompt:
            return parse_prompt(split_row(row)[0])

    elif "messages" in names:

        def find(row: Row) -> Prompt:
            return parse_prompt(_without_answer(row.get("messages")))

    else:
        raise _no_column("prompt", names, source, key)

    def parse(number: int, row: Row) -> PromptRow:
        others = {name: value for name, value in row.items() if name != given}
        return PromptRow(find(row), others, partial(again, number))

    def again(number: int) -> PromptRow:
        row = rows[number]
        assert not isinstance(row, InputError)  # it was none
        return parse(number, row)

    number = -1

    def counted() -> Iterator[Row | InputError]:
        nonlocal number
        for number, row in enumerate(rows):  # noqa: B007  # `parse` is given the row of this number next
            yield row

    parsed, bad = parse_rows(
        counted(), lambda row: then(parse(number, row)), source.path, max_bad_share, key, kind=None
    )
    return parsed if select is None else select(parsed, source, key), bad


def load_preferences(
    source: DataFile, key: str, max_bad_share: float, then: Callable[[PreferenceRecord], T]
) -> tuple[str, list[T], list[BadRecord]]:
    """What the rows of a data set are taken for, its preference pairs, and its unusable rows; see `reward.records`.

    `then` is applied to each pair; what it refuses is unusable, too.
    """
    if isinstance(source, DataSource) and source.mix is not None:
        return _mixture(source, key, lambda part, key: load_preferences(part, key, max_bad_share, then))
    rows = load_rows(source, key)
    names = set(names_of(rows, {"chosen", "rejected"}.issubset))
    _refuse_unknown(source, key, PREFERENCE_COLUMNS)
    for column in ("chosen", "rejected"):
        if names and column not in names:
            raise _no_column(column, names, source, key)
    if source.format is None and "prompt" not in names and format_like(names) == "sharegpt":
        raise _no_column("prompt", names, source, key)  # which is in the dialogue beside them
    _refuse_guess(rows, source, key)
    _say_what_is_odd(rows, source, key)
    records, bad = parse_rows(rows, lambda row: then(parse_record(row)), source.path, max_bad_share, key)
    return layout_of(next(row for row in rows if not isinstance(row, InputError))), records, bad


def load_examples(
    source: DataFile, key: str, max_bad_share: float, then: Callable[[Example], T]
) -> tuple[list[T], list[BadRecord]]:
    """The rows of a data set to fine-tune on, and separately its unusable rows; see `examples.py`.

    `then` is applied to each; what it refuses is unusable, too.
    """
    if isinstance(source, DataSource) and source.mix is not None:
        _, examples, bad = _mixture(source, key, lambda part, key: ("", *load_examples(part, key, max_bad_share, then)))
        return examples, bad
    rows = load_rows(source, key)
    names = set(names_of(rows, has_format))
    _refuse_unknown(source, key, EXAMPLE_COLUMNS)
    if names and not has_format(names):
        raise InputError(
            f"{key}: {source.path} has neither the columns prompt and completion (or response), nor messages, nor text;"
            f" it has {', '.join(sorted(names))}",
            kind="missing",
            key=key,
            file=source.path,
            fix="map them with columns: {completion: …}",
        )
    _say_what_is_odd(rows, source, key)
    return parse_rows(rows, lambda row: then(parse_example(row)), source.path, max_bad_share, key)


def _mixture(
    source: DataSource, key: str, load: Callable[[DataPart, str], tuple[str, list[T], list[BadRecord]]]
) -> tuple[str, list[T], list[BadRecord]]:
    """The rows of a mixture, each part loaded for itself: what its rows are taken for, the rows, the unusable ones."""
    loaded = [load(part, f"{key}.mix.{number}") for number, part in enumerate(source.mix or [])]
    bad = [
        replace(record, reason=f"{part.path}: {record.reason}")
        for part, (_, _, own) in zip(source.mix or [], loaded, strict=True)
        for record in own
    ]
    layouts = "; ".join(dict.fromkeys(layout for layout, _, _ in loaded))
    return layouts, mixed(source, [rows for _, rows, _ in loaded], key), bad


def say_first(key: str, count: int, what: str, text: str) -> None:
    """Say in one line how many rows there are, and what the model reads of the first of them."""
    shown = repr(text)
    say(f"{key}: {count} {what}; the first: {shown if len(shown) <= SHOWN else f'{shown[:SHOWN]} …'}")


def hold_out(
    records: list[Record], group: Callable[[Record], str], share: float, seed: int, *purpose: str
) -> tuple[list[Record], list[Record]]:
    """Split off the records of a share of the groups, at least of one, so that no group is on both sides."""
    groups = sorted({group(record) for record in records})
    order = permutation(len(groups), seed, *purpose)
    chosen = {groups[i] for i in order[: max(1, round(share * len(groups)))]}
    train = [record for record in records if group(record) not in chosen]
    return train, [record for record in records if group(record) in chosen]


def say_overlap(key: str, held_out: list[str], train: list[str]) -> None:
    """Say how many rows to evaluate on begin as one that is trained on does."""
    known = set(train)
    if shared := sum(turn in known for turn in held_out):
        say(f"{key}: {shared} of {len(held_out)} rows begin with the same turn as a row that is trained on")


def note_bad_rows(path: Path, key: str, bad: list[BadRecord]) -> int:
    """Say which rows were left out, the first few, and list all of them in a file. Returns how many there are."""
    listed = is_main() and path.parent.is_dir()  # `inspect` has no folder
    if bad and listed:
        write_jsonl(path, (asdict(record) for record in bad))
    say_bad_rows(key, bad, f", see {path}" if listed else "")
    return len(bad)


def say_bad_rows(key: str, bad: Sequence[BadRecord], where: str = "") -> None:
    """Say which rows were left out, the first few, how many there are, and where all of them are listed."""
    for record in bad[:5]:
        say(f"{key}: left out row {record.row}: {record.reason}")
    if bad:
        say(f"{key}: left out {len(bad)} unusable rows in all{where}")


def _without_answer(messages: Any) -> Any:
    last = messages[-1] if isinstance(messages, list) and messages else None
    answered = isinstance(last, dict) and last.get("role") == "assistant"
    return messages[:-1] if answered else messages


def _refuse_unknown(source: DataFile, key: str, known: Collection[str]) -> None:
    """A mapping to a name that means nothing here would leave its column out in silence."""
    if source.format is not None:
        return
    for ours in source.columns:
        if ours not in known:
            raise InputError(
                f"{key}: columns: {ours!r} means nothing here; there are {', '.join(known)}",
                kind="unknown",
                key=f"{key}.columns",
                file=source.path,
                fix=did_you_mean(ours, known),
            )


def _refuse_guess(rows: Rows, source: DataFile, key: str) -> None:
    """Two texts without a prompt would be read by their common start, though another column holds what they answer.

    Lists of responses would be no messages.
    """
    if source.format is not None:
        return
    first = next((row for row in rows if not isinstance(row, InputError)), {})
    if lists := [name for name in ("chosen", "rejected") if first.get(name) and are_responses(first[name])]:
        message = f"{key}: column {lists[0]!r} of {source.path} holds a list of responses"
        fix = "say format: rewardbench2, for a pair of each chosen response with each rejected one"
        raise InputError(message, kind="invalid", key=f"{key}.format", file=source.path, fix=fix)
    texts = isinstance(first.get("chosen"), str) and layout_of(first).startswith("texts")
    if not texts or "prompt" in (names := names_of(rows, lambda names: "prompt" in names)):
        return
    candidates = [name for name in ASKS if isinstance(first.get(name), str)]
    if source.columns:
        candidates += [name for name in names if name not in PREFERENCE_COLUMNS and isinstance(first.get(name), str)]
    if candidates:
        raise InputError(
            f"{key}: {source.path} has no column 'prompt', and its column {candidates[0]!r} may be it",
            kind="missing",
            key=f"{key}.columns",
            file=source.path,
            fix=f"map it with columns: {{prompt: {candidates[0]}}}, or say format: implicit if chosen and rejected hold"
            " the prompt",
        )


def _say_what_is_odd(rows: Rows, source: DataFile, key: str) -> None:
    """Say that a system text beside a plain prompt is in a column that has no meaning here, that responses say the
    prompt once more, and that a text holds the marks of a chat template: rendered again, they are words to the model.
    """
    first = next((row for row in rows if not isinstance(row, InputError)), {})
    for column in ("prompt", "chosen"):
        if isinstance(text := first.get(column), str) and (found := MARKS.search(text)):
            say(
                f"warning: {key}: {column!r} holds marks of a chat template ({found[0]}), which the model's template"
                " would be written around: give messages, or use chat_template: none for texts that are whole"
            )
    for columns, fix in (
        (("chosen", "rejected"), "format: implicit"),
        (COMPLETIONS[:1], "columns: {text: completion}"),
    ):
        if begins_with_prompt(first, *columns):
            what = f"{' and '.join(columns)} of the first row begin with its prompt, which the model would read twice"
            say(f"warning: {key}: {what}; if all rows do, say {fix}")
    for column in SYSTEMS if source.format is None and isinstance(first.get("prompt"), str) else ():
        if isinstance(text := first.get(column), str) and text.strip():
            say(f"{key}: the column {column!r} is left out; with format: alpaca it is the system turn")


def _no_column(column: str, names: set[str], source: DataFile, key: str) -> InputError:
    message = f"{key}: {source.path} has no column {column!r}; it has {', '.join(sorted(names))}"
    like = None if source.format is not None else format_like(names)
    fix = f"map it with columns: {{{column}: …}}, or name its format" if like is None else f"say format: {like}"
    return InputError(message, kind="missing", key=key, file=source.path, fix=fix)
