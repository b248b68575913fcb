"""Shared prefixes: what rows start with is computed once, and nothing but rounding changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen3NextConfig, Qwen3NextForCausalLM

from pe_rlhf.backbone import Backbone, load_backbone
from pe_rlhf.prefixes import Prefixes, common_length, find_prefixes, takes_prefixes
from pe_rlhf.types import Sequences, micro_batches
from tests.runs import read_jsonl
from tests.stages.support import run
from tests.stages.test_reward import learnable, recipe
from tests.tiny import PAD, ROLES, SPECIAL, Settings, outputs, perturb, randomise_head, rows_of, tiny_model

SYSTEM = [40, 41, PAD, 43, 44, 45]


def with_system_prompt() -> Sequences:
    """Rows that start with the same six tokens; one prompt is those and one more."""
    prompts = [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8], [*SYSTEM, 9, 10, 11, 12]]
    responses = [[20, 21, PAD, 1], [22, 23, 24, 25, 26, 27, 28], [PAD]]
    return Sequences.pack(prompts, responses, pad_id=PAD)


def pairs() -> Sequences:
    """Chosen responses, then the rejected ones, to two prompts of different lengths with nothing in common."""
    prompts = [[30, 31, 32, 33, 34, 35, 36, 37], [50, 51, PAD, 53, 54]] * 2
    responses = [[20, 21, 1], [22, 23, 24, 25, 1], [26, 1], [27, 28, 29]]
    return Sequences.pack(prompts, responses, pad_id=PAD)


BATCHES = {"system prompt": with_system_prompt, "pairs": pairs}


def mistral() -> PreTrainedModel:
    """Attention to the last four tokens alone: the window reaches from a row back into its prefix, and ends there."""
    torch.manual_seed(0)
    sizes: Settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(**SPECIAL, **sizes, num_key_value_heads=2, head_dim=8, sliding_window=4))


def trained(name: str, last_layers: int | None = None) -> Backbone:
    backbone = load_backbone(mistral() if name == "mistral" else tiny_model(name))
    backbone.trunk_cache_mib = 1
    for role in ROLES:
        backbone.add_adapter(role, init="pissa", rank=3, alpha=6, last_layers=last_layers)
        perturb(backbone, role)
    for role in ("value", "reward"):
        randomise_head(backbone, role)
    return backbone


@contextmanager
def counted(backbone: Backbone) -> Iterator[list[int]]:
    """How many tokens each pass embeds, padding included."""
    tokens: list[int] = []
    embeddings = backbone.model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    hook = embeddings.register_forward_hook(lambda _module, inputs, _output: tokens.append(inputs[0].numel()))
    yield tokens
    hook.remove()


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To a few units in the last place of each parameter's largest entry."""
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def alone(backbone: Backbone, role: str, sequences: Sequences) -> Tensor:
    """What the role says of each row in a pass of its own, through the public interface alone."""
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo", "mistral"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("batch", BATCHES)
def test_numbers_and_gradients_are_those_of_whole_rows(name: str, role: str, batch: str) -> None:
    backbone, sequences = trained(name), BATCHES[batch]()
    with counted(backbone) as tokens:
        found, found_gradients = outputs(backbone, role, sequences)
    assert sum(tokens) < 0.9 * 2 * sequences.ids_BT.numel()  # `outputs` makes two passes
    torch.testing.assert_close(found, alone(backbone, role, sequences), atol=1e-5, rtol=1e-5)
    backbone.share_prefixes = False
    with counted(backbone) as tokens:
        _, gradients = outputs(backbone, role, sequences)
    assert sum(tokens) == 2 * sequences.ids_BT.numel()
    assert_same_gradients(found_gradients, gradients)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("batch", BATCHES)
def test_with_a_frozen_trunk_below(name: str, role: str, batch: str) -> None:
    backbone, plain = trained(name, last_layers=1), BATCHES[batch]()
    given_trunk = backbone.with_trunk(plain, micro_batch_tokens=16)
    assert given_trunk.trunk_BTH is not None
    found, found_gradients = outputs(backbone, role, given_trunk)
    torch.testing.assert_close(found, alone(backbone, role, plain), atol=1e-5, rtol=1e-5)
    backbone.share_prefixes = False
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
        rounded.share_prefixes = False
        whole_N = rounded.response_logprobs(sequences)[0]
    assert 0 < (shared_N - expected_N).abs().mean() < 1.3 * (whole_N - expected_N).abs().mean()


