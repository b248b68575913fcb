"""Judges' prompts in the files that suites publish them in, with their system part and their labels.

FastChat's `judge_prompts.jsonl` (MT-Bench), a config of arena-hard-auto in YAML, and a text of AlpacaEval's with parts
in `<|im_start|>`. A place such as `{question}` or `{answer_a_2}` takes a text; other braces stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from reward.errors import InputError
from reward.records import Message

PLACE = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")
PART = re.compile(r"<\|im_start\|>(system|user)\n(.*?)\n?<\|im_end\|>", re.DOTALL)


class Conversation(str):
    """A response of several turns, as one text that knows the `answers` in it."""

    answers: tuple[str, ...]

    @classmethod
    def of(cls, questions: Iterable[str], answers: Sequence[str]) -> Conversation:
        parts = (f"### User:\n{q}\n\n### Assistant:\n{a}" for q, a in zip(questions, answers, strict=False))
        text = cls("\n\n".join(parts))
        text.answers = tuple(answers)
        return text


@dataclass(frozen=True)
class Variant:
    """One text: a system part, which may be empty, and a user's part. rates: it shows one response, to be rated."""

    system: str
    user: str
    rates: bool = False

    @property
    def places(self) -> set[str]:
        return set(PLACE.findall(self.user))


class Published:
    """The texts of a file. `labels` are what they ask for in place of A and B."""

    def __init__(self, path: Path, *, rates: bool) -> None:
        self._path = path
        self.text = path.read_text(encoding="utf-8")
        self._variants = [variant for variant in self._read() if variant.rates == rates and variant.user]
        if not self._variants:
            raise self._wrong("has no " + ("rating of one response" if rates else "comparison of two responses"))
        self.labels = ("m", "M") if re.search(r"\bm or M\b", self.text) else ("A", "B")

    def chat(self, messages: Sequence[Message], responses: Mapping[str, str]) -> list[Message]:
        """The messages to a judge: the text for so many turns, with a reference where the question has one.

        messages: questions, with `reference` for a right answer to each. responses: as `JudgePrompt` has them; one of
        several turns is a `Conversation`.
        """
        values = _values(messages, responses)
        several, referred = "question_2" in values, "ref_answer_1" in values
        fitting = [v for v in self._variants if several == ("question_2" in v.places)]
        fitting = [v for v in fitting if referred == ("ref_answer_1" in v.places)] or (fitting if not referred else [])
        if not fitting:
            turn, right = ("a second turn" if several else "a first turn"), (" with a reference" if referred else "")
            raise self._wrong(f"has no text for {turn}{right}")
        if unknown := sorted(fitting[0].places - values.keys()):
            raise self._wrong(f"has a place {{{unknown[0]}}} that nothing here belongs in")
        # All places at once: what stands in a response is not a place.
        user: Message = {"role": "user", "content": PLACE.sub(lambda found: values[found[1]], fitting[0].user)}
        system: list[Message] = [{"role": "system", "content": fitting[0].system}] if fitting[0].system else []
        return [*system, user]

    def _read(self) -> Iterator[Variant]:
        try:
            if self._path.suffix == ".jsonl":
                for row in map(json.loads, filter(str.strip, self.text.splitlines())):
                    yield Variant(row["system_prompt"], row["prompt_template"], row["type"] == "single")
            elif self._path.suffix in (".yaml", ".yml"):
                config = yaml.safe_load(self.text)
                parts = config["prompt_template"]
                yield Variant(config["system_prompt"], parts if isinstance(parts, str) else "\n".join(parts))
            else:
                parts = dict(PART.findall(self.text))
                yield Variant(parts.get("system", ""), parts["user"])
        except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise self._wrong(f"cannot be read: {error}") from error
        except KeyError as error:
            fix = "arena-hard-auto 2.0 has it in utils/judge_utils.py: write it into the file"
            raise self._wrong(f"has no {error.args[0]}", fix if error.args[0] == "system_prompt" else None) from error

    def _wrong(self, what: str, fix: str | None = None) -> InputError:
        message = f"judge.template: {self._path} {what}"
        return InputError(message, kind="invalid", key="judge.template", file=self._path, fix=fix)


def is_published(path: Path) -> bool:
    """Whether a template's file is of a form that suites publish, and no Jinja."""
    if path.suffix in (".jsonl", ".yaml", ".yml"):
        return True
    return path.suffix == ".txt" and "<|im_start|>user\n" in path.read_text(encoding="utf-8", errors="replace")


def _values(messages: Sequence[Message], responses: Mapping[str, str]) -> dict[str, str]:
    """What belongs in each place, by all its names."""
    references = [message["content"] for message in messages if message["role"] == "reference"]
    asked = [message for message in messages if message["role"] != "reference"]
    questions = [message["content"] for message in asked]
    if any(message["role"] != "user" for message in asked):  # a dialogue is one question
        questions = ["\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in asked)]
    found = {f"question_{turn}": text for turn, text in enumerate(questions, start=1)}
    found |= dict.fromkeys(("question", "QUESTION", "instruction"), questions[0])
    found |= {f"ref_answer_{turn}": text for turn, text in enumerate(references, start=1)}
    sides = [responses[name] for name in ("response_a", "response_b", "response") if name in responses]
    names = (("answer_a", "ANSWER_A", "output_1"), ("answer_b", "ANSWER_B", "output_2"))
    names = names if len(sides) == 2 else (("answer",),)
    for number, (side, of_side) in enumerate(zip(sides, names, strict=True), start=1):
        turns = side.answers if isinstance(side, Conversation) else (side,)
        found |= dict.fromkeys(of_side, turns[0])
        found |= {f"{of_side[0]}_{turn}": text for turn, text in enumerate(turns, start=1)}
        if len(sides) == 2:  # Arena-Hard 0.1 counts the sides
            found[f"answer_{number}"] = turns[0]
    return found
