"""How time and memory of the commands grow with their input: prompts, pairs, outputs, verdicts, runs of a comparison.

    python tests/benchmarks/load.py [--sizes 10000 30000 100000] [--only winrate] [--folder DIR]

Each command is a process of its own, on the tiny random model. Printed are CPU seconds (user and system) and peak MiB
at each size, and `growth`: what a row costs between the last two sizes, divided by what it costs between the first two.
It is 1 where time grows linearly, and about 4 where it grows with the square. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from harness import machine
from rich.console import Console
from rich.table import Table

from pe_rlhf.comparison.plan import load_plan
from pe_rlhf.config.load import save_recipe
from pe_rlhf.runs.layout import ComparisonFiles

ROWS_PER_RUN = 500  # 1e5 rows stand beside a comparison of 200 runs
ARMS = 10
SCORE = [{"function": "reward.scores:length"}]
SHORT = {"max_new_tokens": 4}
BASE: dict[str, Any] = {"model": "random:tiny-llama", "threads": 1, "adapter": {"rank": 2, "alpha": 4}}
# Two steps, however many rows there are: what grows is what is done for every row.
PPO = {"prompts": "prompts.jsonl", "reward": SCORE, "rollout": SHORT, "steps": 2, "batch_size": 8}
REWARD = {"data": "pairs.jsonl", "eval_data": "few.jsonl", "batch_size": 512, "eval_every": 10**6}
EVALUATE = {"prompts": "few_prompts.jsonl", "judge": "length", "sampling": SHORT}

# Started and measured by a small process, since a child's peak memory starts at its parent's.
_MEASURE = """
import os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{usage.ru_utime + usage.ru_stime} {usage.ru_maxrss / 1024}")
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write_rows(path: Path, count: int, row: Callable[[int, random.Random], dict[str, Any]]) -> None:
    """A jsonl file of rows that differ, the same each time."""
    chance = random.Random(0)
    path.write_text("".join(json.dumps(row(i, chance)) + "\n" for i in range(count)), encoding="utf-8")


def write_data(folder: Path, count: int) -> None:
    """The files that the commands read, with `count` rows each."""

    def text(chance: random.Random) -> str:
        return " ".join(f"w{chance.randrange(1000)}" for _ in range(chance.randrange(4, 12)))

    def pair(i: int, chance: random.Random) -> dict[str, Any]:
        return {"prompt": f"Question {i}?", "chosen": text(chance), "rejected": f"{text(chance)}!"}

    def outputs(i: int, chance: random.Random) -> dict[str, Any]:
        return {"prompt": f"Question {i}?", "response": text(chance)}

    def verdict(i: int, chance: random.Random) -> dict[str, Any]:
        order = ("candidate_first", "baseline_first")[i % 2]
        lengths = {"len_candidate": chance.randrange(900), "len_baseline": chance.randrange(900)}
        return {"preference": chance.random(), "position": i // 2, "order": order, "difficulty": i % 7} | lengths

    write_rows(folder / "pairs.jsonl", count, pair)
    write_rows(folder / "few.jsonl", 64, pair)
    for name, rows in (("prompts", count), ("few_prompts", 64)):
        write_rows(folder / f"{name}.jsonl", rows, lambda i, chance: {"prompt": f"Question {i}: {text(chance)}?"})
    for name in ("mine", "other"):
        write_rows(folder / f"{name}.jsonl", count, outputs)
    write_rows(folder / "verdicts.jsonl", count, verdict)
    for name, stages in {"ppo": {"ppo": PPO}, "reward": {"reward": REWARD}}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**BASE, **stages}), encoding="utf-8")


def write_comparison(folder: Path, runs: int) -> None:
    """A comparison whose runs have finished: copies of one, with the recipes and scores of their own."""
    arms = [{"ppo.kl.beta": 0.01 * (i + 1)} for i in range(ARMS)]
    section = {"arms": arms, "seeds": list(range(1, max(2, runs // ARMS) + 1)), "share": "nothing"}
    tree = {**BASE, "ppo": PPO | {"prompts": "few_prompts.jsonl"}, "evaluate": EVALUATE}
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(tree | {"compare": section}), encoding="utf-8")
    (folder / "one.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    run = [sys.executable, "-m", "pe_rlhf", "run", "one.yaml", "--run-dir", "one"]
    subprocess.run(run, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    plan, chance = load_plan(path, folder / "comparison", []), random.Random(0)
    plan.root.mkdir()
    save_recipe(plan.base, ComparisonFiles(plan.root).recipe)
    for arm in plan.arms:
        for planned in plan.runs(arm).values():
            shutil.copytree(folder / "one", planned.folder)
            save_recipe(planned.recipe, planned.folder / "recipe.yaml")
            samples = planned.folder / "evaluate" / "samples.jsonl"
            rows = [json.loads(line) | {"preference": chance.random()} for line in samples.read_text().splitlines()]
            samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


COMMANDS: dict[str, Sequence[str]] = {
    "ppo, prompts": ("run", "ppo.yaml", "--run-dir", "ppo"),
    "reward, pairs": ("run", "reward.yaml", "--run-dir", "reward"),
    "evaluate, outputs": ("evaluate", "mine.jsonl", "--against", "other.jsonl", "--judge", "length", "--out", "e"),
    "evaluate-reward, pairs": ("evaluate-reward", "reward", "pairs.jsonl", "--out", "r"),
    "winrate, verdicts": ("winrate", "verdicts.jsonl"),
    "compare, runs": ("compare", "compare.yaml", "--dir", "comparison", "--only", "report"),
}


def measure(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """CPU seconds and peak MiB of a command. Raises RuntimeError with the end of what it said where it fails."""
    figures = folder / "figures"
    whole = [sys.executable, "-S", "-c", _MEASURE, str(figures), sys.executable, "-m", "pe_rlhf", *command]
    done = subprocess.run(whole, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
    seconds, peak = map(float, figures.read_text().split())
    return seconds, peak


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The cost of a row between the last two sizes over that between the first two."""
    costs = [(b - a) / (n - m) for a, b, m, n in zip(seconds, seconds[1:], sizes, sizes[1:], strict=False)]
    return costs[-1] / costs[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--only", default="", help="commands whose name contains this")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="pe-rlhf-load-"))
    chosen = {name: command for name, command in COMMANDS.items() if arguments.only in name}
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for size in arguments.sizes:
        place = folder / str(size)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        write_data(place, size)
        if any(name.startswith("compare") for name in chosen):
            write_comparison(place, size // ROWS_PER_RUN)
        for name, command in chosen.items():
            found[name].append(measure(command, place))
            print(f"{size} {name}: {found[name][-1][0]:.1f} s, {found[name][-1][1]:,.0f} MiB", flush=True)
    printed = Table(title=f"{machine()}, {date.today().isoformat()}")
    for heading in ("", *(f"{size:,}" for size in arguments.sizes), "growth"):
        printed.add_column(heading, justify="right" if heading else "left")
    for name, figures in found.items():
        cells = [f"{seconds:.1f} s, {peak:,.0f} MiB" for seconds, peak in figures]
        told = f"{growth(arguments.sizes, [s for s, _ in figures]):.2f}" if len(figures) > 2 else "–"
        printed.add_row(name, *cells, told)
    Console(width=140).print(printed)


if __name__ == "__main__":
    main()
