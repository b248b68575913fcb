"""Stop strings: at which token a response ends, which log-probs it keeps, and what is read of it."""

from __future__ import annotations

import pytest
import torch

from pe_rlhf.config import RolloutConfig, SamplingConfig
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.hf import HFRollout
from pe_rlhf.rollout.interface import checked_rollout
from pe_rlhf.rollout.stops import StopStrings
from pe_rlhf.types import Rollout, Sequences
from tests.failures import raises
from tests.tiny import perturb

PROMPTS = [[40 + i, 70, 80 + i % 3] for i in range(24)]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def policy() -> Backbone:
    backbone = load_backbone("random:tiny-llama")
    backbone.add_adapter("policy", init="lora", rank=3, alpha=6)
    perturb(backbone, "policy", 0.3)
    return backbone


def roll(policy: Backbone, *stop: str, batch_size: int = 7) -> Rollout:
    settings = SamplingConfig(max_new_tokens=NEW_TOKENS, stop=list(stop), batch_size=batch_size)
    return HFRollout(policy, "policy", settings).generate(PROMPTS, 3)


@pytest.fixture(scope="module")
def stops(policy: Backbone) -> list[str]:
    """Texts that responses hold: of one byte, of several, and of a letter of two bytes where there is one."""
    texts = [str(policy.tokenizer.decode(ids, skip_special_tokens=False)) for ids in roll(policy).responses]
    found = [
        text[at : at + size] for text, at, size in zip(texts, (2, 5, 0, 7, 3, 1), (1, 2, 3, 2, 1, 2), strict=False)
    ]
    return [text for text in dict.fromkeys(found) if text and "\ufffd" not in text] + ["never there at all"]


def expected_length(policy: Backbone, ids: list[int], stops: list[str]) -> tuple[int, str]:
    """Naively: the shortest beginning whose text holds one of them, unless an EOS is there before."""
    for n in range(1, len(ids) + 1):
        if any(stop in policy.tokenizer.decode(ids[:n], skip_special_tokens=False) for stop in stops):
            return n, "stop"
        if ids[n - 1] in policy.eos_token_ids:
            return n, "eos"
    return len(ids), "length"


def test_a_response_ends_with_the_token_that_completes_a_stop_string(policy: Backbone, stops: list[str]) -> None:
    free, stopped = roll(policy), roll(policy, *stops)
    assert free.stop == ()
    seen = set()
    for i, ids in enumerate(free.responses):
        length, reason = expected_length(policy, ids, stops)
        assert (stopped.responses[i], stopped.finish[i]) == (ids[:length], reason)
        torch.testing.assert_close(
            torch.tensor(stopped.logprobs[i]), torch.tensor(free.logprobs[i][:length]), atol=1e-5, rtol=0
        )
        seen.add(reason)
    assert {"stop", "length"} <= seen
    assert stopped.truncated_B.tolist() == [reason == "length" for reason in stopped.finish]
    # Nothing depends on what is sampled beside it.
    assert roll(policy, *stops, batch_size=2).responses == stopped.responses


def test_log_probs_are_the_trainers(policy: Backbone, stops: list[str]) -> None:
    rollout = roll(policy, *stops)
    sequences = Sequences.of(rollout, policy.pad_token_id)
    with torch.no_grad(), policy.role("policy"):
        trainer_N, _ = policy.response_logprobs(sequences, 1.0)
    sampled_N = torch.tensor([value for row in rollout.logprobs for value in row])
    torch.testing.assert_close(sampled_N, trainer_N, atol=1e-4, rtol=0)
    assert sequences.cut_B is not None
    part = sequences.take(torch.tensor([3, 1]))
    assert part.cut_B is not None
    assert part.cut_B.tolist() == [rollout.finish[i] == "length" for i in (3, 1)]


def test_an_engine_that_goes_on_is_cut_at_the_same_token(policy: Backbone, stops: list[str]) -> None:
    """As a vLLM that sees a stop string a token later, or not at all."""
    free, stopped = roll(policy), roll(policy, *stops)
    answers = list(zip(free.responses, free.logprobs, strict=True))
    settings = RolloutConfig(max_new_tokens=NEW_TOKENS, stop=stops)
    checked = checked_rollout(PROMPTS, answers, 4, policy, settings)
    assert (checked.responses, checked.finish) == (stopped.responses, stopped.finish)
    assert [len(row) for row in checked.logprobs] == [len(row) for row in stopped.responses]
    # One that ends early without a reason is a fault, as without stop strings.
    cut = next(i for i, reason in enumerate(free.finish) if reason == "length" and stopped.finish[i] == "length")
    answers[cut] = (free.responses[cut][:3], free.logprobs[cut][:3])
    with pytest.raises(ValueError, match="without an end"):
        checked_rollout(PROMPTS, answers, 4, policy, settings)
    stopping = stopped.finish.index("stop")
    answers = list(zip(stopped.responses, stopped.logprobs, strict=True))
    answers[stopping] = (stopped.responses[stopping], stopped.logprobs[stopping][:-1])
    with pytest.raises(ValueError, match="log-probs"):
        checked_rollout(PROMPTS, answers, 4, policy, settings)


def test_the_text_ends_before_the_stop_string(policy: Backbone) -> None:
    ids: list[int] = policy.tokenizer("say-END", add_special_tokens=False)["input_ids"]
    codec = TextCodec(policy.tokenizer)
    responses = [ids, ids, ids[:4]]
    logprobs = [[-1.0] * len(response) for response in responses]
    rollout = Rollout([[5]] * 3, responses, logprobs, ["stop", "length", "eos"], 0, ("END",))
    assert codec.texts(rollout) == ["say-", "say-END", "say-"]


def test_an_eos_before_or_with_it_is_the_end(policy: Backbone) -> None:
    letter = policy.tokenizer("x", add_special_tokens=False)["input_ids"][0]
    stops = StopStrings(["xx"], policy.tokenizer, [3, letter])
    assert stops.end([9, 3, letter, letter]) == (2, "eos")
    both = StopStrings(["x"], policy.tokenizer, [letter])
    assert both.end([9, letter, 9]) == (2, "eos")
    assert StopStrings([], None, []).end([9, 9]) == (2, "length")


@pytest.mark.parametrize("stop", [[""], ["a", "a"], ["\ufffd"]])
def test_what_can_be_no_stop_string(stop: list[str]) -> None:
    with pytest.raises(ValueError, match="stop"):
        SamplingConfig(stop=stop)


def test_a_model_without_a_tokenizer_has_none(policy: Backbone) -> None:
    bare = load_backbone(policy.model)
    with raises("missing", key="tokenizer"):
        HFRollout(bare, "anchor", SamplingConfig(stop=["a"]))
