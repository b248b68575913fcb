"""A policy that is routed by task: against dense weights in plain transformers, row by row, and to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from pe_rlhf.adapters.kinds.routed import RoutedConfig, RoutedLoRA
from pe_rlhf.model.backbone import USUAL, Backbone, FastPath, load_backbone
from pe_rlhf.model.fast.packing import Packing, find_prefixes
from pe_rlhf.model.micro_batches import sequence_costs
from pe_rlhf.types import Sequences
from reward.errors import Kind
from tests.failures import raises
from tests.tiny import (
    IDS_BT,
    Settings,
    pairs,
    perturb,
    ragged_sequences,
    role_logits,
    rows_of,
    tiny_model,
    with_system_prompt,
)

NAMES = ("a", "b", "c")
RANK, SHARED, SCALE = 2, 1, 1.5  # ranks of a task's part and of the shared one, and alpha over the rank
# Of each task (rows) for the parts (columns), worked by hand from the settings beside them.
TABLES: dict[str, tuple[Settings, list[list[float]]]] = {
    "own part": ({}, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "task": (
        {"weights": "task", "values": {"a": {"a": 1, "b": 0.5}, "c": {"b": -2, "c": 0.25}}},
        [[1, 0.5, 0], [0, 1, 0], [0, -2, 0.25]],
    ),
}
BATCHES: dict[str, Callable[[], Sequences]] = {
    "ragged": ragged_sequences, "system prompt": with_system_prompt, "pairs": pairs
}  # fmt: skip


def routed(
    family: str = "llama", dtype: torch.dtype = torch.float32, fast: FastPath = USUAL, **settings: Any
) -> Backbone:
    """A routed policy whose tensors are random, as if it had been trained."""
    backbone = load_backbone(tiny_model(family, dtype), fast=fast)
    common: Settings = {"rank": RANK, "alpha": SCALE * RANK, "shared_rank": SHARED, "tasks": list(NAMES)}
    backbone.add_adapter("policy", kind="routed", **common | settings)
    perturb(backbone, "policy", 0.2)
    return backbone


def for_tasks(sequences: Sequences) -> Sequences:
    return replace(sequences, tasks_B=torch.tensor([0, 2, 0, 1])[: len(sequences)])


def ranks_of(table: Tensor) -> Tensor:
    """The weight of each rank-one part, from those of the tasks' parts; the shared part has 1."""
    return torch.cat([torch.ones(len(table), SHARED), table.repeat_interleave(RANK, dim=1)], dim=1)


def dense(backbone: Backbone, leaves: dict[str, Tensor], gates: Callable[[str], Tensor]) -> list[dict[str, Tensor]]:
    """The weights of a plain model for each task: W0 + s·B·diag(k)·A."""
    plain = tiny_model("llama")
    return [
        {
            f"{name}.weight": plain.get_parameter(f"{name}.weight").detach()
            + SCALE * leaves[f"{name}.lora_B"] @ torch.diag(gates(name)[task]) @ leaves[f"{name}.lora_A"]
            for name in backbone.adapter_spec("policy").modules
        }
        for task in range(len(NAMES))
    ]


def plain_logprobs(weights: list[dict[str, Tensor]], sequences: Sequences) -> Tensor:
    """Log-probs _N of the responses, each row by itself in transformers with the weights of its task."""
    plain, found = tiny_model("llama").requires_grad_(False), []
    assert sequences.tasks_B is not None
    for (prompt, response), task in zip(rows_of(sequences), sequences.tasks_B.tolist(), strict=True):
        ids = torch.tensor([prompt + response])
        logits_TV = functional_call(plain, weights[task], (), {"input_ids": ids, "use_cache": False}).logits[0]
        logprobs_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(dim=-1)
        found.append(logprobs_TV.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def leaves_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in backbone.role_parameters("policy").items()}


def assert_same_gradients(
    backbone: Backbone, leaves: dict[str, Tensor], sequences: Sequences, wanted_N: Tensor
) -> None:
    with backbone.role("policy"):
        found_N = backbone.response_logprobs(sequences)[0]
    torch.testing.assert_close(found_N, wanted_N, atol=2e-5, rtol=1e-5)
    weights_N = torch.linspace(-1, 1, len(found_N))
    (found_N * weights_N).sum().backward()
    gradients = torch.autograd.grad((wanted_N * weights_N).sum(), [*leaves.values()])
    for (name, parameter), wanted in zip(backbone.role_parameters("policy").items(), gradients, strict=True):
        assert parameter.grad is not None
        assert wanted.abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_batch_of_several_tasks_is_each_row_by_its_own_weights(packing: bool, batch: str, table: str) -> None:
    settings, numbers = TABLES[table]
    backbone = routed(fast=FastPath(packing=packing), **settings)
    leaves, sequences = leaves_of(backbone), for_tasks(BATCHES[batch]())
    weights = dense(backbone, leaves, lambda _: ranks_of(torch.tensor(numbers)))
    assert_same_gradients(backbone, leaves, sequences, plain_logprobs(weights, sequences))


