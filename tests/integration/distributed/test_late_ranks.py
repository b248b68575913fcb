"""A rank that does not come: the others say so after `rank_timeout`, in one sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pe_rlhf.stages import pipeline
from tests.forked import Forked
from tests.integration.distributed.launching import free_port
from tests.runs import recipe, write_recipe

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

SECONDS_LATE = 120


def forked(
    rank: int, port: int, folder: Path, cache: Path, timeout: float, before: Callable[[], None] | None = None
) -> Forked:
    """One of two ranks, which waits so many seconds for the other."""
    path = write_recipe(folder, recipe("ppo", rank_timeout=timeout))
    world = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    more = world | {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    return Forked(["run", str(path), "--run-dir=out"], folder, cache, more, before)


def be_late() -> None:
    pipeline.RUN["ppo"] = lambda context: time.sleep(SECONDS_LATE)  # type: ignore[assignment,return-value]


def test_a_rank_that_never_starts(tmp_path: Path, model_cache: Path) -> None:
    said = forked(0, free_port(), tmp_path, model_cache, timeout=4.0).finish(code=3)
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "rank_timeout" in line
    assert not (tmp_path / "out").exists()


def test_a_rank_that_is_late_in_a_step(tmp_path: Path, model_cache: Path) -> None:
    port, start = free_port(), time.monotonic()
    late = forked(1, port, tmp_path, model_cache, 12.0, be_late)
    try:
        said = forked(0, port, tmp_path, model_cache, 12.0).finish(code=3)
    finally:
        late.kill()
    assert time.monotonic() - start < SECONDS_LATE
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    failure = json.loads((tmp_path / "out" / "failure.json").read_text())
    assert (failure["kind"], failure["key"]) == ("process", "rank_timeout")
