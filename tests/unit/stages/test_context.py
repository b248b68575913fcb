"""What a stage works with: which prompts of a file it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pe_rlhf.config import PPOConfig, Recipe
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.stages.context import StageContext
from tests.failures import raises
from tests.stage_support import write_prompts

POSITIONS = 256  # of the byte model, which has a token for each letter


def taken(model: Path, folder: Path, lengths: list[int], new_tokens: int, longest: int | None = None) -> list[int]:
    """The lengths of the prompts that a stage takes, of a file whose prompts have those."""
    prompts = write_prompts(folder / "prompts.jsonl", ["x" * length for length in lengths])
    ppo = {"prompts": prompts, "reward": [{"function": "reward.scores:length"}]}
    recipe = Recipe.model_validate({"model": str(model), "ppo": ppo})
    context: StageContext[PPOConfig] = StageContext(recipe, folder / "run", "ppo")
    backbone = load_backbone(model)
    table = context.prompts(recipe.ppo.prompts, context.codec(backbone), backbone, new_tokens, longest)  # type: ignore[union-attr]
    return [*map(len, table.ids)]


@pytest.mark.parametrize(
    ("new_tokens", "longest", "limit"), [(10, None, 246), (10, 300, 246), (10, 20, 20), (POSITIONS - 1, None, 1)]
)
def test_a_prompt_leaves_room_for_the_longest_response(
    model: Path, tmp_path: Path, new_tokens: int, longest: int | None, limit: int
) -> None:
    assert taken(model, tmp_path, [limit + 1, limit, 1, limit + 9], new_tokens, longest) == [limit, 1]


def test_a_response_that_leaves_no_room_for_a_prompt_is_refused(model: Path, tmp_path: Path) -> None:
    with raises("too_long", key="ppo.rollout.max_new_tokens"):
        taken(model, tmp_path, [1], POSITIONS)
