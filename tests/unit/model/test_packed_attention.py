"""Packed batches: no padding is computed, what rows start with once, and nothing but rounding changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DogeConfig, DogeForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from pe_rlhf.model.backbone import Backbone, FastPath, load_backbone
from pe_rlhf.model.micro_batches import micro_batches, pair_cost, sequence_costs
from pe_rlhf.types import Sequences
from tests.pairwise import every_pair
from tests.runs import read_jsonl
from tests.stage_support import run
from tests.tiny import (
    PAD,
    ROLES,
    SPECIAL,
    SYSTEM,
    Settings,
    add_trained_roles,
    mistral,
    outputs,
    padded,
    pairs,
    perturb,
    ragged_sequences,
    rows_of,
    set_fast,
    tiny_model,
    turning_by_length,
    with_system_prompt,
)
from tests.unit.stages.test_reward import learnable, recipe


def one_token_prompts() -> Sequences:
    """A prefix of no tokens beside one of five."""
    prompts = [[30, 31, 32, 33, 34, 35], [50]] * 2
    return Sequences.pack(prompts, [[20, 21, 1], [22, 23], [26, 1], [27, 28]], pad_id=PAD)


BATCHES: dict[str, tuple[Callable[[], Sequences], int]] = {  # and how many tokens are left to compute of each
    "ragged": (ragged_sequences, 7 + 8 + 6),
    "system prompt": (with_system_prompt, 6 + 7 + 8 + 5),
    "pairs": (pairs, 7 + 4 + (1 + 3) + (1 + 5) + (1 + 2) + (1 + 3)),
    "a prompt of one token": (one_token_prompts, 5 + (1 + 3) + (1 + 2) + 3 + 3),
}


FIRST_ATTENTION = {"llama": "layers.0.self_attn", "gpt2": "h.0.attn"}


def trained(name: str, last_layers: int | None = None) -> Backbone:
    model = mistral() if name == "mistral" else tiny_model(name)
    return add_trained_roles(load_backbone(model, fast=FastPath(trunk_cache_mib=1)), last_layers)


@contextmanager
def counted(backbone: Backbone) -> Iterator[list[int]]:
    """How many tokens each pass embeds, padding included."""
    tokens: list[int] = []
    embeddings = backbone.model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    hook = embeddings.register_forward_hook(lambda _module, inputs, _output: tokens.append(inputs[0].numel()))
    yield tokens
    hook.remove()


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[int]]:
    """An entry for each call of the module."""
    calls: list[int] = []
    hook = module.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To a few units in the last place of each parameter's largest entry."""
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def one_by_one(backbone: Backbone, role: str, sequences: Sequences) -> Tensor:
    """What the role says of each row in a pass of its own, through the public interface."""
    numbers = []
    for prompt, response in rows_of(sequences):
        with torch.no_grad(), backbone.role(role):
            logits = backbone(torch.tensor([prompt + response])).logits[0]
        if role == "reward":
            numbers.append(logits)
        elif role == "value":
            numbers.append(logits[len(prompt) - 1 : -1, 0])
        else:
            predicting = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
            numbers.append(predicting[torch.arange(len(response)), torch.tensor(response)])
    return torch.cat(numbers)


# ---- passes ---------------------------------------------------------------------------------------------------------


@every_pair(name=("llama", "gpt2", "mistral"), role=ROLES, batch=BATCHES)
def test_numbers_and_gradients_are_those_of_padded_rows(name: str, role: str, batch: str) -> None:
    backbone, (make, computed) = trained(name), BATCHES[batch]
    sequences = make()
    with counted(backbone) as tokens:
        found, found_gradients = outputs(backbone, role, sequences)
    assert tokens == [computed] * 2  # `outputs` makes two passes
    torch.testing.assert_close(found, one_by_one(backbone, role, sequences), atol=1e-5, rtol=1e-5)
    set_fast(backbone, packing=False)
    with counted(backbone) as tokens:
        _, gradients = outputs(backbone, role, sequences)
    assert tokens == [sequences.ids_BT.numel()] * 2
    assert_same_gradients(found_gradients, gradients)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("batch", BATCHES)
def test_blocks_can_be_recomputed(role: str, batch: str) -> None:
    backbone, sequences = trained("llama"), BATCHES[batch][0]()
    expected, gradients = outputs(backbone, role, sequences)
    set_fast(backbone, gradient_checkpointing=True)
    with counted_calls(backbone.model.get_decoder().layers[0].mlp) as calls:  # type: ignore[union-attr]
        found, found_gradients = outputs(backbone, role, sequences)
    assert len(calls) == 3  # two passes, and once more in the backward pass
    assert torch.equal(found, expected)
    assert_same_gradients(found_gradients, gradients)


