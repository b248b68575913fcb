"""Starting real ranks with gloo on this machine's CPU: by `pe-rlhf launch`, or forked, which takes no time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import psutil

from pe_rlhf.algo import logprobs
from pe_rlhf.cli.main import app
from tests.forked import Forked
from tests.paths import ROOT
from tests.runs import Tree

SECONDS = 300


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(cache: Path) -> dict[str, str]:
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PE_RLHF_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own}


def start(command: list[str], folder: Path, cache: Path) -> subprocess.Popen[str]:
    """Start a command in a session of its own, so that it can be killed with all that it starts."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for its end and return what it said; a command that hangs is a failure."""
    try:
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        kill(process)
    assert process.returncode == code, said[-4000:]
    return said


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a command and all that it has started, all at once."""
    if process.poll() is None:
        whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in whole:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def few_chunks() -> None:
    """So few tokens in a chunk that the ranks' response tokens are of different numbers of chunks."""
    logprobs.CHUNK = 3


def run_in_turn(commands: list[list[str]]) -> None:
    """Several commands in one process, which stays in its group of ranks."""
    few_chunks()
    for arguments in commands:
        print(f"{arguments}", flush=True)
        app(args=arguments, standalone_mode=False)


def start_ranks(
    arguments: list[str], folder: Path, cache: Path, ranks: int = 2, before: Callable[[], None] = few_chunks
) -> list[Forked]:
    """Ranks that start at once, without a launcher."""
    port = str(free_port())
    started = []
    for rank in map(str, range(ranks)):
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        started.append(Forked(arguments, folder, cache, world | own, before))
    return started


def run_on_ranks(arguments: list[str], folder: Path, cache: Path) -> str:
    """Run a command on two ranks to their end. Returns what rank 0 said."""
    started = start_ranks(arguments, folder, cache)
    try:
        said = [process.finish() for process in started]
    finally:
        for process in started:
            process.kill()
    return said[0]


def script_on_ranks(script: str, folder: Path, *arguments: str, ranks: int = 2) -> list[Tree]:
    """The object that a Python text prints last on each rank; one rank is a process without a group."""
    run = partial(_run_script, script, arguments)
    started = [Forked([], folder, folder, before=run)] if ranks == 1 else start_ranks([], folder, folder, ranks, run)
    try:
        said = [process.finish() for process in started]
    finally:
        for process in started:
            process.kill()
    return [json.loads([line for line in text.splitlines() if line.startswith("{")][-1]) for text in said]


def _run_script(script: str, arguments: tuple[str, ...]) -> None:
    sys.argv = ["script.py", *arguments]
    exec(compile(script, "script.py", "exec"), {"__name__": "__main__"})
    raise SystemExit(0)  # it is all that the process does


def launch(recipe: Path, *arguments: str, ranks: int = 2, port: int | None = None) -> list[str]:
    """`pe-rlhf launch` with overrides and options; what comes after `--` goes to `run`."""
    command = [sys.executable, "-m", "pe_rlhf", "launch", str(recipe), f"--num-procs={ranks}"]
    return [*command, f"--master-port={port or free_port()}", *arguments]
