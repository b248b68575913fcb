"""Metrics of a stage: one JSON line per step, handed on to TensorBoard and W&B where the recipe says so.

`metrics.jsonl` is the record that everything else is made from. Names are those of the report; seconds, nats, tokens
and shares are the units.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from pe_rlhf.config import TrackingConfig
from pe_rlhf.runs.layout import StageFiles
from pe_rlhf.system.files import append_jsonl, read_json, read_jsonl, truncate_jsonl
from pe_rlhf.system.processes import is_main
from reward.errors import InputError


class MetricsWriter:
    """Appends to `<stage>/metrics.jsonl`; a resumed stage first drops the lines after the step it resumes from."""

    def __init__(self, files: StageFiles, tracking: TrackingConfig, run_name: str, resume_step: int = 0) -> None:
        self._path = files.metrics
        truncate_jsonl(self._path, resume_step)
        check_tracking(tracking)
        self._tensorboard = _tensorboard(files.tensorboard) if tracking.tensorboard and is_main() else None
        self._wandb = _wandb(tracking, run_name, files.folder) if tracking.wandb and is_main() else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line; a value that is not finite is written as null, since JSON has no NaN."""
        append_jsonl(self._path, {"step": step, **{k: _rounded(v) for k, v in values.items()}})
        for name, value in values.items():
            if self._tensorboard is not None:
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_tracking(tracking: TrackingConfig) -> None:
    """Raise `InputError` where metrics are to go to something that is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(tracking, name) and importlib.util.find_spec(name) is None:
            key = f"tracking.{name}"
            raise InputError(
                f"{key}: {name} is not installed", kind="not_installed", key=key, fix=f"pip install 'pe-rlhf[{name}]'"
            )


def read_metrics(path: Path, *, may_be_cut: bool = False) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.

    What PPO optimises is `reward_shaped`, penalties included. Earlier versions did not log it: theirs is the reward.
    """
    rows = read_jsonl(path, may_be_cut=may_be_cut)
    for row in rows:
        if "reward" in row:
            row.setdefault("reward_shaped", row["reward"])
    return rows


def read_summary(files: StageFiles) -> dict[str, Any] | None:
    """A stage's summary, or None where the stage has not finished."""
    return read_json(files.summary) if files.summary.is_file() else None


def _rounded(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _wandb(tracking: TrackingConfig, run_name: str, folder: Path) -> Any:
    import wandb  # type: ignore[import-not-found]

    return wandb.init(project=tracking.wandb_project, name=f"{run_name}/{folder.name}", dir=str(folder))
