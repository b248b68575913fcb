"""Rows as the authors of known data sets publish them: what becomes of them, and what is left out with its reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.config import DataSource
from pe_rlhf.data.formats import SIGNATURES
from pe_rlhf.data.rows import load_examples, load_preferences, load_prompts
from reward.errors import InputError, Kind
from reward.records import PreferenceRecord
from tests.failures import raises
from tests.runs import PAIRS as RUN_PAIRS
from tests.runs import Tree, read_jsonl, recipe, write_jsonl
from tests.unit.stages.sft_runs import PAIRS as PAIRS_TO_COPY
from tests.unit.stages.sft_runs import sft, train


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def source(tmp_path: Path, name: str | None, rows: list[Tree], **settings: Any) -> DataSource:
    return DataSource(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)), format=name, **settings)


ARENA_55K = {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]'}
PAIRS: dict[str, tuple[Tree, tuple[Any, str, str, float | None], Tree]] = {
    # row, (prompt, chosen, rejected, margin), a row that is left out
    "hh_rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        ([user("q")], "a", "b", None),
        {"chosen": "Human: q", "rejected": "b"},
    ),
    "helpsteer2": (
        {"prompt": "q", "response_1": "b", "response_2": "a", "preference_strength": 2},
        ("q", "a", "b", 2.0),
        {"prompt": "q", "response_1": "b", "response_2": "a", "preference_strength": 0},
    ),
    "helpsteer3": (
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -2},
        ([user("q")], "a", "b", 2.0),
        {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0},
    ),
    "ultrafeedback": (
        {
            "instruction": "q",
            "completions": [{"response": r, "overall_score": s} for r, s in (("c", 5), ("a", 7.5), ("b", 3))],
        },
        ("q", "a", "b", 4.5),
        {"instruction": "q", "completions": [{"response": r, "overall_score": 5} for r in "ab"]},
    ),
    "ultrafeedback_binarized": (
        {
            "prompt": "q",
            "chosen": [user("q"), said("a")],
            "rejected": [user("q"), said("b")],
            "score_chosen": 8.5,
            "score_rejected": 8.0,
        },
        ([user("q")], "a", "b", 0.5),
        {"prompt": "q", "chosen": [user("q"), said("a")], "rejected": [user("p"), said("b")]},
    ),
    "shp": (
        {"history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": 0, "score_ratio": 1.0},
        ("q", "a", "b", 0.0),
        {"history": "q", "human_ref_A": "b"},
    ),
    "pku_saferlhf": (
        {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1, "safer_response_id": 0},
        ("q", "a", "b", None),
        {"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 2},
    ),
    "tldr": (
        {
            "info": {"post": "P", "subreddit": "s", "title": "T"},
            "summaries": [{"text": " b"}, {"text": " a"}],
            "choice": 1,
        },
        ("SUBREDDIT: r/s\n\nTITLE: T\n\nPOST: P\n\nTL;DR:", " a", " b", None),
        {"info": {"post": "P"}, "summaries": [{"text": " b"}], "choice": 1},
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [{"answer": a, "rank": r} for a, r in (("c", 2.0), ("b", 3.0), ("a", 1.0))],
        },
        ([user("q")], "a", "b", None),
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": []},
    ),
    "arena": (
        {"winner": "model_b", "conversation_a": [user("q"), said("b")], "conversation_b": [user("q"), said("a")]},
        ([user("q")], "a", "b", None),
        {"winner": "tie", "conversation_a": [user("q"), said("b")], "conversation_b": [user("q"), said("a")]},
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        ([user("q")], "a", "b", None),
        {"conversations": [{"from": "function_call", "value": "{}"}], "chosen": {}, "rejected": {}},
    ),
    "alpaca": (
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"},
        ([user("q\n\ni")], "a", "b", None),
        {"input": "i", "chosen": "a", "rejected": "b"},
    ),
    "pairwise": (
        {"prompt": "q", "response_a": "b", "response_b": "a", "winner": "model_b"},
        ("q", "a", "b", None),
        {"prompt": "q", "response_a": "b", "response_b": "a", "winner": "2"},
    ),
    "openai": (
        {"input": {"messages": [user("q")]}, "preferred_output": [said("a")], "non_preferred_output": [said("b")]},
        ([user("q")], "a", "b", None),
        {"input": {"messages": []}, "preferred_output": [said("a")]},
    ),
    "rewardbench2": (
        {"prompt": "q", "chosen": ["a"], "rejected": ["b"], "num_correct": 1, "subset": "Math"},
        ("q", "a", "b", None),
        {"prompt": "q", "chosen": ["a"], "rejected": [], "num_correct": 1},
    ),
    "implicit": (
        {"chosen": "q: a", "rejected": "q: b", "input": "x"},
        ("q:", " a", " b", None),
        {"chosen": "a", "rejected": "b"},
    ),
}
CHOSEN, SYSTEM = {"chosen": "a", "rejected": "b"}, {"role": "system", "content": "s"}
OTHERS: list[tuple[str, Tree, tuple[Any, str, str, float | None]]] = [
    ("arena", {**ARENA_55K, "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}, ([user("q")], "b", "a", None)),
    ("shp", {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, ("q", "a", "b", None)),
    ("tldr", {"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a", "b", None)),
    (
        "ultrafeedback_binarized",
        {"instruction": "q", "chosen_response": "a", "rejected_response": "b", "chosen_avg_rating": 4.0}
        | {"rejected_avg_rating": 1.5},
        ("q", "a", "b", 2.5),
    ),
    ("alpaca", {"system": "s", "question": "q"} | CHOSEN, ([SYSTEM, user("q")], "a", "b", None)),  # Orca's
    ("alpaca", {"system": "s", "input": "q"} | CHOSEN, ([SYSTEM, user("q")], "a", "b", None)),  # distilabel's
    ("alpaca", {"system": "", "question": "q"} | CHOSEN, ([user("q")], "a", "b", None)),
    ("alpaca", {"instruction": "q", "output": ["a", "b"]}, ([user("q")], "a", "b", None)),  # LLaMA-Factory's
    (
        "sharegpt",
        {"messages": [user("q")], "chosen": said("a"), "rejected": said("b")},
        ([user("q")], "a", "b", None),
    ),
    ("pairwise", {"question": "q", "answer_0": "b", "answer_1": "a", "winner": 1}, ("q", "a", "b", None)),
    ("pairwise", {"prompt": "q", "response_1": "a", "response_2": "b", "preference": "1"}, ("q", "a", "b", None)),
    ("pairwise", {"prompt": "q", "output_A": "b", "output_B": "a", "label": "output_B"}, ("q", "a", "b", None)),
    (
        "pairwise",  # WebGPT's, flat
        {"question": "q", "answer_0": "b", "answer_1": "a", "score_0": -0.5, "score_1": 0.75},
        ("q", "a", "b", 1.25),
    ),
    (
        "helpsteer2",
        {"prompt": "q<extra_id_1>Assistant\na\n<extra_id_1>User\nr\n", "response_1": "a", "response_2": "b"}
        | {"preference_strength": -1},
        ([user("q"), said("a"), user("r")], "a", "b", 1.0),
    ),
]


def as_tuple(record: PreferenceRecord) -> tuple[Any, str, str, float | None]:
    return record.prompt, record.chosen, record.rejected, record.margin


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_every_format_and_what_is_left_out(tmp_path: Path, name: str) -> None:
    row, expected, refused = PAIRS[name]
    data = source(tmp_path, name, [row, refused, row])
    _, records, left_out = load_preferences(data, "reward.data", 0.5, lambda record: record)
    assert [as_tuple(record) for record in records] == [expected] * 2
    assert [bad.row for bad in left_out] == [2]
    assert left_out[0].reason
    assert load_prompts(data, "ppo.prompts", 0.5)[0] == expected[0]


REFUSED: dict[str, Kind] = {  # why the rows above are left out
    **dict.fromkeys(PAIRS, "invalid"),
    **dict.fromkeys(("helpsteer2", "helpsteer3", "ultrafeedback", "arena"), "conflict"),  # ties
    "ultrafeedback_binarized": "conflict",  # two prompts
    "rewardbench2": "empty",
    "implicit": "missing",  # no prompt that both start with
}


def test_what_is_made_of_pairs_trains_and_what_is_left_out_is_listed(tmp_path: Path) -> None:
    """The reward model takes one step on a row of each format."""
    parts = []
    for name, (row, _, refused) in PAIRS.items():
        path = write_jsonl(tmp_path / f"{name}.jsonl", [row, refused])
        parts.append({"path": str(path), "format": name})
    held_out = write_jsonl(tmp_path / "held_out.jsonl", RUN_PAIRS)
    data = {"data": {"mix": parts}, "eval_data": str(held_out), "batch_size": len(parts), "max_bad_share": 0.5}
    train(recipe("reward", reward=data | {"epochs": 1}), tmp_path / "run")
    (step,) = read_jsonl(tmp_path / "run/reward/metrics.jsonl")
    assert math.isfinite(step["loss"])
    assert json.loads((tmp_path / "run/reward/summary.json").read_text())["train_pairs"] == len(parts)
    assert left_out(tmp_path / "run/reward/left_out_data.jsonl") == {name: (2, kind) for name, kind in REFUSED.items()}


def left_out(path: Path) -> dict[str, tuple[int, Kind]]:
    """By file of the mixture: the row, and the kind of the reason."""
    rows = read_jsonl(path)
    assert all(row["reason"].partition(": ")[2] for row in rows)
    return {Path(row["reason"].partition(": ")[0]).stem: (row["row"], row["kind"]) for row in rows}


@pytest.mark.parametrize(("name", "row", "expected"), OTHERS)
def test_pairs_of_other_makes(tmp_path: Path, name: str, row: Tree, expected: tuple[Any, ...]) -> None:
    _, records, left_out = load_preferences(source(tmp_path, name, [row]), "reward.data", 0, lambda record: record)
    assert ([as_tuple(record) for record in records], left_out) == ([expected], [])


def test_helpsteer2_scores_are_pairs_of_rows(tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": r, "helpfulness": h} for p, r, h in (("p", "a", 4), ("p", "b", 1), ("q", "c", 2))]
    data = source(tmp_path, "helpsteer2", [*rows, {"prompt": "q", "response": "d", "helpfulness": 2}])
    _, records, left_out = load_preferences(data, "reward.data", 0, lambda record: record)
    assert [as_tuple(record) for record in records] == [("p", "a", "b", 3.0)]
    assert len(left_out) == 1  # a tie


def test_ties_are_listed_and_do_not_count_as_unusable(tmp_path: Path) -> None:
    row, _, tie = PAIRS["arena"]
    _, records, left_out = load_preferences(source(tmp_path, "arena", [tie, row, tie]), "reward.data", 0, lambda r: r)
    assert (len(records), [bad.row for bad in left_out]) == (1, [1, 3])
    with raises("empty", key="reward.data"):
        load_preferences(source(tmp_path, "arena", [tie]), "reward.data", 1, lambda record: record)


def test_columns_are_renamed_before_the_format_reads_them(tmp_path: Path) -> None:
    safer = source(
        tmp_path, "pku_saferlhf", [PAIRS["pku_saferlhf"][0]], columns={"better_response_id": "safer_response_id"}
    )
    _, records, _ = load_preferences(safer, "reward.data", 0, lambda record: record)
    assert as_tuple(records[0]) == ("q", "b", "a", None)


EXAMPLES: list[tuple[str, Tree, tuple[Any, str]]] = [
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        ([{"role": "system", "content": "s"}, user("q")], "a"),
    ),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, ([user("q")], "a")),
    (
        "alpaca",
        {"instruction": "q", "context": "c", "response": "a", "category": "x"},
        ([user("q\n\nc")], "a"),
    ),  # Dolly
    ("tldr", {"prompt": "q", "label": "a"}, ("q", "a")),
    ("helpsteer2", {"prompt": "q", "response": "a", "helpfulness": 3}, ("q", "a")),
]


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES)
def test_examples_and_their_prompts(tmp_path: Path, name: str, row: Tree, expected: tuple[Any, str]) -> None:
    data = source(tmp_path, name, [row])
    examples, _ = load_examples(data, "sft.data", 0, lambda example: example)
    assert [(example.prompt, example.response) for example in examples] == [expected]
    assert load_prompts(data, "ppo.prompts") == [expected[0]]


NO_EXAMPLES: dict[str, tuple[Tree, Kind]] = {
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "tool", "value": "a"}]}, "invalid"),
    "alpaca": ({"instruction": "q", "input": "", "output": " "}, "empty"),
    "tldr": ({"prompt": "q"}, "invalid"),
    "helpsteer2": ({"prompt": "r", "helpfulness": 3}, "invalid"),
    "kto": ({"prompt": "q", "completion": "b", "label": False}, "conflict"),
}


def test_what_is_made_of_examples_trains_and_what_is_left_out_is_listed(tmp_path: Path) -> None:
    """The sft stage takes one step on the rows above, and on those of TRL's KTOTrainer."""
    good = {name: row for name, row, _ in EXAMPLES} | {"kto": {"prompt": "q", "completion": "a", "label": True}}
    parts = []
    for name, (refused, _) in NO_EXAMPLES.items():
        path = write_jsonl(tmp_path / f"{name}.jsonl", [good[name], refused])
        parts.append({"path": str(path)} | ({} if name == "kto" else {"format": name}))
    tree = sft("random:tiny-llama", tmp_path, PAIRS_TO_COPY, data={"mix": parts}, max_bad_share=0.5, batch_size=6)
    assert train(tree, tmp_path / "run")["steps"] == 1
    expected = {name: (2, kind) for name, (_, kind) in NO_EXAMPLES.items()}
    assert left_out(tmp_path / "run/sft/left_out_data.jsonl") == expected


