"""The prompts of chat judges: jinja2 files in `reward/prompts`, or a file of the user's."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import ClassVar

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2 import Template as JinjaTemplate
from jinja2.sandbox import ImmutableSandboxedEnvironment

from reward.errors import InputError, did_you_mean
from reward.judges.base import Comparison
from reward.judges.published import Published, is_published
from reward.judges.user_code import call_users_code
from reward.records import Message, Prompt

FOLDER = Path(__file__).parents[1] / "prompts"


class JudgePrompt:
    """A judge's prompt: `general`, `helpfulness`, `harmlessness`, `summarization`, or the path of a file.

    A jinja2 file gets `messages`, `response_a`, `response_b` and `reasoning`, may extend `base.jinja2`, and has to ask
    for the letter A or B, or for Arena-Hard's labels; a macro `system` is its system part. Other files are those of
    suites: see `Published`. `fingerprint` changes with the text of the question. `allows_ties`: it offers a tie as
    `[[C]]`, `A=B` or "or tie"; without it a judge that calls a tie gives no valid verdict.
    """

    folder: ClassVar[Path] = FOLDER
    rates: ClassVar[bool] = False  # one response in place of two

    def __init__(self, name: str) -> None:
        self.name = name
        path = _find(name, self.folder)
        self._template = Published(path, rates=self.rates) if is_published(path) else _load(path, self.folder)
        self.labels = self._template.labels if isinstance(self._template, Published) else ("A", "B")
        text = call_users_code("judge.template", self._probed)
        if isinstance(self._template, Published):
            text += self._template.text
        self.fingerprint = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        self.allows_ties = re.search(r"\[\[C\]\]|A ?= ?B|\bor (?:a )?[\"'“]?tie\b", text) is not None

    def _probed(self) -> str:
        """The text of a question. Raises `InputError` for one that shows no response, or asks for no letter."""
        prompt: list[Message] = [{"role": "user", "content": "p"}]
        text, other = (
            "".join(
                message["content"]
                for reasoning in (False, True)
                for message in self.chat(Comparison(prompt, *pair), reasoning=reasoning)
            )
            for pair in (("a", "b"), ("b", "a"))
        )
        wanted = () if self.rates else self.labels
        if text == other:
            what = "is the same whatever the responses are"
        elif missing := [letter for letter in wanted if not re.search(rf"\b{letter}\b", text)]:
            what = f"never asks for {missing[0]}"
        else:
            return text
        raise InputError(f"judge.template: {self.name} {what}", kind="invalid", key="judge.template")

    def chat(self, comparison: Comparison, *, reasoning: bool) -> list[Message]:
        """The question to the judge, after a system message where there is one. Raises `InputError` where it fails."""
        messages, responses = as_messages(comparison.prompt), self._responses(comparison)
        if isinstance(self._template, Published):
            return self._template.chat(messages, responses)
        try:
            parts = self._template.make_module({"messages": messages, "reasoning": reasoning, **responses})
            chat: list[Message] = [{"role": "user", "content": str(parts).strip()}]
            if callable(system := getattr(parts, "system", None)):
                chat.insert(0, {"role": "system", "content": str(system()).strip()})
            return chat
        except Exception as error:  # a template is a program: it can fail in any way
            message = f"judge.template: {self.name} fails: {str(error) or type(error).__name__}"
            raise InputError(message, kind="user_code", key="judge.template") from error

    def _responses(self, comparison: Comparison) -> dict[str, str]:
        return {"response_a": comparison.response_a, "response_b": comparison.response_b}


class RatingPrompt(JudgePrompt):
    """The prompt of a judge that rates one response, A: a template of the same names, in `rating`, or a file.

    A file gets `messages`, `response` and `reasoning`, may extend `base.jinja2` of that folder, and has to ask for a
    number from 1 to 10, by itself or as `[[5]]`.
    """

    folder = FOLDER / "rating"
    rates = True

    def _responses(self, comparison: Comparison) -> dict[str, str]:
        return {"response": comparison.response_a}


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def template_names(folder: Path = FOLDER) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.jinja2") if path.stem != "base")


def _find(name: str, folder: Path) -> Path:
    path = Path(name) if Path(name).is_file() else folder / f"{name}.jinja2"
    if not path.is_file() or name == "base":
        raise InputError(
            f"judge.template: {name!r} is neither one of {', '.join(template_names(folder))} nor a file",
            kind="unknown",
            key="judge.template",
            fix=did_you_mean(name, template_names(folder)),
        )
    return path


def _load(path: Path, folder: Path) -> JinjaTemplate:
    # The text goes to a model and not to a browser, so nothing is escaped.
    loader = FileSystemLoader([path.parent, folder])
    environment = ImmutableSandboxedEnvironment(loader=loader, undefined=StrictUndefined, autoescape=False)
    try:
        return environment.get_template(path.name)
    except TemplateSyntaxError as error:
        where = {"key": "judge.template", "file": path, "row": error.lineno}
        raise InputError(
            f"judge.template: {path} line {error.lineno}: {error.message}", kind="unreadable", **where
        ) from error
    except TemplateError as error:
        raise InputError(
            f"judge.template: {path}: {error}", kind="unreadable", key="judge.template", file=path
        ) from error
