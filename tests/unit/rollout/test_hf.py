"""The embedded rollout engine: what it samples, what it says about it, and what it must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from pe_rlhf.config import RolloutConfig, SamplingConfig
from pe_rlhf.model.backbone import Backbone, load_backbone
from pe_rlhf.rollout.hf import HFRollout, sample_tokens
from pe_rlhf.types import Rollout, Sequences
from tests.tiny import (
    EOS,
    PAD,
    SYSTEM,
    VOCABULARY,
    mistral,
    perturb,
    role_logits,
    set_fast,
    tiny_model,
    turning_by_length,
)

ENDS = [EOS, 7, 9, 30, 31, 50]  # many, so that many responses end before the limit
PROMPTS = [[5, 6, 7], [8], [9, PAD, EOS, 12, 13, 14, 15], [20, 21], [8], [33, 34, 35, 36, 37]] * 3
NEW_TOKENS = 20


def trained_policy(family: str = "llama", ends: list[int] | None = ENDS) -> Backbone:
    """A backbone whose policy differs from the anchor, with several EOS ids; padding is one of them."""
    backbone = load_backbone(tiny_model(family, eos_token_id=ends))
    backbone.add_adapter("policy", init="lora", rank=3, alpha=6)
    perturb(backbone, "policy", 0.3)
    assert backbone.eos_token_ids == (ends or [])
    assert backbone.pad_token_id == (ends or [0])[0]
    return backbone


def roll(backbone: Backbone, seed: int = 0, config: SamplingConfig | None = None) -> Rollout:
    config = config or SamplingConfig(max_new_tokens=NEW_TOKENS)
    return HFRollout(backbone, "policy", config).generate(PROMPTS, seed)


def next_token_logits(backbone: Backbone, prompt: list[int]) -> Tensor:
    """The policy's logits _V after a prompt that stands by itself, without any padding."""
    return role_logits(backbone, "policy", torch.tensor([prompt]))[0, -1]


@pytest.fixture(scope="module")
def policy() -> Backbone:
    return trained_policy()


# ---- log-probs, lengths, endings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_log_probs_are_those_of_the_trainer_and_of_a_plain_pass(family: str, temperature: float) -> None:
    backbone = trained_policy(family)
    rollout = roll(backbone, config=SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=temperature, batch_size=5))
    sampled_N = torch.tensor([value for row in rollout.logprobs for value in row])

    sequences = Sequences.pack(rollout.prompts, rollout.responses, backbone.pad_token_id)
    with torch.no_grad(), backbone.role("policy"):
        trainer_N, _ = backbone.response_logprobs(sequences, temperature)
    torch.testing.assert_close(sampled_N, trainer_N, atol=1e-4, rtol=0)

    plain: list[float] = []
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        logits_TV = role_logits(backbone, "policy", torch.tensor([prompt + response]))[0]
        logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        plain += [float(logprobs_TV[len(prompt) - 1 + t, token]) for t, token in enumerate(response)]
    torch.testing.assert_close(sampled_N, torch.tensor(plain), atol=1e-4, rtol=0)


def test_responses_end_with_the_first_eos_or_at_the_limit(policy: Backbone) -> None:
    rollout = roll(policy)
    assert rollout.prompts == PROMPTS
    seen = set()
    for response, logprobs, finish in zip(rollout.responses, rollout.logprobs, rollout.finish, strict=True):
        assert len(logprobs) == len(response) <= NEW_TOKENS
        assert not set(response[:-1]) & set(ENDS)
        if finish == "eos":
            assert response[-1] in ENDS
        else:
            assert len(response) == NEW_TOKENS
            assert response[-1] not in ENDS
        seen.add((finish, response[-1] if finish == "eos" else None))
    assert ("length", None) in seen
    assert len({token for finish, token in seen if finish == "eos"}) >= 3
    assert rollout.truncated_B.tolist() == [finish == "length" for finish in rollout.finish]


def test_an_eos_at_the_very_limit_is_an_ending_and_not_a_cut(policy: Backbone) -> None:
    rollout = HFRollout(policy, "policy", SamplingConfig(max_new_tokens=1)).generate([[5]] * 200, seed=0)
    ended = [response[0] in ENDS for response in rollout.responses]
    assert any(ended)
    assert not all(ended)
    assert [finish == "eos" for finish in rollout.finish] == ended


