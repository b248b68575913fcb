"""Whether a tokenizer gives back the text that it was given."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from reward.errors import InputError

TEXTS = ("we need to add", "é 🤗 中")
# How spaces and bytes are written inside a vocabulary; a text never shows them.
INNER = re.compile(r"Ġ|Ċ|▁|<0x[0-9A-F]{2}>")


def check_round_trip(tokenizer: PreTrainedTokenizerBase, name: str, key: str) -> None:
    """Raise `InputError` of kind `conflict` for a tokenizer that loses spaces, or shows them as its vocabulary does.

    Some files name another class than they are of, and every prompt would be garbled. What a small vocabulary has no
    token for, case and repeated spaces may be lost.
    """
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids or tokenizer.unk_token_id in ids:
            continue
        back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        words, expected = back.casefold().split(), text.casefold().split()
        if INNER.search(back) or ("".join(words) == "".join(expected) and words != expected):
            raise InputError(
                f"{key}: the tokenizer of {name!r} ({type(tokenizer).__name__}) makes {back!r} of {text!r}",
                kind="conflict",
                key=key,
                file=name,
                fix="see whether tokenizer_class in its tokenizer_config.json is that of its tokenizer.json",
            )
