"""A command of ours in a process of its own, forked from a server that has imported everything: it starts at once."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import FrameType


def call(arguments: list[str], log: Path) -> tuple[int, int]:
    """Run `pe-rlhf` with those arguments; what it says is added to a file.

    The command is asked to stop where this process is, and killed where this process is killed.

    Returns:
        its exit code, negative for the signal that killed it, and the number of the signal that asked this process to
        stop meanwhile, or 0.
    """
    process = _context().Process(target=_command, args=(arguments, log, dict(os.environ)))
    received = 0

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        if process.pid is not None:
            os.kill(process.pid, number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process.start()
        if received and process.pid is not None:  # while the process was being started
            os.kill(process.pid, received)
        process.join()
        return process.exitcode or 0, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _context() -> ForkServerContext | SpawnContext:
    """How processes start. With a GPU each imports anew: no fork has it after an import has looked for it."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pe_rlhf.stages.pipeline"])
    return context


def _command(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    _die_with_parent()
    os.setpgid(0, 0)  # Ctrl-C reaches it from the parent only
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["pe-rlhf", *arguments]
    try:
        runpy.run_module("pe_rlhf", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as any interpreter does at its end, except those of multiprocessing


def _die_with_parent() -> None:
    """Be killed when the parent is: an orphan would keep its folder locked."""
    if sys.platform != "linux":
        return
    import ctypes

    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died in between
        os._exit(1)
