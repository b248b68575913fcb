"""Roles as a stage hands them on, how they are found again, and the base model they belong to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from pe_rlhf.adapters.specs import FullSpec, RoleSpec, spec_from_json
from pe_rlhf.config import Recipe
from pe_rlhf.config.load import load_recipe
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import USUAL, Backbone, FastPath, load_backbone
from pe_rlhf.model.identity import changed_settings, function_settings
from pe_rlhf.model.names import MODEL_CONFIG
from pe_rlhf.model.whole import refuse_not_finite
from pe_rlhf.runs.layout import (
    ROLES,
    RoleFiles,
    RunFiles,
    refuse_without_roles,
    role_folders,
    wanted_roles,
)
from pe_rlhf.system.distributed import on_main
from pe_rlhf.system.files import new_folder, read_json, write_json
from pe_rlhf.system.progress import say
from pe_rlhf.system.tensor_files import about_tensors, load_tensors, save_tensors
from reward.errors import InputError

# ---- the base model --------------------------------------------------------------------------------------------------


def starting_model(recipe: Recipe, run_dir: Path) -> str:
    """The name of the model that a run's stages after sft start from, as `load_base` takes it.

    Raises `InputError` where the recipe has an sft stage that has not finished there.
    """
    if recipe.sft is None:
        return recipe.model
    made = RunFiles(run_dir).sft_model.absolute()
    if not (made / MODEL_CONFIG).is_file():
        raise InputError(
            f"{run_dir} holds no finished sft stage, whose model the other stages start from",
            kind="unfinished",
            key="sft",
            file=run_dir,
        )
    return str(made)


def load_base(recipe: Recipe, model: str, device: str | None = None, fast: FastPath = USUAL) -> Backbone:
    """A model loaded as the recipe says, on the recipe's device unless another is named."""
    settings = recipe.backbone
    return load_backbone(
        model,
        dtype=settings.dtype,
        device=device or settings.device,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        revision=settings.revision,
        quantization=settings.quantization,
        fast=fast,
    )


def codec_of(
    backbone: Backbone, chat_template: str, arguments: dict[str, Any] | None = None, date: str | None = None
) -> TextCodec:
    return TextCodec(backbone.tokenizer, chat_template, backbone.eos_token_ids, arguments, date)


# ---- writing, reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedRole:
    """A role that a stage wrote; `base` is the name of its base model, as it can be loaded now."""

    files: RoleFiles
    role: str
    base: str
    base_sha256: str
    spec: RoleSpec

    @property
    def folder(self) -> Path:
        return self.files.folder

    @property
    def is_full(self) -> bool:
        """Whether it has weights of its own instead of an adapter."""
        return isinstance(self.spec, FullSpec)

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe of the stage, or else of its run; None where the adapter's folder was taken out of its run."""
        stage = self.files.stage
        path = next((path for path in (stage.recipe, stage.run.recipe) if path.is_file()), None)
        return None if path is None else load_recipe(path)

    def load_base(self, *, dtype: str, device: str) -> tuple[Backbone, TextCodec]:
        """The base model, loaded and prompted as the recipe says; in `dtype` where there is no recipe."""
        if self.recipe is None:
            backbone = load_backbone(self.base, dtype=dtype, device=device)
            return backbone, codec_of(backbone, "auto")
        backbone = load_base(self.recipe, self.base, device)
        recipe = self.recipe
        return backbone, codec_of(backbone, recipe.chat_template, recipe.chat_template_kwargs, recipe.date)

    def load(self, role: str, *, dtype: str, device: str) -> tuple[Backbone, TextCodec]:
        """As `load_base`, with this on it as a role of that name."""
        backbone, codec = self.load_base(dtype=dtype, device=device)
        load_role(backbone, role, self.folder)
        return backbone, codec


def save_role(backbone: Backbone, role: str, folder: Path) -> None:
    """Write a role for the next stage (`role.json`, `role.safetensors`) and for everybody else (PEFT's files).

    A fully tuned role has no PEFT files: `pe-rlhf export --format merged` makes a checkpoint of it.
    """
    on_main(lambda: _write_role(backbone, role, folder))


