"""The frozen trunk: passes that are given its hidden states equal passes that compute them, and skip its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from pe_rlhf.model.backbone import Backbone, FastPath, load_backbone
from pe_rlhf.model.fast.trunk import FrozenTrunk, TrunkCache
from tests.runs import Tree, read_jsonl
from tests.stage_support import run
from tests.tiny import ROLES, add_trained_roles, outputs, perturb, ragged_sequences, set_fast, tiny_model
from tests.unit.stages.test_reward import learnable, recipe


def trained(family: str = "llama", last_layers: int | None = 1, layers: int = 3) -> Backbone:
    sizes = {"llama": "num_hidden_layers", "gpt2": "n_layer", "gpt_neo": "num_layers"}
    changes: Tree = {sizes[family]: layers}
    if family == "gpt_neo":
        changes["attention_types"] = [[["global"], layers]]
    return add_trained_roles(
        load_backbone(tiny_model(family, **changes), fast=FastPath(trunk_cache_mib=1)), last_layers
    )


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
def test_kept_or_computed_the_numbers_and_gradients_are_the_same(family: str, role: str) -> None:
    backbone, sequences = trained(family), ragged_sequences()
    numbers, gradients = outputs(backbone, role, sequences)
    backbone.compute_once(sequences, token_budget=16)  # less than the batch: rows are put together again
    with counted(backbone) as counts:
        found, found_gradients = outputs(backbone, role, sequences)
    assert counts[:2] == [0, 0]
    assert counts[2] > 0
    torch.testing.assert_close(found, numbers, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_found_in_any_batch_and_order(packing: bool) -> None:
    backbone, sequences = trained(), ragged_sequences()
    set_fast(backbone, packing=packing)
    with torch.no_grad(), backbone.role("policy"):
        expected = [backbone.response_logprobs(sequences.take(torch.tensor([i])))[0] for i in (2, 0)]
        backbone.compute_once(sequences, token_budget=1000)
        with counted(backbone) as counts:
            both = backbone.response_logprobs(sequences.take(torch.tensor([2, 0])))[0]
    assert counts == [0, 0, 1]
    torch.testing.assert_close(both, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_a_batch_with_a_row_that_is_not_kept_is_computed() -> None:
    backbone, sequences = trained(), ragged_sequences()
    backbone.compute_once(sequences.take(torch.tensor([0, 1])), token_budget=1000)
    with counted(backbone) as counts, backbone.role("policy"):
        backbone.response_logprobs(sequences)
    assert counts == [1, 1, 1]


def test_the_rows_of_the_next_batch_take_the_place_of_those_before() -> None:
    backbone, sequences = trained(), ragged_sequences()
    for index in ([0, 1], [2]):
        backbone.compute_once(sequences.take(torch.tensor(index)), token_budget=1000)
    with counted(backbone) as counts, torch.no_grad(), backbone.role("policy"):
        for i in range(3):
            backbone.response_logprobs(sequences.take(torch.tensor([i])))
    assert counts == [2, 2, 3]


def test_states_are_those_that_the_whole_model_passes_on(family: str) -> None:
    backbone, sequences = trained(family), ragged_sequences()
    trunk, ids_BT = FrozenTrunk(backbone.model), sequences.ids_BT
    with torch.no_grad():
        states_BTH = trunk.states(lambda: backbone.model.base_model(input_ids=ids_BT))  # type: ignore[operator]
        hidden_BTH = backbone.model(input_ids=ids_BT, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(states_BTH, hidden_BTH, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("last_layers", "depth"), [(None, 0), (3, 0), (2, 1), (1, 2)])
def test_the_trunk_ends_below_the_first_adapter_of_any_role(last_layers: int | None, depth: int) -> None:
    backbone = trained(last_layers=last_layers)
    assert FrozenTrunk(backbone.model).depth == depth
    if depth:
        backbone.add_adapter("policy_2", rank=2, targets=["layers.0.mlp.up_proj"])
        assert FrozenTrunk(backbone.model).depth == 0


def test_there_is_no_trunk_below_an_adapter_outside_of_the_blocks() -> None:
    """An adapter on a layer that leads into the first block changes what every block is given."""
    sizes: Tree = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    backbone = load_backbone(OPTForCausalLM(OPTConfig(vocab_size=64, word_embed_proj_dim=16, **sizes)))
    backbone.add_adapter("policy", rank=2, targets=["layers.1.fc1"])
    assert FrozenTrunk(backbone.model).depth == 1
    backbone.add_adapter("policy_2", rank=2, targets=["project_in"])
    assert FrozenTrunk(backbone.model).depth == 0


def test_an_adapter_further_down_ends_what_was_kept() -> None:
    backbone, sequences = trained(), ragged_sequences()
    backbone.compute_once(sequences, token_budget=1000)
    backbone.add_adapter("policy_2", rank=2, targets=["layers.0.mlp.up_proj"])
    perturb(backbone, "policy_2")
    with counted(backbone) as counts, torch.no_grad(), backbone.role("policy_2"):
        backbone.response_logprobs(sequences)
    assert counts == [1, 1, 1]


def test_recomputing_blocks_leaves_out_those_below_the_first_adapter() -> None:
    """The backward pass ends at the first adapter, so nothing below it is computed again."""
    backbone = trained()
    set_fast(backbone, gradient_checkpointing=True)
    with counted(backbone) as counts, backbone.role("policy"):
        backbone.response_logprobs(ragged_sequences())[0].sum().backward()
    assert counts == [1, 1, 2]


@pytest.mark.parametrize(("tokens", "kept"), [(2**20 // (32 * 4), True), (2**20 // (32 * 4) + 1, False)])
def test_what_does_not_fit_is_not_kept(tokens: int, kept: bool) -> None:
    """One MiB holds tokens × hidden size × 4 bytes."""
    assert TrunkCache(trained().model, mib=1).has_room(tokens) is kept


def test_without_adapters_or_memory_nothing_is_kept() -> None:
    assert not TrunkCache(tiny_model("llama"), mib=1).has_room(1)
    assert not TrunkCache(trained().model, mib=0).has_room(1)


def test_an_error_in_a_pass_leaves_every_block_as_it_was() -> None:
    backbone, sequences = trained(), ragged_sequences()
    backbone.compute_once(sequences, token_budget=100)

    def fail(*_: object) -> None:
        raise RuntimeError("of the last block")

    hook = blocks(backbone)[2].register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError), backbone.role("policy"):
        backbone.response_logprobs(sequences)
    hook.remove()
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
