"""Several data sets as one: shares by hand, turns, labels, unusable rows, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pe_rlhf.config import DataSource, Recipe
from pe_rlhf.config.load import load_recipe
from pe_rlhf.data.mixture import shares
from pe_rlhf.data.rows import load_examples, load_preferences, load_prompt_rows
from reward.errors import Kind
from tests.failures import raises
from tests.runs import Outcome, Tree, recipe, write_jsonl, write_recipe


def files(folder: Path, **counts: int) -> list[str]:
    return [
        str(write_jsonl(folder / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(count)]))
        for name, count in counts.items()
    ]


def prompts(source: Tree) -> list[tuple[str, object]]:
    rows, _ = load_prompt_rows(DataSource.model_validate(source), "ppo.prompts", lambda row: row)
    return [(str(row.prompt), row.columns.get("source")) for row in rows]


@pytest.mark.parametrize(
    ("weights", "there", "size", "expected"),
    [
        ([1, 1], [10, 4], None, [4, 4]),
        ([3, 1], [10, 4], None, [10, 3]),  # ten thirds of a row of the second for each of the first
        ([2, 1], [10, 10], 9, [6, 3]),
        ([1, 1, 1], [5, 5, 5], 10, [4, 3, 3]),
        ([1, 3], [2, 2], 8, [2, 6]),
        ([0.1, 0.2], [100, 200], None, [100, 200]),
    ],
)
def test_shares_are_in_proportion(
    weights: list[float], there: list[int], size: int | None, expected: list[int]
) -> None:
    assert shares(weights, there, size) == expected


def test_without_weights_all_rows_take_turns(tmp_path: Path) -> None:
    a, b = files(tmp_path, a=4, b=2)
    assert prompts({"mix": [a, {"path": b, "label": "other"}]}) == [
        *(("a 0", "a"), ("b 0", "other"), ("a 1", "a")),
        *(("a 2", "a"), ("b 1", "other"), ("a 3", "a")),
    ]


def test_weights_choose_evenly_spaced_rows_and_repeat_them_where_a_size_asks_for_it(tmp_path: Path) -> None:
    a, b = files(tmp_path, a=6, b=2)
    mix = [{"path": a, "weight": 1}, {"path": b, "weight": 1}]
    assert Counter(name for _, name in prompts({"mix": mix})) == {"a": 2, "b": 2}
    found = prompts({"mix": mix, "size": 8})
    assert Counter(text for text, _ in found) == {"a 0": 1, "a 1": 1, "a 3": 1, "a 4": 1, "b 0": 2, "b 1": 2}
    assert found == prompts({"mix": mix, "size": 8})


def test_a_label_is_what_the_column_says_and_a_name_only_where_there_is_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "source": "web"}])
    assert prompts({"mix": [str(path)]}) == [("a", "web")]
    assert prompts({"mix": [{"path": str(path), "label": "mine"}]}) == [("a", "mine")]


def test_each_part_has_its_own_layout_split_and_bad_rows(tmp_path: Path) -> None:
    pairs = write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 9 + [{"prompt": "x"}]
    )
    hh = "\n\nHuman: hi\n\nAssistant:"
    dialogues = write_jsonl(tmp_path / "hh.jsonl", [{"chosen": f"{hh} yes", "rejected": f"{hh} no"}] * 4)
    mix = [str(pairs), {"path": str(dialogues), "format": "hh_rlhf", "split": "train[:2]"}]
    layout, records, bad = load_preferences(
        DataSource.model_validate({"mix": mix}), "reward.data", 0.2, lambda record: record
    )
    assert len(records) == 9 + 2
    assert "; " in layout
    assert [(record.row, record.reason.startswith(str(pairs))) for record in bad] == [(10, True)]
    with raises("invalid", key="reward.data.mix.0", file=str(pairs), row=10):
        load_preferences(DataSource.model_validate({"mix": mix}), "reward.data", 0.05, lambda record: record)


def test_examples_are_mixed_too(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    two = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    examples, bad = load_examples(
        DataSource.model_validate({"mix": [str(one), str(two)]}), "sft.data", 0.05, lambda example: example
    )
    assert (len(examples), bad) == (2, [])


@pytest.mark.parametrize(
    ("source", "kind", "key"),
    [
        ({}, "missing", "path"),
        ({"mix": []}, "empty", "mix"),
        ({"mix": ["a.jsonl"], "path": "b.jsonl"}, "conflict", "path"),
        ({"mix": ["a.jsonl"], "split": "train[:1]"}, "conflict", "split"),
        ({"mix": ["a.jsonl"], "columns": {"prompt": "q"}}, "conflict", "columns"),
        ({"mix": ["a.jsonl", {"path": "b.jsonl", "weight": 1}]}, "missing", "mix.0.weight"),
        ({"mix": [{"path": "a.jsonl", "weight": 0}]}, "invalid", "mix.0.weight"),
        ({"mix": [{"weight": 1}]}, "missing", "mix.0.path"),
        ({"mix": [{"mix": ["a.jsonl"]}]}, "unknown", "mix.0.mix"),
        ({"mix": ["a.jsonl"], "size": 3}, "missing", "size"),
        ({"path": "a.jsonl", "size": 3}, "conflict", "size"),
        ({"mix": ["x/a.jsonl", "y/a.jsonl"]}, "conflict", "mix.1.label"),
        ({"mix": [{"path": "b.jsonl", "label": "a"}, "a.jsonl"]}, "conflict", "mix.1.label"),
    ],
    ids=str,
)
def test_what_is_no_mixture_is_refused(tmp_path: Path, source: Tree, kind: Kind, key: str) -> None:
    path = write_recipe(tmp_path, recipe("ppo", ppo__prompts=source))
    with raises(kind, key=f"ppo.prompts.{key}"):
        load_recipe(path)


def test_a_part_that_is_missing_or_too_small_is_named(tmp_path: Path) -> None:
    a, b = files(tmp_path, a=4, b=2)
    with raises("missing", key="ppo.prompts.mix.1"):
        prompts({"mix": [a, str(tmp_path / "none.jsonl")]})
    with raises("empty", key="ppo.prompts.mix.1", file=b):
        prompts({"mix": [{"path": a, "weight": 100}, {"path": b, "weight": 1}]})


def test_the_parts_are_found_beside_the_recipe(tmp_path: Path) -> None:
    files(tmp_path, a=1, b=1)
    loaded: Recipe = load_recipe(write_recipe(tmp_path, recipe("ppo", ppo__prompts={"mix": ["a.jsonl", "b.jsonl"]})))
    assert loaded.ppo is not None
    assert [part.path for part in loaded.ppo.prompts.mix or []] == [str(tmp_path / f"{name}.jsonl") for name in "ab"]


def test_shares_are_those_of_prompts_that_are_short_enough(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    short, long = ([{"prompt": text} for text in texts] for texts in (["a"] * 6, ["b"] * 3 + ["word " * 40] * 3))
    mix = []
    for name, rows in (("short", short), ("long", long)):
        mix.append({"path": str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), "weight": 1})
    (tmp_path / "scores.py").write_text(
        "def by_part(prompts, responses, source):\n"
        "    open('seen', 'a').write(''.join(f'{name}\\n' for name in source))\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    tree = recipe(
        "ppo",
        ppo__prompts={"mix": mix},
        ppo__max_prompt_tokens=20,
        ppo__batch_size=6,
        ppo__steps=1,
        ppo__reward=[{"function": "scores:by_part"}],
    )
    done = cli("run", write_recipe(tmp_path, tree), "--run-dir", "out")
    assert done.code == 0, done
    # Three prompts of the second part fit, so that three of the first make equal shares; one step takes all six.
    assert Counter((tmp_path / "seen").read_text().split()) == {"short": 3, "long": 3}
    assert "ppo.prompts.mix.1: left out 3 of 6 prompts" in done.err
    write_jsonl(tmp_path / "long.jsonl", long[3:])
    failed = cli("run", write_recipe(tmp_path, tree), "--run-dir", "other")
    assert (failed.code, getattr(failed.error, "key", None)) == (2, "ppo.prompts.mix.1")
