"""How the critic starts: fresh, or as the reward model, fitted to the returns by a scale and a shift."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pe_rlhf.config import LoRAConfig, PPOConfig, Recipe
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.prompt_order import PromptOrder, PromptSet
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.runs.saved_roles import load_role
from pe_rlhf.stages.context import StageContext
from pe_rlhf.stages.init_batches import AnchorRollouts
from pe_rlhf.system.seeding import derive_seed
from pe_rlhf.types import Sequences
from tests.runs import Tree, read_jsonl
from tests.stage_support import run
from tests.tiny import perturb, rows_of
from tests.unit.stages.test_ppo import PROMPTS, metrics, recipe, saved_reward


def value_at_start(tree: Tree, folder: Path) -> dict[str, torch.Tensor]:
    """The critic that a run of one step with no learning rate ends with."""
    tree["ppo"] |= {"steps": 1, "learning_rate": 1e-30, "value_learning_rate": 1e-30}
    run(tree, folder / "run")
    return load_file(folder / "run" / "ppo" / "value" / "role.safetensors")


def test_a_critic_starts_at_zero_without_a_reward_adapter(tmp_path: Path) -> None:
    """A critic that starts at random drowns the advantages in its values, and the value clip holds it there."""
    state = value_at_start(recipe(tmp_path), tmp_path)
    assert not state["head.weight"].abs().max() > 1e-12
    assert metrics(tmp_path)[0]["value"] == 0
    assert metrics(tmp_path)[0]["explained_variance"] == 0


def values_and_scores(
    backbone: Backbone, rows: Iterable[tuple[list[int], list[int]]]
) -> tuple[list[list[float]], list[float]]:
    """What the reward role gives at the tokens before each response token, and at the last one; row by row."""
    values: list[list[float]] = []
    scores: list[float] = []
    for prompt, response in rows:
        with torch.no_grad(), backbone.role("reward"):
            read = [torch.tensor([prompt + response[:n]]) for n in range(len(response) + 1)]
            *before, score = (backbone(ids_1T).logits.item() for ids_1T in read)
        values.append(before)
        scores.append(score)
    return values, scores


def of_the_first_step(tree: Tree, source: Path) -> tuple[list[list[float]], list[float]]:
    """`values_and_scores` of a saved reward adapter, of the responses of the first step."""
    backbone, config = load_backbone(tree["model"]), PPOConfig.model_validate(tree["ppo"])
    load_role(backbone, "reward", source)
    ids = [backbone.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    batch = PromptOrder(PromptSet(list(PROMPTS), ids, {}), config.batch_size, 1, seed=0).batch(0)
    rollout = HFRollout(backbone, "anchor", config.rollout).generate(batch.ids, derive_seed(0, "rollout", 0))
    return values_and_scores(backbone, zip(rollout.prompts, rollout.responses, strict=True))


@pytest.mark.parametrize("value_init", [None, "reward", "fresh"])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_a_critic_starts_from_the_reward_adapter(tmp_path: Path, value_init: str | None, gamma: float) -> None:
    """Its head as the best line to the returns of the first rollout: by hand the score, γ times for each token."""
    tree = recipe(tmp_path, value_init=value_init, gamma=gamma)
    source = saved_reward(tree, tmp_path)
    tree["ppo"] |= {"reward": [{"adapter": source, "weight": 2.0}], "kl": {"beta": 0.1}}
    state = value_at_start(tree, tmp_path)
    reward = load_file(Path(source) / "role.safetensors")
    if value_init == "fresh":
        assert metrics(tmp_path)[0]["value"] == 0
        return
    values, scores = of_the_first_step(tree, Path(source))
    returns = [
        1.8 * score * gamma ** (len(row) - 1 - t)
        for row, score in zip(values, scores, strict=True)
        for t in range(len(row))
    ]
    scale, shift = np.polyfit([value for row in values for value in row], returns, deg=1)
    assert (scale > 0.05) == (gamma < 1)  # undiscounted, the random model foresees nothing: a constant is best
    if scale < 0:
        scale, shift = 0.0, sum(returns) / len(returns)
    assert state.keys() == reward.keys()
    for name, tensor in reward.items():
        expected = scale * tensor + shift * (name == "head.bias") if name.startswith("head.") else tensor
        torch.testing.assert_close(state[name], expected.float(), atol=1e-4, rtol=1e-4, msg=name)
    assert metrics(tmp_path)[0]["explained_variance"] > (0.01 if scale else -1e-6)


def test_a_critic_starts_from_the_runs_reward_adapter_where_a_function_scores(tmp_path: Path) -> None:
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tree = recipe(tmp_path, value_init="reward") | {"reward": {"data": str(tmp_path / "pairs.jsonl"), "batch_size": 4}}
    tree["ppo"] |= {"kl": {"form": "penalty"}, "batch_size": 4}
    state = value_at_start(tree, tmp_path)
    source = tmp_path / "run" / "reward" / "adapter"
    values, _ = of_the_first_step(tree, source)
    lengths = [row["score"] for row in read_jsonl(tmp_path / "run" / "ppo" / "samples.jsonl")]
    returns = [length for row, length in zip(values, lengths, strict=True) for _ in row]
    slope, _ = np.polyfit([value for row in values for value in row], returns, deg=1)
    assert slope < 0  # a reward model that would have it the other way round: the critic starts as a constant
    reward = load_file(source / "role.safetensors")
    assert state.keys() == reward.keys()
    for name, tensor in reward.items():
        constant = torch.full_like(tensor, sum(returns) / len(returns) if name == "head.bias" else 0)
        expected = constant if name.startswith("head.") else tensor
        torch.testing.assert_close(state[name], expected, atol=1e-4, rtol=1e-6, msg=name)


def test_a_critic_from_a_reward_adapter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as raised:
        run(recipe(tmp_path, value_init="reward"), tmp_path / "run")
    (mistake,) = raised.value.errors()
    assert (mistake["type"], mistake.get("ctx", {}).get("key")) == ("refusal", "ppo.value_init")


@dataclass
class MeanOfValues:
    """A reward that the reward role's values foretell."""

    backbone: Backbone

    def score(self, prompts: object, responses: object, sequences: Sequences, columns: object = None) -> torch.Tensor:
        values, _ = values_and_scores(self.backbone, rows_of(sequences))
        return torch.tensor([3 * sum(row) / len(row) for row in values])


