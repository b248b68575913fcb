"""A comparison on a SLURM cluster: the shared stages, the trials and the runs as arrays, and then the report."""

from __future__ import annotations

import shlex
import shutil
import subprocess

from pe_rlhf.comparison.plan import Plan
from pe_rlhf.config.load import bundled
from reward.errors import InputError

SCRIPT = "slurm_compare.sbatch"


def slurm_script(plan: Plan) -> str:
    """Shell commands that submit all parts; each job starts when the one before has ended, and its number is shown.

    The sbatch script turns the index of a task, `SLURM_ARRAY_TASK_ID`, into `--only PART:K/N`.
    """
    counts = {
        "trials": sum(len(plan.trials(arm)) for arm in plan.arms),
        "runs": len(plan.arms) * len(plan.config.seeds),
    }
    arguments = [str(plan.path.absolute()), *plan.overrides, "--dir", str(plan.root)]
    lines, before = [], ""
    for part in (["shared"] if plan.shared else []) + [part for part in counts if counts[part]] + ["report"]:
        array = [f"--array=1-{counts[part]}%{plan.config.nodes}"] if part in counts else []
        only = f"{part}:K/{counts[part]}" if array else part
        # Without the shared stages no run can start. Failed trials or runs stop nothing: the report shows them.
        condition = "afterok" if before == "shared" else "afterany"
        wait = [f"--dependency={condition}:$" + before] if before else []
        words = [*array, f"--job-name={plan.base.name}-{part}", str(bundled("launch") / SCRIPT), only, *arguments]
        lines.append(f"{part}=$({' '.join(['sbatch --parsable', *wait, shlex.join(words)])}); echo {part}: job ${part}")
        before = part
    return "\n".join(lines)


def submit(script: str) -> str:
    """Run the commands and return what they print. Raises `InputError` if there is no `sbatch`, or it refuses a job."""
    if shutil.which("sbatch") is None:
        raise InputError(
            "--submit slurm: there is no sbatch here", kind="not_installed", key="--submit", fix="use --submit print"
        )
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(f"sbatch refused a job: {' '.join(done.stderr.split())}", kind="process", key="--submit")
    return done.stdout.rstrip("\n")
