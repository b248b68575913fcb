"""Messages as people's tables have them: as text, by themselves, and with ShareGPT's keys and roles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pe_rlhf.config import DataSource
from pe_rlhf.data.examples import parse_example
from pe_rlhf.data.rows import load_examples, load_preferences, load_prompts
from reward.records import PreferenceRecord
from tests.runs import write_jsonl

ASK, YES, NO = ({"role": role, "content": text} for role, text in (("user", "Hi?"), *[("assistant", "Y")] * 2))
NO = NO | {"content": "N"}
OF_SHAREGPT = [[{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": text}] for text in "YN"]
PAIRS = {
    "JSON": {"chosen": json.dumps([ASK, YES]), "rejected": json.dumps([ASK, NO])},
    "Python": {"chosen": repr([ASK, YES]), "rejected": repr([ASK, NO])},
    "one message": {"prompt": [ASK], "chosen": YES, "rejected": NO},
    "ShareGPT": {"chosen": OF_SHAREGPT[0], "rejected": OF_SHAREGPT[1]},
    "other roles": {"prompt": [{"role": "Human", "content": "Hi?"}], "chosen": [YES], "rejected": [NO]},
    "no system": {"prompt": [{"role": "system", "content": None}, ASK], "chosen": [YES], "rejected": [NO]},
}


@pytest.mark.parametrize("form", PAIRS)
def test_messages_of_pairs(form: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [PAIRS[form]] * 2)
    layout, records, bad = load_preferences(DataSource(path=str(path)), "key", 0.0, lambda record: record)
    assert records == [PreferenceRecord([ASK], "Y", "N")] * 2
    assert (bad, "message" in layout or "dialogues" in layout) == ([], True)


@pytest.mark.parametrize("value", [json.dumps([ASK]), [{"from": "human", "value": "Hi?"}], ASK], ids=str)
def test_messages_of_prompts_and_examples(value: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": value, "completion": "Y"}])
    assert load_prompts(DataSource(path=str(path)), "key") == [[ASK]]
    examples, _ = load_examples(DataSource(path=str(path)), "key", 0.0, lambda example: example)
    assert examples == [parse_example({"prompt": [ASK], "completion": "Y"})]


def test_messages_of_a_table_of_text(tmp_path: Path) -> None:
    row = {"chosen": json.dumps([ASK, YES]), "rejected": json.dumps([ASK, NO])}
    pq.write_table(pa.Table.from_pylist([row] * 2), tmp_path / "pairs.parquet")
    source = DataSource(path=str(tmp_path / "pairs.parquet"))
    assert load_preferences(source, "key", 0.0, lambda record: record)[1] == [PreferenceRecord([ASK], "Y", "N")] * 2


@pytest.mark.parametrize("text", ['[{"a": 1}]', "[{'role': 1, broken", "[1, 2]", '[{"role": "user"}]', "say [{}]"])
def test_text_that_is_no_messages_stays_text(text: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text}])
    assert load_prompts(DataSource(path=str(path)), "key") == [text]
