"""Which prompts the chat template of a reward model takes, known before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer

from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.adapter_models import SEQ_CLS
from pe_rlhf.model.names import check_model_name, resolve_model
from pe_rlhf.model.whole import loading
from pe_rlhf.runs.saved_roles import SavedRole, role_behind
from pe_rlhf.scoring.classifier import tokenizer_of
from reward.errors import InputError
from reward.records import Prompt


def template_check(name: str, key: str, trust_remote_code: bool = False) -> Callable[[Prompt], None]:
    """What raises `InputError` for a prompt that a reward model's template refuses: of a run of ours, or of others.

    A role of ours reads the prompt, and the response as it follows; a model of others the conversation of both. No
    weights are loaded.
    """
    found = role_behind(name, "reward")
    if found is None:
        check_model_name(name, key, SEQ_CLS)
        read = TextCodec(tokenizer_of(name, key, trust_remote_code)).check
    else:
        read = _codec_of(found, key).render

    def check(prompt: Prompt) -> None:
        try:
            read(prompt)
        except InputError as error:
            raise error.at(f"the reward model {name}") from error

    return check


def _codec_of(found: SavedRole, key: str) -> TextCodec:
    recipe, options = found.recipe, dict[str, Any]()
    if recipe is not None:
        options = {"trust_remote_code": recipe.backbone.trust_remote_code, "revision": recipe.backbone.revision}
    with loading(found.base, key):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(found.base), **options)
    if recipe is None:
        return TextCodec(tokenizer)
    return TextCodec(tokenizer, recipe.chat_template, arguments=recipe.chat_template_kwargs, date=recipe.date)
