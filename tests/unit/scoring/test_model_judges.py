"""Judges that need a model: a local chat model against a naive forward pass, and rewards as probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pe_rlhf.data.codec import dated
from pe_rlhf.scoring.hf_chat import HFChat
from pe_rlhf.scoring.model_judges import make_judge
from pe_rlhf.scoring.reward_judge import reward_scores
from reward.errors import InputError
from reward.judges import Comparison
from reward.judges.chat_tokens import ChatTokens
from reward.judges.judge_registry import check_judge, judge_settings, register_judge
from reward.judges.judge_settings import JudgeSettings
from reward.judges.rating import RATINGS
from reward.judges.reward_model import reward_model_judge
from reward.judges.templates import JudgePrompt, RatingPrompt
from reward.records import Message
from tests.failures import raises, refuses
from tests.model_types import build
from tests.stage_support import byte_model

COMPARISONS = [Comparison("Say something", "ab" * n, "x" * (5 - n)) for n in range(1, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    return byte_model(folder, pad_is_eos=True, initializer_range=0.4, max_position_embeddings=2048)


def test_a_system_part_stands_before_the_question_where_the_chat_template_takes_none(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    )
    chat: list[Message] = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "A or B?"}]
    rows, _ = ChatTokens(tokenizer, "m", 500, len(tokenizer)).encode([chat], room=1)
    assert tokenizer.decode(rows[0]) == "<user>Be fair.\n\nA or B?"


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A Gemma 2 that reads bytes: sdpa has no place for its cap on attention."""
    folder = tmp_path_factory.mktemp("capped")
    tokenizer = AutoTokenizer.from_pretrained(model)
    build("gemma2", vocab_size=len(tokenizer), max_position_embeddings=2048, eos_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("which", ["model", "capped"])
def test_a_local_judges_verdicts_are_those_of_a_naive_forward_pass(which: str, request: pytest.FixtureRequest) -> None:
    """One sequence at a time, without padding, by plain transformers; the judge has them in a padded batch."""
    model: Path = request.getfixturevalue(which)
    judge = make_judge(JudgeSettings(kind="llm", target=str(model), min_label_mass=0))
    verdicts = judge.compare(COMPARISONS)
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(model)
    for comparison, verdict in zip(COMPARISONS, verdicts, strict=True):
        text = f"User: {JudgePrompt('general').chat(comparison, reasoning=False)[-1]['content']}\n\nAssistant:"
        with torch.no_grad():
            logits_V = plain(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        a, b = (logits_V[tokenizer.convert_tokens_to_ids(label)].item() for label in "AB")
        assert verdict.preference == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-4)
        assert set(json.loads(verdict.raw or "")["logprobs"]) == {"A", "B"}


def test_a_local_models_ratings_have_the_probabilities_of_a_naive_forward_pass(model: Path) -> None:
    """This vocabulary has bytes only, so that 10 is a 1 and a 0, and has no probability as the next token."""
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    texts = [RatingPrompt("general").chat(comparison, reasoning=False)[-1]["content"] for comparison in COMPARISONS]
    chats: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    for text, found in zip(texts, HFChat(plain, tokenizer, "m").label_logprobs(chats, RATINGS), strict=True):
        with torch.no_grad():
            logits_V = plain(torch.tensor([tokenizer(f"User: {text}\n\nAssistant:")["input_ids"]])).logits[0, -1]
        logprobs_V = logits_V.log_softmax(dim=0)
        expected = {str(n): logprobs_V[tokenizer.convert_tokens_to_ids(str(n))].item() for n in range(1, 10)}
        assert found.label_logprobs == pytest.approx(expected, abs=1e-4)
    judge = make_judge(JudgeSettings(kind="rating", target=str(model), verdict="probabilities", min_label_mass=0))
    assert all(verdict.score_a is None and verdict.invalid for verdict in judge.compare(COMPARISONS))
    with pytest.raises(InputError) as caught:
        ChatTokens(tokenizer, "m", 100, 20).label_ids(["A"])
    assert caught.value.key == "judge.verdict"


@pytest.mark.parametrize("name", ["mamba", "qwen3_5_text", "recurrent_gemma", "rwkv"])
def test_a_model_with_a_recurrent_state_answers_as_to_each_question_alone(model: Path, name: str) -> None:
    """What it cannot read beside padding it reads in rows of one length, or one by one."""
    sizes: dict[str, Any] = {"vocab_size": 257, "max_position_embeddings": 256, "context_length": 256}
    plain, tokenizer = build(name, **sizes), AutoTokenizer.from_pretrained(model)
    texts = ["Hi", "A or B?", "Yes", "Which of the two is better?"]
    chats: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    chat = HFChat(build(name, **sizes), tokenizer, "m")
    asked = zip(texts, chat.label_logprobs(chats, "AB"), chat.generate(chats, 3, 0.0, 0), strict=True)
    for text, labels, said in asked:
        ids = tokenizer(f"User: {text}\n\nAssistant:")["input_ids"]
        answer: list[int] = []
        expected: dict[str, float] = {}
        for _ in range(3):
            with torch.no_grad():
                logits_V = plain(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, -1]
            if not answer:
                own = {label: tokenizer.convert_tokens_to_ids(label) for label in "AB"}
                expected = {label: float(logits_V.log_softmax(0)[token]) for label, token in own.items()}
            answer.append(int(logits_V.argmax()))
        assert labels.label_logprobs == pytest.approx(expected, abs=1e-4)
        assert said.text == tokenizer.decode(answer, skip_special_tokens=True)


def test_a_token_of_two_digits_is_a_rating(model: Path) -> None:
    """With a token 10 that the tokenizer uses, p(10) and p(1) are apart."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert "10" not in ChatTokens(tokenizer, "m", 100, 300).label_ids(["1", "10"])
    tokenizer.add_tokens(["10"])
    ids = ChatTokens(tokenizer, "m", 100, 300).label_ids(["1", "10"])
    assert ids == {"1": [tokenizer.convert_tokens_to_ids("1")], "10": [len(tokenizer) - 1]}


def test_reasoning_and_text_of_a_local_judge(model: Path) -> None:
    config = JudgeSettings(kind="llm", target=str(model), reasoning=True, reasoning_tokens=5, min_label_mass=0)
    (verdict,) = make_judge(config).compare(COMPARISONS[:1])
    assert verdict.reason is not None
    assert 0 < verdict.preference < 1
    text = make_judge(JudgeSettings(kind="llm", target=str(model), verdict="text", answer_tokens=16))
    (spoken,) = text.compare(COMPARISONS[:1])  # a random model says nothing that could be understood
    assert spoken.invalid is not None or spoken.preference in (0.0, 1.0)


def test_a_question_that_is_too_long_is_invalid_alone(model: Path) -> None:
    judge = make_judge(JudgeSettings(kind="llm", target=str(model), min_label_mass=0))
    short, long = judge.compare([COMPARISONS[0], Comparison("p", "x" * 3000, "y")])
    assert short.invalid is None
    assert long.invalid is not None
    assert "the judge reads 2048" in long.invalid
    assert math.isnan(long.preference)


@pytest.mark.parametrize("verdict", ["probabilities", "auto"])
def test_labels_next_to_no_mass_are_no_verdict(model: Path, verdict: Literal["probabilities", "auto"]) -> None:
    """The model is about to say something else, so that the ratio of A to B means nothing."""
    settings = JudgeSettings(kind="llm", target=str(model), verdict=verdict, answer_tokens=16)
    judged = make_judge(settings).compare(COMPARISONS)
    by_ratio = make_judge(settings.model_copy(update={"min_label_mass": 0.0})).compare(COMPARISONS)
    for one, other in zip(judged, by_ratio, strict=True):
        logprobs = json.loads(other.raw or "")["logprobs"]
        assert one.label_mass == pytest.approx(math.exp(logprobs["A"]) + math.exp(logprobs["B"]))
        assert (one.label_mass or 1) < 0.5
        assert one.invalid is not None
        assert 0 < other.preference < 1


def test_arguments_reach_the_chat_template_and_are_part_of_the_judges_name(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking is not defined %}<think>{% endif %}"
    )
    thinking, off = (ChatTokens(tokenizer, "m", 100, 257, kwargs) for kwargs in ({}, {"enable_thinking": False}))
    chat: list[Message] = [{"role": "user", "content": "ab"}]
    assert len(thinking.encode([chat], 1)[0][0]) - len(off.encode([chat], 1)[0][0]) == len("<think>")
    settings = JudgeSettings(kind="llm", target=str(model))
    other = settings.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    assert make_judge(settings).identity != make_judge(other).identity


def test_judges_and_rewards_print_the_day_of_the_run(model: Path, tmp_path: Path) -> None:
    """A verdict is the same tomorrow; one of another day is asked for anew."""
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}:{{ m['content'] }}{% endfor %}"
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    chat, rewards = tmp_path / "chat", tmp_path / "rewards"
    plain.save_pretrained(chat)
    one_label = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=0)
    one_label.save_pretrained(rewards)
    for folder in (chat, rewards):
        tokenizer.save_pretrained(folder)
    with dated("2024-02-03"):
        judge = make_judge(JudgeSettings(kind="llm", target=str(chat), min_label_mass=0))
        rewarded = make_judge(JudgeSettings(kind="reward_model", target=str(rewards)))
        score = reward_scores(str(rewards))
    assert "2024-02-03" in judge.identity
    assert "2024-02-03" in rewarded.identity
    question = JudgePrompt("general").chat(COMPARISONS[0], reasoning=False)[-1]["content"]
    with torch.no_grad():
        logits_V = plain(torch.tensor([tokenizer(f"03 Feb 2024:{question}")["input_ids"]])).logits[0, -1]
        reward = one_label(torch.tensor([tokenizer("03 Feb 2024:Hi:Yes")["input_ids"]])).logits.item()
    a, b = (logits_V[tokenizer.convert_tokens_to_ids(label)].item() for label in "AB")
    assert judge.compare(COMPARISONS[:1])[0].preference == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-4)
    assert score(["Hi"], ["Yes"]) == pytest.approx([reward], abs=1e-4)


CODE = """
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaModel):
    config_class = OwnConfig

