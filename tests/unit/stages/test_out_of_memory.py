"""Where memory runs out the run ends with a sentence that names the setting, and exit code 3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from pe_rlhf.stages import pipeline
from pe_rlhf.system.failures import TrainingError
from tests.runs import recipe, write_recipe


def on_a_gpu() -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")


def on_the_cpu() -> None:
    torch.empty(2**55)  # torch's own words


def in_python() -> None:
    bytearray(2**62)


@pytest.mark.parametrize("runs_out", [on_a_gpu, on_the_cpu, in_python])
@pytest.mark.parametrize(("stage", "key"), [("reward", "reward.micro_batch_tokens"), ("ppo", "ppo.micro_batch_tokens")])
def test_the_setting_is_named(
    fails: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    runs_out: Callable[[], None],
    stage: str,
    key: str,
) -> None:
    monkeypatch.setitem(pipeline.RUN, stage, lambda context: runs_out())
    failure = fails("run", write_recipe(tmp_path, recipe(stage)), "--run-dir", "out", code=3)
    assert isinstance(failure, TrainingError)
    assert (failure.kind, failure.key) == ("memory", key)
    assert json.loads((tmp_path / "out" / "failure.json").read_text())["kind"] == "memory"


def test_other_errors_stay_what_they_are(
    monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any], tmp_path: Path
) -> None:
    monkeypatch.setitem(pipeline.RUN, "ppo", torch.as_tensor)  # which takes no context
    with pytest.raises(RuntimeError, match="infer dtype"):
        cli("run", write_recipe(tmp_path, recipe("ppo")), "--run-dir", "out")
