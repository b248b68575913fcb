"""`pe-rlhf launch`: `pe-rlhf run` on several processes and nodes, through DeepSpeed's launcher."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import psutil
import typer

from pe_rlhf.cli.ranks import HOST_NAME, Placement, launcher_command, ranks_here, read_hostfile
from pe_rlhf.cli.run_command import checked, plan, run, show_cost
from reward.errors import InputError

if TYPE_CHECKING:
    from pe_rlhf.config import Recipe

PLAIN_OPTION = re.compile(r"[\w@%+=:,./-]+")


def launch(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE [KEY=VALUE]... [OPTIONS OF RUN]",
            help="What `pe-rlhf run` takes: a recipe, overrides, and --run-dir, --resume, --from, --to, --may-change.",
        ),
    ] = None,
    num_procs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on each node, one per GPU; default: the hostfile's slots, the GPUs of the mask, or 1.",
        ),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="`HOST slots=N` a line; the nodes are reached by ssh unless --node-rank is given."),
    ] = None,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes, without a hostfile.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="This node's number: run the same command on every node, without ssh.")
    ] = None,
    master_addr: Annotated[str | None, typer.Option(help="Address at which the other nodes reach node 0.")] = None,
    master_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="A free port on node 0; default: one is found.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the command, start nothing.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a recipe on several processes; batch sizes in it are of all processes together.

    Where CUDA_VISIBLE_DEVICES is set, the processes get those GPUs and no others.

    All options of `pe-rlhf run` can be given, too. `deepspeed=zero2` among the overrides chooses how states are split:
    zero0 … zero3, zero3_offload, or a JSON file.
    """
    passed = arguments or []
    if importlib.util.find_spec("deepspeed") is None:
        message = "launch: DeepSpeed is not installed, whose launcher starts the processes"
        raise InputError(message, kind="not_installed", key="launch", fix="pip install 'pe-rlhf[deepspeed]'")
    if hostfile is not None and node_rank is None:
        _check_words(passed)
    parts = _check_run(passed, wait=not dry_run)
    hosts = read_hostfile(hostfile) if hostfile else {f"node-{i}": ranks_here(num_procs) for i in range(num_nodes)}
    _check_nodes(len(hosts), num_nodes, hostfile, node_rank, master_addr)
    command = launcher_command(Placement(hosts, hostfile, node_rank, master_addr, master_port, num_procs))
    command += ["--no_local_rank", "--module", "pe_rlhf", "run", *passed]
    if debug:
        command.append("--debug")
    if dry_run:
        # Beside stdout, which has the command and nothing else.
        show_cost(parts, sum(num_procs or slots for slots in hosts.values()), err=True)
        typer.echo(shlex.join(command))
        return
    raise typer.Exit(_run(command))


def _check_words(arguments: list[str]) -> None:
    """Refuse what a shell would read: DeepSpeed passes the words to ssh in single quotes, and options without any."""
    for word in arguments:
        if "'" in word or "\n" in word or (word.startswith("-") and not PLAIN_OPTION.fullmatch(word)):
            raise InputError(
                f"{word!r} cannot be passed on to other nodes by ssh: a shell would read it",
                kind="conflict",
                key=word.partition("=")[0],
                fix="write it into the recipe, or start each node with --node-rank",
            )


def _check_run(arguments: list[str], *, wait: bool) -> list[tuple[Recipe, list[str]]]:
    """Refuse what `pe-rlhf run` would refuse: once, and before any process is started. Returns what would run."""
    app = typer.Typer(add_completion=False)
    app.command()(run)
    given = typer.main.get_command(app).make_context("pe-rlhf launch", list(arguments)).params
    run_dir = None if given["run_dir"] is None else Path(given["run_dir"])
    between = given["first"], given["last"]
    loaded, target, stages = plan(given["recipe"], list(given["overrides"] or ()), run_dir, *between)
    return checked(loaded, target, stages, between, wait=wait)


def _check_nodes(
    nodes: int, num_nodes: int, hostfile: Path | None, node_rank: int | None, master_addr: str | None
) -> None:
    """Raise `InputError` for options that do not say which nodes there are and how they reach each other."""
    if hostfile is not None and num_nodes > 1:
        raise InputError("--num-nodes is for runs without a --hostfile", kind="conflict", key="--num-nodes")
    if master_addr is not None and not HOST_NAME.fullmatch(master_addr):
        message = f"--master-addr: {master_addr!r} is no name or address of a machine"
        raise InputError(message, kind="invalid", key="--master-addr")
    if num_nodes > 1 and (node_rank is None or master_addr is None):
        message = "--num-nodes needs --node-rank and --master-addr"
        fix = "or name a --hostfile with nodes that ssh reaches"
        raise InputError(message, kind="missing", key="--node-rank" if node_rank is None else "--master-addr", fix=fix)
    if node_rank is not None and num_nodes == 1 and hostfile is None:
        raise InputError("--node-rank needs --num-nodes or --hostfile", kind="missing", key="--num-nodes")
    if node_rank is not None and node_rank >= nodes:
        message = f"--node-rank {node_rank} is not one of {nodes} nodes, which are counted from 0"
        raise InputError(message, kind="invalid", key="--node-rank")


def _run(command: list[str]) -> int:
    """Run the launcher and return its exit code. SIGTERM and SIGINT go to the training processes themselves.

    DeepSpeed's launcher, if it got the signal, would end them at once, before they have saved.
    """
    from pe_rlhf.system.processes import accelerator_environment

    launcher = subprocess.Popen(command, env={**accelerator_environment(), **os.environ}, process_group=0)

    def hand_on(number: int, frame: FrameType | None) -> None:
        ranks = _ranks(launcher.pid)
        for process in ranks:
            with suppress(psutil.Error):  # it may have ended by now
                process.send_signal(number)
        if not ranks:  # not started yet, or on other nodes
            launcher.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _ranks(launcher: int) -> list[psutil.Process]:
    """The training processes that a launcher has started here: the only ones with a RANK in their environment."""
    ranks = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error):
                if "RANK" in process.environ():
                    ranks.append(process)
    return ranks
