"""Prompts and responses as tokens: with a chat template and without, and where EOS stands."""

import copy
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pe_rlhf.data.codec import TextCodec, dated, transcript
from reward.errors import InputError
from reward.records import Message
from tests.failures import raises

CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RENDERED = "<system>Be brief.</><user>Hi</><assistant>Hello</><user>Why?</><assistant>"
BOS, END = 256, 257


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """One id per byte; begin is set before a text, and end and padding are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<bos>", "<end>"])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bytewise.decoder = ByteLevelDecoder()  # type: ignore[assignment]
    bytewise.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<end>",
        clean_up_tokenization_spaces=False,
    )


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text without special tokens, byte by byte."""
    alphabet = {v: k for k, v in _bytes_to_unicode().items()}
    return [tokenizer.convert_tokens_to_ids(alphabet[byte]) for byte in text.encode()]  # type: ignore[misc]


def _bytes_to_unicode() -> dict[str, int]:
    """GPT-2's table: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_the_template_of_the_tokenizer_is_used_where_it_has_one(tokenizer: PreTrainedTokenizerBase) -> None:
    codec = TextCodec(with_template(tokenizer, TEMPLATE))
    assert codec.render(CHAT) == RENDERED
    assert codec.render("Hi") == "<user>Hi</><assistant>"
    # Special tokens are the template's business: the tokenizer adds no other.
    assert codec.encode_prompt("Hi") == ids_of(tokenizer, "<user>Hi</><assistant>")


def test_without_a_template_a_prompt_is_its_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for codec in (TextCodec(tokenizer), TextCodec(with_template(tokenizer, TEMPLATE), "none")):
        assert codec.render("Once upon") == "Once upon"
        assert codec.encode_prompt("Once upon") == [BOS, *ids_of(tokenizer, "Once upon")]
        expected = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
        assert codec.render(CHAT) == expected
        assert codec.encode_prompt(CHAT) == [BOS, *ids_of(tokenizer, expected)]


def test_a_role_that_transcripts_do_not_know_keeps_its_name() -> None:
    assert transcript([{"role": "tool", "content": "42"}]) == "\n\ntool: 42\n\nAssistant:"


def test_a_template_in_the_recipe_or_in_a_file_replaces_the_tokenizers(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_text(TEMPLATE, encoding="utf-8")
    other = with_template(tokenizer, "{{ 'never' }}")
    for setting in (TEMPLATE, str(tmp_path / "mine.jinja")):
        assert TextCodec(other, setting).render(CHAT) == RENDERED
    with raises("missing", key="chat_template", file="absent.jinja"):
        TextCodec(other, "absent.jinja")


FAILING = ["{% if %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[9].role.x }}"]


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_names_the_prompt(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    with pytest.raises(InputError) as raised:
        TextCodec(tokenizer, template).render(CHAT)
    assert (raised.value.kind, raised.value.key) == ("user_code", "chat_template")
    assert "'Be brief.'" in str(raised.value)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_eos_ends_a_response_unless_it_was_cut(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    codec = TextCodec(tokenizer, template or "none")
    prompt, response = codec.encode_pair("Hi", "Well, no.")
    assert prompt == codec.encode_prompt("Hi")
    assert response == [*ids_of(tokenizer, "Well, no."), END]
    assert codec.encode_pair("Hi", "Well, no.", truncated=True)[1] == ids_of(tokenizer, "Well, no.")


def test_a_response_in_a_transcript_starts_with_the_space_after_the_name(tokenizer: PreTrainedTokenizerBase) -> None:
    assert TextCodec(tokenizer, "none").encode_pair(CHAT, "No.")[1] == [*ids_of(tokenizer, " No."), END]
    assert TextCodec(tokenizer, TEMPLATE).encode_pair(CHAT, "No.")[1] == [*ids_of(tokenizer, "No."), END]


def test_a_sampled_response_in_a_transcript_keeps_its_one_space(tokenizer: PreTrainedTokenizerBase) -> None:
    """Byte-level tokenizers decode the space that the model put after "Assistant:" with the rest."""
    codec = TextCodec(tokenizer, "none")
    assert codec.encode_pair(CHAT, " No.") == codec.encode_pair(CHAT, "No.")


def test_of_several_templates_by_name_the_default_is_taken(tokenizer: PreTrainedTokenizerBase) -> None:
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"tool_use": "{{ tools }}", "default": TEMPLATE}  # type: ignore[assignment]
    assert TextCodec(several).render(CHAT) == TextCodec(tokenizer, TEMPLATE).render(CHAT)
    several.chat_template = {"rag": TEMPLATE, "tool_use": TEMPLATE}  # type: ignore[assignment]
    with raises("conflict", key="chat_template"):
        TextCodec(several)


def test_eos_of_the_model_serves_where_the_tokenizer_has_none(tokenizer: PreTrainedTokenizerBase) -> None:
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    assert TextCodec(without, "none", eos_token_ids=[7]).encode_pair("Hi", "a")[1] == [*ids_of(tokenizer, "a"), 7]
    assert TextCodec(without, "none").encode_pair("Hi", "a")[1] == ids_of(tokenizer, "a")
    # The tokenizer's own comes first: a chat model ends a turn with another token than a text.
    assert TextCodec(tokenizer, "none", eos_token_ids=[7]).end_token_id == END


def test_a_response_comes_back_as_its_text(tokenizer: PreTrainedTokenizerBase) -> None:
    codec = TextCodec(tokenizer, TEMPLATE)
    for text in ("Well , no . It 's\n\n fine", " spaces  kept ", "ünï 你好 🙂", ""):
        _, ids = codec.encode_pair("Hi", text)
        assert codec.decode(ids) == text
        assert codec.decode([*ids, END, END]) == text  # filling, which here is the end token too


DATED = "{{ date_string or strftime_now('%d %b %Y') }}:{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_template_prints_the_day_that_it_is_given(tokenizer: PreTrainedTokenizerBase) -> None:
    """As Llama-3's do, which print `date_string` where there is one, else what the clock says."""
    assert TextCodec(tokenizer, DATED, date="2024-02-03").render("a") == "03 Feb 2024:a"
    given = {"date_string": "1 May"}
    assert TextCodec(tokenizer, DATED, arguments=given, date="2024-02-03").render("a") == "1 May:a"
    plain = TextCodec(tokenizer, DATED)
    today = {datetime.now().strftime("%d %b %Y")}
    rendered = plain.render("a")
    assert rendered.removesuffix(":a") in today | {datetime.now().strftime("%d %b %Y")}
    with dated("2020-12-31"), dated(None):
        pinned = TextCodec(tokenizer, DATED)
        assert plain.render("a") == rendered
        assert TextCodec(tokenizer, DATED, date="2024-02-03").render("a") == "03 Feb 2024:a"
    assert pinned.render("a") == "31 Dec 2020:a"  # also in another thread, or later
    assert (pinned.day, TextCodec(tokenizer, TEMPLATE).day) == ("2020-12-31", None)


def test_a_template_that_goes_over_the_parts_of_a_content(tokenizer: PreTrainedTokenizerBase) -> None:
    """As those of models that also read pictures: what they write of a text is what their part of it is."""
    head, tail = (
        "{% for m in messages %}<{{ m.role }}>",
        "<end>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}",
    )
    plain = TextCodec(tokenizer, head + "{{ m.content }}" + tail)
    parts = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    listing = TextCodec(tokenizer, head + parts + tail)
    for prompt in ("Hello <end>", CHAT):
        assert listing.render(prompt) == plain.render(prompt)
        assert listing.encode_pair(prompt, "Yes<end>") == plain.encode_pair(prompt, "Yes<end>")
    with raises("invalid", key="chat_template"):
        TextCodec(tokenizer, "{% for m in messages %}{{ m.role }}{% endfor %}")
