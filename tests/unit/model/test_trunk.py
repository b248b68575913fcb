"""The frozen trunk: passes that are given its hidden states equal passes that compute them, and skip its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.fast.trunk import FrozenTrunk
from tests.runs import Tree, read_jsonl
from tests.stage_support import run
from tests.tiny import ROLES, add_trained_roles, outputs, ragged_sequences, tiny_model
from tests.unit.stages.test_reward import learnable, recipe


def trained(family: str = "llama", last_layers: int | None = 1, layers: int = 3) -> Backbone:
    sizes = {"llama": "num_hidden_layers", "gpt2": "n_layer", "gpt_neo": "num_layers"}
    changes: Tree = {sizes[family]: layers}
    if family == "gpt_neo":
        changes["attention_types"] = [[["global"], layers]]
    return add_trained_roles(load_backbone(tiny_model(family, **changes)), last_layers)


def blocks(backbone: Backbone) -> nn.ModuleList:
    return next(module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == 3)


@contextmanager
def counted(backbone: Backbone) -> Iterator[list[int]]:
    """How often each block's attention is computed."""
    counts = [0] * 3
    hooks = []
    for i, block in enumerate(blocks(backbone)):
        attention = next(m for name, m in block.named_children() if "attn" in name)

        def count(*_: object, i: int = i) -> None:
            counts[i] += 1

        hooks.append(attention.register_forward_hook(count))
    yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("role", ROLES)
def test_given_or_computed_the_numbers_and_gradients_are_the_same(family: str, role: str) -> None:
    backbone, plain = trained(family), ragged_sequences()
    given = backbone.with_trunk(plain, micro_batch_tokens=16)  # less than the batch: rows are put together again
    assert given.trunk_BTH is not None
    numbers, gradients = outputs(backbone, role, plain)
    with counted(backbone) as counts:
        found, found_gradients = outputs(backbone, role, given)
    assert counts[:2] == [0, 0]
    assert counts[2] > 0
    torch.testing.assert_close(found, numbers, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_rows_that_are_taken_keep_their_states() -> None:
    backbone = trained()
    given = backbone.with_trunk(ragged_sequences(), micro_batch_tokens=1000)
    index = torch.tensor([2, 0])
    with torch.no_grad(), backbone.role("policy"):
        both = backbone.response_logprobs(given.take(index))[0]
        alone = [backbone.response_logprobs(given.take(index[i : i + 1]))[0] for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_states_are_those_that_the_whole_model_passes_on(family: str) -> None:
    backbone, sequences = trained(family), ragged_sequences()
    rows = backbone.trunk_rows(sequences, micro_batch_tokens=8)
    with torch.no_grad():
        hidden = backbone.model(input_ids=sequences.ids_BT, output_hidden_states=True).hidden_states[2]
    for row, expected_TH, length in zip(rows, hidden, sequences.lengths_B.tolist(), strict=True):
        torch.testing.assert_close(row, expected_TH[:length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("last_layers", "depth"), [(None, 0), (3, 0), (2, 1), (1, 2)])
def test_the_trunk_ends_below_the_first_adapter_of_any_role(last_layers: int | None, depth: int) -> None:
    backbone = trained(last_layers=last_layers)
    assert FrozenTrunk(backbone.model).depth == depth
    if depth:
        backbone.add_adapter("policy_2", rank=2, targets=["layers.0.mlp.up_proj"])
        assert FrozenTrunk(backbone.model).depth == 0


def test_recomputing_blocks_leaves_out_those_below_the_first_adapter() -> None:
    """The backward pass ends at the first adapter, so nothing below it is computed again."""
    backbone = trained()
    backbone.enable_gradient_checkpointing()
    with counted(backbone) as counts, backbone.role("policy"):
        backbone.response_logprobs(ragged_sequences())[0].sum().backward()
    assert counts == [1, 1, 2]


def test_without_adapters_or_room_nothing_is_kept() -> None:
    assert FrozenTrunk(tiny_model("llama")).depth == 0
    backbone, sequences = trained(), ragged_sequences()
    backbone.trunk_cache_mib = 0
    assert backbone.with_trunk(sequences, 100) is sequences
    assert not backbone.keeps_trunk(1)
    backbone.trunk_cache_mib = 1
    assert backbone.keeps_trunk(2**20 // (32 * 4))  # tokens × hidden size × 4 bytes
    assert not backbone.keeps_trunk(2**20 // (32 * 4) + 1)


def test_an_error_in_a_pass_leaves_every_block_as_it_was() -> None:
    backbone = trained()
    given = backbone.with_trunk(ragged_sequences(), 100)
    assert given.trunk_BTH is not None
    wrong = replace(given, trunk_BTH=given.trunk_BTH[..., :-1])
    with torch.no_grad(), pytest.raises(RuntimeError), backbone.role("policy"):
        backbone.response_logprobs(wrong)
    assert all("forward" not in vars(block) for block in blocks(backbone))


def test_a_reward_stage_learns_the_same(tmp_path: Path) -> None:
    """Dropout on, two epochs, evaluations in between: kept or computed again, the losses differ by rounding."""
    losses = []
    for mib in (0, 64):
        folder = tmp_path / str(mib)
        folder.mkdir()
        tree = recipe(folder, learnable(), learning_rate=1e-2, epochs=2, eval_every=3)
        tree["adapter"] |= {"last_layers": 1, "dropout": 0.1}
        tree["backbone"] = {"trunk_cache_mib": mib}
        run(tree, folder / "run")
        losses.append([line["loss"] for line in read_jsonl(folder / "run" / "reward" / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]
