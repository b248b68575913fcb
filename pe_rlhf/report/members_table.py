"""The members of a reward ensemble beside the ensemble, as a table of the run's page."""

from __future__ import annotations

from typing import Any

from pe_rlhf.report.format import number, percent
from pe_rlhf.report.page import Table

COLUMNS = ("Member", "Init", "Pairs", "Held-out accuracy", "95 % interval", "Held-out loss", "Calibration error")


def members_table(summary: dict[str, Any]) -> list[Table]:
    """What each member is worth on held-out pairs, and the mean of their scores; nothing without an ensemble."""
    if not (members := summary.get("members")):
        return []
    rows = [
        (
            member["role"],
            member["init"],
            "resampled" if member["bootstrap"] else "all",
            percent(member["eval_accuracy"]),
            f"{percent(member['eval_accuracy_low'])} – {percent(member['eval_accuracy_high'])}",
            number(member["eval_loss"]),
            number(member["calibration_error"]),
        )
        for member in members
    ]
    together = (
        *("mean of all", "", "", percent(summary["ensemble_eval_accuracy"]), ""),
        *(number(summary[f"ensemble_eval_{key}"]) for key in ("loss", "calibration_error")),
    )
    return [Table(COLUMNS, [*rows, together], words=COLUMNS[:3])]
