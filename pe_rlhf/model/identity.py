"""What tells a base model from another: its weights, and what its config says of the function that they are used in."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from pe_rlhf.system.cache import cache_dir
from pe_rlhf.system.files import write_whole

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


def fingerprint_by_files(model: PreTrainedModel, source: str) -> str:
    """`fingerprint` of a model that is as it was read from `source`, a folder or a hub id.

    A 7B model's takes ten seconds or more, so it is kept in the cache, under what tells the files from others: the
    hub's commit, or the name, size and time of change of each file.
    """
    folder, commit = Path(source), getattr(model.config, "_commit_hash", None)
    if not folder.is_dir() and commit is None:
        return fingerprint(model)
    files = [(str(file), file.stat()) for file in sorted(folder.resolve().iterdir())] if folder.is_dir() else []
    stamps = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in files]
    precision = str(model.dtype), str(getattr(model.config, "quantization_config", None))
    key = repr((source, commit, stamps, precision, transformers.__version__, torch.__version__))
    known = cache_dir() / "fingerprints" / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError):
        return known.read_text(encoding="utf-8")
    found = fingerprint(model)
    with suppress(OSError):  # a cache that cannot be written costs time, not the run
        known.parent.mkdir(parents=True, exist_ok=True)
        write_whole(known, found)
    return found


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
