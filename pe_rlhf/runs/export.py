"""`pe-rlhf export`: a role of a finished run as a plain LoRA, or merged into a full checkpoint of its own.

Both are for the original base, whatever the init. The merged weights are computed fresh as W0 + ΔW from a base that is
loaded for this, and never written into a model that is in use. Of a quantised base, W0 is what it stands for.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from pe_rlhf.adapters.specs import AdapterSpec
from pe_rlhf.config import BackboneConfig, Recipe
from pe_rlhf.config.load import load_recipe, save_recipe
from pe_rlhf.data.codec import find_template
from pe_rlhf.model.backbone import Backbone
from pe_rlhf.model.names import resolve_model
from pe_rlhf.model.whole import loading
from pe_rlhf.runs.checkpoint import role_of_checkpoint, roles_of_checkpoints
from pe_rlhf.runs.layout import ROLES, RoleFiles, RunFiles, StageFiles, wanted_roles
from pe_rlhf.runs.metrics import read_summary
from pe_rlhf.runs.own_output import claim_place
from pe_rlhf.runs.saved_roles import (
    SavedRole,
    check_peft_files,
    find_role,
    load_base,
    load_role,
    read_role,
    save_role,
    starting_model,
)
from pe_rlhf.runs.task_mixture import Weight, mixed_policy
from pe_rlhf.system.files import new_folder, read_json, write_json, write_whole
from pe_rlhf.system.progress import say
from pe_rlhf.system.render import render
from pe_rlhf.system.tensor_files import save_tensors
from reward.errors import InputError

Format = Literal["lora", "merged"]
Dtype = Literal["float32", "bfloat16", "float16"]


def export_role(
    place: Path,
    form: Format,
    to: Path | None = None,
    role: str | None = None,
    checkpoint: str | None = None,
    dtype: Dtype | None = None,
    mix: Mapping[str, Weight] | None = None,
) -> Path:
    """Write a role of a run as `lora` (PEFT's files) or `merged` (a checkpoint), with a model card. Returns where.

    Args:
        place: a run's directory, a stage's in it, or an adapter's.
        to: where to write; default `export/<role>-<form>` in the run. It must not be there already.
        role: a name of `ROLES`; default: the first of these that is there.
        checkpoint: `best`, `newest` or a step's number; default: what the stage ended with.
        dtype: of merged weights; default: the base's, which if narrow loses a part of a small update.
        mix: of a run with tasks: the weight of each task's part in the policy; see `task_mixture`.

    Raises `InputError` where there is no such role, or where `to` is taken.
    """
    if dtype is not None and form == "lora":
        message = "--dtype is for --format merged: a LoRA is written as it was trained"
        raise InputError(message, kind="conflict", key="--dtype")
    if RunFiles(place).tasks.is_dir():
        return _export_tasks(place, form, to, role, checkpoint, dtype, mix)
    if mix is not None:
        raise InputError(f"--mix: {place} is no run with tasks", kind="conflict", key="--mix", file=place)
    if checkpoint is None:
        found = find_role(place, role)
        return _write_export(found, form, to or found.files.stage.run.export(found.role, form), dtype)
    stage, name = _find_checkpoints(place, role)
    step, spec, state = role_of_checkpoint(stage.folder, checkpoint, name)
    recipe = load_recipe(stage.recipe)
    backbone = _base_to_export(recipe, starting_model(recipe, stage.run.folder))
    backbone.load_role(name, spec, state)
    with _as_if_ended(recipe, backbone, stage.folder.name, name) as found:
        return _write_export(found, form, to or stage.run.export(name, form, step), dtype)


@contextmanager
def _as_if_ended(recipe: Recipe, backbone: Backbone, stage: str, role: str) -> Iterator[SavedRole]:
    """A role of a backbone as a stage would have left it, had it ended with it."""
    with tempfile.TemporaryDirectory() as scratch:
        ended = StageFiles(Path(scratch) / stage)
        ended.folder.mkdir()
        save_recipe(recipe, ended.recipe)
        save_role(backbone, role, ended.role(role).folder)
        yield read_role(ended.role(role).folder)


def _export_tasks(
    place: Path,
    form: Format,
    to: Path | None,
    role: str | None,
    checkpoint: str | None,
    dtype: Dtype | None,
    mix: Mapping[str, Weight] | None,
) -> Path:
    """The policy after the last of several tasks, or a mixture of their parts."""
    recipe, files = load_recipe(RunFiles(place).recipe), RunFiles(place)
    last = recipe.last_policy
    if mix is None:
        target = to or files.export(role or "policy", form)
        return export_role(files.task(last).folder, form, target, role, checkpoint, dtype)
    if role not in (None, "policy") or checkpoint is not None:
        key = "--role" if role not in (None, "policy") else "--checkpoint"
        raise InputError("--mix is of the policies that the tasks ended with", kind="conflict", key=key)
    own = load_recipe(files.task(last).recipe)
    with _as_if_ended(own, mixed_policy(recipe, place, mix), "ppo", "policy") as found:
        return _write_export(found, form, to or files.export("mixture", form), dtype)


def _find_checkpoints(place: Path, role: str | None) -> tuple[StageFiles, str]:
    """The stage whose checkpoints hold a role, and the role; `place` is as of `find_role`, but may be unfinished."""
    for name in wanted_roles(place, role):
        for stage in (StageFiles(place), RoleFiles(place).stage, RunFiles(place).stage(ROLES[name].name)):
            if name in roles_of_checkpoints(stage.folder):
                return stage, name
    raise InputError(f"{place} has no checkpoint of a {role or 'role'}", kind="missing", key="checkpoint", file=place)


def _write_export(found: SavedRole, form: Format, target: Path, dtype: Dtype | None) -> Path:
    claim_place(target, "--to")
    there = target.resolve()  # `absent/..` is a place that is there, too
    if there.exists() and (not there.is_dir() or any(there.iterdir())):
        raise InputError(f"{target} is there already", kind="exists", file=target, fix="name another place with --to")
    if isinstance(found.spec, AdapterSpec) and (tasks := found.spec.settings.routes):
        raise InputError(
            f"{found.folder} is another policy for each task ({', '.join(tasks)}), of which PEFT and vLLM load one",
            kind="missing",
            key="--mix",
            file=found.folder,
            fix=f"export the run with --mix {tasks[0]}=1, or with a weight for each task",
        )
    with new_folder(target) as scratch:
        if form == "merged":
            _write_merged(found, scratch, dtype)
        elif found.is_full:
            raise InputError(
                f"{found.folder} was fully tuned and has no adapter",
                kind="conflict",
                key="format",
                file=found.folder,
                fix="export it with --format merged",
            )
        else:
            check_peft_files(found)
            for path in found.files.for_peft():
                shutil.copyfile(path, scratch / path.name)
            _name_base(RoleFiles(scratch).adapter_config, found.base)
            _write_tokenizer(found, scratch)
        write_whole(scratch / "README.md", model_card(found, form))
    return target


def merged_state(backbone: Backbone, role: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict of a plain model that computes the role: fresh, in the base's dtype or another; no head."""
    state = dict(backbone.merged_tensors(role, dtype))
    names = {n: t.data_ptr() for n, t in backbone.model.state_dict().items() if ".adapters." not in n}
    first = {pointer: name for name, pointer in reversed(names.items())}
    named = {n.replace(".base.", "."): first[pointer].replace(".base.", ".") for n, pointer in names.items()}
    return {name: state[known] for name, known in named.items() if known in state}


def model_card(found: SavedRole, form: Format) -> str:
    """The README.md of an export: what it is, how it was trained, how it is loaded."""
    stage, recipe = found.files.stage, _recipe(found)
    numbers = {key: value for key, value in (read_summary(stage) or {}).items() if isinstance(value, int | float)}
    spec = found.spec.as_json()
    hidden = ("kind", "modules", "targets", "exclude", "last_layers")
    peft = dict(read_json(found.files.adapter_config)) if form == "lora" else {}
    return render(
        Path(__file__).with_name("model_card.md.j2"),
        role=found.role,
        form=form,
        name=recipe.name,
        base_model=found.base,
        base_sha256=found.base_sha256,
        quantization="" if recipe.backbone.quantization == "none" else recipe.backbone.quantization,
        kind=spec.get("kind"),
        modules=spec.get("modules", []),
        settings={key: value for key, value in spec.items() if key not in hidden and value not in (None, {}, [])},
        adapter=_adapter_of_peft(peft),
        is_changed=peft.get("peft_type") == "LORA" and spec.get("kind") not in ("lora", "dora"),
        is_twice_as_wide="rank" in spec and peft.get("r") == 2 * spec["rank"],
        chat_template=recipe.chat_template,
        numbers=numbers,
        stage=stage.folder.name,
    )


def _adapter_of_peft(config: dict[str, Any]) -> str:
    """What PEFT's files are, for the card, from `adapter_config.json`; empty without one."""
    if not config:
        return ""
    usual = {"LORA": "A DoRA" if config.get("use_dora") else "A LoRA"}
    named = usual.get(config["peft_type"], f"An adapter of PEFT's type `{config['peft_type']}`")
    by_layer: dict[str, Any] = config.get("rank_pattern") or {"all": config.get("r")}
    ranks = sorted(by_layer.values())
    if ranks == [None]:
        return named
    return f"{named} of rank {ranks[0]}" + (f" to {ranks[-1]}" if ranks[0] != ranks[-1] else "")


def _recipe(found: SavedRole) -> Recipe:
    """The recipe that a role was trained with. Raises `InputError` where it is missing."""
    return found.recipe or load_recipe(found.files.stage.recipe)


def _write_tokenizer(found: SavedRole, path: Path) -> None:
    """The base's tokenizer with the template that the role was trained with: an adapter is nothing without it."""
    recipe = _recipe(found)
    common = {"trust_remote_code": recipe.backbone.trust_remote_code, "revision": recipe.backbone.revision}
    with loading(found.base, "model"):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(found.base), **common)
    tokenizer.chat_template = find_template(tokenizer, recipe.chat_template)
    tokenizer.save_pretrained(path)