def test_without_an_eos_every_response_is_cut() -> None:
    backbone = trained_policy(ends=None)
    rollout = HFRollout(backbone, "policy", SamplingConfig(max_new_tokens=12)).generate(PROMPTS, seed=0)
    assert [len(response) for response in rollout.responses] == [12] * len(PROMPTS)
    assert set(rollout.finish) == {"length"}


# ---- the distribution -----------------------------------------------------------------------------------------------


def assert_sampled_from(probabilities_V: np.ndarray, tokens: np.ndarray) -> None:
    """A chi-square test of counts against probabilities; what has probability 0 must never occur."""
    counts_V = np.bincount(tokens, minlength=len(probabilities_V))
    possible = probabilities_V > 0
    assert counts_V[~possible].sum() == 0
    expected_V = probabilities_V[possible] / probabilities_V[possible].sum() * len(tokens)
    common = expected_V >= 5  # the rare ones together are one class
    observed = [*counts_V[possible][common], counts_V[possible][~common].sum()]
    expected = [*expected_V[common], expected_V[~common].sum()]
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("vocabulary", [64, 256, 300, 1027])
def test_sample_has_the_distribution(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(3)
    probabilities_V = torch.softmax(2 * torch.randn(vocabulary, generator=generator), dim=0)
    probabilities_V[torch.rand(vocabulary, generator=generator) < 0.3] = 0
    probabilities_V[: vocabulary // 5] = 0
    uniform_B1 = torch.rand(50_000, 1, generator=generator, dtype=torch.float64)
    tokens_B1 = torch.cat([sample_tokens(probabilities_V.expand(len(u), -1), u) for u in uniform_B1.split(2_000)])
    assert_sampled_from(probabilities_V.double().numpy(), tokens_B1[:, 0].numpy())


def test_sample_is_the_inverse_cdf() -> None:
    # Counts out of 2^16: every sum is exact in fp32, so not even a boundary may fall to the neighbour.
    random = np.random.default_rng(0)
    counts_BV = np.stack([random.multinomial(2**16, random.dirichlet(np.full(700, 0.2))) for _ in range(40)])
    uniform_B = random.integers(0, 2**16, 40) / 2**16
    expected = [int(np.flatnonzero(c.cumsum() > u * 2**16)[0]) for c, u in zip(counts_BV, uniform_B, strict=True)]
    found_B1 = sample_tokens(torch.tensor(counts_BV / 2**16, dtype=torch.float32), torch.tensor(uniform_B)[:, None])
    assert found_B1[:, 0].tolist() == expected


@pytest.mark.parametrize(("first", "last"), [(0, 599), (3, 254), (255, 256), (256, 511), (300, 300), (590, 598)])
def test_sample_at_the_edges_stays_inside_the_support(first: int, last: int) -> None:
    """u → 0 gives the first possible token, u → 1 the last, whatever impossible ones and blocks stand around them."""
    probabilities_V = torch.zeros(600)
    probabilities_V[[first, last]] = 1 / 3  # a total that is not 1, nor exact
    edges_B1 = torch.tensor([[0.0], [2.0**-60], [1 - 2.0**-53]], dtype=torch.float64)
    assert sample_tokens(probabilities_V.expand(3, -1), edges_B1)[:, 0].tolist() == [first, first, last]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_a_token_has_the_probability_of_the_model(policy: Backbone, temperature: float) -> None:
    config = SamplingConfig(max_new_tokens=1, temperature=temperature, batch_size=4_000)
    rollout = HFRollout(policy, "policy", config).generate([[5, 6, 7]] * 4_000, seed=2)
    probabilities_V = torch.softmax(next_token_logits(policy, [5, 6, 7]).double() / temperature, dim=-1)
    assert_sampled_from(probabilities_V.numpy(), np.array(rollout.responses)[:, 0])


# ---- what a response follows from -----------------------------------------------------------------------------------


def test_a_seed_means_the_same_responses_whatever_the_batch_size(policy: Backbone) -> None:
    together = roll(policy, config=SamplingConfig(max_new_tokens=NEW_TOKENS, batch_size=16))
    single = roll(policy, config=SamplingConfig(max_new_tokens=NEW_TOKENS, batch_size=1))
    assert together.responses == single.responses
    assert together.finish == single.finish
    assert roll(policy, seed=1).responses != together.responses
    torch.manual_seed(5)  # nothing hangs on torch's own generators
    assert roll(policy).responses == together.responses


def test_equal_prompts_get_different_responses(policy: Backbone) -> None:
    rollout = HFRollout(policy, "policy", SamplingConfig(max_new_tokens=1)).generate([[5, 6]] * 40, seed=0)
    assert len({tuple(response) for response in rollout.responses}) > 8


def test_it_samples_from_the_role_it_was_made_for(policy: Backbone) -> None:
    config = SamplingConfig(max_new_tokens=NEW_TOKENS)
    anchor = HFRollout(policy, "anchor", config).generate(PROMPTS, seed=0)
    assert anchor.responses != roll(policy).responses
    bare = load_backbone(tiny_model("llama", eos_token_id=ENDS))
    assert HFRollout(bare, "anchor", config).generate(PROMPTS, seed=0).responses == anchor.responses


def test_the_sampling_defaults_of_a_checkpoint_have_no_influence(
    saved_model: Callable[[PreTrainedModel], Path],
) -> None:
    config = SamplingConfig(max_new_tokens=12, temperature=1.3)
    expected = HFRollout(load_backbone(tiny_model("llama")), "anchor", config).generate(PROMPTS, seed=0)
    model = tiny_model("llama")
    defaults = {"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 9.0}
    for name, value in {**defaults, "no_repeat_ngram_size": 1, "max_new_tokens": 2, "min_new_tokens": 9}.items():
        setattr(model.generation_config, name, value)
    backbone = load_backbone(saved_model(model))
    found = HFRollout(backbone, "anchor", config).generate(PROMPTS, seed=0)
    assert found.responses == expected.responses
    assert found.logprobs == expected.logprobs


# ---- truncated sampling, where it was asked for ---------------------------------------------------------------------


def nucleus(probabilities_V: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The tokens that top-k and then top-p leave: the fewest most probable ones whose sum reaches top_p."""
    order = np.argsort(-probabilities_V)[: top_k or None]
    cumulative = np.cumsum(probabilities_V[order] / probabilities_V[order].sum())
    return order[: int(np.searchsorted(cumulative, top_p)) + 1]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.5), (8, 0.7)])
def test_truncated_sampling_restricts_the_support(policy: Backbone, top_k: int, top_p: float) -> None:
    config = RolloutConfig(
        max_new_tokens=1, temperature=1.2, top_k=top_k, top_p=top_p, allow_truncated_sampling=True, batch_size=2_000
    )
    rollout = HFRollout(policy, "policy", config).generate([[5, 6, 7]] * 2_000, seed=0)
    full_V = torch.softmax(next_token_logits(policy, [5, 6, 7]).double() / 1.2, dim=-1).numpy()
    kept = nucleus(full_V, top_k, top_p)
    assert 1 < len(kept) < VOCABULARY / 2
    probabilities_V = np.zeros(VOCABULARY)
    probabilities_V[kept] = full_V[kept] / full_V[kept].sum()
    tokens = np.array(rollout.responses)[:, 0]
    assert_sampled_from(probabilities_V, tokens)
    # The log-probs are those of the distribution that was sampled from.
    np.testing.assert_allclose(np.array(rollout.logprobs)[:, 0], np.log(probabilities_V[tokens]), atol=1e-4)


# ---- the machinery --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_cache_is_used_with_gradient_checkpointing_too(training: bool) -> None:
    backbone = trained_policy()
    expected = roll(backbone).responses
    set_fast(backbone, gradient_checkpointing=True)
    backbone.train(training)
    widths: list[int] = []
    backbone.model.get_input_embeddings().register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    assert roll(backbone).responses == expected
    assert widths == [6] + [1] * NEW_TOKENS  # prompts come several times: read once, except their last tokens


def test_the_role_before_is_back_afterwards() -> None:
    backbone = trained_policy()
    backbone.add_adapter("value", rank=2)
    with backbone.role("value"):
        roll(backbone)
        assert backbone.active_role == "value"
        with pytest.raises(IndexError):
            HFRollout(backbone, "policy", SamplingConfig(max_new_tokens=2)).generate([[VOCABULARY + 5]], seed=0)
        assert backbone.active_role == "value"
    assert backbone.active_role == "anchor"


def test_the_version_is_the_one_of_the_last_sync(policy: Backbone) -> None:
    engine = HFRollout(policy, "policy", SamplingConfig(max_new_tokens=1))
    assert engine.generate([[5]], seed=0).version == 0
    engine.sync(7)
    assert engine.generate([[5]], seed=0).version == 7


def test_progress_counts_every_response(policy: Backbone) -> None:
    counts: list[int] = []
    config = SamplingConfig(max_new_tokens=2, batch_size=4)
    HFRollout(policy, "policy", config, lambda n, note="": counts.append(n)).generate(PROMPTS, seed=0)
    assert sum(counts) == len(PROMPTS) == 18
    assert max(counts) == 4


@pytest.mark.parametrize("copies", [1, 4])
def test_equal_prompts_are_read_once(policy: Backbone, copies: int) -> None:
    """All but the last token of each: that one's logits are the first that a response needs."""
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [20, 21, 22, 23]]
    read: list[int] = []
    embedding = policy.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    HFRollout(policy, "policy", SamplingConfig(max_new_tokens=1)).generate(prompts * copies, seed=0)
    hook.remove()
    assert sum(read) == (3 * 4 if copies == 1 else 3 * 3 + 3 * copies)


def assert_as_alone(sampler: HFRollout, found: Rollout, seed: int) -> None:
    """Each response is what its prompt gives by itself, by the same random numbers."""
    for row, prompt in enumerate(found.prompts):
        single = sampler.generate([prompt], seed, rows=[row])
        assert single.responses[0] == found.responses[row]
        np.testing.assert_allclose(single.logprobs[0], found.logprobs[row], atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "tokens"),
    [
        ([[*SYSTEM, 5, 6], [*SYSTEM, 8], [*SYSTEM, 9, 10, 11]], 6 + 3 * 3),
        ([[*SYSTEM, 5, 6], [*SYSTEM, 8, 9], [*SYSTEM, 5, 6]], 6 + 2 * 1 + 3 * 1),
        ([SYSTEM] * 4, 5 + 4),
        ([SYSTEM, [*SYSTEM, 8, 9]], 5 + 2 * 3),
        ([[5, *SYSTEM], [6, *SYSTEM]], 2 * 7),
        ([[5]] * 3, 3),
        ([SYSTEM], 6),
    ],
    ids=["all start alike", "and two are equal", "all are equal", "one is a start", "nothing", "one token", "one row"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_all_prompts_start_with_is_read_once(name: str, prompts: list[list[int]], tokens: int) -> None:
    """And each response is what the prompt gives by itself, by the same random numbers."""
    policy = trained_policy(name)
    read: list[int] = []
    embedding = policy.model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Module)
    hook = embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    sampler = HFRollout(policy, "policy", SamplingConfig(max_new_tokens=6))
    found = sampler.generate(prompts, seed=3)
    hook.remove()
    decoded = max(map(len, found.responses)) - 1
    assert sum(read) == tokens + decoded * len(prompts)
    assert_as_alone(sampler, found, seed=3)


@pytest.mark.parametrize("name", ["gpt_neo", "mistral"])
def test_padding_takes_up_no_window(name: str) -> None:
    """Attention to the last four tokens: padding between a shared start and the rest would be among them."""
    backbone = load_backbone(mistral() if name == "mistral" else tiny_model(name))
    sampler = HFRollout(backbone, "anchor", SamplingConfig(max_new_tokens=6))
    prompts = [[*SYSTEM, 5], [*SYSTEM, 8, 9, 10, 11, 12]]
    found = sampler.generate(prompts, seed=3)
    assert_as_alone(sampler, found, seed=3)


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_a_start_is_not_read_alone_where_its_keys_would_be_others(rope_type: str) -> None:
    """Past 16 tokens the rotary embeddings are others, and the start that all prompts share has 12."""
    backbone = load_backbone(turning_by_length(rope_type))
    sampler = HFRollout(backbone, "anchor", SamplingConfig(max_new_tokens=1))
    prompts = [[*range(2, 14), i, *range(20, 24)] for i in (30, 31)]
    found = sampler.generate(prompts, seed=3)
    for prompt, responses, logprobs in zip(prompts, found.responses, found.logprobs, strict=True):
        expected_V = torch.log_softmax(role_logits(backbone, "anchor", torch.tensor([prompt]))[0, -1], dim=-1)
        assert logprobs[0] == pytest.approx(expected_V[responses[0]].item(), abs=1e-4)