def test_full_tuning_shares_them_too() -> None:
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_own_weights("policy")
    perturb(backbone, "policy", 0.02)
    found, found_gradients = outputs(backbone, "policy", with_system_prompt())
    backbone.share_prefixes = False
    expected, gradients = outputs(backbone, "policy", with_system_prompt())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_same_gradients(found_gradients, gradients)


def test_recomputed_blocks_and_recurrent_states_go_without() -> None:
    backbone = trained("llama")
    assert backbone.shares_prefixes
    backbone.enable_gradient_checkpointing()
    assert not backbone.shares_prefixes
    hybrid = Qwen3NextConfig(
        **SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, layer_types=["linear_attention"] * 2
    )
    assert not takes_prefixes(Qwen3NextForCausalLM(hybrid))


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_keys_that_are_turned_by_the_length_of_a_row_are_not_shared(rope_type: str) -> None:
    """Rows longer than the model was first trained on, with a prefix that is shorter."""
    rope: Settings = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 16}
    model = tiny_model("llama", max_position_embeddings=64 if rope_type == "longrope" else 16, rope_parameters=rope)
    backbone = load_backbone(model)
    backbone.add_adapter("policy")
    rows = Sequences.pack([[*range(2, 14), i] for i in (5, 6, 7)], [[20 + i] * 12 for i in range(3)], pad_id=PAD)
    assert find_prefixes(rows) is not None
    with torch.no_grad(), backbone.role("policy"):
        found_N, _ = backbone.response_logprobs(rows)
        backbone.share_prefixes = False
        expected_N, _ = backbone.response_logprobs(rows)
    torch.testing.assert_close(found_N, expected_N, atol=1e-5, rtol=1e-5)


def test_positions_do_not_run_past_the_models_last() -> None:
    """A long prefix beside a row with a long rest; each row fits, the longest of both would not."""
    prompts = [list(range(2, 8)), list(range(10, 60))] * 2
    responses = [[20 + i] * 30 for i in (0, 1)]
    rows = Sequences.pack(prompts, [responses[0], [30] * 12, responses[1], [31] * 9], pad_id=PAD)
    assert find_prefixes(rows) is not None
    backbone = trained("gpt2")
    with torch.no_grad(), backbone.role("reward"):
        found_B = backbone.response_scores(rows)
        backbone.share_prefixes = False
        expected_B = backbone.response_scores(rows)
    torch.testing.assert_close(found_B, expected_B, atol=1e-5, rtol=1e-4)


def test_rows_cost_what_they_do_not_share() -> None:
    backbone, sequences = trained("llama"), with_system_prompt()
    assert backbone.budget_lengths(sequences).tolist() == [13 - 6 + 1, 14 - 6 + 1, 11 - 6 + 1]
    backbone.share_prefixes = False
    assert backbone.budget_lengths(sequences).tolist() == [13, 14, 11]


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
    groups = micro_batches(backbone.budget_lengths(rows), 1000)
    assert max(map(len, groups)) > 10
    most = max(kept_bytes(backbone, rows.take(index)) for index in groups)
    without = Sequences.pack([row[:4] for row in tokens], [row[4:] for row in tokens], pad_id=PAD)
    per_token = kept_bytes(backbone, without) / (60 * 16)
    assert most < 1.05 * (400 + 1000) * per_token