def _base_to_export(recipe: Recipe, model: str) -> Backbone:
    """The base on the CPU; a quantised one where it was trained: elsewhere its weights may be rounded otherwise."""
    return load_base(recipe, model, "cpu" if recipe.backbone.quantization == "none" else None)


def _write_merged(found: SavedRole, path: Path, dtype: Dtype | None) -> None:
    recipe = _recipe(found)
    backbone = _base_to_export(recipe, found.base)
    load_role(backbone, found.role, found.folder)
    template = find_template(backbone.tokenizer, recipe.chat_template)
    write_merged(backbone, found.role, recipe.backbone, path, template, dtype)


def write_merged(
    backbone: Backbone,
    role: str,
    settings: BackboneConfig,
    path: Path,
    chat_template: str | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Write a role as a checkpoint of its own, computed fresh, with the base's tokenizer; a head goes beside it.

    `chat_template` takes the place of the tokenizer's own; None is plain text.
    Says which share of ΔW is left where the dtype is narrow.
    """
    written = getattr(torch, dtype or settings.dtype)
    if written != torch.float32 and role in backbone.specs:
        share = backbone.merged_share(role, written)
        say(
            f"{share:.1%} of the adapter's change is left in {dtype or settings.dtype} weights; float32 keeps all of it"
        )
    source = resolve_model(backbone.name)
    common = {"trust_remote_code": settings.trust_remote_code, "revision": settings.revision}
    config = AutoConfig.from_pretrained(source, **common)
    if not isinstance(config, type(backbone.model.config)):  # of a checkpoint of which only the text part was loaded
        config = config.get_text_config(decoder=True)
    config.dtype = dtype or settings.dtype
    vars(config).pop("quantization_config", None)  # of a checkpoint that is quantised: what is written is not
    tokenizer = AutoTokenizer.from_pretrained(source, **common)
    tokenizer.chat_template = chat_template  # None, too: a role that was trained on plain text is prompted with it
    state = merged_state(backbone, role, written)
    if role == "reward":
        config.num_labels, config.pad_token_id = 1, backbone.pad_token_id
        try:
            plain = _empty(AutoModelForSequenceClassification, config)
        except ValueError as error:
            raise InputError(
                f"transformers has no classifier of the type {config.model_type!r}, which a merged reward would be",
                kind="conflict",
                key="format",
                fix="export it with --format lora",
            ) from error
        state = {name: tensor for name, tensor in state.items() if name in plain.state_dict()}
        state["score.weight"] = backbone.head("reward").weight.detach()[None].to(written)
    else:
        plain = _empty(type(backbone.model), config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = _generation_config(source, common, config)
    try:
        plain.save_pretrained(path)
    except SafetensorError as error:  # a full disk
        raise OSError(f"{path}: {error}") from error
    tokenizer.save_pretrained(path)
    if role in backbone.heads:
        head = backbone.head(role).state_dict()
        save_tensors({name: tensor.detach().contiguous() for name, tensor in head.items()}, RoleFiles(path).head)


def _name_base(path: Path, base: str) -> None:
    """Set the base in an adapter's config, which says where it was when the adapter was trained."""
    config = read_json(path)
    if config["base_model_name_or_path"] != base:
        write_json(path, config | {"base_model_name_or_path": base})


def _empty(kind: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model of that kind without memory for its weights."""
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


def _generation_config(source: str, common: dict[str, Any], config: PretrainedConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source, **common)
    except OSError:  # a model without one
        return GenerationConfig.from_model_config(config)
