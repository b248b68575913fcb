"""Advantage estimators at equal samples, at equal seconds and at equal KL, with intervals over seeds. Resumable.

    make results NAME=compare_estimators
    python -m tests.benchmarks.estimators --dir runs/small model=random:tiny-llama ppo.steps=3 compare.seeds=[1,2]

It is `pe-rlhf compare` with a second table. Runs go one after the other, since seconds are compared: leave the machine
to them.

- equal samples: the last quarter of the steps; every arm has the same number of responses in a step.
- equal seconds: the same of the steps that a run had finished when the fastest run of all ended. Sampling, scoring and
  updates count; loading, evaluation and checkpoints do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

from pe_rlhf.comparison.analysis import analyse
from pe_rlhf.comparison.collect import collect
from pe_rlhf.comparison.plan import load_plan
from pe_rlhf.comparison.run_result import Analysis, RunResult
from pe_rlhf.comparison.run_statistics import seeds_estimate
from pe_rlhf.comparison.trajectory import PHASES, last_quarter
from pe_rlhf.comparison.trials import choose
from pe_rlhf.config.load import find_recipe
from tests.benchmarks.results import Row, estimate, markdown, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings of the recipe: model=… compare.seeds=[1,2] …")
    parser.add_argument("--recipe", default="compare_estimators")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--only-page", action="store_true", help="from the runs that are there")
    args = parser.parse_intermixed_args()
    command = [sys.executable, "-m", "pe_rlhf", "compare", args.recipe, *args.overrides, "--dir", str(args.dir)]
    code = subprocess.run([*command, *["--only", "report"] * args.only_page], check=False).returncode
    path = args.dir / "summary.json"
    if not path.exists():
        sys.exit(code)
    plan = load_plan(find_recipe(args.recipe), args.dir, args.overrides)
    runs = collect(plan, [choose(plan, arm) for arm in plan.arms])
    summary = json.loads(path.read_text(encoding="utf-8"))
    tables = [table(summary), at_equal_seconds(analyse(plan.base.name, plan.config, runs))]
    told = {"tables": tables, "command": shlex.join(["make", "results", f"NAME={args.recipe}", *given(args.overrides)])}
    path.write_text(json.dumps(summary | told), encoding="utf-8")
    print(*tables, sep="\n\n")
    sys.exit(code)


def given(overrides: list[str]) -> list[str]:
    return [f"WITH={shlex.join(overrides)}"] if overrides else []


def at_equal_seconds(analysis: Analysis) -> str:
    """The reward of every arm when the fastest run of all had ended, and how many steps it had made."""
    finished = [run for run in analysis.runs if run.status == "finished"]
    fastest = min((seconds_of(run)[-1] for run in finished), default=0.0)
    rows: list[Row] = []
    for arm in (arm for arm in analysis.arms if arm.seeds):
        cut = [until(run, fastest) for run in finished if run.arm == arm.arm]
        rewards = [reward for run in cut if (reward := last_quarter(run, "reward")) is not None]
        found = seeds_estimate(rewards) if len(rewards) == len(cut) else None
        steps = seeds_estimate([len(run.metrics) for run in cut], (0.0, math.inf))
        rows.append(
            {
                "arm": f"`{arm.arm}`",
                f"reward after {fastest:.0f} s of training": estimate(found and dataclasses.asdict(found)),
                "steps by then": estimate(dataclasses.asdict(steps), digits=1),
                "seconds per step": "" if arm.seconds_per_step is None else f"{arm.seconds_per_step:.2f}",
            }
        )
    return markdown(rows)


def seconds_of(run: RunResult) -> list[float]:
    """Seconds from the start of training to the end of each step."""
    return list(itertools.accumulate(sum(row[phase] for phase in PHASES) for row in run.metrics))


def until(run: RunResult, seconds: float) -> RunResult:
    """A run as it was after so many seconds of training."""
    done = sum(end <= seconds for end in seconds_of(run))
    return dataclasses.replace(run, metrics=run.metrics[:done])


if __name__ == "__main__":
    main()
