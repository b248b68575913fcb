"""`make stats`, `make results` and `same_run.py`: their numbers against ones counted by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import hh_small, results, same_run, stats
from tests.runs import write_jsonl

SOURCE = """# one
def outer():  # two
    text = "# none"

    def inner():
        return text

    return inner
"""


def test_comments_and_functions_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "ROOT", tmp_path)
    path = tmp_path / "pe_rlhf" / "model" / "fast" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text(SOURCE)
    assert stats.comment_lines(SOURCE) == 2
    assert stats.function_lengths(path) == [
        (7, "pe_rlhf/model/fast/a.py:2 outer"),
        (2, "pe_rlhf/model/fast/a.py:5 inner"),
    ]
    assert stats.room(path) == "pe_rlhf/model"


def test_seconds_are_added_up_by_tier(tmp_path: Path) -> None:
    cases = [("tests.unit.algo.test_kl", 1.5), ("tests.unit.test_types", 2.0), ("tests.real.test_smollm2", 4.0)]
    lines = "".join(f'<testcase classname="{name}" time="{seconds}"/>' for name, seconds in cases)
    path = tmp_path / "test.xml"
    path.write_text(f'<testsuites><testsuite time="4.1">{lines}</testsuite></testsuites>')
    assert stats.test_seconds(path) == {"unit": (3.5, 2), "real": (4.0, 1)}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"step": 2, "loss": float("nan"), "seconds": 9.0, "tokens_per_second_rollout": 1.0, "peak_memory_mib": 1}, 0),
        ({"step": 2, "loss": 0.5}, 1),
        ({"step": 2, "loss": float("nan"), "kl": 0.0}, 1),
    ],
)
def test_runs_are_the_same_but_for_time_and_memory(tmp_path: Path, row: dict[str, float], code: int) -> None:
    first, last = {"step": 1, "loss": 0.25}, {"step": 2, "loss": float("nan"), "seconds": 1.0}
    for name, rows in (("before", [first, last]), ("after", [first, row])):
        (tmp_path / name / "ppo" / "adapter").mkdir(parents=True)
        write_jsonl(tmp_path / name / "ppo" / "metrics.jsonl", rows)
        (tmp_path / name / "ppo" / "adapter" / "role.safetensors").write_bytes(b"w")
    before, after = tmp_path / "before", tmp_path / "after"
    assert same_run.main(before, after) == code
    (after / "ppo" / "adapter" / "role.safetensors").write_bytes(b"v")
    assert same_run.main(before, after) == 1
    (after / "ppo" / "metrics.jsonl").unlink()
    assert same_run.main(before, after) == 1
    assert same_run.main(after, before) == 1  # nothing to compare is no proof


def _estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


UNKNOWN = dict.fromkeys(
    ("gold", "reward", "kl", "at_equal_kl", "judge_at_equal_kl", "reward_accuracy", "reward_peak_mib", "peak_mib")
)
ARM: dict[str, Any] = UNKNOWN | {
    "arm": "lora",
    "settings": {"ppo.learning_rate": 0.003},
    "failed": [3],
    "win_rate": _estimate(0.75, 0.5, 1.0),
    "kl": _estimate(5.06, 4.0, 6.0),
    "trainable_parameters": 12345,
    "collapses": [{"seed": 2, "kind": "KL blow-up", "step": 7}],
}
SUMMARY: dict[str, Any] = {
    "command": "pe-rlhf compare small model=/data/models/tiny/hf ppo.steps=3",
    "seeds": "1, 2, 3",
    "date": "2026-11-28",
    "machine": "2 cores, a processor",
    "equal_kl": 1.8,
    "arms": [ARM, ARM | {"arm": "other", "settings": {}, "failed": [], "win_rate": None, "collapses": []}],
    "runs": [
        {"arm": "lora", "status": "finished", "evaluate": {"win_rate": 0.7}},
        {"arm": "lora", "status": "finished", "evaluate": {"win_rate": 0.8}},
        {"arm": "lora", "status": "failed", "evaluate": {}},
    ],
    "trials": [{"arm": "lora", "learning_rate": rate, "chosen": rate == 0.003} for rate in (0.0003, 0.001, 0.003)],
}


def test_a_result_is_written_anew_and_the_words_around_it_stay(tmp_path: Path) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "docs" / "small"
    runs.mkdir()
    for name in ("results.csv", "win_rates.svg", "report.html"):
        (runs / name).write_text(f"new {name}")
    (runs / "summary.json").write_text(json.dumps(SUMMARY))
    results.commits_of(runs).write_text("abc1234\ndef5678+\n")
    page = results.publish("small", runs, folder)
    assert page.read_text().startswith("# small\n")
    page.write_text(page.read_text().replace("# small", "# Small\n\nWords before.") + "\nWords after.\n")
    (runs / "summary.json").write_text(json.dumps(SUMMARY | {"date": "2026-12-24"}))
    results.publish("small", runs, folder)
    before, after = page.read_text().split(f"{results.BEGIN}\n\n")
    numbers, after = after.split(f"\n\n{results.END}")
    assert (before, after) == ("# Small\n\nWords before.\n\n", "\n\nWords after.\n")
    origin, table, figure = numbers.split("\n\n")
    facts = "commits abc1234, def5678+, seeds 1, 2, 3, 2026-12-24, 2 cores, a processor"
    assert origin == f"`pe-rlhf compare small model=path/to/tiny ppo.steps=3`, {facts}. [results.csv](results.csv)"
    parameters = "trained parameters, policy and critic"
    collapsed = "seed 3: failed; seed 2: KL blow-up at step 7"
    assert [line.strip("| ").split(" | ") for line in table.splitlines()] == [
        [*("arm", "learning rate", "win-rate against the anchor", "by seed", "KL"), parameters, "failed or collapsed"],
        ["---"] * 7,
        ["`lora`", "0.003 (edge)", "0.750 (0.500 – 1.000)", "0.700, 0.800", "5.1", "12,345", collapsed],
        ["`other`", "–", "–", "–", "5.1", "12,345", "–"],
    ]
    assert figure == "![win rates](win_rates.svg)"
    assert {path.name for path in folder.iterdir()} == {"README.md", "results.csv", "win_rates.svg"}


def test_a_result_of_several_tasks_has_each_after_each() -> None:
    found = {
        "average": {"value": 0.7, "low": 0.6, "high": 0.8},
        "forgetting": {"value": 0.1, "low": None, "high": None},
        "a → a": {"value": 0.9, "low": None, "high": None},
        "b → a": {"value": 0.8, "low": None, "high": None},
        "b → b": {"value": 0.6, "low": None, "high": None},
    }
    arms = [ARM | {"tasks": found}, ARM | {"arm": "other", "tasks": {}, "failed": [1], "collapses": []}]
    whole, each = results.tables(SUMMARY | {"arms": arms})
    assert [line.strip("| ").split(" | ") for line in whole.splitlines()][2:] == [
        ["`lora`", "0.700 (0.600 – 0.800)", "0.100", "0.700, 0.800", "seed 3: failed; seed 2: KL blow-up at step 7"],
        ["`other`", "–", "–", "–", "seed 1: failed"],
    ]
    assert [line.strip("| ").split(" | ") for line in each.splitlines()] == [
        ["arm", "after", "on a", "on b"],
        ["---"] * 4,
        ["`lora`", "a", "0.900", "–"],
        ["`lora`", "b", "0.800", "0.600"],
    ]


def test_the_tables_of_hh_small(tmp_path: Path) -> None:
    evaluate = tmp_path / "ppo" / "runs" / "LoRA" / "seed-1" / "evaluate"
    evaluate.mkdir(parents=True)
    judged = {"win_rate": 0.625, "length_controlled_win_rate": 0.5, "kl": 4.25, "gold_policy": 1.0, "gold_anchor": 0.5}
    (evaluate / "summary.json").write_text(json.dumps(judged | {"mean_length_policy": 40}))
    (tmp_path / "ppo" / "summary.json").write_text(json.dumps(SUMMARY))
    for name in ("results.csv", "gold_over_kl.svg"):
        (tmp_path / "ppo" / name).write_text("of PPO")
    # Wilson's interval of 60 of 100: (0.6 + 1.921/100 ± 1.96 √(0.24/100 + 0.9604/10000)) / 1.03841, by hand.
    rows = [
        {"library": library, "pairs": "harmless", "learning_rate": 3e-4, "seed": seed, "eval_accuracy": accuracy}
        | {"eval_pairs": 100, "train_pairs": 200, "peak_rss_mib": 1000.0 + seed, "seconds_per_step": float(seed)}
        for library, of_seeds in (("pe-rlhf", (0.5, 0.7)), ("TRL", (0.6, 0.6)))
        for seed, accuracy in enumerate(of_seeds, start=1)
    ]
    hh_small.write(tmp_path, rows, "make results NAME=hh_small", [1, 2])
    page = results.publish("hh_small", tmp_path, tmp_path / "page").read_text()
    interval = "0.600 (0.502 – 0.691 over 100 pairs)"
    assert f"| harmless | pe-rlhf | 0.0003 | {interval} | 0.500, 0.700 | 1.5 | 1,002 |" in page
    assert f"| harmless | TRL | 0.0003 | {interval} | 0.600, 0.600 | 1.5 | 1,002 |" in page
    assert "| seed-1 | 0.625 | 0.500 | 4.250 | 1.000 | 0.500 | 40.000 |" in page
    assert "`make results NAME=hh_small`, commit unknown, seeds 1, 2, 2026-11-28" in page
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        "README.md",
        "results.csv",
        "ppo.csv",
        "gold_over_kl.svg",
    }
    assert hh_small.read_rows(tmp_path) == rows
