"""Statistics for inits, a layer at a time, against brute-force gradients and inputs of plain models."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from pe_rlhf.adapters.gradients import Probe, ProbedStatistics
from pe_rlhf.adapters.layer_statistics import LayerStatistics
from pe_rlhf.model.backbone import Backbone, load_backbone
from tests.tiny import add_role, ragged_sequences, rows_of, set_fast, statistics_for, tiny_model
from tests.unit.adapters.first_steps import assert_none_is_closer_than_lora_ga


def brute_force(family: str, rows: list[int]) -> dict[str, Tensor]:
    """Gradients of every weight of a plain model, out × in, of the likelihood that `statistics_for` takes."""
    model = tiny_model(family).requires_grad_(True)
    sequences = ragged_sequences().take(torch.tensor([0, 1, 2, 0, 1, 2]))
    sequences.ids_BT[3:, 0] += 1
    total = int(sequences.response_lengths_B.sum())
    loss = torch.zeros(())
    for index, (prompt, response) in enumerate(rows_of(sequences)):
        if index in rows:
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
            logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
            loss = loss - logprobs[torch.arange(len(response)), torch.tensor(response)].sum() / total
    loss.backward()
    transposed = family == "gpt2"
    return {
        name.removesuffix(".weight"): (p.grad.T if transposed else p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None and p.dim() == 2
    }


def visit(backbone: Backbone, source: ProbedStatistics, modules: list[str], need: Any) -> dict[str, LayerStatistics]:
    found: dict[str, LayerStatistics] = {}
    source.visit(modules, need, found.__setitem__)
    return found


def all_modules(family: str) -> tuple[Backbone, list[str]]:
    backbone = load_backbone(tiny_model(family))
    backbone.add_adapter("value", rank=1)  # names the targets; plays no part at the anchor
    return backbone, list(backbone.adapter_spec("value").modules)


def test_gradients_equal_those_of_the_plain_model(family: str) -> None:
    backbone, modules = all_modules(family)
    one = visit(backbone, statistics_for(backbone), modules, "gradient")
    two = visit(backbone, statistics_for(backbone), modules, "two gradients")
    for rows, gradients in (
        (range(6), {name: found.gradients_OI[0] for name, found in one.items()}),
        (range(3), {name: found.gradients_OI[0] for name, found in two.items()}),
        (range(3, 6), {name: found.gradients_OI[1] for name, found in two.items()}),
    ):
        expected = brute_force(family, list(rows))
        assert len(gradients) == len(modules)
        for name in modules:
            torch.testing.assert_close(gradients[name], expected[name], atol=2e-6, rtol=1e-4)


def in_parts(backbone: Backbone) -> ProbedStatistics:
    """The same loss in three forward passes, of padded rows."""
    set_fast(backbone, packing=False)
    (whole,) = statistics_for(backbone).probes("gradient")
    sequences = ragged_sequences().take(torch.tensor([0, 1, 2, 0, 1, 2]))
    sequences.ids_BT[3:, 0] += 1
    total = int(sequences.response_lengths_B.sum())

    def probe(rows: list[int]) -> Probe:
        part = sequences.take(torch.tensor(rows))
        width = part.ids_BT.shape[1]

        def loss() -> Tensor:
            return -backbone.response_logprobs(part)[0].sum() / total

        return Probe(loss, whole.mask_BT[rows][:, :width], whole.batch_B[rows])

    return ProbedStatistics(backbone.base_layer, lambda need: [probe([0, 3]), probe([1]), probe([2, 4, 5])])


@pytest.mark.parametrize("need", ["gradient", "two gradients", "inputs"])
def test_several_passes_add_up_to_one(need: Any) -> None:
    backbone, modules = all_modules("llama")
    whole = visit(backbone, statistics_for(backbone), modules, need)
    parts = visit(backbone, in_parts(backbone), modules, need)
    assert list(parts) == modules
    for name in modules:
        for a, b in zip(whole[name].gradients_OI, parts[name].gradients_OI, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        if need == "inputs":
            first, second = whole[name].inputs, parts[name].inputs
            assert first is not None
            assert second is not None
            torch.testing.assert_close(first.second_II, second.second_II, atol=1e-5, rtol=1e-4)
            assert first.tokens == second.tokens


def test_one_pass_hands_over_each_layer_before_the_next_and_keeps_no_gradient() -> None:
    backbone, modules = all_modules("llama")
    held: list[Any] = []
    alive: list[int] = []

    def take(name: str, found: LayerStatistics) -> None:
        held.append(weakref.ref(found.gradients_OI[0]))
        alive.append(sum(ref() is not None for ref in held))

    statistics_for(backbone).visit(modules, "gradient", take)
    assert len(alive) == len(modules)
    assert max(alive) <= 2  # this one, and at most the one that is being let go
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_inputs_are_those_of_real_tokens_alone(family: str) -> None:
    backbone, modules = all_modules(family)
    found = visit(backbone, statistics_for(backbone), modules, "inputs")
    model = tiny_model(family)
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name in modules:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append(inputs[0][0].detach())
        )
    sequences = ragged_sequences().take(torch.tensor([0, 1, 2, 0, 1, 2]))
    sequences.ids_BT[3:, 0] += 1
    with torch.no_grad():
        for prompt, response in rows_of(sequences):  # each by itself: no padding anywhere
            model(input_ids=torch.tensor([prompt + response]))
    for name in modules:
        X, inputs = torch.cat(seen[name]).double(), found[name].inputs
        assert inputs is not None
        assert inputs.tokens == len(X)
        torch.testing.assert_close(inputs.second_II.double(), X.T @ X / len(X), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(inputs.mean_I.double(), X.mean(0), atol=1e-4, rtol=1e-3)


def test_the_same_statistics_every_time() -> None:
    states = []
    for _ in range(2):
        backbone = load_backbone(tiny_model("gpt_neo"))
        add_role(backbone, "policy", "lora_ga", rank=3)
        states.append(backbone.role_state("policy"))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_lora_ga_in_a_model_beats_every_other_init_and_reaches_the_bound(family: str) -> None:
    def with_policy(init: str) -> Backbone:
        backbone = load_backbone(tiny_model(family))
        add_role(backbone, "policy", init, rank=3, alpha=3)
        return backbone

    assert_none_is_closer_than_lora_ga(brute_force(family, list(range(6))), 3, with_policy)


def test_the_base_keeps_no_copy_of_the_model(family: str) -> None:
    original = tiny_model(family)
    backbone = load_backbone(copy.deepcopy(original))
    before = backbone.base_fingerprint()
    add_role(backbone, "policy", "cross_task", rank=2)
    assert backbone.base_fingerprint() == before
