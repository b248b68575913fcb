"""What must hold whatever the architecture and the init: invariants 1, 2 and 6 of the design."""

import copy
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from pe_rlhf.adapters.lora.anchored import Scaling
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.model.micro_batches import micro_batches
from pe_rlhf.types import Sequences
from tests.pairwise import every_pair, pairwise
from tests.tiny import (
    ALL_INITS,
    FAMILIES,
    PAD,
    add_role,
    padded,
    perturb,
    ragged_sequences,
    randomise_head,
    role_loss,
    rows_of,
    tiny_model,
    train_role,
)

DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((1, 3.0, "standard"), (4, 32.0, "rslora"), (16, 10.0, "standard"))  # rank, alpha, scaling
CASES = pairwise(("tokens", "values"), FAMILIES, ALL_INITS, DTYPES)
WHOLE_ROWS = [prompt + response for prompt, response in rows_of(ragged_sequences())]
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
# In bf16 a number is rounded at every layer: 8 bits of it.
ROUNDING: dict[torch.dtype, dict[str, Any]] = {torch.float32: TOLERANCE, torch.bfloat16: {"atol": 0.06, "rtol": 0.03}}


@torch.no_grad()
def assert_step_zero(backbone: Backbone, original: PreTrainedModel, role: str, rows: list[list[int]]) -> None:
    """Policy, anchor and original give the same bits: for a whole row, and for rows padded on either side."""
    ids_BT = torch.tensor(rows[:1])
    calls: list[tuple[dict[str, Tensor], tuple[Tensor, ...]]] = [({"input_ids": ids_BT}, (ids_BT,))]
    for side in ("left", "right"):
        ids_BT, mask_BT, positions_BT = padded(rows, side)
        plain = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
        calls.append((plain, (ids_BT, mask_BT)))
    for plain, ours in calls:
        expected = original(**plain).logits
        assert torch.equal(backbone(*ours).logits, expected)
        with backbone.role(role):
            assert torch.equal(backbone(*ours).logits, expected)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal up to the rounding of a base of that dtype, wherever they are."""
    torch.testing.assert_close(found.float().cpu(), expected.float().cpu(), **ROUNDING[dtype])


def greedy(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    ids_BT, mask_BT, _ = (tensor.to(model.device) for tensor in padded(rows, "left"))
    config = GenerationConfig(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=PAD)
    found = model.generate(ids_BT, attention_mask=mask_BT, generation_config=config)  # type: ignore[operator]
    assert found.shape == (len(rows), ids_BT.shape[1] + 12)
    return found


@every_pair(family=FAMILIES, init=ALL_INITS, dtype=DTYPES, size=SIZES)
def test_step_zero_is_the_original_model_bit_for_bit(
    family: str, init: str, dtype: torch.dtype, size: tuple[int, float, Scaling]
) -> None:
    rank, alpha, scaling = size
    model = tiny_model(family, dtype)
    original = copy.deepcopy(model)
    backbone = load_backbone(model)
    add_role(backbone, "policy", init, rank=rank, alpha=alpha, scaling=scaling)
    assert_step_zero(backbone, original, "policy", WHOLE_ROWS)


@pytest.mark.parametrize(("family", "init", "dtype"), [case[1:] for case in CASES if case[0] == "tokens"])
def test_step_zero_generates_the_tokens_of_the_original(family: str, init: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    original = copy.deepcopy(model)
    backbone = load_backbone(model)
    add_role(backbone, "policy", init, rank=4)
    expected = greedy(original, WHOLE_ROWS)
    assert torch.equal(greedy(backbone.model, WHOLE_ROWS), expected)
    with backbone.role("policy"):
        assert torch.equal(greedy(backbone.model, WHOLE_ROWS), expected)
        perturb(backbone, "policy", 0.5)
        assert not torch.equal(greedy(backbone.model, WHOLE_ROWS), expected)


@pytest.mark.parametrize(("family", "init", "dtype"), [case[1:] for case in CASES if case[0] == "values"])
def test_a_new_critic_is_its_head_on_the_hidden_states_of_the_original(
    family: str, init: str, dtype: torch.dtype
) -> None:
    model = tiny_model(family, dtype)
    original = copy.deepcopy(model)
    backbone = load_backbone(model)
    add_role(backbone, "value", init, rank=4)
    randomise_head(backbone, "value")
    ids_BT = torch.tensor(WHOLE_ROWS[:1])
    with torch.no_grad(), backbone.role("value"):
        hidden_BTH = original.base_model(input_ids=ids_BT).last_hidden_state
        head = backbone.role_state("value")
        expected_BT = hidden_BTH.float().cpu() @ head["head.weight"].cpu() + head["head.bias"].cpu()
        assert expected_BT.std() > 0.1
        assert_near(backbone(ids_BT).logits[..., 0], expected_BT, dtype)


def bytes_of(model: PreTrainedModel) -> dict[str, bytes]:
    """The base weights of a model, wrapped or not, by their names in the unwrapped one."""
    return {
        name.replace(".base.", "."): tensor.cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if ".adapters." not in name
    }


@every_pair(family=FAMILIES, init=ALL_INITS, dtype=DTYPES)
def test_training_every_role_leaves_the_base_byte_identical(family: str, init: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    original = copy.deepcopy(model)
    backbone = load_backbone(model)
    before = backbone.base_fingerprint()
    roles = ("policy", "value", "reward")
    for role in roles:
        add_role(backbone, role, init, rank=4, dropout=0.1)
    backbone.train()
    for role in roles:
        state = backbone.role_state(role)
        train_role(backbone, role)
        moved = backbone.role_state(role)
        assert all((moved[name] != state[name]).any() for name in backbone.role_parameters(role)), role
    assert backbone.base_fingerprint() == before
    assert bytes_of(backbone.model) == bytes_of(original)
    trained = {id(parameter) for role in roles for parameter in backbone.role_parameters(role).values()}
    base = [parameter for parameter in backbone.model.parameters() if id(parameter) not in trained]
    assert len(base) == len(list(original.parameters()))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base)
    with torch.no_grad():  # and so the anchor is still the original
        ids_BT = torch.tensor(WHOLE_ROWS[:1])
        assert torch.equal(backbone(ids_BT).logits, original(ids_BT).logits)


def test_the_fingerprint_sees_one_changed_bit_and_ignores_the_roles() -> None:
    prints = [load_backbone(tiny_model("llama")).base_fingerprint() for _ in range(2)]
    assert prints[0] == prints[1]
    assert load_backbone(tiny_model("llama", torch.bfloat16)).base_fingerprint() != prints[0]
    backbone = load_backbone(tiny_model("llama"))
    backbone.add_adapter("policy", init="pissa", rank=2)
    assert backbone.base_fingerprint() == prints[0]
    weight = next(p for name, p in backbone.model.named_parameters() if name.endswith("o_proj.base.weight"))
    weight.data[3, 5] = torch.nextafter(weight.data[3, 5].cpu(), torch.tensor(10.0))
    assert backbone.base_fingerprint() != prints[0]


def trained_backbone(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
    backbone = load_backbone(tiny_model(family, dtype))
    for role in ("policy", "value", "reward"):
        backbone.add_adapter(role, init="pissa", rank=4)
        perturb(backbone, role)
    return backbone


@torch.no_grad()
def results_alone(backbone: Backbone, sequences: Sequences) -> tuple[list[float], list[float], list[float]]:
    """Log-probs, values and scores of each row by itself, from the complete outputs, token after token."""
    logprobs, values, scores = [], [], []
    for prompt, response in rows_of(sequences):
        ids_BT = torch.tensor([prompt + response])
        with backbone.role("policy"):
            all_logprobs = torch.log_softmax(backbone(ids_BT).logits[0].float(), -1)
        with backbone.role("value"):
            all_values = backbone(ids_BT).logits[0, :, 0]
        with backbone.role("reward"):
            scores.append(float(backbone(ids_BT).logits))
        for t, token in enumerate(response):
            logprobs.append(float(all_logprobs[len(prompt) + t - 1, token]))
            values.append(float(all_values[len(prompt) + t - 1]))
    return logprobs, values, scores


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(family: str, dtype: torch.dtype) -> None:
    backbone, sequences = trained_backbone(family, dtype), ragged_sequences()
    logprobs, values, scores = results_alone(backbone, sequences)
    with backbone.role("policy"):
        found, entropies_N = backbone.response_logprobs(sequences)
    assert_near(found, torch.tensor(logprobs), dtype)
    assert entropies_N.shape == found.shape
    with backbone.role("value"):
        assert_near(backbone.response_values(sequences), torch.tensor(values), dtype)
    with backbone.role("reward"):
        assert_near(backbone.response_scores(sequences), torch.tensor(scores), dtype)


@every_pair(family=FAMILIES, side=("left", "right"), dtype=DTYPES)
@torch.no_grad()
def test_padding_under_an_attention_mask_changes_nothing(family: str, side: str, dtype: torch.dtype) -> None:
    backbone = trained_backbone(family, dtype)
    ids_BT, mask_BT, _ = padded(WHOLE_ROWS, side)  # type: ignore[arg-type]
    for role in ("policy", "value", "reward"):
        with backbone.role(role):
            batch = backbone(ids_BT, mask_BT).logits
            for index, row in enumerate(WHOLE_ROWS):
                single = backbone(torch.tensor([row])).logits[0]
                found = batch[index] if role == "reward" else batch[index][mask_BT[index].bool().to(batch.device)]
                assert_near(found, single, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_micro_batches_and_their_order_change_nothing(family: str, dtype: torch.dtype) -> None:
    backbone, sequences = trained_backbone(family, dtype), ragged_sequences()
    offsets = [0, *sequences.response_lengths_B.cumsum(0).tolist()]
    with backbone.role("policy"):
        whole_N, _ = backbone.response_logprobs(sequences)
        groups = [torch.tensor([2, 0, 1]), *micro_batches(sequences.lengths_B, token_budget=8, padded=True)]
        assert len(groups) == 4
        for group in groups:
            found_N, _ = backbone.response_logprobs(sequences.take(group))
            expected_N = torch.cat([whole_N[offsets[row] : offsets[row + 1]] for row in group.tolist()])
            assert_near(found_N, expected_N, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(family: str, dtype: torch.dtype) -> None:
    backbone, sequences = trained_backbone(family, dtype), ragged_sequences()
    parameters = list(backbone.role_parameters("policy").values())
    with backbone.role("policy"):
        whole = torch.autograd.grad(backbone.response_logprobs(sequences)[0].sum(), parameters)
        parts = [
            torch.autograd.grad(backbone.response_logprobs(sequences.take(torch.tensor([row])))[0].sum(), parameters)
            for row in (2, 0, 1)
        ]
    for expected, *found in zip(whole, *parts, strict=True):
        added = torch.stack(found).sum(0)
        if dtype == torch.float32:
            torch.testing.assert_close(added, expected, atol=1e-4, rtol=1e-4)
        else:  # an entry may be small beside those that are added up to it
            assert (added - expected).norm() < 0.03 * expected.norm()


@every_pair(family=FAMILIES, temperature=(1.0, 0.7), dtype=DTYPES)
@torch.no_grad()
def test_anchor_logprobs_and_entropies_equal_the_plain_model(
    family: str, temperature: float, dtype: torch.dtype
) -> None:
    model = tiny_model(family, dtype)
    original = copy.deepcopy(model)
    sequences = ragged_sequences()
    found_N, entropies_N = load_backbone(model).response_logprobs(sequences, temperature)
    logprobs, entropies = [], []
    for prompt, response in rows_of(sequences):
        logits = original(input_ids=torch.tensor([prompt + response])).logits[0].float().cpu() / temperature
        distributions = torch.distributions.Categorical(logits=logits[len(prompt) - 1 : -1])
        logprobs.append(distributions.log_prob(torch.tensor(response)))
        entropies.append(distributions.entropy())
    assert_near(found_N, torch.cat(logprobs), dtype)
    assert_near(entropies_N, torch.cat(entropies), dtype)


@pytest.mark.shared
@pytest.mark.parametrize(("name", "init"), zip(cycle(["stories260K", "tinychat3m"]), ALL_INITS, strict=False))
def test_real_models(shared_data: Path, name: str, init: str) -> None:
    path = shared_data / name / "hf"
    original = AutoModelForCausalLM.from_pretrained(path).eval()
    backbone = load_backbone(path)
    assert backbone.eos_token_ids == {"stories260K": [1, 2], "tinychat3m": [14018]}[name]
    before = backbone.base_fingerprint()
    add_role(backbone, "policy", init, rank=8)
    texts = ["Once upon a time", "The little dog was", "A girl named Lily saw a big red"]
    rows = [backbone.tokenizer(text)["input_ids"] for text in texts]
    assert_step_zero(backbone, original, "policy", rows)

    sequences = Sequences.pack([row[:2] for row in rows], [row[2:] for row in rows], backbone.pad_token_id)
    with torch.no_grad(), backbone.role("policy"):
        found_N, _ = backbone.response_logprobs(sequences)
        expected = []
        for row in rows:
            logits = original(input_ids=torch.tensor([row])).logits[0]
            expected += [float(torch.log_softmax(logits[t - 1], -1)[row[t]]) for t in range(2, len(row))]
    torch.testing.assert_close(found_N, torch.tensor(expected), **TOLERANCE)
    with backbone.role("policy"):
        role_loss(backbone, "policy", sequences).backward()
    assert backbone.base_fingerprint() == before