def test_advantages_of_an_inits_batch_are_with_the_values_of_a_critic_that_is_fitted_to_it(tmp_path: Path) -> None:
    """By hand: the best line from the values to the discounted scores, and then equation 16 of arXiv 1506.02438."""
    tree, gamma, lam = recipe(tmp_path, gamma=0.8, kl={"form": "penalty"}), 0.8, 0.95
    backbone = load_backbone(tree["model"])
    backbone.add_adapter("reward", rank=3)
    perturb(backbone, "reward", 0.2)
    codec = TextCodec(backbone.tokenizer, "none")
    context: StageContext[PPOConfig] = StageContext(Recipe.model_validate(tree), tmp_path, "ppo")
    prompts = PromptSet([*PROMPTS], [codec.encode_prompt(prompt) for prompt in PROMPTS], {})
    adapter, scorer = LoRAConfig(init="lora_ga", rank=2), MeanOfValues(backbone)
    batch = AnchorRollouts(context, backbone, scorer, codec, prompts, adapter, "reward")._sampled("gradient")
    values, _ = values_and_scores(backbone, rows_of(batch.sequences))
    scores = [3 * sum(row) / len(row) for row in values]
    to_go = [[s * gamma ** (len(row) - 1 - t) for t in range(len(row))] for row, s in zip(values, scores, strict=True)]
    scale, shift = np.polyfit([v for row in values for v in row], [g for row in to_go for g in row], deg=1)
    assert scale > 0.05
    returns: list[float] = []
    for row, score in zip(values, scores, strict=True):
        fitted = [scale * value + shift for value in row]
        advantage, found = 0.0, []
        for t in reversed(range(len(row))):
            reward, after = (score, 0.0) if t + 1 == len(row) else (0.0, fitted[t + 1])
            advantage = reward + gamma * after - fitted[t] + gamma * lam * advantage
            found.insert(0, advantage + fitted[t])
        returns += found
    assert batch.returns_BR is not None
    expected_N = torch.tensor(returns, dtype=torch.float32)
    torch.testing.assert_close(batch.returns_BR[batch.sequences.mask_BR], expected_N, atol=1e-4, rtol=1e-4)
