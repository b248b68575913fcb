"""PPO against RLOO and GRPO at equal samples, at equal seconds and at equal KL, with intervals over seeds.

    python tests/benchmarks/estimators.py --seeds 1 2 3 4 5 --output runs/estimators
    python tests/benchmarks/estimators.py --seeds 1 2 --output runs/small model=random:tiny-llama ppo.steps=3

It is `pe-rlhf compare compare_estimators` with a table of its own. The same command goes on where it was interrupted;
`--only-table` prints what is there. Runs go one after the other, since seconds are compared: leave the machine to them.

- equal samples: the last quarter of the steps; every arm has the same number of responses in a step.
- equal seconds: the same of the steps that a run had finished when the fastest run of all ended. Sampling, scoring and
  updates count; loading, evaluation and checkpoints do not.
- equal KL: the reward where the KL first reaches a level that all arms reach.
- gold: the judge's mean score on held-out prompts, after the last step.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

from harness import machine
from rich.console import Console
from rich.table import Table

from pe_rlhf.comparison.analysis import analyse
from pe_rlhf.comparison.collect import collect
from pe_rlhf.comparison.plan import load_plan
from pe_rlhf.comparison.run_result import Analysis, Estimate, RunResult
from pe_rlhf.comparison.run_statistics import seeds_estimate
from pe_rlhf.comparison.trajectory import PHASES, last_quarter
from pe_rlhf.comparison.trials import choose
from pe_rlhf.config.load import find_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings of the recipe: model=… ppo.steps=…")
    parser.add_argument("--recipe", default="compare_estimators")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--output", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--only-table", action="store_true")
    arguments = parser.parse_args()
    overrides = [f"compare.seeds={arguments.seeds}", *arguments.overrides]
    code = 0
    if not arguments.only_table:
        command = [sys.executable, "-m", "pe_rlhf", "compare", arguments.recipe, *overrides]
        code = subprocess.run([*command, "--dir", str(arguments.output)], check=False).returncode
    plan = load_plan(find_recipe(arguments.recipe), arguments.output, overrides)
    runs = collect(plan, [choose(plan, arm) for arm in plan.arms])
    results = rows(analyse(plan.base.name, plan.config, runs))
    (arguments.output / "estimators.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)  # of the runs that finished, also where others failed
    sys.exit(code)


def seconds_of(run: RunResult) -> list[float]:
    """Seconds from the start of training to the end of each step."""
    return list(itertools.accumulate(sum(row[phase] for phase in PHASES) for row in run.metrics))


def until(run: RunResult, seconds: float) -> RunResult:
    """A run as it was after so many seconds of training."""
    done = sum(end <= seconds for end in seconds_of(run))
    return dataclasses.replace(run, metrics=run.metrics[:done])


def rows(analysis: Analysis) -> list[dict[str, object]]:
    """A row for each arm with finished runs; estimates are `[value, low, high]`."""
    finished = [run for run in analysis.runs if run.status == "finished"]
    fastest = min((seconds_of(run)[-1] for run in finished), default=0.0)
    table: list[dict[str, object]] = []
    for arm in (arm for arm in analysis.arms if arm.seeds):
        cut = [until(run, fastest) for run in finished if run.arm == arm.arm]
        rewards = [reward for run in cut if (reward := last_quarter(run, "reward")) is not None]
        estimates = {
            "reward, equal samples": arm.reward,
            f"reward, {fastest:.0f} s": seeds_estimate(rewards) if len(rewards) == len(cut) else None,
            f"reward, KL {analysis.equal_kl}": arm.at_equal_kl,
            "gold": arm.gold,
            "KL": arm.kl,
            "steps in these seconds": seeds_estimate([len(run.metrics) for run in cut], (0.0, math.inf)),
        }
        row: dict[str, object] = {"arm": arm.arm, "runs": len(arm.seeds)}
        row |= {name: None if e is None else [e.value, e.low, e.high] for name, e in estimates.items()}
        table.append(row | {"s/step": arm.seconds_per_step, "peak MiB": arm.peak_mib})
    return table


def print_table(results: list[dict[str, object]]) -> None:
    table = Table(title=f"mean (95 % interval over seeds); {machine()}")
    for heading in results[0] if results else ["no run has finished"]:
        table.add_column(heading, justify="left" if heading == "arm" else "right", overflow="fold")
    for row in results:
        table.add_row(*map(cell, row.values()))
    Console(width=160).print(table)


def cell(value: object) -> str:
    if isinstance(value, list):
        estimate = Estimate(*value)
        return f"{estimate.value:.3g}\n({estimate.low:.3g} – {estimate.high:.3g})"
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