def test_a_reward_stage_learns_the_same(tmp_path: Path) -> None:
    losses, seen = [], []
    for shares in (True, False):
        folder = tmp_path / str(shares)
        folder.mkdir()
        tree = recipe(folder, learnable(), learning_rate=1e-2, epochs=2, eval_every=3)
        tree["backbone"] = {"share_prefixes": shares}
        run(tree, folder / "run")
        lines = read_jsonl(folder / "run" / "reward" / "metrics.jsonl")
        losses.append([line["loss"] for line in lines])
        seen.append([line["eval_margin"] for line in lines if "eval_margin" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]


# ---- which ----------------------------------------------------------------------------------------------------------


def rest_and_prefix(sequences: Sequences, prefixes: Prefixes) -> list[list[int]]:
    """The rows put together again from what is computed of them."""
    starts, rests = prefixes.of_prefixes(sequences.ids_BT), prefixes.of_rest(sequences.ids_BT)
    return [
        starts[u][prefixes.attends_UP[u]].tolist() + rests[b][prefixes.follows_BS[b]].tolist()
        for b, u in enumerate(prefixes.prefix_B.tolist())
    ]


def test_the_common_start_by_hand() -> None:
    sequences = with_system_prompt()
    assert common_length(sequences) == 6
    prefixes = find_prefixes(sequences)
    assert prefixes is not None
    assert prefixes.of_prefixes(sequences.ids_BT).tolist() == [SYSTEM]
    assert prefixes.prefix_B.tolist() == [0, 0, 0]
    assert prefixes.tokens() == 6 + 3 * 8  # against 3 × 14
    assert rest_and_prefix(sequences, prefixes) == [prompt + response for prompt, response in rows_of(sequences)]


def test_equal_prompts_by_hand() -> None:
    sequences = pairs()
    prefixes = find_prefixes(sequences)
    assert prefixes is not None
    # All of a prompt but its last token, the shorter one padded on the left.
    assert prefixes.attends_UP.tolist() == [[True] * 7, [False] * 3 + [True] * 4]
    assert prefixes.prefix_B.tolist() == [0, 1, 0, 1]
    assert prefixes.tokens() == 2 * 7 + 4 * 6  # against 4 × 11
    assert rest_and_prefix(sequences, prefixes) == [prompt + response for prompt, response in rows_of(sequences)]


def test_the_last_prompt_token_is_never_in_a_prefix() -> None:
    same = Sequences.pack([[5, 6, 7, 8]] * 3, [[9, 9, 9]] * 3, PAD)
    assert common_length(same) == 3
    one_token = Sequences.pack([[5], [5]], [[9, 9], [9, 8]], PAD)
    assert common_length(one_token) == 0
    assert find_prefixes(one_token) is None


@pytest.mark.parametrize(("length", "shares"), [(1, False), (2, True)])
def test_a_prefix_has_to_be_worth_a_pass(length: int, shares: bool) -> None:
    """Two rows of ten tokens: one token less to compute of 20 is not worth it, two are."""
    start = [7] * length
    sequences = Sequences.pack([[*start, 5], [*start, 6]], [[9] * (9 - length)] * 2, PAD)
    assert common_length(sequences) == length
    assert (find_prefixes(sequences) is not None) is shares


def test_a_row_alone_has_nothing_to_share() -> None:
    assert find_prefixes(with_system_prompt().take(torch.tensor([0]))) is None


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6), st.lists(st.integers(0, 2), max_size=8))
def test_rows_are_what_their_prefix_and_the_rest_say(rows: list[tuple[list[int], list[int]]], start: list[int]) -> None:
    sequences = Sequences.pack([start + prompt for prompt, _ in rows], [response for _, response in rows], pad_id=0)
    prefixes = find_prefixes(sequences)
    if prefixes is None:
        return
    assert prefixes.tokens() <= 0.9 * sequences.ids_BT.numel()
    assert rest_and_prefix(sequences, prefixes) == [prompt + response for prompt, response in rows_of(sequences)]
    assert prefixes.attends().sum(dim=1).tolist() >= sequences.lengths_B.tolist()
    # What is asked for lies in the rest.
    wanted = prefixes.of_rest(sequences.predicts_BT) & prefixes.follows_BS
    assert wanted.sum(dim=1).tolist() == sequences.response_lengths_B.tolist()


def test_a_given_trunk_of_another_width_is_an_error_not_a_number() -> None:
    backbone = trained("llama", last_layers=1)
    given_trunk = backbone.with_trunk(with_system_prompt(), 100)
    assert given_trunk.trunk_BTH is not None
    wrong = replace(given_trunk, trunk_BTH=given_trunk.trunk_BTH[..., :-1])
    with torch.no_grad(), pytest.raises(RuntimeError), backbone.role("policy"):
        backbone.response_logprobs(wrong)