@every_pair(name=("llama", "gpt2"), role=ROLES, batch=BATCHES)
def test_with_a_frozen_trunk_below(name: str, role: str, batch: str) -> None:
    backbone, plain = trained(name, last_layers=1), BATCHES[batch][0]()
    backbone.compute_once(plain, token_budget=16)
    with counted_calls(backbone.model.base_model.get_submodule(FIRST_ATTENTION[name])) as calls:
        found, found_gradients = outputs(backbone, role, plain)
    assert calls == []
    torch.testing.assert_close(found, one_by_one(backbone, role, plain), atol=1e-5, rtol=1e-5)
    set_fast(backbone, packing=False)
    _, gradients = outputs(backbone, role, plain)
    assert_same_gradients(found_gradients, gradients)


def test_policy_and_anchor_are_the_same_bits_at_step_zero(family: str) -> None:
    backbone, sequences = load_backbone(tiny_model(family)), with_system_prompt()
    backbone.add_adapter("policy", init="pissa", rank=3, alpha=6)
    with torch.no_grad():
        with backbone.role("policy"):
            policy_N = backbone.response_logprobs(sequences)[0]
        with backbone.role("anchor"):
            anchor_N = backbone.response_logprobs(sequences)[0]
    assert torch.equal(policy_N, anchor_N)


def test_in_bf16_it_rounds_no_more_than_whole_rows_do() -> None:
    """Against the same weights in fp32, over rows enough for a mean."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 64, (12, 20), generator=generator).tolist()
    sequences = Sequences.pack([[*SYSTEM, *row[:6]] for row in rows], [row[6:] for row in rows], PAD)
    exact, rounded = load_backbone(tiny_model("llama")), load_backbone(tiny_model("llama", torch.bfloat16))
    exact.model.load_state_dict(rounded.model.state_dict())
    with torch.no_grad():
        expected_N = exact.response_logprobs(sequences)[0]
        shared_N = rounded.response_logprobs(sequences)[0]
        set_fast(rounded, packing=False)
        whole_N = rounded.response_logprobs(sequences)[0]
    assert 0 < (shared_N - expected_N).abs().mean() < 1.3 * (whole_N - expected_N).abs().mean()


def test_full_tuning_shares_them_too() -> None:
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_own_weights("policy")
    perturb(backbone, "policy", 0.02)
    found, found_gradients = outputs(backbone, "policy", with_system_prompt())
    set_fast(backbone, packing=False)
    expected, gradients = outputs(backbone, "policy", with_system_prompt())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(found_gradients, gradients)


def test_models_that_cannot_take_them() -> None:
    """A recurrent state, attention of its own kind, eager attention; each works on padded rows."""
    hybrid = Qwen3NextConfig(
        **SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layer_types=["linear_attention"] * 2
    )
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    for model in (Qwen3NextForCausalLM(hybrid), tiny_model("gpt_neo"), eager):
        before = model.config._attn_implementation
        backbone = load_backbone(model)
        assert not backbone.packs
        assert model.config._attn_implementation == before
        with counted(backbone) as tokens, torch.no_grad():
            backbone.response_logprobs(with_system_prompt())
        assert tokens == [3 * 14]


def test_a_window_that_attention_is_not_told_of() -> None:
    """A config with a window whose layers do not ask for one: it would have to come with the mask."""
    assert load_backbone(mistral()).packs
    assert not load_backbone(tiny_model("llama", sliding_window=4)).packs
    assert not load_backbone(tiny_model("llama", layer_types=["chunked_attention"] * 2)).packs


def test_a_model_that_has_something_else_in_its_mask() -> None:
    """Doge adds a bias to the mask that follows from the values, and is constant where its A is zero."""
    torch.manual_seed(0)
    sizes: Settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = DogeForCausalLM(DogeConfig(**SPECIAL, **sizes, num_key_value_heads=2, pad_token_id=PAD))
    for name, parameter in model.named_parameters():
        if name.endswith(".A"):
            nn.init.zeros_(parameter)
    backbone = load_backbone(model)
    assert not backbone.packs
    assert model.config._attn_implementation == "sdpa"


def test_a_model_of_few_tokens() -> None:
    assert load_backbone(tiny_model("llama", vocab_size=5)).packs


def test_a_model_that_was_a_backbones_before() -> None:
    model = tiny_model("llama")
    assert load_backbone(model).packs
    assert load_backbone(model).packs


def test_attention_that_is_set_to_another_kind_later() -> None:
    backbone, sequences = trained("llama"), with_system_prompt()
    expected, _ = outputs(backbone, "policy", sequences)
    backbone.model.set_attn_implementation("eager")
    assert not backbone.packs
    found, _ = outputs(backbone, "policy", sequences)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_keys_that_are_turned_by_the_length_of_the_longest_row(rope_type: str) -> None:
    """Rows longer than the model was first trained on, with a prefix that is shorter."""
    backbone = load_backbone(turning_by_length(rope_type))
    backbone.add_adapter("policy")
    rows = Sequences.pack([[*range(2, 14), i] for i in (5, 6, 7)], [[20 + i] * 12 for i in range(3)], pad_id=PAD)
    with torch.no_grad(), backbone.role("policy"):
        found_N, _ = backbone.response_logprobs(rows)
        set_fast(backbone, packing=False)
        expected_N, _ = backbone.response_logprobs(rows)
    torch.testing.assert_close(found_N, expected_N, atol=1e-5, rtol=1e-5)


def test_positions_do_not_run_past_the_models_last() -> None:
    """A long prefix beside a row with a long rest; each row fits, the longest of both would not."""
    prompts = [list(range(2, 8)), list(range(10, 60))] * 2
    responses = [[20 + i] * 30 for i in (0, 1)]
    rows = Sequences.pack(prompts, [responses[0], [30] * 12, responses[1], [31] * 9], pad_id=PAD)
    backbone = trained("gpt2")
    with torch.no_grad(), backbone.role("reward"):
        found_B = backbone.response_scores(rows)
        set_fast(backbone, packing=False)
        expected_B = backbone.response_scores(rows)
    torch.testing.assert_close(found_B, expected_B, atol=1e-5, rtol=1e-4)


def test_rows_cost_what_they_do_not_share() -> None:
    sequences = with_system_prompt()
    assert sequence_costs(sequences, packed=True).tolist() == [13 - 6 + 1, 14 - 6 + 1, 11 - 6 + 1]
    assert sequence_costs(sequences, packed=False).tolist() == [13, 14, 11]


def test_a_pair_costs_its_prompt_once() -> None:
    """20 tokens of prompt, of which 19 are computed once and kept twice, at an eighth: ⌈19/8⌉ = 3."""
    assert pair_cost(20, 7, 4, packed=True) == 19 + 2 * 3 + (1 + 7) + (1 + 4)
    assert pair_cost(20, 7, 4, packed=False) == 2 * 27  # padded, both are as long as the longer one


def kept_bytes(backbone: Backbone, sequences: Sequences) -> int:
    """What autograd keeps of a pass: each storage once, the base's weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with backbone.role("policy"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone.response_logprobs(sequences)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def test_a_budget_holds_with_a_long_prefix() -> None:
    """What rows keep of a prefix counts: 60 rows of 16 tokens after 400 would be four times the budget."""
    model = tiny_model("llama", max_position_embeddings=512, intermediate_size=96, num_hidden_layers=3)
    backbone = load_backbone(model)
    backbone.add_adapter("policy", rank=3, alpha=6)
    tokens = torch.randint(2, 60, (60, 16)).tolist()
    rows = Sequences.pack([[5] * 400 + row[:4] for row in tokens], [row[4:] for row in tokens], pad_id=PAD)
    groups = micro_batches(sequence_costs(rows, packed=True), 1000, padded=False)
    assert max(map(len, groups)) > 10
    most = max(kept_bytes(backbone, rows.take(index)) for index in groups)
    without = Sequences.pack([row[:4] for row in tokens], [row[4:] for row in tokens], pad_id=PAD)
    per_token = kept_bytes(backbone, without) / (60 * 16)
    assert most < 1.05 * (400 + 1000) * per_token


