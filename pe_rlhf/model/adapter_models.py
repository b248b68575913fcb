"""A PEFT adapter's folder as a model: its base with the adapter merged, made once and kept in the cache.

Afterwards it is a model like any other: the anchor, what vLLM samples from, and the base that exports name. Its
folder in the cache is named by what it was made from, so that an adapter or a base that changes is merged anew.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pe_rlhf.model.whole import load_adapter_whole, load_whole, loading
from pe_rlhf.system.files import read_json
from reward.errors import InputError

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"  # what PEFT calls a policy and a reward model
MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "VERA", "HRA", "RANDLORA", "MISS", "SHIRA")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / MODEL_CONFIG).is_file()


def base_of(folder: Path, key: str, task: str = CAUSAL_LM) -> str:
    """The base that an adapter names. Raises `InputError` for an adapter that is no part of a model for that task."""
    said = read_json(folder / ADAPTER_CONFIG)
    base, kind, own = (said.get(name) for name in ("base_model_name_or_path", "peft_type", "task_type"))
    if not isinstance(base, str) or not base or Path(base).expanduser().resolve() == folder.resolve():
        raise InputError(
            f"{key}: {folder / ADAPTER_CONFIG} does not say which model the adapter is of",
            kind="missing",
            key=key,
            file=folder / ADAPTER_CONFIG,
            fix="write the model's name there as base_model_name_or_path",
        )
    if str(kind).upper() not in MERGEABLE or own not in ((None, task) if task == CAUSAL_LM else (task,)):
        what = "a language model" if task == CAUSAL_LM else "a reward model, which is SEQ_CLS with one label"
        raise InputError(
            f"{key}: the adapter in {folder} ({kind}, {own}) cannot be merged into {what}",
            kind="conflict",
            key=key,
            file=folder,
            fix="name a model, or a LoRA of one",
        )
    return base


def digest_of(folder: Path, base_folder: Path | None, base: str) -> str:
    """What the merged model depends on: the adapter's files, and the base's name and files where it is here."""
    digest = hashlib.sha256(base.encode())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(base_folder.glob("*")) if base_folder is not None else ():
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def merge(folder: Path, base: str, target: Path) -> None:
    """Write the merged model and its tokenizer; the sum is computed in fp32 and rounded once, to the base's dtype."""
    with loading(base, "model"):
        dtype = getattr(AutoConfig.from_pretrained(base), "dtype", None) or torch.float32
    plain = load_whole(AutoModelForCausalLM, base, name=base, key="model", dtype=torch.float32)
    merged = load_adapter_whole(plain, str(folder)).merge_and_unload()
    merged.to(dtype).save_pretrained(target)  # type: ignore[operator]  # PEFT gives back the model, or says a tensor
    own = (folder / "tokenizer_config.json").is_file()
    with loading(base, "model"):
        AutoTokenizer.from_pretrained(folder if own else base).save_pretrained(target)
