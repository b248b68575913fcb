"""Running what a comparison has planned: each run a process of its own, so that one that dies takes no other with it.

What has finished is never run again, and what was interrupted goes on from its checkpoint. A run that failed is noted
in its folder and stays as it is until it is to be tried again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from pe_rlhf.comparison.plan import PlannedRun
from pe_rlhf.comparison.run_result import Status
from pe_rlhf.config.load import changes_since, refuse_other_recipe, save_recipe
from pe_rlhf.runs.layout import RunFiles
from pe_rlhf.system.failures import Stopped
from pe_rlhf.system.files import write_json
from pe_rlhf.system.progress import say
from reward.errors import InputError

# Of `pe-rlhf run`: what came from outside and says nothing of the run itself.
IN_USE = "is in use by another run"
SECONDS_BETWEEN_LOOKS = 15.0
# What may differ on another machine that has run a part of the same comparison: where things lie, and what it can do.
OF_THE_MACHINE = (
    *("model", "ppo.reward", "ppo.micro_batch_tokens", "reward.micro_batch_tokens"),
    *(f"{data}.path" for data in ("sft.data", "sft.eval_data", "reward.data", "reward.eval_data")),
    *(f"{stage}.prompts.path" for stage in ("preferences", "ppo", "evaluate")),
    *(
        f"{sampling}.{key}"
        for sampling in ("preferences.sampling", "ppo.rollout", "evaluate.sampling")
        for key in ("urls", "exchange_dir", "start_timeout", "timeout", "gpu_memory_share", "sleep")
    ),
    *(
        f"{judge}.{key}"
        for judge in ("preferences.judge", "evaluate.judge")
        for key in ("base_url", "api_key_env", "concurrency", "timeout", "attempts", "gpu_memory_share", "device")
    ),
)


@dataclass(frozen=True)
class Share:
    """The k-th of n shares of a list."""

    number: int = 1
    count: int = 1

    def of(self, items: Sequence[PlannedRun]) -> list[PlannedRun]:
        return list(items)[self.number - 1 :: self.count]


def state_of(run: PlannedRun) -> tuple[Status, str]:
    """Whether a run has finished or failed, and why it failed."""
    if all(RunFiles(run.folder).stage(stage).summary.is_file() for stage in run.recipe.stages):
        return "finished", ""
    with suppress(OSError, ValueError):
        return "failed", json.loads(RunFiles(run.folder).failure.read_text(encoding="utf-8"))["message"]
    return "unfinished", ""


def run_all(runs: Sequence[PlannedRun], *, retry: bool, told: Callable[[PlannedRun], str] = lambda _: "") -> None:
    """Run what has not finished, one after the other. `told` says in a few words what came of a run.

    Raises `Stopped` where this process, or a run, was asked to stop; the rest is then left for the next time.
    """
    todo = [run for run in runs if state_of(run)[0] == "unfinished" or (retry and state_of(run)[0] == "failed")]
    for status in ("finished", "failed"):
        there = [run.name for run in runs if run not in todo and state_of(run)[0] == status]
        if there:
            say(f"{status} before, left as {'they are' if len(there) > 1 else 'it is'}: {'; '.join(there)}")
    for number, run in enumerate(todo, start=1):
        say(f"[{number}/{len(todo)}] {run.name}: running, {run.folder}")
        start = time.monotonic()
        _run(run)
        status, message = state_of(run)
        took = f"{time.monotonic() - start:.0f} s"
        say(f"[{number}/{len(todo)}] {run.name}: {status} after {took}: {message or told(run)}")


def run_to_end(run: PlannedRun, *, retry: bool) -> None:
    """Run one that others need as well; where another process has it, wait until that one has ended."""
    run_all([run], retry=retry)
    while state_of(run)[0] == "unfinished":
        time.sleep(SECONDS_BETWEEN_LOOKS)
        run_all([run], retry=False)


def _run(run: PlannedRun) -> None:
    """One run, to its end; why it failed, where it did, goes into its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    RunFiles(run.folder).failure.unlink(missing_ok=True)
    recipe = run.folder.with_name(f"{run.folder.name}.yaml")
    save_recipe(run.recipe, recipe)
    command = [sys.executable, "-m", "pe_rlhf", "run", str(recipe), "--run-dir", str(run.folder), "--resume"]
    log = RunFiles(run.folder).log
    start = log.stat().st_size if log.exists() else 0
    code, asked = _call(command, log)
    if code == 0 and not asked:
        return
    if asked or code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        raise Stopped(f"compare: stopped during {run.name}", asked or code - 128, "the same command goes on from there")
    said = log.read_bytes()[start:].decode(errors="replace")
    errors = re.findall(r"^error: (.*)$", said, flags=re.MULTILINE)
    message = errors[-1] if errors else f"it ended with exit code {code}; see {log}"
    if code < 0:
        message = f"it was killed by {signal.Signals(-code).name}; see {log}"
    if IN_USE in message:
        say(f"{run.name}: left to the other process: {message}")
        return
    write_json(RunFiles(run.folder).failure, {"message": message, "exit_code": code})


def _call(command: list[str], log: Path) -> tuple[int, int]:
    """Run a command: its exit code, and the number of the signal that asked this process to stop meanwhile, or 0.

    The command gets that signal, too, and where this process is killed, it is killed with it.
    """
    received = 0
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, process_group=0, preexec_fn=_die_with(os.getpid())
            )
        if received:  # while it was being started
            process.send_signal(received)
        return process.wait(), received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child does first, so that it is killed when its parent is: a run left behind would hold its folder."""
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork, where little may be done
    set_death_signal = 1

    def ask() -> None:
        prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask


def refuse_changed(runs: Sequence[PlannedRun]) -> None:
    """Raise `InputError` where one of the runs was started with another recipe, before any of them goes on."""
    for run in runs:
        if (path := RunFiles(run.folder).recipe).is_file():
            refuse_other_recipe(run.recipe, path)


def located(run: PlannedRun, places: Sequence[Path], root: Path, may_change: Sequence[str] = ()) -> PlannedRun:
    """A run where it lies: in its own place, or at the same path below one of the others; one that has finished first.

    Raises `InputError` for one that was run with another recipe. What is of the machine alone may differ.
    """
    folders = [place / run.folder.relative_to(root) for place in (root, *places)]
    there = [replace(run, folder=folder) for folder in folders if RunFiles(folder).recipe.is_file()]
    for found in there:
        if changed := changes_since(run.recipe, RunFiles(found.folder).recipe, (*OF_THE_MACHINE, *may_change)):
            raise InputError(f"{found.folder} was run with another recipe than this comparison's: {changed}")
    return max(there, key=lambda found: state_of(found)[0] == "finished", default=run)
