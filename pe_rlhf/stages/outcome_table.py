"""The table a run ends with."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rich.table import Table

from pe_rlhf.runs.task_table import TaskTable

HEADINGS = ("result", "before", "after", "95 % interval, n")
ACCURACY = "{eval_accuracy_low:.3f} – {eval_accuracy_high:.3f}, {eval_pairs} pairs"
WIN_RATE = "{ci_low:.3f} – {ci_high:.3f}, {n} ({ties} ties)"
# Stage, name of the result, before, after, and how sure it is; filled in from the stage's summary.
ROWS = (
    ("sft", "sft, held-out loss (nats per token)", "{eval_loss_before:.3f}", "{eval_loss:.3f}", "{eval_rows} rows"),
    ("reward", "reward model, held-out accuracy", "", "{eval_accuracy:.3f}", ACCURACY),
    ("ppo", "reward while training", "{reward_first:.3f}", "{reward_last:.3f}", ""),
    ("ppo", "KL while training (nats per response)", "0.00", "{kl_last:.2f}", ""),
    ("ppo", "seconds per PPO step", "", "{seconds_per_step:.1f}", "{steps} steps"),
    ("evaluate", "gold score, held-out prompts", "{gold_anchor:.3f}", "{gold_policy:.3f}", ""),
    ("evaluate", "reward, held-out prompts", "{reward_anchor:.3f}", "{reward_policy:.3f}", ""),
    ("evaluate", "KL, held-out prompts", "0.00", "{kl:.2f}", ""),
    ("evaluate", "response length (tokens)", "{mean_length_anchor:.1f}", "{mean_length_policy:.1f}", ""),
    ("evaluate", "win-rate against the anchor", "0.500", "{win_rate:.3f}", WIN_RATE),
)


def outcome_table(name: str, summaries: dict[str, dict[str, Any]]) -> Table:
    """What the stages came to: accuracy, scores before and after, KL, win-rate; a row only for what is known."""
    table = Table(title=f"pe-rlhf: {name}", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "result" else "right")
    for stage, result, *templates in ROWS:
        with suppress(KeyError, TypeError):  # a number that the stage has not, or that is None
            table.add_row(result, *[template.format_map(summaries[stage]) for template in templates])
    peaks = [summary["peak_rss_mib"] for summary in summaries.values() if "peak_rss_mib" in summary]
    seconds = sum(summary.get("seconds", 0) for summary in summaries.values())
    if peaks:
        table.add_row("peak memory (MiB), time (s)", f"{max(peaks):.0f}", f"{seconds:.0f}", "")
    return table


def task_outcome_table(name: str, tasks: TaskTable) -> Table:
    """What several tasks came to: the win-rate over the base on each of them, after each of them."""
    table = Table(title=f"pe-rlhf: {name}", title_justify="left")
    measured = [task for task in tasks.tasks if any(cell.on == task for cell in tasks.cells)]
    for heading in ("after" if tasks.how == "in turn" else "policy", *(f"on {task}" for task in measured)):
        table.add_column(heading, justify="right" if heading.startswith("on ") else "left")
    for after in tasks.policies:
        cells = [tasks.cell(after, on) for on in measured]
        shown = [f"{c.win_rate:.3f} ({c.ci_low:.3f} – {c.ci_high:.3f})" if c else "–" for c in cells]
        table.add_row(after, *shown)
    for metric in ("average", "forgetting", "forward_transfer"):
        if (value := getattr(tasks, metric)) is not None:
            shown = f"{value.value:.3f} ({value.low:.3f} – {value.high:.3f})"
            table.add_row(metric.replace("_", " "), shown, *[""] * (len(measured) - 1))
    return table
