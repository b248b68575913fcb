"""Tokenizers that do not give back what they were given."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.model.names import resolve_model
from pe_rlhf.model.round_trip import check_round_trip
from tests.failures import raises
from tests.stage_support import byte_model


def bytewise(decoder: object, pre_tokenizer: object | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "▁"])}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizer or ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoder  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    "broken",
    [
        bytewise(decoders.Fuse()),  # "weĠneedĠto"
        bytewise(decoders.Sequence([decoders.Replace("▁", ""), decoders.Fuse()]), Metaspace()),  # "weneedto"
    ],
    ids=["inner letters", "no spaces"],
)
def test_one_that_garbles_a_text_is_refused(broken: PreTrainedTokenizerFast) -> None:
    with raises("conflict", key="model", file="mine"):
        check_round_trip(broken, "mine", "model")


def test_a_model_with_such_a_tokenizer_is_not_loaded(tmp_path: Path) -> None:
    bytewise(decoders.Fuse()).save_pretrained(byte_model(tmp_path / "model", pad_is_eos=True))
    with raises("conflict", key="model", file=tmp_path / "model"):
        load_backbone(str(tmp_path / "model"))


def test_good_ones_pass() -> None:
    check_round_trip(bytewise(decoders.ByteLevel()), "mine", "model")
    check_round_trip(bytewise(decoders.Metaspace(), Metaspace()), "mine", "model")  # it has no letter é
    check_round_trip(AutoTokenizer.from_pretrained(resolve_model("random:tiny-llama")), "random:tiny-llama", "model")