AutoModel.register(OwnConfig, OwnModel)

class OwnChat(LlamaForCausalLM):
    config_class = OwnConfig

class OwnRewards(LlamaForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("kind", ["llm", "reward_model"])
def test_a_judges_own_code_runs_where_it_is_trusted(model: Path, tmp_path: Path, kind: str) -> None:
    """Refused before a run starts elsewhere, without the question that transformers asks on a terminal."""
    auto = AutoModelForCausalLM if kind == "llm" else AutoModelForSequenceClassification
    plain, tokenizer = auto.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    plain.config.num_labels, plain.config.pad_token_id = 1, 0
    (plain if kind == "llm" else auto.from_config(plain.config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "own_llama"}
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnChat"}
    config["auto_map"] = names | {"AutoModelForSequenceClassification": "own.OwnRewards"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(CODE)
    settings = JudgeSettings(kind=kind, target=str(tmp_path), min_label_mass=0)
    for refused in (lambda: check_judge(settings), lambda: make_judge(settings)):
        with raises("conflict", file=tmp_path):
            refused()
    trusting = settings.model_copy(update={"trust_remote_code": True})
    check_judge(trusting)
    verdict = make_judge(trusting).compare(COMPARISONS[:1])[0].preference
    if kind == "llm":
        settings = settings.model_copy(update={"target": str(model)})
        assert verdict == make_judge(settings).compare(COMPARISONS[:1])[0].preference
    assert 0 < verdict < 1
    with refuses("trust_remote_code"):
        JudgeSettings(kind="llm", target="m", base_url="http://localhost:1/v1", trust_remote_code=True)


def test_rewards_are_bradley_terry_probabilities() -> None:
    judge = reward_model_judge(lambda prompts, responses: [float(len(r)) for r in responses], "length")
    (verdict,) = judge.compare([Comparison("p", "abc", "a")])
    assert verdict.preference == pytest.approx(1 / (1 + math.exp(-2)))
    assert not judge.sees_order
    assert judge.compare([Comparison("p", "a", "x" * 1000)])[0].preference == 0.0


def test_a_name_is_registered_once_and_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        register_judge("length", lambda settings: make_judge("length"))
    assert caught.value.kind == "exists"
    with pytest.raises(InputError):
        reward_scores(str(tmp_path / "nowhere"))


def test_the_reward_model_of_the_run_that_asks_may_still_be_made(tmp_path: Path) -> None:
    judge = f"reward_model:{tmp_path / 'run'}"
    check_judge(judge, tmp_path / "run")
    with pytest.raises(InputError):
        check_judge(judge, tmp_path / "another")


@pytest.mark.parametrize("form", ["llm:org/model", {"kind": "llm:org/model"}, {"kind": "llm", "target": "org/model"}])
def test_a_judge_is_named_in_one_word_or_by_kind_and_target(form: str | dict[str, str]) -> None:
    settings = judge_settings(JudgeSettings.model_validate({"kind": form} if isinstance(form, str) else form))
    assert (settings.kind, settings.target) == ("llm", "org/model")


def test_a_target_that_is_named_twice_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        judge_settings(JudgeSettings(kind="llm:one", target="two"))
    assert caught.value.key == "judge.target"
