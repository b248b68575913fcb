"""One result of docs/results again, from its recipe: its csv and svg, and the numbers on its page.

    make results NAME=compare_kinds_small WITH='model=path/to/tinychat3m'
    python -m tests.benchmarks.results compare_kinds_small model=path/to/tinychat3m [--only-page]

NAME is a recipe with a compare section, or one of `SCRIPTS`. The runs are in comparisons/NAME, so the same command goes
on where it was interrupted. On the page (docs/results/NAME/README.md) only what is between the two marks is written
anew; the words around it are an author's. A new result gets a page with a title, and its line in
docs/results/README.md is to be written by hand, as is its place in the menu of mkdocs.yml.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pe_rlhf.comparison.analysis import analyse
from pe_rlhf.comparison.collect import collect
from pe_rlhf.comparison.plan import load_plan
from pe_rlhf.comparison.trials import choose
from pe_rlhf.config.load import find_recipe
from tests.paths import ROOT

# Results that are more than one comparison: NAME → module.
SCRIPTS = {"hh_small": "tests.benchmarks.hh_small"}
BEGIN, END = "<!-- numbers: `make results` writes these -->", "<!-- end of the numbers -->"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the result: the name of its recipe")
    parser.add_argument("overrides", nargs="*", help="settings of the recipe: model=… compare.seeds=[4,5] …")
    parser.add_argument("--only-page", action="store_true", help="from the runs that are there")
    arguments = parser.parse_args()
    runs = ROOT / "comparisons" / arguments.name
    code = make(arguments.name, arguments.overrides, runs, only_page=arguments.only_page)
    if not (runs / "summary.json").exists():
        sys.exit(code)
    page = publish(arguments.name, runs, ROOT / "docs" / "results" / arguments.name)
    print(f"{page}: read what is said around the numbers, and its line in docs/results/README.md")
    sys.exit(code)


def make(name: str, overrides: list[str], runs: Path, *, only_page: bool) -> int:
    """Run what is missing, and note the commit. Returns the exit code: failed runs are a result too."""
    own = name in SCRIPTS
    command = [SCRIPTS[name]] if own else ["pe_rlhf", "compare", name]
    command = [sys.executable, "-m", *command, "--dir", str(runs), *overrides]
    if only_page:
        command += ["--only-page"] if own else ["--only", "report"]
    else:
        note_commit(commits_of(runs))
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    add_second_table(name, overrides, runs)
    return code


def add_second_table(name: str, overrides: list[str], runs: Path) -> None:
    """Put the result's tables into its summary, where it has a second one."""
    from tests.benchmarks.second_tables import SECOND_TABLES  # here, since it makes them of this module's parts

    path = runs / "summary.json"
    if name not in SECOND_TABLES or not path.exists():
        return
    plan = load_plan(find_recipe(name), runs, overrides)
    found = collect(plan, [choose(plan, arm) for arm in plan.arms])
    second = SECOND_TABLES[name](analyse(plan.base.name, plan.config, found))
    summary = json.loads(path.read_text(encoding="utf-8"))
    command = shlex.join(["make", "results", f"NAME={name}", *([f"WITH={shlex.join(overrides)}"] if overrides else [])])
    told = {"tables": [table(summary), second], "command": command}
    path.write_text(json.dumps(summary | told), encoding="utf-8")


def commits_of(runs: Path) -> Path:
    """The file that names the commits of a result's runs: beside their folder, which is the comparison's own."""
    return runs.with_name(f"{runs.name}.commits.txt")


def note_commit(path: Path) -> None:
    """Add the commit of the checkout to those that the runs were made at; `+` says that files differed from it."""
    describe = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    known = path.read_text(encoding="utf-8").split() if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(dict.fromkeys([*known, commit])) + "\n", encoding="utf-8")


def publish(name: str, runs: Path, folder: Path) -> Path:
    """Copy csv and svg into the result's folder and write the numbers on its page. Returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted([*runs.glob("*.svg"), *runs.glob("*.csv")]):
        shutil.copy(path, folder)
    noted = commits_of(runs)
    commits = noted.read_text(encoding="utf-8").split() if noted.exists() else []
    summary = json.loads((runs / "summary.json").read_text(encoding="utf-8"))
    figures = [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in sorted(runs.glob("*.svg"))]
    numbers = "\n\n".join([origin(summary, commits), *(summary.get("tables") or tables(summary)), *figures])
    return write_numbers(folder / "README.md", name, numbers)


def write_numbers(page: Path, name: str, numbers: str) -> Path:
    """Put the numbers between the marks of a page, which is made where there is none. Returns the page."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {name}\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{numbers}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return page


def origin(summary: Row, commits: list[str]) -> str:
    """Where the numbers come from: command, commit, seeds, date and machine, without paths of this machine."""
    command = re.sub(r"=/\S*?([^/\s]+?)(/hf)?(?=\s|$)", r"=path/to/\1", summary["command"])
    at = f"commit{'s' * (len(commits) > 1)} {', '.join(commits) or 'unknown'}"
    facts = f"{at}, seeds {summary['seeds']}, {summary['date']}, {summary['machine']}"
    return f"`{command}`, {facts}. [results.csv](results.csv)"


