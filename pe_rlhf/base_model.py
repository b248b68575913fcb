"""The model that the stages of a run start from: the recipe's, or what the run's own sft stage has made of it."""

from __future__ import annotations

from pathlib import Path

from pe_rlhf.backbone import Backbone, load_backbone
from pe_rlhf.config import Recipe
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
