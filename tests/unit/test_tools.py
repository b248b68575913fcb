"""`make stats` and `same_run.py`: their numbers against ones counted by hand."""

from pathlib import Path

import pytest

from tests.benchmarks import same_run, stats
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
