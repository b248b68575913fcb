"""A comparison on a SLURM cluster: what is shared, the trials, the runs, each as an array, and then the report."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from pe_rlhf.comparison.plan import Plan
from pe_rlhf.config.load import bundled
from reward.errors import InputError

SCRIPT = "slurm_compare.sbatch"


def jobs(plan: Plan, arguments: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    """The jobs in their order: which part, how many tasks, and what `sbatch` is given.

    The index of each task is in `SLURM_ARRAY_TASK_ID`; the script turns it into `--only PART:K/N`.
    """
    trials = sum(len(plan.trials(arm)) for arm in plan.arms)
    counts = {"shared": 1 if plan.shared else 0, "trials": trials, "runs": len(plan.arms) * len(plan.config.seeds)}
    script = str(bundled("launch") / SCRIPT)
    for part, count in {**counts, "report": 1}.items():
        if count:
            array = [f"--array=1-{count}%{plan.config.nodes}"] if part in ("trials", "runs") else []
            only = f"{part}:K/{count}" if array else part
            yield part, count, [*array, f"--job-name={plan.base.name}-{part}", script, only, *arguments]


def submit(plan: Plan, arguments: list[str], *, print_only: bool, echo: Callable[[str], None]) -> None:
    """Submit the jobs, each to start when the one before has ended, or print the commands.

    Raises `InputError` where there is no `sbatch`, or where it refuses a job.
    """
    if not print_only and shutil.which("sbatch") is None:
        raise InputError("--submit slurm: there is no sbatch here; --submit print shows the commands")
    before = ""
    for part, count, rest in jobs(plan, arguments):
        # Runs go on where some trials failed, and the report tells of runs that did; nothing goes on without the rest.
        kind = "afterok" if before and part in ("trials", "runs") and before.startswith("shared") else "afterany"
        job = before.partition(":")[2]
        command = ["sbatch", "--parsable", *([f"--dependency={kind}:{job}"] if job else []), *rest]
        if print_only:
            echo(f"{part.upper()}=$({_shell(command)})")
            before = f"{part}:${part.upper()}"
            continue
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise InputError(f"sbatch refused the job for the {part}: {' '.join(done.stderr.split())}")
        before = f"{part}:{done.stdout.strip().split(';')[0]}"
        echo(f"{part}: job {before.partition(':')[2]}, {count} task{'s' if count > 1 else ''}")


def _shell(command: list[str]) -> str:
    """The command for a shell; variables that hold earlier jobs' numbers stay variables."""
    return " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in command)


def arguments_for(recipe: Path, root: Path, overrides: list[str]) -> list[str]:
    """What the script hands on to `pe-rlhf compare`."""
    return [str(recipe.absolute()), *overrides, "--dir", str(root)]
