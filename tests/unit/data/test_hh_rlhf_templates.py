"""Real rows of hh-rlhf through the chat templates of five families: every stage has the same tokens for the same words.

The expectation is made row by row by transformers: the dialogue is split here, and rendered by `apply_chat_template`.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config import DataSource
from pe_rlhf.data.codec import TextCodec
from pe_rlhf.data.preference_pairs import encode_pair
from pe_rlhf.data.rows import load_examples, load_preferences, load_prompt_rows
from pe_rlhf.stages.sft import NO_LOSS, encode_row
from tests.chat_templates import FAMILIES, Family
from tests.hh_rlhf import PARTS, messages_of, pair_of
from tests.runs import write_jsonl

pytestmark = pytest.mark.shared
ROWS = 60  # of each part
LIMIT = 100_000
Tokens = tuple[Any, Any, Any]  # of token ids


def expected_tokens(family: Family, row: dict[str, str]) -> Tokens | None:
    """Prompt, chosen and rejected; None for a row that the template refuses or that holds no pair."""
    tokenizer = family.tokenizer()
    if pair_of(row) is None:
        return None
    chosen, rejected = messages_of(row["chosen"]), messages_of(row["rejected"])
    arguments = {"return_dict": False, "enable_thinking": False}
    try:
        prompt = list(tokenizer.apply_chat_template(chosen[:-1], add_generation_prompt=True, **arguments))  # type: ignore[arg-type]
        wholes = [list(tokenizer.apply_chat_template(said, **arguments)) for said in (chosen, rejected)]  # type: ignore[arg-type]
    except Exception:  # the templates' own `raise_exception`
        return None
    end = family.special.index(family.end)
    responses = [whole[len(prompt) : len(whole) - whole[::-1].index(end)] for whole in wholes]
    return prompt, responses[0], responses[1]


@pytest.fixture(scope="module")
def files(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The rows as published, as examples to fine-tune on, and as pairs that the preferences stage wrote."""
    folder, rows = tmp_path_factory.mktemp("hh"), []
    for part in PARTS:
        with gzip.open(shared_data / "hh_rlhf" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows += [json.loads(line) for line in itertools.islice(file, ROWS)]
    split = [(messages_of(row["chosen"]), messages_of(row["rejected"])) for row in rows]
    return {
        "hh": write_jsonl(folder / "hh.jsonl", rows),
        "sft": write_jsonl(
            folder / "sft.jsonl", [{"prompt": a[:-1], "completion": a[-1]["content"]} for a, _ in split]
        ),
        "labels": write_jsonl(
            folder / "labels.jsonl",
            [{"prompt": a[:-1], "chosen": a[-1]["content"], "rejected": b[-1]["content"]} for a, b in split],
        ),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_all_stages_have_the_tokens_that_the_template_writes(name: str, files: dict[str, Path]) -> None:
    family = FAMILIES[name]
    codec = TextCodec(family.tokenizer(), eos_token_ids=family.ends, arguments={"enable_thinking": False})
    rows = [json.loads(line) for line in files["hh"].read_text(encoding="utf-8").splitlines()]
    expected = [expected_tokens(family, row) for row in rows]
    usable = [tokens for tokens in expected if tokens is not None]
    assert len(usable) > ROWS
    source = {kind: DataSource(path=str(path)) for kind, path in files.items()}

    _, pairs, bad = load_preferences(source["hh"], "key", 1.0, lambda record: encode_pair(record, codec, LIMIT))
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == usable
    assert [row.row for row in bad] == [i for i, tokens in enumerate(expected, start=1) if tokens is None]

    _, labelled, _ = load_preferences(source["labels"], "key", 1.0, lambda record: encode_pair(record, codec, LIMIT))
    everything = [(pair.prompt, pair.chosen, pair.rejected) for pair in labelled]
    assert [tokens for tokens in everything if tokens in usable] == usable

    prompts, _ = load_prompt_rows(source["hh"], "key", lambda row: codec.encode_prompt(row.prompt), 1.0)
    assert [ids for ids in prompts if ids in [tokens[0] for tokens in usable]] == [tokens[0] for tokens in usable]

    examples, _ = load_examples(source["sft"], "key", 1.0, lambda row: encode_row(row, codec, LIMIT, whole=False))
    by_ids = {tuple(ids): labels for ids, labels in examples}
    for prompt, chosen, _ in usable:
        assert by_ids[tuple(prompt + chosen)] == [NO_LOSS] * len(prompt) + chosen
        assert chosen[-1] == codec.end_token_id
