"""hh-rlhf, both parts, trains a reward model and a policy through the chat templates of five families."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.system.files import read_jsonl
from tests.chat_templates import FAMILIES
from tests.hh_rlhf import PARTS, alternates, messages_of, pair_of
from tests.runs import Outcome, recipe, write_recipe
from tests.tiny import tiny_model

pytestmark = pytest.mark.shared
ROWS = 800  # of each part
LEFT_OUT = {"pairs": 9, "prompts": 4, "refused": 3}  # of both parts
REFUSES = {"mistral", "gemma3"}  # their templates want the turns to alternate


def left_out(file: Path, by_part: dict[str, Path]) -> dict[str, set[int]]:
    """The numbers of the rows that a run has listed, by part."""
    listed: dict[str, set[int]] = {part: set() for part in PARTS}
    for row in read_jsonl(file):
        assert row["reason"]
        (part,) = (name for name, path in by_part.items() if row["reason"].startswith(f"{path}: "))
        listed[part].add(row["row"])
    return listed


@pytest.mark.parametrize("name", FAMILIES)
def test_both_stages_train_and_list_what_they_leave_out(
    name: str, shared_data: Path, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    ends = {"bos_token_id": 0, "eos_token_id": family.ends, "pad_token_id": 2}
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048, **ends)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    paths = {part: shared_data / "hh_rlhf" / f"{part}.jsonl.gz" for part in PARTS}
    both = {"mix": [{"path": str(path), "split": f"train[:{ROWS}]"} for path in paths.values()]}
    changes: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "chat_template_kwargs": {"enable_thinking": False},
        "reward": {"data": both, "max_length": 512, "max_pairs": 16, "batch_size": 8, "eval_share": 0.002, "epochs": 1},
        "ppo__prompts": both,
        "ppo__reward": [{"adapter": "stage"}],
        "ppo__steps": 1,
    }
    outcome = cli("run", write_recipe(tmp_path, recipe("reward", "ppo", **changes)), "--run-dir", "run")
    assert outcome.code == 0, outcome

    refused: dict[str, set[int]] = {}
    no_pair: dict[str, set[int]] = {}
    no_prompt: dict[str, set[int]] = {}
    for part, path in paths.items():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, ROWS)]
        pairs = {number: pair_of(row) for number, row in enumerate(rows, start=1)}
        no_pair[part] = {number for number, pair in pairs.items() if pair is None}
        refused[part] = {number for number, pair in pairs.items() if pair and not alternates(pair[0])}
        whole = [[messages_of(row[side])[:-1] for side in ("chosen", "rejected")] for row in rows]
        no_prompt[part] = {number for number, (a, b) in enumerate(whole, start=1) if a != b}
    counts = {"pairs": no_pair, "prompts": no_prompt, "refused": refused}
    assert {what: sum(map(len, of.values())) for what, of in counts.items()} == LEFT_OUT
    also = refused if name in REFUSES else {part: set[int]() for part in PARTS}
    listed = tmp_path / "run/reward/left_out_data.jsonl", tmp_path / "run/ppo/left_out_prompts.jsonl"
    assert left_out(listed[0], paths) == {part: no_pair[part] | also[part] for part in PARTS}
    assert left_out(listed[1], paths) == {part: no_prompt[part] | also[part] for part in PARTS}
    (reward,) = {row["step"] for row in read_jsonl(tmp_path / "run/reward/metrics.jsonl")[-1:]}
    (ppo,) = read_jsonl(tmp_path / "run/ppo/metrics.jsonl")
    assert (reward, ppo["kl"]) == (2, pytest.approx(0, abs=1e-4))
