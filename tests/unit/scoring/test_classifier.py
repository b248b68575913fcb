"""Reward models of others against direct passes over what their own tokenizers and templates write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import BertProcessing
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pe_rlhf.scoring.classifier import Classifier
from pe_rlhf.scoring.scorers import ModelScorer
from pe_rlhf.types import Sequences
from reward.errors import Kind
from reward.records import Message, Prompt
from tests.chat_templates import FAMILIES
from tests.failures import raises
from tests.stage_support import byte_model

PROMPTS: list[Prompt] = ["How are you?", "x", "Tell me a longer story, please."]
RESPONSES = [" fine", " a rather long answer, and then some more of it", " y"]
CPU = torch.device("cpu")


def classifier(path: str | Path, **settings: int) -> Classifier:
    return Classifier(str(path), CPU, torch.float32, **settings)  # type: ignore[arg-type]


def random_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)


def saved_classifier(tmp_path: Path, labels: int, *, with_pad: bool = True) -> Path:
    """A tiny random sequence classifier with the byte tokenizer, with its padding token or without one."""
    source = byte_model(tmp_path / "causal", pad_is_eos=False)
    path = tmp_path / "classifier"
    model = LlamaForSequenceClassification.from_pretrained(source, num_labels=labels)
    random_weights(model)
    if not with_pad:
        model.config.pad_token_id = None
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not with_pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(path)
    return path


@torch.no_grad()
def at_the_last_token(path: Path, rows: list[list[int]]) -> Tensor:
    """The head's output at the end of each row, every row in a pass of its own."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    return torch.stack([model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])[0] for ids in rows])


