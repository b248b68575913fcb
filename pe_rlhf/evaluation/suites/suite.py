"""What a suite is, and how its files are read: from a folder, or from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pe_rlhf.system.progress import say
from reward.errors import InputError
from reward.judges.published import Conversation
from reward.records import Message, Prompt
from reward.row_files import read_rows
from reward.summary import Outcome

IDS = ("question_id", "uid", "prompt_id", "instruction")
ASKED = ("llm", "rating")  # kinds of judges that a template is for
TURNS = ("turns", "prompt", "instruction")


@dataclass(frozen=True)
class Item:
    """A question of one or more turns. answer: the baseline's, a text for each turn; reference: a right one."""

    id: str
    turns: tuple[str, ...]
    answer: tuple[str, ...] | None = None
    reference: tuple[str, ...] | None = None

    def prompt(self, said: Sequence[str]) -> Prompt:
        """The next turn, after what a side has answered to the ones before; a first turn is a plain text."""
        if not said:
            return self.turns[0]
        messages: list[Message] = []
        for question, answer in zip(self.turns, said, strict=False):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.turns[len(said)]}]

    def question(self, turn: int) -> Prompt:
        """What the judge is asked about: the questions up to a turn, and the reference where there is one."""
        messages: list[Message] = [{"role": "user", "content": text} for text in self.turns[: turn + 1]]
        messages += [{"role": "reference", "content": text} for text in (self.reference or ())[: turn + 1]]
        return self.turns[0] if len(messages) == 1 else messages

    def response(self, said: Sequence[str]) -> str:
        """A side's answer to the first turn; later, its whole conversation."""
        return said[0] if len(said) == 1 else Conversation.of(self.turns, said)


@dataclass(frozen=True)
class Suite:
    """Where a suite's files are, how it is judged, and its number.

    questions, answers (of `baseline`), references: files of the hub's `hub`; in a folder of the user's their last name
    is looked for. categories: of the questions that are used, where they have some. judge: settings that a chat judge
    has unless the user says otherwise. judge_texts: files of the folder with the published text of the judge.
    difficulty: files of the folder for the length-controlled win-rate.
    """

    name: str
    hub: str
    questions: str
    answers: str
    baseline: str
    judge: dict[str, Any]
    max_new_tokens: int
    score: Callable[[Sequence[Outcome], dict[str, Any]], dict[str, Any]]
    hub_type: Literal["dataset", "space"] = "dataset"
    references: str | None = None
    categories: tuple[str, ...] = ()
    difficulty: tuple[str, ...] = field(default=())
    judge_texts: tuple[str, ...] = ()

    def set_defaults(self, settings: dict[str, Any], folder: Path | None = None) -> None:
        """Set what the suite says of judge and sampling in settings of `pe-rlhf evaluate` that say nothing of it.

        The judge's template is the published one where the folder has its file or, without a folder, the hub.
        """
        settings.setdefault("sampling", {}).setdefault("max_new_tokens", self.max_new_tokens)
        judge: dict[str, Any] = _section(settings["judge"])
        settings["judge"] = judge
        judge["members"] = [_section(member) for member in judge.get("members", ())]
        judges = [judge, *judge["members"]]
        asking = [one for one in judges if str(one.get("kind")).startswith(ASKED) and "template" not in one]
        if asking and (text := self._judge_text(folder)) is not None:
            for one in asking:
                one["template"] = str(text)
        elif asking:
            say(
                f"warning: --suite {self.name}: the judge is asked in words of this project, so that the score is not"
                f" the published one's; put {self.judge_texts[0]} into --suite-data (docs/judging.md)"
            )
        for one in judges:
            one |= {key: value for key, value in self.judge.items() if key not in one}

    def load(self, folder: Path | None, *, with_answers: bool) -> list[Item]:
        """The questions in their order. Raises `InputError` for a file that is missing or of another form."""
        path = self._file(self.questions, folder, ("question.jsonl", "*.json", "*.jsonl", "*.csv"))
        rows = [(line, row) for line, row in read_rows(path) if self._is_used(row)]
        answers = self._answers(self.answers, folder) if with_answers else {}
        references = self._answers(self.references, folder, needed=False) if self.references else {}
        items: list[Item] = []
        for line, row in rows:
            id, turns = _id(row, path, line), _texts(_first(row, TURNS))
            if not turns:
                raise InputError(
                    f"{path} line {line}: there is no question under {', '.join(TURNS)}",
                    kind="missing",
                    key="turns",
                    file=path,
                    row=line,
                )
            answer = answers.get(id)
            if with_answers and (answer is None or len(answer) < len(turns)):
                raise InputError(
                    f"--suite {self.name}: the baseline has no answer to {id[:60]!r} of {len(turns)} turns",
                    kind="missing",
                    key="--suite-data",
                    file=path,
                    row=line,
                    fix="name another baseline by --against",
                )
            items.append(Item(id, turns, answer, references.get(id) or _texts(row.get("reference")) or None))
        if not items:
            raise InputError(f"{path} has no questions", kind="empty", key="--suite-data", file=path)
        return items

    def difficulties(self, folder: Path | None) -> Path | None:
        """The file with the instructions' difficulties, if the folder has one."""
        return self._beside(folder, self.difficulty)

    def _judge_text(self, folder: Path | None) -> Path | None:
        """The file with the judge's published text; None where it is neither in the folder nor on the hub."""
        if folder is not None:
            return self._beside(folder, self.judge_texts)
        for file in (name for name in self.judge_texts if "*" not in name):
            with suppress(InputError):
                return self._from_hub(file)
        return None

    @staticmethod
    def _beside(folder: Path | None, patterns: Sequence[str]) -> Path | None:
        found = (path for pattern in patterns if folder for path in sorted(folder.glob(pattern)))
        return next(found, None)

    def _is_used(self, row: Mapping[str, Any]) -> bool:
        category = row.get("category")
        return not self.categories or category is None or category in self.categories

    def _answers(self, file: str, folder: Path | None, *, needed: bool = True) -> dict[str, tuple[str, ...]]:
        try:
            path = self._file(file, folder, ())
        except InputError:
            if needed:
                raise
            return {}
        return answers_in(path)

    def _file(self, file: str, folder: Path | None, others: Sequence[str]) -> Path:
        if folder is None:
            return self._from_hub(file)
        below = Path(file)
        patterns = (file, str(Path(*below.parts[-2:])), below.name, f"*/{below.name}", *others)
        found = (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file())
        path = next(found, None)
        if path is None:
            raise InputError(
                f"--suite {self.name}: there is no {below.name} in {folder}",
                kind="missing",
                key="--suite-data",
                file=folder,
                fix=f"it is {file} of {self.hub} on the hub",
            )
        return path

    def _from_hub(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.hub, file, repo_type=self.hub_type))
        except Exception as error:  # it raises its own classes, those of two HTTP libraries, and the system's
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--suite {self.name}: {file} of {self.hub} could not be loaded from the hub: {reason}",
                kind="missing",
                key="--suite-data",
                fix="download the files of the suite and name their folder by --suite-data",
            ) from error


