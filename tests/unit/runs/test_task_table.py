"""Average, forgetting and forward transfer of several tasks, worked by hand."""

import math
from typing import Literal

import pytest

from pe_rlhf.runs.task_table import Measured, TaskTable

# After each of three tasks (rows) the win-rate on each (columns); every interval is ± 0.098, a standard error of 0.05.
RATES = [[0.8, 0.6, 0.45], [0.7, 0.9, 0.55], [0.6, 0.85, 0.95]]
TASKS = ["a", "b", "c"]
HALF = 0.05 * 1.959964


def table(tasks: int = 3, how: Literal["in turn", "separate", "joint"] = "in turn") -> TaskTable:
    cells = [
        Measured(after, on, rate, rate - HALF, rate + HALF, n=100, kl=1.0, gold=None)
        for after, rates in zip(TASKS[:tasks], RATES, strict=False)
        for on, rate in zip(TASKS, rates, strict=True)
    ]
    return TaskTable(TASKS, cells, how)


def test_figures() -> None:
    found = table()
    assert found.average is not None
    assert found.forgetting is not None
    assert found.forward_transfer is not None
    assert found.average.value == pytest.approx((0.6 + 0.85 + 0.95) / 3)
    assert found.average.high - found.average.value == pytest.approx(HALF * math.sqrt(3) / 3, rel=1e-5)
    # Of a the best was 0.8, of b 0.9; the last task cannot be forgotten.
    assert found.forgetting.value == pytest.approx(((0.8 - 0.6) + (0.9 - 0.85)) / 2)
    assert found.forgetting.high - found.forgetting.value == pytest.approx(HALF * 2 / 2, rel=1e-5)
    # b after a, c after b.
    assert found.forward_transfer.value == pytest.approx((0.6 + 0.55) / 2 - 0.5)


def test_what_is_not_known_yet_is_none() -> None:
    found = table(2)
    assert found.average is None
    assert found.forgetting is None
    assert found.forward_transfer is not None
    assert TaskTable(TASKS, []).as_json() == {
        "tasks": TASKS,
        "average": None,
        "forgetting": None,
        "forward_transfer": None,
        "cells": [],
    }


def test_separate_policies_forget_nothing_and_each_counts_on_its_own_task() -> None:
    found = table(how="separate")
    assert found.average is not None
    assert found.average.value == pytest.approx((0.8 + 0.9 + 0.95) / 3)
    assert found.forgetting is None
    assert found.forward_transfer is None


def test_a_task_that_is_not_measured_is_left_out() -> None:
    found = TaskTable(TASKS, [cell for cell in table().cells if cell.on != "b"])
    assert found.average is not None
    assert found.forgetting is not None
    assert found.average.value == pytest.approx((0.6 + 0.95) / 2)
    assert found.forgetting.value == pytest.approx(0.8 - 0.6)
    assert Measured.of("a", "b", {"win_rate": None}) is None


def test_a_policy_of_all_tasks_at_once_has_its_average_only() -> None:
    cells = [
        Measured("joint", on, rate, rate - HALF, rate + HALF, 100, 1.0, None)
        for on, rate in zip(TASKS, RATES[2], strict=True)
    ]
    found = TaskTable(TASKS, cells, "joint")
    assert found.average is not None
    assert found.average.value == pytest.approx((0.6 + 0.85 + 0.95) / 3)
    assert (found.forgetting, found.forward_transfer) == (None, None)
