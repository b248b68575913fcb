"""The page of a run with several tasks: every task after every task, what that comes to, and the tasks' own pages."""

from __future__ import annotations

from pathlib import Path

from pe_rlhf.report.charts import Line, draw_lines
from pe_rlhf.report.format import number, percent
from pe_rlhf.report.page import Cell, Interval, Page, PageSection, Plot, Table, Tile
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.runs.metrics import read_summary
from pe_rlhf.runs.task_table import Bounded, Measured, TaskTable
from pe_rlhf.system.files import write_whole

INTERVALS = "95 % intervals over prompts; the base against itself has 50 %."
METRICS = {
    "average": ("Average", "win-rate over the base, after the last task"),
    "forgetting": ("Forgetting", "best before the last task minus after it; 0 is none"),
    "forward_transfer": ("Forward transfer", "before a task is learnt, above 50 %"),
}


def write_tasks_report(run_dir: Path, table: TaskTable) -> Path:
    """Write `run_dir/report.html` from what was measured and what the tasks' runs left there; return its path."""
    files = RunFiles(run_dir)
    page = Page(
        title=run_dir.resolve().name,
        kind="report",
        subtitle=f"{len(table.tasks)} tasks: {' → '.join(table.tasks)}",
        tiles=tiles(table),
        sections=[
            PageSection(
                "Every task after every task",
                note=f"Win-rate over the base by each task's own judge. {INTERVALS}",
                tables=[matrix(table)] if table.cells else [],
                plots=[plot] if (plot := curves(table)) else [],
            ),
            PageSection("What the tasks changed", tables=_tasks(files, table)),
            *_routes(files, table),
            PageSection("Recipe, as resolved", code=files.recipe.read_text(encoding="utf-8"), folded=True),
        ],
    )
    write_whole(files.report, page.html())
    return files.report


def tiles(table: TaskTable) -> list[Tile]:
    """Average, forgetting and forward transfer, those that are known."""
    found: list[Tile] = []
    for name, (label, detail) in METRICS.items():
        value: Bounded | None = getattr(table, name)
        if value is not None:
            bounds = Interval(*(value.low, value.value, value.high)) if name == "average" else None
            shown = f"{detail} ({percent(value.low)} – {percent(value.high)})"
            found.append(Tile(label, percent(value.value), shown, bounds))
    return found


def matrix(table: TaskTable) -> Table:
    """A row after each task, a column for each that is measured."""
    measured = [task for task in table.tasks if any(cell.on == task for cell in table.cells)]
    rows: list[list[str | Cell]] = []
    for after in table.policies:
        cells = [table.cell(after, on) for on in measured]
        if any(cells):
            rows.append([after, *map(_shown, cells)])
    heading = "After" if table.how == "in turn" else "Policy"
    return Table([heading, *(f"on {task}" for task in measured)], rows, scrolls=True)


def _shown(cell: Measured | None) -> str | Cell:
    if cell is None:
        return "–"
    return Cell(percent(cell.win_rate), f"{percent(cell.ci_low)} – {percent(cell.ci_high)}")


def curves(table: TaskTable) -> Plot | None:
    """The win-rate on each task over the tasks that were learnt, where they were learnt one after the other."""
    if table.how != "in turn" or len(table.policies) < 2:
        return None
    lines: list[Line] = []
    for on in table.tasks:
        cells = [(i, cell) for i, after in enumerate(table.policies, 1) if (cell := table.cell(after, on)) is not None]
        rate, low, high = ([getattr(cell, name) for _, cell in cells] for name in ("win_rate", "ci_low", "ci_high"))
        lines.append(Line(on, [i for i, _ in cells], rate, low, high))
    note = "band: 95 % interval; line at 50 %"
    return draw_lines(
        *("Win-rate by task", "share of prompts", lines), x_label="tasks learnt", note=note, shares=True, reference=0.5
    )


def _tasks(files: RunFiles, table: TaskTable) -> list[Table]:
    """What each task's PPO came to, and how far its change gets in the way of the earlier ones'."""
    columns = ("Task", "Reward, first → last step", "KL", "Overlap of A", "Weights changed twice", "Page")
    rows: list[tuple[str, ...]] = []
    for task in table.policies:
        if (ppo := read_summary(files.task(task).stage("ppo"))) is None:
            continue
        rate = ppo.get("collision_rate")
        rows.append(
            (
                *(task, f"{number(ppo['reward_first'])} → {number(ppo['reward_last'])}", number(ppo["kl_last"])),
                *(number(ppo.get("overlap")), "–" if rate is None else percent(rate)),
                str(files.task(task).report.relative_to(files.folder)),
            )
        )
    note = "overlap: √Σ‖A_i A_tᵀ‖² over the layers; changed twice: by this task and an earlier one, noticeably"
    return [Table(columns, rows, note=note, words=("Page",))] if rows else []


def _routes(files: RunFiles, table: TaskTable) -> list[PageSection]:
    """What each task's policy is made of, where one policy is routed by task."""
    summaries = [read_summary(files.task(task).stage("ppo")) or {} for task in table.policies]
    if not (weights := next((found["task_weights"] for found in summaries if "task_weights" in found), None)):
        return []
    note = "The weight of each task's part of the adapter: the mean over layers and over the part's ranks."
    rows = [[task, *(f"{own[part]:.2f}" for part in weights)] for task, own in weights.items()]
    made = Table(["For", *(f"{task}’s part" for task in weights)], rows)
    return [PageSection("What each task is made of", note=note, tables=[made])]
