"""What tells a base model from another: its weights, and what its config says of the function that they are used in."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

# What a config says that changes no log-prob: names, ids, defaults of training and of output, sizes that weights show.
NO_PART = re.compile(
    r"^_|^(architectures|dtype|torch_dtype|transformers_version|use_cache|return_dict|name_or_path|model_type)$"
    r"|token_id|dropout|pdrop|initializer|^output_|^is_|id2label|label2id|num_labels|problem_type|pretraining_tp|kernels"
    r"|aux_loss|jitter|gradient|chunk|max_position|vocab_size|quantization|^init_|tie_|^tokenizer"
)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over a base's weights, names and shapes included; those of adapters have no part in it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            continue
        digest.update(f"{name.replace('.base.', '.')} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def function_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What a language model's config says of its function (rotary embeddings, caps, multipliers, windows), for JSON."""
    config = model.config.get_text_config(decoder=True).to_dict()
    return {key: _plain(value) for key, value in config.items() if not NO_PART.search(key)}


def changed_settings(saved: Mapping[str, Any], model: PreTrainedModel) -> list[str]:
    """The settings that a model has with another value; one that is not in both is of another version's config."""
    own = function_settings(model)
    return [f"{key} {saved[key]!r} (now {own[key]!r})" for key in own if key in saved and saved[key] != own[key]]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
