"""Chat templates of model families, as they are published (tools and pictures left out), and byte-wise tokenizers with
the special tokens that each has."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ALTERNATE = "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}" + ALTERNATE + "{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set start = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set start = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}" + ALTERNATE + "{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ start if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (
    "{% set last = namespace(user=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set said = m['content'] %}{% set thought = '' %}"
    "{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > last.user and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ said.lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, the special tokens (BOS and the tokenizer's EOS first), and the token that ends a turn."""

    template: str
    special: tuple[str, ...]
    end: str
    others: tuple[str, ...] = ()  # added tokens that are no special ones

    @property
    def ends(self) -> list[int]:
        """The ids of a generation config: EOS and the end of a turn."""
        return sorted({1, self.special.index(self.end)})

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """One id per special token in their order, then one per byte."""
        alphabet = sorted(ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate([*self.special, *alphabet])}
        bytewise = Tokenizer(BPE(vocab=vocabulary, merges=[]))
        bytewise.pre_tokenizer, bytewise.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()  # type: ignore[assignment]
        bytewise.add_special_tokens([AddedToken(token, special=True) for token in self.special])
        bytewise.add_tokens([AddedToken(token, special=False) for token in self.others])
        made = PreTrainedTokenizerFast(
            tokenizer_object=bytewise, bos_token=self.special[0], eos_token=self.special[1], pad_token=self.special[2]
        )
        made.chat_template = self.template
        return made


LLAMA3_TOKENS = ("<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>")
GEMMA3_TOKENS = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>")
QWEN3_TOKENS = ("<|bos|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>")
PHI3_TOKENS = ("<s>", "<|endoftext|>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
FAMILIES = {
    "llama3": Family(LLAMA3, LLAMA3_TOKENS, "<|eot_id|>"),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "<unk>"), "</s>"),
    "gemma3": Family(GEMMA3, GEMMA3_TOKENS, "<end_of_turn>"),
    "qwen3": Family(QWEN3, QWEN3_TOKENS, "<|im_end|>", ("<think>", "</think>")),
    "phi3": Family(PHI3, PHI3_TOKENS, "<|end|>"),
}
