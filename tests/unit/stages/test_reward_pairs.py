"""The pairs of the reward stage: split by prompt, cut to a length, with or without an end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.failures import raises
from tests.runs import Tree, write_jsonl
from tests.unit.stages.test_reward import learnable, pairs_of, recipe


def test_fewer_pairs_are_some_of_more_and_the_held_out_ones_stay(tmp_path: Path) -> None:
    def sides(**settings: int) -> tuple[list[Any], list[Any]]:
        train, held_out, _ = pairs_of(recipe(tmp_path, learnable(), eval_share=0.2, **settings), tmp_path)
        return [*train.pairs], [*held_out.pairs]

    train, held_out = sides()
    few, more, all_of_them = (sides(max_pairs=count) for count in (5, 20, 1000))
    assert [len(side[0]) for side in (few, more, all_of_them)] == [5, 20, len(train)]
    assert few[0] == more[0][:5]
    assert all(pair in train for pair in more[0])
    assert more[0] != train[:20]  # drawn, not the first rows of the file
    assert few[1] == more[1] == all_of_them[1] == held_out


def test_the_split_is_by_prompt(tmp_path: Path) -> None:
    """No prompt on both sides, text or messages; the seed decides which."""
    rows = learnable()
    for row in rows[:40]:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    write_jsonl(tmp_path / "messages.jsonl", rows[:40])
    sides = []
    for data, seed in (("pairs.jsonl", 0), ("messages.jsonl", 0), ("pairs.jsonl", 1)):
        tree = recipe(tmp_path, learnable(), eval_share=0.2)
        tree["seed"] = seed
        tree["reward"]["data"] = str(tmp_path / data)
        train, held_out, _ = pairs_of(tree, tmp_path)
        known, unknown = ({tuple(pair.prompt) for pair in side.pairs} for side in (train, held_out))
        assert not known & unknown
        assert (len(known), len(unknown)) == ((8, 2) if data == "messages.jsonl" else (24, 6))
        assert (len(train), len(held_out)) == (4 * len(known), 4 * len(unknown))
        sides.append(unknown)
    assert sides[0] != sides[2]


def test_a_small_share_still_holds_a_prompt_out(tmp_path: Path) -> None:
    _, held_out, _ = pairs_of(recipe(tmp_path, learnable()[:8], eval_share=0.01), tmp_path)
    assert len(held_out) == 4


def test_one_prompt_is_too_few_to_split(tmp_path: Path) -> None:
    with raises("empty", key="reward.data"):
        pairs_of(recipe(tmp_path, learnable()[:4], eval_share=0.5), tmp_path)


def test_prompts_are_cut_on_the_left_and_responses_on_the_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["short:", "a prompt that is a good deal longer than fits:", "x:"]
    responses = [" fits", " this also fits, 23 it is", " this response by itself is over the limit"]
    rows = [{"prompt": p, "chosen": r, "rejected": " no"} for p, r in zip(prompts, responses, strict=True)]
    write_jsonl(tmp_path / "held_out.jsonl", rows)
    tree = recipe(tmp_path, rows, eval_data=str(tmp_path / "held_out.jsonl"), max_length=30)
    train, _, backbone = pairs_of(tree, tmp_path)
    end = backbone.eos_token_ids[0]

    def ids(text: str) -> list[int]:
        return backbone.tokenizer(text)["input_ids"]

    assert [pair.chosen for pair in train.pairs] == [
        [*ids(responses[0]), end],
        [*ids(responses[1]), end],
        ids(responses[2])[:29],
    ]
    # 25 characters and EOS leave 4. The other response could have more of the prompt, and then the two would be scored
    # under different prompts.
    assert [pair.prompt for pair in train.pairs] == [ids(prompts[0]), ids(prompts[1])[-4:], ids(prompts[2])[-1:]]
    assert [pair.rejected for pair in train.pairs] == [[*ids(" no"), end]] * 3
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("reward.eval_data: cut"))
    assert re.findall(r"\d+", said) == ["30", "3", "2", "1"]  # tokens, rows, prompts, responses


def test_held_out_dialogues_that_begin_as_those_of_training_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three: one with the same prompt, one that goes on otherwise after the same first turn."""

    def pair(*turns: str) -> Tree:
        said = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))
        return {side: f"{said}\n\nAssistant: {side}" for side in ("chosen", "rejected")}

    held_out = [pair("one"), pair("two", "a", "b"), pair("three")]
    write_jsonl(tmp_path / "held_out.jsonl", held_out)
    rows = [pair("one"), pair("two", "c", "d"), pair("four")]
    tree = recipe(tmp_path, rows, eval_data=str(tmp_path / "held_out.jsonl"))
    pairs_of(tree, tmp_path)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "same turn" in line]
    assert (said.split(":")[0], re.findall(r"\d+", said)) == ("reward.eval_data", ["2", "3"])


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_truncated_responses_get_no_eos(tmp_path: Path, side: str) -> None:
    rows = [{"prompt": f"{i}:", "chosen": " yes", "rejected": " no", f"{side}_truncated": True} for i in range(4)]
    train, _, backbone = pairs_of(recipe(tmp_path, rows, eval_share=0.5), tmp_path)
    end = backbone.eos_token_ids[0]
    for pair in train.pairs:
        assert [pair.chosen[-1] == end, pair.rejected[-1] == end] == [side == "rejected", side == "chosen"]
