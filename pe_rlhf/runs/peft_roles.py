"""A PEFT LoRA as a role: its factors are those of a role with B0 = 0, on a base that stays as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pe_rlhf.adapters.specs import AdapterSpec, adapter_settings
from pe_rlhf.config import AdapterConfig
from pe_rlhf.model.adapter_models import ADAPTER_CONFIG, CAUSAL_LM, SEQ_CLS, base_of
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.names import find_adapter
from pe_rlhf.model.whole import loading, refuse_not_finite
from pe_rlhf.runs.saved_roles import SavedRole, load_role, role_behind
from pe_rlhf.system.files import read_json
from pe_rlhf.system.progress import say
from reward.errors import InputError

# What would make another function of the same factors, or a base that is no longer the original one.
ODD = (
    *("use_dora", "use_qalora", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication", "modules_to_save"),
    *("trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
)
SOUND_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
FACTOR = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
HEAD = re.compile(r"base_model\.model\.(score|classifier)\.weight")


def check_start(name: str, role: str, key: str, adapter: AdapterConfig | None = None) -> None:
    """Raise `InputError` where a role can't be started from that: no role of ours, and no LoRA that a role can be."""
    if _own_role(name, role, key) is None:
        _lora_config(_folder_of(name, role, key), role, key, adapter)


def load_start(backbone: Backbone, role: str, name: str, key: str, adapter: AdapterConfig | None = None) -> None:
    """Add a role that is the one under that name: of a run, of a stage, or a PEFT LoRA.

    role: `policy`, or a name that starts with `reward`, whose head is a LoRA's where it is one for classification.
    adapter: what a LoRA's settings are completed by, such as its dropout. Raises `InputError` as `check_start`, and for
    tensors that are not the model's.
    """
    kind = "reward" if role.startswith("reward") else role
    if (found := _own_role(name, kind, key)) is not None:
        return load_role(backbone, role, found.folder)
    folder = _folder_of(name, kind, key)
    said = _lora_config(folder, kind, key, adapter)
    if (base := base_of(folder, key, said["task_type"] or CAUSAL_LM)) != backbone.name:
        say(f"warning: {key}: {name} is a LoRA of {base}, and is put on {backbone.name}")
    state = _state_of(backbone, folder, kind, key)
    modules = tuple(dict.fromkeys(key.rpartition(".")[0] for key in state if not key.startswith("head.")))
    lora = adapter_settings(
        rank=said["r"],
        alpha=said["lora_alpha"],
        scaling="rslora" if said.get("use_rslora") else "standard",
        targets=list(modules),
        dropout=getattr(adapter, "dropout", 0.0),
    )
    say(f"{role}: starts as {name}, a LoRA of rank {said['r']} on {len(modules)} layers")
    return backbone.load_role(role, AdapterSpec(lora, modules), state)


def _own_role(name: str, role: str, key: str) -> SavedRole | None:
    try:
        return role_behind(name, role)
    except InputError as error:
        raise InputError(f"{key}: {error}", kind=error.kind, key=key, file=error.file) from error


def _folder_of(name: str, role: str, key: str) -> Path:
    """The folder of a PEFT adapter, also of one that is fetched: it is small, and what it is for may be hours away."""
    if (folder := find_adapter(name, fetch=True)) is None:
        message = f"{key}: {name} is neither a run with a {role} nor a PEFT adapter, here or on the hub"
        raise InputError(message, kind="missing", key=key, file=name)
    return folder


def _lora_config(folder: Path, role: str, key: str, adapter: AdapterConfig | None) -> dict[str, Any]:
    """PEFT's config. Raises `InputError` for one that does not describe a role of ours."""
    if adapter is not None and adapter.kind != "lora":
        message = f"{key}: {folder} is a LoRA, and the adapter is to be of the kind {adapter.kind}"
        raise InputError(message, kind="conflict", key="adapter.kind", file=folder)
    said = read_json(folder / ADAPTER_CONFIG)
    task = said.setdefault("task_type", None)
    odd = [name for name in ODD if said.get(name) and (name, task) != ("modules_to_save", SEQ_CLS)]
    odd += ["bias"] if said.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if said.get("init_lora_weights") not in SOUND_INITS else []
    allowed = (None, CAUSAL_LM, SEQ_CLS) if role == "reward" else (None, CAUSAL_LM)
    odd += ["task_type"] if task not in allowed else []
    if said.get("peft_type") != "LORA":
        odd = ["peft_type"]
    if odd:
        values = ", ".join(f"{name}: {said.get(name)}" for name in odd)
        raise InputError(
            f"{key}: {folder} is no plain LoRA that a {role} can start from ({values})",
            kind="conflict",
            key=key,
            file=folder,
            fix="name it as model: or as a model of ppo.reward, where it is merged",
        )
    return said


def _state_of(backbone: Backbone, folder: Path, role: str, key: str) -> dict[str, Tensor]:
    """The factors, and for a reward the head, by the names that a role gives them."""
    from peft.utils.save_and_load import load_peft_weights  # PEFT takes a second to import

    with loading(str(folder), key):
        tensors = {name: tensor.float() for name, tensor in load_peft_weights(str(folder), device="cpu").items()}
    refuse_not_finite(tensors.items(), str(folder), key)
    state: dict[str, Tensor] = {}
    modules = dict(backbone.model.named_modules())
    unknown: list[str] = []
    weight_H = torch.zeros(backbone.model.get_input_embeddings().embedding_dim)  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        if (found := FACTOR.fullmatch(name)) and found[1] in modules:
            state[f"{found[1]}.{found[2]}"] = tensor
        elif HEAD.fullmatch(name) and role == "reward" and tensor.shape == (1, len(weight_H)):
            weight_H = tensor[0]
        else:
            unknown.append(name)
    if unknown or not state:
        what = unknown[0] if unknown else "none at all"
        message = f"{key}: {folder} has tensors that {backbone.name} has no place for: {what}"
        raise InputError(message, kind="conflict", key=key, file=folder)
    head = {"head.weight": weight_H, "head.bias": torch.zeros(1)} if role == "reward" else {}
    return state | head