def test_a_system_column_that_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "orca.jsonl", [{"system": "s", "question": "q", **CHOSEN}])
    data = DataSource.model_validate({"path": str(path), "columns": {"prompt": "question"}})
    load_preferences(data, "reward.data", 0, lambda record: record)
    assert "'system' is left out" in capsys.readouterr().err
    load_prompts(source(tmp_path, "alpaca", [{"system": "s", "question": "q", **CHOSEN}]), "ppo.prompts")
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_data_set_without_its_format_is_told_which_it_may_be(tmp_path: Path, name: str) -> None:
    """By its columns; it is not read as something else."""
    rows = [PAIRS[name][0] if name in PAIRS else {}, *(row for other, row, _ in OTHERS if other == name)]
    row = next((row for row in rows if SIGNATURES[name] <= row.keys()), dict.fromkeys(SIGNATURES[name], "x"))
    with pytest.raises(InputError) as raised:
        load_preferences(source(tmp_path, None, [row] * 4), "reward.data", 0.05, lambda record: record)
    assert (raised.value.kind, raised.value.key) == ("missing", "reward.data")
    assert str(raised.value.fix).endswith(f": {name}")


@pytest.mark.parametrize("mark", ["<|im_start|>user\n", "[INST] ", "<start_of_turn>user\n", ""])
def test_texts_with_the_marks_of_a_chat_template_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: str
) -> None:
    """They would be rendered twice, and nothing else would say so."""
    rows = [{"chosen": f"{mark}q a", "rejected": f"{mark}q b"}] * 4
    load_preferences(source(tmp_path, "implicit", rows), "reward.data", 0.05, lambda record: record)
    load_prompts(source(tmp_path, None, [{"prompt": f"{mark}q"}]), "ppo.prompts")
    said = capsys.readouterr().err
    assert [f"warning: {key}" in said for key in ("reward.data", "ppo.prompts")] == [bool(mark)] * 2
    assert (mark.strip().split("\n")[0].removesuffix("user") in said) or not mark


def test_a_format_that_there_is_not(tmp_path: Path) -> None:
    data = source(tmp_path, "helpstear3", [PAIRS["helpsteer3"][0]])
    with raises("unknown", key="reward.data.format", fix="did you mean 'helpsteer3'?"):
        load_preferences(data, "reward.data", 0, lambda record: record)