def tables(summary: Row) -> list[str]:
    """The tables of a comparison: one, or for arms that learn several tasks what that comes to, and each after each."""
    if any(arm.get("tasks") for arm in summary["arms"]):
        return [table_of_tasks(summary), table_after_each(summary)]
    return [table(summary)]


def table_of_tasks(summary: Row) -> str:
    """A row for each arm: the last policy over all tasks, and what was forgotten on the way."""
    names = {
        "average": "win-rate over all tasks, at the end",
        "forgetting": "forgetting",
        "forward_transfer": "forward transfer",
        "overlap": "overlap of A",
        "collision_rate": "weights changed twice",
    }
    rows: list[Row] = []
    for arm in summary["arms"]:
        found = arm.get("tasks") or {}
        shown = {heading: estimate(found.get(name)) for name, heading in names.items()}
        ends = {
            "by seed": by_seed(summary, arm),
            "peak MiB, PPO": whole(arm["peak_mib"]),
            "failed or collapsed": ended(arm),
        }
        rows.append({"arm": f"`{arm['arm']}`"} | shown | ends)
    return markdown(rows)


def table_after_each(summary: Row) -> str:
    """Every task (columns) after every task (rows), by arm; all at once there is one policy."""
    rows: dict[tuple[str, str], Row] = {}
    for arm in summary["arms"]:
        for name, found in (arm.get("tasks") or {}).items():
            after, arrow, on = name.partition(" → ")
            if arrow:
                row = rows.setdefault((arm["arm"], after), {"arm": f"`{arm['arm']}`", "after": after})
                row[f"on {on}"] = estimate(found)
    return markdown([*rows.values()])


def by_seed(summary: Row, arm: Row) -> str:
    runs = [run for run in summary["runs"] if run["arm"] == arm["arm"] and run["status"] == "finished"]
    return ", ".join(f"{run['evaluate']['win_rate']:.3f}" for run in runs if "win_rate" in run["evaluate"])


def ended(arm: Row) -> str:
    """Runs that failed, and those that collapsed."""
    collapses = [f"seed {found['seed']}: {found['kind']} at step {found['step']}" for found in arm["collapses"]]
    return "; ".join([*(f"seed {seed}: failed" for seed in arm["failed"]), *collapses])


def table(summary: Row) -> str:
    """A row for each arm of a comparison; columns in which nothing is known are left out."""
    level = summary["equal_kl"]
    at_kl = "equal KL" if level is None else f"KL {level:g}"
    tried: dict[str, list[Row]] = {}
    for trial in summary.get("trials", []):
        tried.setdefault(trial["arm"], []).append(trial)
    rows: list[Row] = [
        {
            "arm": f"`{arm['arm']}`",
            "learning rate": rate(arm, tried.get(arm["arm"], [])),
            "win-rate against the anchor": estimate(arm["win_rate"]),
            "by seed": by_seed(summary, arm),
            "judge's score": estimate(arm["gold"], interval=False),
            "reward": estimate(arm["reward"], interval=False),
            "KL": estimate(arm["kl"], interval=False, digits=1),
            f"reward at {at_kl}": estimate(arm["at_equal_kl"], digits=2),
            f"win-rate at {at_kl}": estimate(arm["judge_at_equal_kl"]),
            "reward model's accuracy": "" if arm["reward_accuracy"] is None else f"{arm['reward_accuracy']:.3f}",
            "trained parameters, policy and critic": whole(arm["trainable_parameters"]),
            "peak MiB, reward stage": whole(arm["reward_peak_mib"]),
            "peak MiB, PPO": whole(arm["peak_mib"]),
            "failed or collapsed": ended(arm),
        }
        for arm in summary["arms"]
    ]
    return markdown(rows)


def rate(arm: Row, trials: list[Row]) -> str:
    """The learning rate of an arm; `edge` where it is the least or the greatest of three or more that were tried."""
    own = next(
        (trial["learning_rate"] for trial in trials if trial["chosen"]), arm["settings"].get("ppo.learning_rate")
    )
    tried = [trial["learning_rate"] for trial in trials]
    return "" if own is None else f"{own:g}" + " (edge)" * (len(tried) > 2 and own in (min(tried), max(tried)))


def estimate(found: Row | None, *, interval: bool = True, digits: int = 3) -> str:
    """A number with its 95 % interval, as far as they are known."""
    if found is None or found["value"] is None:
        return ""
    if not interval or found["low"] is None:
        return f"{found['value']:.{digits}f}"
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} – {found['high']:.{digits}f})"


def whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def markdown(rows: list[Row]) -> str:
    """A Markdown table; a dash for what is not known, no column for what is known of no row."""
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if any(row.get(name) for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row.get(name) or "–" for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
