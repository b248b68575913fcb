"""Metrics on the disk: whole lines, JSON that every reader takes, and what a resumed stage keeps."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pe_rlhf.config import TrackingConfig
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.runs.metrics import MetricsWriter
from pe_rlhf.system.files import append_jsonl, read_jsonl, truncate_jsonl, write_json
from reward.errors import InputError

OFF = TrackingConfig()


def strict(line: str) -> dict[str, float | None]:
    """Parse as every JSON reader does: only Python knows NaN."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_one_line_per_step(tmp_path: Path) -> None:
    writer = MetricsWriter(StageFiles(tmp_path), OFF, "run")
    writer.write(1, {"loss": 0.123456789, "episodes": 16})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.1234568, "episodes": 16}\n'
    writer.write(2, {"loss": 1e-9, "episodes": 123456789})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict(lines[1]) == {"step": 2, "loss": 1e-9, "episodes": 123456789}  # whole numbers are not rounded


def test_a_value_that_is_not_finite_is_null(tmp_path: Path) -> None:
    writer = MetricsWriter(StageFiles(tmp_path), OFF, "run")
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict(line) == {"step": 1, "a": None, "b": None, "c": None, "d": 0.0}


def test_a_resumed_stage_drops_the_lines_after_its_step(tmp_path: Path) -> None:
    writer = MetricsWriter(StageFiles(tmp_path), OFF, "run")
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": float(step)})
    writer.close()
    resumed = MetricsWriter(StageFiles(tmp_path), OFF, "run", resume_step=2)
    resumed.write(3, {"loss": 30.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]
    MetricsWriter(StageFiles(tmp_path), OFF, "run")  # a stage that starts anew keeps none
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


# Each is what a kill may leave of `{"step": 3, "text": "ü"}` and its line feed.
WHOLE = '{"step": 3, "text": "ü"}\n'.encode()


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_a_last_line_that_is_half_written_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + WHOLE[:cut])
    truncate_jsonl(path, 3)
    rows: list[dict[str, object]] = [{"step": 1}, {"step": 2}]
    if cut >= len(WHOLE) - 1:  # all of it but the line feed
        rows.append({"step": 3, "text": "ü"})
    assert read_jsonl(path) == rows
    append_jsonl(path, {"step": 4})
    assert read_jsonl(path) == [*rows, {"step": 4}]


def test_line_separators_inside_a_text_are_no_ends_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"step": 1, "text": "a\u2028b\u0085c\x1cd\re\nf"}, {"step": 2, "text": "\u2029"}, {"step": 3, "text": ""}]
    for row in rows:
        append_jsonl(path, row)
    assert path.read_bytes().count(b"\n") == 3
    assert read_jsonl(path) == rows
    truncate_jsonl(path, 2)
    assert read_jsonl(path) == rows[:2]


def test_a_file_that_is_missing_stays_missing(tmp_path: Path) -> None:
    truncate_jsonl(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_summary_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1, "b": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": 1,\n  "b": "ü"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1, "b": "ü"}
    # Half of a character, from a response that was cut within one, is read again as it was.
    write_json(path, {"a": "half of it\ud800"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "half of it\ud800"}
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    writer = MetricsWriter(StageFiles(tmp_path), TrackingConfig(tensorboard=True), "run")
    for step in (1, 2, 3):
        writer.write(step, {"reward": step / 2, "kl": 10.0 * step})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["kl", "reward"]
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("kl")] == [(1, 10.0), (2, 20.0), (3, 30.0)]


def test_what_tracking_needs_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        MetricsWriter(StageFiles(tmp_path), TrackingConfig(wandb=True), "run")
    assert (raised.value.kind, raised.value.key) == ("not_installed", "tracking.wandb")
    assert raised.value.fix == "pip install 'pe-rlhf[wandb]'"
