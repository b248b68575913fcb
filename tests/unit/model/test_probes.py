"""What a model is found to be before roles are put on it, each against transformers' own numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pe_rlhf.model.backbone import load_backbone
from tests.failures import raises
from tests.model_types import build
from tests.tiny import ragged_sequences, rows_of


@torch.no_grad()
def logprobs_row_by_row(name: str, attention: str | None = None) -> Tensor:
    """Of the responses, by plain transformers, each row by itself."""
    model = build(name)
    if attention is not None:
        model.set_attn_implementation(attention)
    found = []
    for prompt, response in rows_of(ragged_sequences()):
        logits_TV = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        found.append(logits_TV.log_softmax(-1)[len(prompt) - 1 :][torch.arange(len(response)), torch.tensor(response)])
    return torch.cat(found)


@pytest.mark.parametrize("name", ["recurrent_gemma", "falcon_h1", "llama4_text", "gemma3"])
def test_log_probs_are_those_of_plain_transformers(name: str) -> None:
    """A cap and a multiplier on logits with names of their own, a decoder with no prefix, a model with pictures."""
    with torch.no_grad():
        found_N, _ = load_backbone(build(name)).response_logprobs(ragged_sequences())
    torch.testing.assert_close(found_N, logprobs_row_by_row(name), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "vaultgemma"])
def test_a_cap_on_attention_is_not_left_out(name: str) -> None:
    with torch.no_grad():
        found_N, _ = load_backbone(build(name)).response_logprobs(ragged_sequences())
    torch.testing.assert_close(found_N, logprobs_row_by_row(name, "eager"), atol=2e-5, rtol=1e-5)
    assert (found_N - logprobs_row_by_row(name, "sdpa")).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "electra", "modernbert-decoder"])
def test_what_is_no_causal_language_model_is_refused(name: str) -> None:
    with raises("conflict", key="model"):
        load_backbone(build(name))


def test_tokens_that_attend_to_later_ones_are_refused() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    original = model.model.forward
    model.model.forward = lambda **arguments: original(**arguments, attention_mask=torch.ones(1, 1, 12, 12).bool())
    with raises("conflict", key="model"):
        load_backbone(model)


@pytest.mark.parametrize(("name", "longest"), [("phi3:longrope", 32), ("llama:dynamic", 64), ("llama:yarn", 64)])
def test_no_row_is_longer_than_rotary_embeddings_stay_the_same(name: str, longest: int) -> None:
    assert load_backbone(build(name)).max_positions == longest


def test_positions_and_padding_of_a_model_with_pictures_are_those_of_its_text() -> None:
    backbone = load_backbone(build("gemma3"))
    assert backbone.max_positions == 64
    assert backbone.vocabulary == 64


def test_a_dropout_that_is_a_number_is_off() -> None:
    """OPT's blocks hand theirs to the function, in train mode."""
    backbone = load_backbone(build("opt"))
    floats = [v for m in backbone.model.modules() for k, v in vars(m).items() if "dropout" in k]
    assert floats
    assert set(floats) == {0.0}