def test_learned_weights_are_a_softmax_for_each_task_in_each_layer() -> None:
    """Also the gradients of the logits, against autograd's through dense weights."""
    backbone = routed(weights="learned")
    leaves, sequences = leaves_of(backbone), for_tasks(with_system_prompt())
    weights = dense(backbone, leaves, lambda name: ranks_of(leaves[f"{name}.route_logits_TT"].softmax(dim=1)))
    assert_same_gradients(backbone, leaves, sequences, plain_logprobs(weights, sequences))


def test_recomputed_blocks_are_of_the_same_tasks() -> None:
    """A backward pass runs when the batch's tasks have long been left."""
    backbone, again = routed(), routed(fast=FastPath(gradient_checkpointing=True))
    for each in (backbone, again):
        with each.role("policy"):
            logprobs_N, _ = each.response_logprobs(for_tasks(pairs()))
        with each.route(1):
            logprobs_N.sum().backward()
    for one, other in zip(*(each.role_parameters("policy").values() for each in (backbone, again)), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_one_hot_route_is_the_tasks_own_adapter_to_the_bit(family: str, dtype: torch.dtype) -> None:
    """Beside a plain LoRA that holds the task's own factors: logits, gradients, and merged weights."""
    backbone = routed(family, dtype, shared_rank=0)
    for task in range(3):
        backbone.add_adapter(f"task_{task}", rank=RANK, alpha=SCALE * RANK)
        own, rows = backbone.role_layers(f"task_{task}"), slice(RANK * task, RANK * (task + 1))
        with torch.no_grad():
            for name, layer in backbone.role_layers("policy").items():
                own[name].lora_A.copy_(layer.lora_A[rows])  # type: ignore[operator]
                own[name].lora_B.copy_(layer.lora_B[:, rows])  # type: ignore[operator]
    for task in range(3):
        with backbone.route(task):
            assert torch.equal(role_logits(backbone, "policy"), role_logits(backbone, f"task_{task}"))
            for name, layer in backbone.role_layers("policy").items():
                weight_OI = backbone.base_weight(name).float()
                one, other = (
                    each.delta_weight(weight_OI) for each in (layer, backbone.role_layers(f"task_{task}")[name])
                )
                assert one is not None
                assert other is not None
                assert torch.equal(one, other)
            for role in ("policy", f"task_{task}"):
                with backbone.role(role):
                    backbone(IDS_BT).logits.float().square().sum().backward()
        rows = slice(RANK * task, RANK * (task + 1))
        for name, layer in backbone.role_layers("policy").items():
            own = backbone.role_layers(f"task_{task}")[name]
            assert torch.equal(layer.lora_A.grad[rows], own.lora_A.grad)  # type: ignore[index, union-attr]
            assert torch.equal(layer.lora_B.grad[:, rows], own.lora_B.grad)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", ["task", "learned"])
def test_at_the_start_all_tasks_are_the_anchor_to_the_bit(weights: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    with torch.no_grad():
        original = model(input_ids=IDS_BT).logits
    backbone = load_backbone(model)
    backbone.add_adapter("policy", kind="routed", rank=2, tasks=list(NAMES), weights=weights, shared_rank=1)
    for task in (*range(3), torch.tensor([[0], [2]])):
        with backbone.route(task):
            assert torch.equal(role_logits(backbone, "policy"), original)
    with torch.no_grad(), backbone.role("anchor"):
        anchor_N = backbone.response_logprobs(for_tasks(pairs()))[0]
    with torch.no_grad(), backbone.role("policy"):
        assert torch.equal(backbone.response_logprobs(for_tasks(pairs()))[0], anchor_N)


def test_equal_weights_of_the_rank_one_parts_are_the_weight_of_the_task() -> None:
    by_task = {"a": {"a": 1.0, "b": 0.5}, "b": {"c": 2.0}}
    by_rank = {task: {part: [w] * RANK for part, w in own.items()} for task, own in by_task.items()}
    by_layer = {task: {part: {"": w} for part, w in own.items()} for task, own in by_task.items()}
    made = [
        routed(weights="task", values=by_task),
        routed(weights="subspace", values=by_rank),
        routed(weights="layer", values=by_layer),
    ]
    for task in (*range(3), torch.tensor([[1], [0]])):
        found = []
        for backbone in made:
            with backbone.route(task):
                found.append(role_logits(backbone, "policy"))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_layers_and_ranks_have_weights_of_their_own() -> None:
    values = {"a": {"b": {"layers.1": 3.0, "q_proj": 2.0}}}
    settings = RoutedConfig(kind="routed", rank=2, tasks=["a", "b"], weights="layer", values=values)  # type: ignore[arg-type]
    tables = {
        name: settings.gates_TP(name).tolist() for name in ("layers.0.q_proj", "layers.0.o_proj", "layers.1.q_proj")
    }
    assert tables == {
        "layers.0.q_proj": [[0, 0, 2, 2], [0, 0, 1, 1]],
        "layers.0.o_proj": [[0, 0, 0, 0], [0, 0, 1, 1]],
        "layers.1.q_proj": [[0, 0, 3, 3], [0, 0, 1, 1]],
    }
    ranks = {"kind": "routed", "rank": 2, "shared_rank": 1, "tasks": ["a", "b"], "weights": "subspace"}
    found = RoutedConfig(**ranks, values={"b": {"a": [0.0, 4.0]}}).gates_TP("any")  # type: ignore[arg-type]
    assert found.tolist() == [[1, 1, 1, 0, 0], [1, 0, 4, 0, 0]]


def test_what_each_task_is_made_of_is_the_mean_over_layers_and_ranks() -> None:
    """tiny_model's Llama has two layers; a pattern gives one of them another weight."""
    by_rank = routed(weights="subspace", values={"b": {"a": [0.0, 4.0]}}, tasks=["a", "b"])
    assert by_rank.task_weights("policy") == {"a": {"a": 1, "b": 0}, "b": {"a": 2, "b": 0}}
    by_layer = routed(weights="layer", values={"a": {"b": {"layers.1": 3.0, "": 1.0}}}, tasks=["a", "b"])
    assert by_layer.task_weights("policy") == {"a": {"a": 0, "b": 2}, "b": {"a": 0, "b": 1}}
    assert by_layer.task_weights("anchor") == {}


@pytest.mark.parametrize(("pattern", "kind"), [("[", "invalid"), ("layers.7", "unknown")])
def test_a_pattern_that_fits_no_layer_is_refused(pattern: str, kind: Kind) -> None:
    """Its weight would be 0 in all of them, in silence."""
    with raises(kind, key="continual.route.values"):
        routed(weights="layer", values={"a": {"b": {"q_proj": 1.0, pattern: 1.0}}})


def test_prefixes_are_shared_only_within_a_task() -> None:
    """Four rows with one start: of two tasks, so it is computed twice; equal prompts of two tasks likewise."""
    start = [7, 8, 9, 10]
    rows = Sequences.pack([[*start, 20 + i] for i in range(4)], [[30, 31]] * 4, pad_id=0)
    assert find_prefixes(rows)[1].tolist() == [4]
    mixed = replace(rows, tasks_B=torch.tensor([0, 1, 0, 1]))
    prefix_B, lengths_U = find_prefixes(mixed)
    assert (prefix_B.tolist(), lengths_U.tolist()) == ([0, 1, 0, 1], [4, 4])
    packing = Packing.of(mixed, torch.device("cpu"))
    assert packing.row_L[:8].tolist() == [0] * 4 + [1] * 4
    assert sequence_costs(mixed, packed=True).tolist() == [7 - 4 + 1] * 4
    same = replace(Sequences.pack([[5, 6, 7, 8]] * 4, [[9], [9, 9]] * 2, pad_id=0), tasks_B=torch.tensor([1, 0, 0, 1]))
    assert find_prefixes(same)[0].tolist() in ([0, 1, 1, 0], [1, 0, 0, 1])
    single = replace(rows, tasks_B=torch.arange(4))
    assert Packing.of(single, torch.device("cpu")).prefixes is None
    assert sequence_costs(single, packed=True).tolist() == [7] * 4


def test_what_a_role_gives_is_the_task_that_is_played() -> None:
    backbone = routed()
    assert backbone.tasks_of("policy") == NAMES
    assert backbone.tasks_of("anchor") == ()
    assert backbone.export_rank("policy") == SHARED + RANK
    assert isinstance(backbone.peft_form("policy"), str)
    for call in (
        lambda: role_logits(backbone, "policy"),
        lambda: list(backbone.merged_tensors("policy")),
        lambda: next(iter(backbone.role_layers("policy").values())).lora_factors(),
    ):
        with raises("missing", key="task"):
            call()
    with backbone.route(1):
        wanted = role_logits(backbone, "policy")
        with torch.no_grad(), backbone.merged_role("policy"):
            torch.testing.assert_close(backbone(IDS_BT).logits, wanted, atol=2e-5, rtol=1e-5)
    backbone.copy_role("policy", "other")
    with backbone.route(1):
        assert torch.equal(role_logits(backbone, "other"), wanted)
    backbone.load_role("policy", backbone.specs["policy"], backbone.role_state("policy"))
    with backbone.route(1):
        assert torch.equal(role_logits(backbone, "policy"), wanted)


def test_tokens_in_an_order_of_their_own_are_refused() -> None:
    """As an expert of a mixture gets them."""
    layer = next(iter(routed().role_layers("policy").values()))
    assert isinstance(layer, RoutedLoRA)
    with raises("conflict", key="adapter.targets"):
        layer._fitting(torch.tensor([[0], [1]]), torch.zeros(4, 32))


@pytest.mark.parametrize("init", ["pissa", "lora_ga", "orthogonal"])
def test_an_init_that_tasks_cannot_share_is_refused(init: str) -> None:
    backbone = load_backbone(tiny_model("llama"))
    with raises("conflict", key="adapter.init"):
        backbone.add_adapter("policy", kind="routed", rank=2, init=init, tasks=list(NAMES))