def test_a_reward_stage_learns_the_same(tmp_path: Path) -> None:
    losses, seen = [], []
    for packing in (True, False):
        folder = tmp_path / str(packing)
        folder.mkdir()
        tree = recipe(folder, learnable(), learning_rate=1e-2, epochs=2, eval_every=3)
        tree["backbone"] = {"packing": packing}
        run(tree, folder / "run")
        lines = read_jsonl(folder / "run" / "reward" / "metrics.jsonl")
        losses.append([line["loss"] for line in lines])
        seen.append([line["eval_margin"] for line in lines if "eval_margin" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_that_are_not_packed_have_the_bits_of_transformers(name: str, dtype: torch.dtype) -> None:
    """Left padding, a cache, grouped heads: what is sampled with must be the model that was given."""
    original = tiny_model(name, dtype)
    assert original.config._attn_implementation == "sdpa"
    ids_BT, mask_BT, position_ids = padded([[5, 6, 7, 8], [9, 10], [11, 12, 13]], "left")
    arguments: Settings = {"attention_mask": mask_BT, "position_ids": position_ids}
    backbone = load_backbone(tiny_model(name, dtype))
    assert backbone.packs
    with torch.no_grad():
        expected = original(input_ids=ids_BT, **arguments, use_cache=True)
        found = backbone.model(input_ids=ids_BT, **arguments, use_cache=True)
        assert torch.equal(found.logits, expected.logits)
        longer_BT = torch.cat([mask_BT, torch.ones(3, 1, dtype=mask_BT.dtype)], dim=1)
        step: Settings = {"input_ids": ids_BT[:, -1:], "attention_mask": longer_BT}
        step["position_ids"] = position_ids[:, -1:] + 1
        expected = original(**step, past_key_values=expected.past_key_values)
        found = backbone.model(**step, past_key_values=found.past_key_values)
    assert torch.equal(found.logits, expected.logits)
