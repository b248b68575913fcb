"""The prompts of chat judges: jinja2 files in `reward/prompts`, or a file of the user's."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2 import Template as JinjaTemplate
from jinja2.sandbox import ImmutableSandboxedEnvironment

from reward.errors import InputError, did_you_mean
from reward.judges.base import Comparison
from reward.records import Message, Prompt

FOLDER = Path(__file__).parents[1] / "prompts"


class JudgePrompt:
    """A judge's prompt: `general`, `helpfulness`, `harmlessness`, `summarization`, or the path of a jinja2 file.

    A file gets `messages`, `response_a`, `response_b` and `reasoning`, may extend `base.jinja2`, and has to ask for the
    letter A or B, or for Arena-Hard's labels. `fingerprint` changes with the text of the question. `allows_ties`: it
    offers a tie as `[[C]]`, `A=B` or "or tie"; without it a judge that calls a tie gives no valid verdict.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._template = _load(name)
        probe = Comparison([{"role": "user", "content": "p"}], "a", "b")
        text = self.render(probe, reasoning=False) + self.render(probe, reasoning=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.allows_ties = re.search(r"\[\[C\]\]|A ?= ?B|\bor (?:a )?[\"'“]?tie\b", text) is not None

    def render(self, comparison: Comparison, *, reasoning: bool) -> str:
        """The question to the judge. Raises `InputError` where the template fails."""
        try:
            return self._template.render(
                messages=as_messages(comparison.prompt),
                response_a=comparison.response_a,
                response_b=comparison.response_b,
                reasoning=reasoning,
            ).strip()
        except TemplateError as error:
            raise InputError(
                f"judge.template: {self.name} fails: {error}", kind="user_code", key="judge.template"
            ) from error


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def template_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.jinja2") if path.stem != "base")


def _load(name: str) -> JinjaTemplate:
    path = Path(name) if Path(name).is_file() else FOLDER / f"{name}.jinja2"
    if not path.is_file() or name == "base":
        raise InputError(
            f"judge.template: {name!r} is neither one of {', '.join(template_names())} nor a file",
            kind="unknown",
            key="judge.template",
            fix=did_you_mean(name, template_names()),
        )
    # The text goes to a model and not to a browser, so nothing is escaped.
    loader = FileSystemLoader([path.parent, FOLDER])
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
