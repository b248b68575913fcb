"""Roles as a stage hands them on, how they are found again, and the base model they belong to."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from pe_rlhf.adapters.specs import FullSpec, spec_from_json
from pe_rlhf.config import Recipe, RewardSource
from pe_rlhf.config.load import load_recipe
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.runs.checkpoint import save_tensors
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.files import write_json
from reward.errors import InputError

SFT_MODEL = Path("sft") / "model"


def starting_model(recipe: Recipe, run_dir: Path) -> str:
    """The name of the anchor of a run's stages after sft, as `load_base` takes it.

    Raises `InputError` where the recipe has an sft stage that has not finished there.
    """
    if recipe.sft is None:
        return recipe.model
    made = (run_dir / SFT_MODEL).absolute()
    if not (made / "config.json").is_file():
        raise InputError(f"{run_dir} holds no finished sft stage, whose model the other stages start from")
    return str(made)


def base_of_role(folder: Path, recorded: str) -> str:
    """The base of a role that a stage wrote, from the name it recorded.

    One that the run's sft stage had made is looked for beside the stage first: the run may have been moved since.
    """
    stage = folder.absolute().parent
    beside = stage.parent / SFT_MODEL
    made_by_sft = Path(recorded).parts[-2:] == SFT_MODEL.parts and stage.name != SFT_MODEL.parts[0]
    return str(beside) if made_by_sft and (beside / "config.json").is_file() else recorded


def load_base(recipe: Recipe, model: str, device: str | None = None) -> Backbone:
    """A model as the recipe says how models are loaded, on the recipe's device unless another is named."""
    settings = recipe.backbone
    return load_backbone(
        model,
        dtype=settings.dtype,
        device=device or settings.device,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        revision=settings.revision,
        quantization=settings.quantization,
    )


def save_role(backbone: Backbone, role: str, folder: Path) -> None:
    """Write a role for the next stage (`role.json`, `role.safetensors`) and for everybody else (PEFT's files).

    A fully tuned role has no PEFT files: `pe-rlhf export --format merged` makes a checkpoint of it.
    """
    on_main(lambda: _write_role(backbone, role, folder))


def _write_role(backbone: Backbone, role: str, folder: Path) -> None:
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(backbone.specs[role], FullSpec):
        scratch.mkdir(parents=True)
    else:
        backbone.export_adapter(role, scratch)
    save_tensors(backbone.role_state(role, copy=False), scratch / "role.safetensors")
    description = {"role": role, "base_model": backbone.name, "base_sha256": backbone.anchor_sha256}
    write_json(scratch / "role.json", {**description, "spec": backbone.specs[role].as_json()})
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def load_role(backbone: Backbone, role: str, folder: Path) -> None:
    """Put a role that a stage wrote on a backbone, under any role name.

    Raises `InputError` where there is none, or where it was trained on another base.
    """
    try:
        description = json.loads((folder / "role.json").read_text(encoding="utf-8"))
        state = load_file(folder / "role.safetensors")
        spec = spec_from_json(description["spec"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: no role of a stage can be read here: {error}") from error
    if description["base_sha256"] != backbone.anchor_sha256:
        raise InputError(
            f"{folder} was trained on another base ({description['base_model']}) than {backbone.name} in"
            f" {str(backbone.model.dtype).removeprefix('torch.')}"
        )
    backbone.load_role(role, spec, state)


ROLES = {"ppo": "policy", "reward": "reward"}  # what a stage's adapter plays


@dataclass(frozen=True)
class RoleFolder:
    """A role that a stage wrote: its folder, the base model's name, and the recipe of its run where that is there."""

    folder: Path
    base: str
    recipe: Recipe | None

    def load_base(self, *, dtype: str, device: str) -> tuple[Backbone, TextCodec]:
        """The run's anchor, loaded and prompted as the recipe says; in `dtype` where there is no recipe."""
        if self.recipe is None:
            backbone = load_backbone(self.base, dtype=dtype, device=device)
            return backbone, codec_of(backbone, "auto")
        backbone = load_base(self.recipe, self.base, device)
        return backbone, codec_of(backbone, self.recipe.chat_template)


def find_role(name: str, stage: str) -> RoleFolder | None:
    """The adapter of a stage from a run's, a stage's or the adapter's own directory; None where it is none of these."""
    path = Path(name).expanduser()
    for folder in (path / stage / "adapter", path / "adapter", path):
        if (folder / "role.json").is_file():
            break
    else:
        if (path / "recipe.yaml").is_file():
            raise InputError(f"{path} is a run without a finished {stage} stage")
        return None
    recipe = next((f for p in (folder.parent, folder.parent.parent) if (f := p / "recipe.yaml").is_file()), None)
    try:
        description = json.loads((folder / "role.json").read_text(encoding="utf-8"))
        base, role = description["base_model"], str(description["role"])
    except (ValueError, KeyError) as error:
        raise InputError(f"{folder / 'role.json'} is damaged: {error}") from error
    if not role.startswith(ROLES[stage]):
        raise InputError(f"{folder} holds a {role}, not a {ROLES[stage]}")
    base = base_of_role(folder, base)
    return RoleFolder(folder, base, None if recipe is None else load_recipe(recipe))


def load_role_backbone(found: RoleFolder, role: str, *, dtype: str, device: str) -> tuple[Backbone, TextCodec]:
    """The base model with that role on it, and the codec of the run; `dtype` as of `RoleFolder.load_base`."""
    backbone, codec = found.load_base(dtype=dtype, device=device)
    load_role(backbone, role, found.folder)
    return backbone, codec


def weights_of(name: str, stage: str) -> str:
    """What tells the weights under a directory's name from others that were there before; "" for other names.

    Adapters by their bytes, whole models, which take long to read, by their files' sizes and times.
    """
    found = None if is_endpoint(name) else find_role(name, stage)
    return files_of(str(found.folder) if found else name, small=found is not None)


def files_of(name: str, *, small: bool = False) -> str:
    """As `weights_of`, of a directory that is known to hold the weights itself; `small`: go by the bytes."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return ""
    digest, small = hashlib.sha256(), small or (folder / "adapter_config.json").is_file()
    for file in sorted(folder.glob("*.safetensors")):
        about = file.stat()
        digest.update(file.name.encode())
        digest.update(file.read_bytes() if small else f"{about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def is_endpoint(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def codec_of(backbone: Backbone, chat_template: str) -> TextCodec:
    eos = backbone.eos_token_ids[0] if backbone.eos_token_ids else None
    return TextCodec(backbone.tokenizer, chat_template, eos)


def reward_adapter_dir(source: RewardSource, run_dir: Path) -> Path:
    """Where a reward adapter lies: this run's, or the one of the stage directory that is named."""
    assert source.adapter is not None
    stage = run_dir / "reward" if source.adapter == "stage" else Path(source.adapter)
    return stage if (stage / "role.json").is_file() else stage / "adapter"
