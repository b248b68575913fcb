"""Cells and JSON of files of rows: what is a number, what is none, and what is refused."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from reward.row_files import finite_number, parse_json, probability, read_rows, whole
from tests.failures import raises


@pytest.mark.parametrize("value", [None, "", "  ", "nan", " NaN ", "NULL", "None", math.nan])
def test_an_empty_cell_has_no_number(value: Any) -> None:
    assert finite_number({"x": value}, "x") is None
    assert finite_number({"y": 1}, "x") is None
    assert probability({"x": value}, "x") is None
    assert whole({"x": value}, "x") is None


@pytest.mark.parametrize(("value", "found"), [(2, 2.0), (-0.5, -0.5), (" 3e2 ", 300.0), ("7", 7.0), (0, 0.0)])
def test_a_number_is_one_as_text_too(value: Any, found: float) -> None:
    assert finite_number({"x": value}, "x") == found


@pytest.mark.parametrize("value", [True, False, "x", "1,5", [1], {}, b"1x", 10**400, math.inf, "-inf", "1e999", "nane"])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with raises("invalid", key="x"):
        finite_number({"x": value}, "x")


@pytest.mark.parametrize("value", [-1e-9, 1.0001, "2"])
def test_a_probability_is_from_0_to_1(value: Any) -> None:
    assert [probability({"x": end}, "x") for end in (0, "0.25", 1)] == [0.0, 0.25, 1.0]
    with raises("invalid", key="x"):
        probability({"x": value}, "x")


@pytest.mark.parametrize("value", [-1, 0.5, "1.5"])
def test_a_whole_number_starts_at_0(value: Any) -> None:
    found = [whole({"x": each}, "x") for each in (0, "3", 4.0)]
    assert found == [0, 3, 4]
    assert all(isinstance(each, int) for each in found)
    with raises("invalid", key="x"):
        whole({"x": value}, "x")


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 3}', '[{"b": {"a": 1, "a": 1}}]', b'{"a": 1, "a": 1}'])
def test_a_key_twice_is_refused_at_any_depth(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="'a'"):
        parse_json(text)


def test_other_json_is_as_it_is() -> None:
    assert parse_json('{"a": {"b": [1, null]}, "b": "x"}') == {"a": {"b": [1, None]}, "b": "x"}
    assert parse_json(b"[]") == []


def test_a_pipe_is_no_file_of_rows(tmp_path: Path) -> None:
    """Nobody writes to it, so that reading it would never end."""
    os.mkfifo(tmp_path / "rows.jsonl")
    with raises("unreadable", file=tmp_path / "rows.jsonl"):
        list(read_rows(tmp_path / "rows.jsonl"))
