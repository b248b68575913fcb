"""`pe-rlhf export`: a role of a finished run as a plain LoRA, or merged into a full checkpoint of its own.

Both are for the original base, whatever the init. The merged weights are computed fresh as W0 + ΔW from a base that is
loaded for this, and never written into a model that is in use.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from pe_rlhf.adapters.specs import FullSpec, spec_from_json
from pe_rlhf.config import BackboneConfig, Recipe
from pe_rlhf.config.load import load_recipe
from pe_rlhf.data.codec import find_template
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.names import resolve_model
from pe_rlhf.runs.checkpoint import role_of_checkpoint
from pe_rlhf.runs.saved_roles import base_of_role, load_base, load_role, save_role, starting_model
from pe_rlhf.system.files import write_whole
from pe_rlhf.system.render import render
from reward.errors import InputError

Format = Literal["lora", "merged"]

# Where the stages leave the roles, the one that is exported unless another is named first.
FOLDERS = {"policy": "ppo/adapter", "value": "ppo/value", "reward": "reward/adapter"}
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors")


@dataclass(frozen=True)
class FinishedRole:
    """A role that a stage left behind: its folder, what `role.json` says, and the recipe of the run."""

    folder: Path
    description: dict[str, Any]
    recipe: Recipe

    @property
    def role(self) -> str:
        return self.description["role"]

    @property
    def is_full(self) -> bool:
        return isinstance(spec_from_json(self.description["spec"]), FullSpec)


def export_role(
    run: Path, form: Format, to: Path | None = None, role: str | None = None, checkpoint: str | None = None
) -> Path:
    """Write a role of a run as `lora` (PEFT's files) or `merged` (a checkpoint), with a model card. Returns where.

    Args:
        run: a run's directory, a stage's in it, or an adapter's.
        to: where to write; default `export/<role>-<form>` in the run. It must not be there already.
        role: `policy`, `value` or `reward`; default: the first of these that the run has.
        checkpoint: `best`, `newest` or a step's number; default: what the stage ended with.

    Raises `InputError` where there is no such role, or where `to` is taken.
    """
    if checkpoint is None:
        found = find_role(run, role)
        default = found.folder.parent.parent / "export" / f"{found.role}-{form}"
        return _write_export(found, form, to or default)
    with tempfile.TemporaryDirectory() as scratch:
        step, found = _take_out(run, role or _role_with_checkpoints(run), checkpoint, Path(scratch))
        return _write_export(found, form, to or run / "export" / f"{found.role}-step-{step}-{form}")


def _role_with_checkpoints(run: Path) -> str:
    """The first role whose stage has kept checkpoints, in a run or in the stage's own directory."""
    for role, place in FOLDERS.items():
        stage = place.split("/")[0]
        folder = run if run.absolute().name == stage else run / stage
        if (folder / "checkpoints").is_dir():
            return role
    return "policy"


def _take_out(run: Path, role: str, checkpoint: str, scratch: Path) -> tuple[int, FinishedRole]:
    """A role of a checkpoint, written as a stage writes the roles that it ends with; and the checkpoint's step."""
    if role not in FOLDERS:
        raise InputError(f"there is no role {role!r} to export; there are {', '.join(FOLDERS)}")
    stage, name = FOLDERS[role].split("/")
    source = run if (run / "checkpoints").is_dir() else run / stage
    step, spec, state = role_of_checkpoint(source, checkpoint, role)
    recipe = load_recipe(source / "recipe.yaml")
    backbone = load_base(recipe, starting_model(recipe, source.absolute().parent), "cpu")
    backbone.load_role(role, spec, state)
    folder = scratch / stage / name
    folder.parent.mkdir()
    save_role(backbone, role, folder)
    return step, FinishedRole(folder, _read_json(folder / "role.json"), recipe)


def _write_export(found: FinishedRole, form: Format, target: Path) -> Path:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already; name another place with --to")
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if form == "lora" and found.is_full:
        raise InputError(f"{found.folder} was fully tuned and is no adapter: export it with --format merged")
    if form == "lora":
        for name in LORA_FILES:
            if (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, scratch / name)
        _name_base(scratch / "adapter_config.json", found.description["base_model"])
    else:
        _write_merged(found, scratch)
    write_whole(scratch / "README.md", model_card(found, form))
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    return target


def find_role(run: Path, role: str | None) -> FinishedRole:
    """A role of a run. Raises `InputError` that says what the run has where it has not that one."""
    if role is not None and role not in FOLDERS:
        raise InputError(f"there is no role {role!r} to export; there are {', '.join(FOLDERS)}")
    if not run.is_dir():
        raise InputError(f"{run} is not a directory")
    places = [run, *(run / FOLDERS[name] for name in FOLDERS), *(run / Path(FOLDERS[name]).name for name in FOLDERS)]
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for place in places:
        if (place / "role.json").is_file():
            description = _read_json(place / "role.json")
            found.setdefault(description.get("role", "?"), (place, description))
    wanted = [role] if role else list(FOLDERS)
    chosen = next((name for name in wanted if name in found), None)
    if chosen is None:
        has = f"it has {', '.join(found)}" if found else "no stage that trains one has finished there"
        raise InputError(f"{run} holds no {role or 'role'} to export; {has}")
    folder, description = found[chosen]
    description["base_model"] = base_of_role(folder, description["base_model"])
    return FinishedRole(folder, description, load_recipe(folder.parent / "recipe.yaml"))


def merged_state(backbone: Backbone, role: str) -> dict[str, Tensor]:
    """The state dict of a plain model that computes the role: fresh, in the base's dtype; no head."""
    state = dict(backbone.merged_tensors(role))
    names = {n: t.data_ptr() for n, t in backbone.model.state_dict().items() if ".adapters." not in n}
    first = {pointer: name for name, pointer in reversed(names.items())}
    return {n.replace(".base.", "."): state[first[pointer].replace(".base.", ".")] for n, pointer in names.items()}


def model_card(found: FinishedRole, form: Format) -> str:
    """The README.md of an export: what it is, how it was trained, how it is loaded."""
    summary = found.folder.parent / "summary.json"
    numbers = {k: v for k, v in _read_json(summary).items() if isinstance(v, int | float)} if summary.is_file() else {}
    spec = found.description["spec"]
    rank = None if found.is_full else _read_json(found.folder / "adapter_config.json")["r"]
    return render(
        Path(__file__).with_name("model_card.md.j2"),
        role=found.role,
        form=form,
        name=found.recipe.name,
        base_model=found.description["base_model"],
        base_sha256=found.description["base_sha256"],
        spec=spec,
        rank=rank,
        chat_template=found.recipe.chat_template,
        numbers=numbers,
        stage=found.folder.parent.name,
    )


def _write_merged(found: FinishedRole, path: Path) -> None:
    if found.recipe.backbone.quantization != "none":
        raise InputError(
            f"{found.folder} was trained on a quantised base: merged with the original weights it would be another"
            " model; export it with --format lora"
        )
    backbone = load_base(found.recipe, found.description["base_model"], "cpu")
    load_role(backbone, found.role, found.folder)
    template = find_template(backbone.tokenizer, found.recipe.chat_template)
    write_merged(backbone, found.role, found.recipe.backbone, path, template)


def write_merged(
    backbone: Backbone, role: str, settings: BackboneConfig, path: Path, chat_template: str | None = None
) -> None:
    """Write a role as a checkpoint of its own, computed fresh, with the base's tokenizer; a head goes beside it.

    `chat_template` takes the place of the tokenizer's own.
    """
    source = resolve_model(backbone.name)
    common = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    config = AutoConfig.from_pretrained(source, **common)
    config.dtype = settings.dtype
    tokenizer = AutoTokenizer.from_pretrained(source, **common)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    state = merged_state(backbone, role)
    if role == "reward":
        config.num_labels, config.pad_token_id = 1, backbone.pad_token_id
        plain = _empty(AutoModelForSequenceClassification, config)
        state = {name: tensor for name, tensor in state.items() if name in plain.state_dict()}
        state["score.weight"] = backbone.head("reward").weight.detach()[None].to(backbone.model.dtype)
    else:
        plain = _empty(type(backbone.model), config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = _generation_config(source, common, config)
    plain.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if role in backbone.heads:
        head = backbone.head(role).state_dict()
        save_file({name: tensor.detach().contiguous() for name, tensor in head.items()}, path / "head.safetensors")


def _name_base(path: Path, base: str) -> None:
    """Set the base in an adapter's config, which says where it was when the adapter was trained."""
    config = _read_json(path)
    if config["base_model_name_or_path"] != base:
        write_whole(path, json.dumps(config | {"base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n")


def _empty(kind: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of that kind without memory for its weights."""
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _generation_config(source: str, common: dict[str, Any], config: PretrainedConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source, **common)
    except OSError:  # a model without one
        return GenerationConfig.from_model_config(config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
