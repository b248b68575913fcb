"""How each side of an evaluation is prompted: two sides with different templates differ by that, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.data.codec import find_template, read_template
from pe_rlhf.model.names import resolve_model
from pe_rlhf.model.whole import loading
from pe_rlhf.runs.layout import RoleFiles
from pe_rlhf.runs.saved_roles import SavedRole
from reward.errors import InputError


@dataclass(frozen=True)
class Prompting:
    """The chat template that a local side is prompted with; None is plain text."""

    template: str | None


def prompting_of(
    side: str, name: str, settings: EvaluationSettings, found: SavedRole | None, base: str | None
) -> Prompting:
    """The template of the candidate or baseline: the one that the settings name, else its own.

    Args:
        side: `candidate` or `baseline`.
        found, base: where it is a run of ours, or an adapter of any make.
    """
    key = f"{side}_template"
    asked = getattr(settings, key)
    if asked == "auto" and found is not None and found.recipe is not None:
        asked = found.recipe.chat_template
    try:
        if asked == "none":
            return Prompting(None)
        if asked != "auto":
            return Prompting(read_template(asked))
        tokenizer = own_tokenizer(name) if base is not None else None
        return Prompting(
            find_template(tokenizer or _tokenizer(resolve_model(found.base if found else base or name)), "auto")
        )
    except InputError as error:
        raise InputError(f"{key}: {error}", kind=error.kind, key=key, file=error.file) from error


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    with loading(path, "model"):
        return AutoTokenizer.from_pretrained(path)


def own_tokenizer(adapter: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in an adapter's folder, which knows its template; None where there is none."""
    folder = RoleFiles(Path(adapter)).folder
    return _tokenizer(str(folder)) if (folder / "tokenizer_config.json").is_file() else None


def refuse_different_prompting(
    candidate: Prompting | None, baseline: Prompting | None, settings: EvaluationSettings
) -> None:
    """Raise `InputError` where two local sides have different templates and the settings do not allow it."""
    if candidate is None or baseline is None or settings.different_templates:
        return  # what a server or the author of a file did is not known here
    if candidate.template != baseline.template:
        shown = ["plain text" if side.template is None else "a chat template" for side in (candidate, baseline)]
        both = f"{shown[0]} and {shown[1]}" if shown[0] != shown[1] else "two different chat templates"
        raise InputError(
            f"candidate and baseline would be prompted differently: {both}",
            kind="conflict",
            key="baseline_template",
            fix="give candidate_template=… and baseline_template=…, or allow it by different_templates=true",
        )