def _write_role(backbone: Backbone, role: str, folder: Path) -> None:
    with new_folder(folder) as scratch:
        files = RoleFiles(scratch)
        is_full = isinstance(backbone.specs[role], FullSpec)
        refusal = form if isinstance(form := None if is_full else backbone.peft_form(role), str) else None
        if refusal is not None:
            tasks = backbone.tasks_of(role)
            otherwise = f"RUN --mix {tasks[0]}=1 writes a task's" if tasks else "--format merged makes a checkpoint"
            say(f"{role}: no PEFT files are written ({refusal}); pe-rlhf export {otherwise}")
        elif form is not None and not isinstance(form, str):
            backbone.export_adapter(role, scratch, form=form)
        spec = backbone.specs[role].as_json()
        # With the tensors, too: another rank, alpha or init in role.json would make another role of the same tensors.
        save_tensors(backbone.role_state(role, copy=False), files.tensors, {"spec": json.dumps(spec, sort_keys=True)})
        description: dict[str, Any] = {"role": role, "base_model": backbone.name}
        description |= {"base_sha256": backbone.anchor_sha256, "base_config": function_settings(backbone.model)}
        if refusal is not None:
            description["peft_refusal"] = refusal
        checksums = {path.name: _sha256(path) for path in files.for_peft()}
        write_json(files.description, {**description, "spec": spec, "sha256": checksums})


def read_role(folder: Path) -> SavedRole:
    """What `role.json` in a folder says. Raises `InputError` where it is missing or damaged."""
    files = RoleFiles(folder)
    said = read_json(files.description)
    for key in ("role", "base_model", "base_sha256"):
        if not isinstance(said[key], str):
            raise InputError(
                f"{files.description}: {key} is {said[key]!r}, no text",
                kind="unreadable",
                key=key,
                file=files.description,
            )
    if not said["role"].isidentifier():  # it becomes part of the names of files
        raise InputError(
            f"{files.description}: role {said['role']!r} is no name of a role",
            kind="unreadable",
            key="role",
            file=files.description,
        )
    spec = read_spec(said["spec"], files.description)
    return SavedRole(files, said["role"], _base_of(files, said["base_model"]), said["base_sha256"], spec)


