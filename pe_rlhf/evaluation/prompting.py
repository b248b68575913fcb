"""How each side of an evaluation is prompted: two sides with different templates differ by that, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from pe_rlhf.config.evaluate import EvaluationSettings
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.rows import load_prompt_rows
from pe_rlhf.model.loading import longest_sequence
from pe_rlhf.model.names import resolve_model
from pe_rlhf.model.whole import loading
from pe_rlhf.runs.layout import RoleFiles
from pe_rlhf.runs.saved_roles import SavedRole
from reward.errors import InputError
from reward.records import Columns, Prompt


@dataclass(frozen=True)
class Prompting:
    """How a local side is prompted.

    Attributes:
        template: the chat template; None is plain text.
        arguments: what the template is given besides messages.
        date: the day that it prints as today's; None where it prints none.
        codec: encodes prompts, before the model is loaded.
        longest: what the model takes, in tokens; None where its config does not say so.
    """

    template: str | None
    arguments: dict[str, Any] = field(default_factory=dict)
    date: str | None = None
    codec: TextCodec | None = field(default=None, compare=False, repr=False)
    longest: int | None = field(default=None, compare=False)

    def takes(self, prompt: Prompt, new_tokens: int) -> bool:
        """Whether a prompt has tokens and leaves room for a response."""
        assert self.codec is not None
        return 0 < len(self.codec.encode_prompt(prompt)) <= (self.longest or 10**9) - new_tokens


def prompting_of(
    side: str, name: str, settings: EvaluationSettings, found: SavedRole | None, base: str | None
) -> Prompting:
    """How the candidate or baseline is prompted: as the settings say, else as its run's recipe, else its own template.

    Args:
        side: `candidate` or `baseline`.
        found, base: where it is a run of ours, or an adapter of any make.
    """
    key = f"{side}_template"
    asked = getattr(settings, key)
    recipe = None if found is None else found.recipe
    if asked == "auto" and recipe is not None:
        asked = recipe.chat_template
    arguments = settings.chat_template_kwargs
    if arguments is None:
        arguments = {} if recipe is None else recipe.chat_template_kwargs
    path = resolve_model(found.base if found else base or name)
    options: dict[str, Any] = {"trust_remote_code": recipe is not None and recipe.backbone.trust_remote_code}
    try:
        with loading(path, "model"):
            config = AutoConfig.from_pretrained(path, **options)
            tokenizer = (own_tokenizer(name) if base is not None else None) or AutoTokenizer.from_pretrained(
                path, **options
            )
        date = settings.date or (None if recipe is None else recipe.date)
        codec = TextCodec(tokenizer, asked, arguments=arguments, date=date)
    except InputError as error:
        raise InputError(f"{key}: {error}", kind=error.kind, key=key, file=error.file) from error
    return Prompting(codec.template, arguments if codec.template else {}, codec.day, codec, longest_sequence(config))


def own_tokenizer(adapter: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in an adapter's folder, which knows its template; None where there is none."""
    folder = RoleFiles(Path(adapter)).folder
    if not (folder / "tokenizer_config.json").is_file():
        return None
    with loading(str(folder), "model"):
        return AutoTokenizer.from_pretrained(folder)


def refuse_different_prompting(
    candidate: Prompting | None, baseline: Prompting | None, settings: EvaluationSettings
) -> None:
    """Raise `InputError` where two local sides have different templates and the settings do not allow it."""
    if candidate is None or baseline is None or settings.different_templates:
        return  # what a server or the author of a file did is not known here
    if candidate != baseline:
        shown = ["plain text" if side.template is None else "a chat template" for side in (candidate, baseline)]
        both = f"{shown[0]} and {shown[1]}" if shown[0] != shown[1] else "two different chat templates"
        both = (
            both
            if candidate.template != baseline.template
            else "with other arguments of the chat template, or another date"
        )
        raise InputError(
            f"candidate and baseline would be prompted differently: {both}",
            kind="conflict",
            key="baseline_template",
            fix="give candidate_template=…, baseline_template=…, chat_template_kwargs=… and date=…, or allow it by"
            " different_templates=true",
        )


def columns_of(prompts: Sequence[Prompt], settings: EvaluationSettings) -> Columns:
    """The other columns of the prompts' rows, of which some may have been left out."""
    if settings.prompts is None:
        return {}
    rows, _ = load_prompt_rows(settings.prompts, "--prompts", lambda row: row, settings.max_bad_share)
    following = iter(rows)
    mine = [next(row.columns for row in following if row.prompt == prompt) for prompt in prompts]
    return {name: [row.get(name) for row in mine] for name in dict.fromkeys(name for row in mine for name in row)}