@pytest.mark.parametrize("with_pad", [True, False])
def test_a_model_scores_at_the_last_token_of_each_row(tmp_path: Path, with_pad: bool) -> None:
    """At EOS, or at the last token of a response that was cut; with a padding token, or none but EOS."""
    path = saved_classifier(tmp_path, labels=1, with_pad=with_pad)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ended = [True, False, True]
    texts = zip(PROMPTS, RESPONSES, ended, strict=True)
    rows = [tokenizer(f"{p}{r}")["input_ids"] + ([tokenizer.eos_token_id] if whole else []) for p, r, whole in texts]
    # Another tokenizer's ids, of which 7 is the EOS: a model reads the text, and whether it ended.
    sequences = Sequences.pack([[1]] * 3, [[7] if whole else [7, 8] for whole in ended], 0)
    scorer = ModelScorer(classifier(path, batch_size=2), [7])
    found_B = scorer.score(PROMPTS, RESPONSES, sequences)
    torch.testing.assert_close(found_B, at_the_last_token(path, rows), atol=1e-5, rtol=1e-5)
    assert found_B.std() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_with_a_template_reads_the_whole_conversation(tmp_path: Path, name: str) -> None:
    """To the template's very end: Qwen3's empty thought, Gemma's line break and Phi-3's EOS included."""
    tokenizer, path = FAMILIES[name].tokenizer(), tmp_path / "rm"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=300, num_labels=1, pad_token_id=None, **sizes))  # type: ignore[arg-type]
    random_weights(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    earlier: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompts: list[Prompt] = ["Why?", [*earlier, {"role": "user", "content": "And then?"}], "Why?"]
    responses, rows = ["Because.", "Nothing.", "Because it is"], []
    for prompt, response in zip(prompts, responses, strict=True):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        said = [*asked, {"role": "assistant", "content": response}]
        rows.append(list(tokenizer.apply_chat_template(said, return_dict=False)))  # type: ignore[arg-type]
    # A response that was cut has no end.
    asked = [{"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    lead = " " if name == "mistral" else ""
    rows[2] = tokenizer(f"{text}{lead}{responses[2]}", add_special_tokens=False)["input_ids"]
    found_B = classifier(path).score(prompts, responses, [False, False, True])
    torch.testing.assert_close(found_B, at_the_last_token(path, rows), atol=1e-5, rtol=1e-5)


def test_both_sides_of_a_long_prompt_are_cut_alike(tmp_path: Path) -> None:
    """RoBERTa's positions begin behind its padding id's: of 34 it can use 32."""
    source = byte_model(tmp_path / "causal", pad_is_eos=False)
    tokenizer = AutoTokenizer.from_pretrained(source)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    positions = {"max_position_embeddings": 34, "type_vocab_size": 1, "pad_token_id": 1}
    config = RobertaConfig(vocab_size=300, num_labels=1, **sizes, **positions)  # type: ignore[arg-type]
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    prompt = "a prompt of more than thirty-two bytes"
    room = 32 - len(" fine!") - 1
    ids = [[*tokenizer(prompt[-room:] + said)["input_ids"], tokenizer.eos_token_id] for said in (" fine!", " no")]
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([row])).logits[0] for row in ids])
    found_B = classifier(tmp_path / "roberta").score([prompt] * 2, [" fine!", " no"])
    torch.testing.assert_close(found_B, expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_reads_a_pair_of_texts(tmp_path: Path) -> None:
    """[CLS] prompt [SEP] response [SEP] with both types, as its tokenizer makes it of two texts."""
    source = byte_model(tmp_path / "causal", pad_is_eos=False)
    byte_wise = AutoTokenizer.from_pretrained(source)
    backend = byte_wise.backend_tokenizer
    backend.add_special_tokens(["[SEP]", "[CLS]"])
    separator, first = backend.token_to_id("[SEP]"), backend.token_to_id("[CLS]")
    backend.post_processor = BertProcessing(("[SEP]", separator), ("[CLS]", first))
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="<|pad|>",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=300, max_position_embeddings=64, num_labels=1, **sizes)  # type: ignore[call-arg]
    model = BertForSequenceClassification(config).eval()
    random_weights(model)
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        said = list(response.encode())
        asked, given = (byte_wise(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
        ids = [first, *asked, separator, *given, separator]
        types = [0] * (len(ids) - len(said) - 1) + [1] * (len(said) + 1)
        with torch.no_grad():
            expected.append(model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0, 0])
    found_B = classifier(tmp_path / "bert").score(PROMPTS, RESPONSES)
    torch.testing.assert_close(found_B, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_config_that_leaves_out_its_one_label(tmp_path: Path) -> None:
    """As OpenRLHF writes them: transformers' default would be two."""
    path = saved_classifier(tmp_path, labels=1)
    written = json.loads((path / "config.json").read_text())
    for key in ("num_labels", "id2label", "label2id"):
        written.pop(key, None)
    expected = classifier(path).score(PROMPTS, RESPONSES)
    (path / "config.json").write_text(json.dumps(written))
    assert torch.equal(classifier(path).score(PROMPTS, RESPONSES), expected)


@pytest.mark.parametrize(("labels", "kind"), [(2, "unreadable"), (3, "conflict")])
def test_a_model_of_several_labels_is_refused(tmp_path: Path, labels: int, kind: Kind) -> None:
    """By its config, or where that leaves their number out, by its weights."""
    path = saved_classifier(tmp_path, labels)
    with raises(kind, key="reward model", file=path):
        classifier(path)


def test_a_model_without_a_reward_head_is_refused(tmp_path: Path) -> None:
    path = byte_model(tmp_path / "causal", pad_is_eos=True)
    with raises("unreadable", key="reward model", file=path):
        classifier(path)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with raises("missing", key="reward model", file=tmp_path / "absent"):
        classifier(tmp_path / "absent")


def test_a_cap_on_attention_is_not_left_out(tmp_path: Path) -> None:
    """Gemma 2: sdpa has no place for the cap."""
    source = byte_model(tmp_path / "causal", pad_is_eos=False)
    tokenizer, path = AutoTokenizer.from_pretrained(source), tmp_path / "classifier"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_logit_softcapping": 0.5}
    options: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "num_labels": 1, **sizes, **heads}
    config = Gemma2Config(**options)
    model = Gemma2ForSequenceClassification(config)
    random_weights(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    found = classifier(path)
    scores = found.score(PROMPTS, RESPONSES)

    def one_by_one(attention: str) -> Tensor:
        plain = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation=attention)
        plain.config.pad_token_id = None
        rows = found._conversations(PROMPTS, RESPONSES, [False] * len(PROMPTS))
        with torch.no_grad():
            return torch.stack([plain(torch.tensor([row["input_ids"]])).logits[0, 0] for row in rows])

    torch.testing.assert_close(scores, one_by_one("eager"), atol=1e-5, rtol=1e-5)
    assert (scores - one_by_one("sdpa")).abs().max() > 1e-3