def read_spec(said: Any, file: Path) -> RoleSpec:
    """How a role is made, from what a file says of it. Raises `InputError` that names the file."""
    try:
        return spec_from_json(said)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("spec", *first["loc"])))
        raise InputError(f"{file}: {key}: {first['msg']}", kind="unreadable", key=key, file=file) from error
    except (AttributeError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{file}: spec is damaged ({what})", kind="unreadable", key="spec", file=file) from error


def check_peft_files(found: SavedRole) -> None:
    """Raise `InputError` where PEFT's files of a role are not what the stage wrote.

    Of a role that was saved without checksums it is only seen whether they can be read.
    """
    said = read_json(found.files.description)
    if refusal := said.get("peft_refusal"):
        raise InputError(
            f"{found.folder} has no PEFT files: {refusal}",
            kind="conflict",
            key="format",
            file=found.folder,
            fix="export it with --format merged",
        )
    checksums = said.get("sha256", {})
    for path in found.files.for_peft():
        expected = checksums.get(path.name) if isinstance(checksums, dict) else ""
        if path.suffix == ".safetensors":
            load_tensors(path)
        if expected is not None and expected != _sha256(path):
            raise InputError(f"{path} has changed since the stage wrote it", kind="changed", file=path)
    needed = {found.files.adapter_config, found.files.adapter_tensors}
    if missing := sorted(needed - set(found.files.for_peft())):
        raise InputError(f"{missing[0]}: is not there", kind="missing", file=missing[0])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_role(backbone: Backbone, role: str, folder: Path) -> None:
    """Put a role that a stage wrote on a backbone, under any role name. Raises as `checked_state`."""
    spec, state = checked_state(backbone, folder)
    try:
        backbone.load_role(role, spec, state)
    except InputError as error:
        raise InputError(f"{folder}: {error}", kind=error.kind, file=folder) from error


def checked_state(backbone: Backbone, folder: Path) -> tuple[RoleSpec, dict[str, Tensor]]:
    """How a role that a stage wrote is made, and its tensors.

    Raises `InputError` where there is none, where it is damaged or not finite, or where it was trained on another base.
    """
    found = read_role(folder)
    state = load_tensors(found.files.tensors)
    refuse_not_finite(state.items(), str(found.files.tensors))
    saved_spec = about_tensors(found.files.tensors).get("spec")
    if saved_spec is not None and read_spec(json.loads(saved_spec), found.files.tensors) != found.spec:
        raise InputError(
            f"{found.files.description} describes another adapter than the tensors beside it are of",
            kind="changed",
            key="spec",
            file=found.files.description,
        )
    if found.base_sha256 != backbone.anchor_sha256:
        raise InputError(
            f"{folder} was trained on another base ({found.base}) than {backbone.name} in"
            f" {str(backbone.model.dtype).removeprefix('torch.')}",
            kind="changed",
            file=folder,
        )
    saved = read_json(found.files.description).get("base_config", {})
    if changed := changed_settings(saved if isinstance(saved, dict) else {}, backbone.model):
        raise InputError(
            f"{folder} was trained on {found.base} with another config: {', '.join(changed)}",
            kind="changed",
            key="base_config",
            file=folder,
        )
    return found.spec, state


def _base_of(files: RoleFiles, recorded: str) -> str:
    """The base of a role from the name that was recorded when it was written.

    The run may have been moved since: a model that the run's own sft stage made is looked for beside the stage first.
    """
    stage = files.stage
    beside = stage.run.sft_model
    made_by_sft = Path(recorded).parts[-2:] == beside.parts[-2:] and stage.folder != beside.parent
    return str(beside) if made_by_sft and (beside / MODEL_CONFIG).is_file() else recorded


# ---- finding ---------------------------------------------------------------------------------------------------------


def find_role(place: Path, role: str | None = None) -> SavedRole:
    """A role from a run's directory, a stage's in it, or the adapter's own.

    `role` is a name of `ROLES`; None is the first of these that is there. Raises `InputError` that says what is there
    where that role is not.
    """
    for wanted in wanted_roles(place, role):
        for folder in role_folders(place, wanted):
            found = read_role(folder)
            # `reward_2` is what a second reward adapter is called on a backbone; it may have been saved as that.
            if found.role == wanted or found.role.startswith(f"{wanted}_"):
                return found
    refuse_without_roles(place, role)
    there = dict.fromkeys(read_role(folder).role for name in ROLES for folder in role_folders(place, name))
    message = f"{place} holds no {role or 'role'}; it holds {', '.join(there)}"
    raise InputError(message, kind="missing", key=role, file=place)


def role_behind(name: str, role: str) -> SavedRole | None:
    """The role that a user's word for a model means, if it is a run's, a stage's or an adapter's directory.

    None for a server, a file, a model, or an adapter that was not made here. Raises as `find_role` for a directory of
    ours without that role.
    """
    place = Path(name).expanduser()
    if is_endpoint(name) or not place.is_dir():
        return None
    is_ours = RunFiles(place).recipe.is_file() or any(role_folders(place, known) for known in ROLES)
    return find_role(place, role) if is_ours else None


def is_endpoint(name: str) -> bool:
    return name.startswith(("http://", "https://"))


# ---- telling weights from others -------------------------------------------------------------------------------------


def weights_of(name: str, role: str) -> str:
    """What tells the weights under a directory's name from others that were there before; "" for other names.

    Adapters by their bytes; whole models, which take long to read, by their files' sizes and times.
    """
    found = role_behind(name, role)
    return files_of(str(found.folder) if found else name, small=found is not None)


def files_of(name: str, *, small: bool = False) -> str:
    """As `weights_of`, of a directory that is known to hold the weights itself; `small`: go by the bytes."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return ""
    digest, small = hashlib.sha256(), small or RoleFiles(folder).adapter_config.is_file()
    for file in sorted(folder.glob("*.safetensors")):
        about = file.stat()
        digest.update(file.name.encode())
        digest.update(file.read_bytes() if small else f"{about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