def answers_in(path: Path) -> dict[str, tuple[str, ...]]:
    """A model's answers, a text for each turn, by the id of the question.

    Of FastChat's form (`choices` with `turns`), Arena-Hard's (`messages`), AlpacaEval's (`output`), or with `response`.
    """
    found: dict[str, tuple[str, ...]] = {}
    for line, row in read_rows(path):
        choices = row.get("choices")
        said = _texts(choices[0].get("turns") if isinstance(choices, list) and choices else None)
        said = said or _texts([m for m in row.get("messages") or () if m.get("role") == "assistant"])
        said = said or _texts(_first(row, ("output", "response", "responses")))
        if not said:
            raise InputError(
                f"{path} line {line}: there is no answer under choices, messages, output or response",
                kind="missing",
                key="output",
                file=path,
                row=line,
            )
        found[_id(row, path, line)] = said
    return found


def _section(judge: Any) -> dict[str, Any]:
    return {"kind": judge} if isinstance(judge, str) else dict(judge)


def _id(row: Mapping[str, Any], path: Path, line: int) -> str:
    value = _first(row, (*IDS, "prompt"))
    if value is None:
        raise InputError(
            f"{path} line {line}: it needs one of {', '.join(IDS)}", kind="missing", key=IDS[0], file=path, row=line
        )
    return value if isinstance(value, str) else json.dumps(value)


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((row[column] for column in columns if row.get(column) is not None), None)


def _texts(value: Any) -> tuple[str, ...]:
    """A text, texts, or messages (whose content may be an object with the answer) as texts."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, dict):
        return _texts(_first(value, ("content", "answer", "text")))
    return tuple(text for one in value for text in _texts(one)) if isinstance(value, list | tuple) else ()
