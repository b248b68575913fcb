"""The table a run ends with: a row for what is known, whole where there is no terminal."""

from __future__ import annotations

import io

from rich.console import Console

from pe_rlhf.stages.outcome_table import HEADINGS, outcome_table
from pe_rlhf.system.progress import console

EVALUATE = (
    {"win_rate": 0.7125, "ci_low": 0.625, "ci_high": 0.7875, "n": 80, "ties": 4, "kl": 2.437, "seconds": 2.4}
    | {"gold_policy": None, "gold_anchor": None, "reward_policy": 1.873, "reward_anchor": -0.412}
    | {"mean_length_policy": 36.25, "mean_length_anchor": 33.5, "peak_rss_mib": 700.2}
)


def rows(summaries: dict[str, dict[str, object]], width: int) -> dict[str, list[str]]:
    file = io.StringIO()
    Console(file=file, width=width).print(outcome_table("x", summaries))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in file.getvalue().splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) == len(HEADINGS)}


def test_a_row_for_each_result_that_is_known() -> None:
    assert rows({"evaluate": dict(EVALUATE), "ppo": {"steps": 3, "seconds": 1.0, "peak_rss_mib": 812.6}}, 200) == {
        "reward, held-out prompts": ["-0.412", "1.873", ""],
        "KL, held-out prompts": ["0.00", "2.44", ""],
        "response length (tokens)": ["33.5", "36.2", ""],
        "win-rate against the anchor": ["0.500", "0.713", "0.625 – 0.787, 80 (4 ties)"],
        "peak memory (MiB), time (s)": ["813", "3", ""],
    }


def test_the_console_has_room_for_the_table_outside_a_terminal() -> None:
    whole = rows({"evaluate": dict(EVALUATE)}, 200)
    assert rows({"evaluate": dict(EVALUATE)}, 60) != whole  # where rich knows a width it cuts
    assert console.is_terminal or rows({"evaluate": dict(EVALUATE)}, console.width) == whole
