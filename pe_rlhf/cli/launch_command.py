"""`pe-rlhf launch`: `pe-rlhf run` on several processes and nodes, through DeepSpeed's launcher."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import psutil
import typer

VALUED = ("--run-dir", "--from", "--to", "--may-change")  # options of `pe-rlhf run` whose value may hold a "="


def launch(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that comes along.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="What `pe-rlhf run` takes after the recipe; put its options behind `--`: -- --resume"),
    ] = None,
    num_procs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on each node, one per GPU; if left out, the hostfile's slots, or 1."),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="`HOST slots=N` a line; the nodes are reached by ssh unless --node-rank is given."),
    ] = None,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes, where there is no hostfile.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="This node's number: run the same command on every node, without ssh.")
    ] = None,
    master_addr: Annotated[str | None, typer.Option(help="Where node 0 is reached by the others.")] = None,
    master_port: Annotated[int, typer.Option(help="A free port on node 0.")] = 29500,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and do nothing.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a recipe on several processes; batch sizes in it are of all processes together.

    `deepspeed=zero2` among the overrides chooses how states are split: zero0 … zero3, zero3_offload, or a JSON file.
    """
    from pe_rlhf.config.load import find_recipe, load_deepspeed_config, load_recipe
    from reward.errors import InputError

    passed = arguments or []
    overrides = [
        argument
        for before, argument in zip(["", *passed], passed, strict=False)
        if not argument.startswith("-") and "=" in argument and before not in VALUED
    ]
    # A mistake is told once, before any process is started.
    loaded = load_recipe(find_recipe(recipe), overrides)
    if loaded.deepspeed is not None:
        load_deepspeed_config(loaded.deepspeed)
    several = num_nodes > 1 or hostfile is not None
    if node_rank is not None and not several:
        raise InputError("--node-rank needs --num-nodes or --hostfile")
    if num_nodes > 1 and hostfile is None and (node_rank is None or master_addr is None):
        raise InputError("--num-nodes needs --node-rank and --master-addr, or a --hostfile with nodes that ssh reaches")
    if node_rank is not None and node_rank >= num_nodes and hostfile is None:
        raise InputError(f"--node-rank {node_rank} is not below --num-nodes {num_nodes}: the first node is 0")

    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--master_port={master_port}"]
    if master_addr is not None:
        command.append(f"--master_addr={master_addr}")
    if several:
        command.append(f"--hostfile={hostfile or _numbered_hosts(num_nodes, num_procs or 1)}")
    if num_procs is not None or not several:
        command.append(f"--num_accelerators={num_procs or 1}")
    if node_rank is not None:
        command += ["--no_ssh", f"--node_rank={node_rank}"]
    command += ["--no_local_rank", "--module", "pe_rlhf", "run", recipe, *(arguments or [])]
    if debug:
        command.append("--debug")
    if dry_run:
        typer.echo(shlex.join(command))
        return
    raise typer.Exit(_run(command))


def _run(command: list[str]) -> int:
    """Run the launcher and return its exit code. SIGTERM and SIGINT go to the training processes themselves.

    DeepSpeed's launcher would end them: at once where it is told by a signal, and after 30 seconds where they were.
    """
    from pe_rlhf.system.processes import accelerator_environment

    launcher = subprocess.Popen(command, env={**accelerator_environment(), **os.environ}, process_group=0)

    def hand_on(number: int, frame: FrameType | None) -> None:
        ranks = _ranks(launcher.pid)
        for process in ranks:
            with suppress(psutil.Error):  # it may have ended by now
                process.send_signal(number)
        if not ranks:  # not there yet, or on other nodes
            launcher.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = launcher.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _ranks(launcher: int) -> list[psutil.Process]:
    """The training processes that a launcher has started here: what they have and it has not is a rank."""
    ranks = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error):
                if "RANK" in process.environ():
                    ranks.append(process)
    return ranks


def _numbered_hosts(nodes: int, slots: int) -> str:
    """A hostfile for nodes that are started by hand: the launcher counts its lines and looks no name up."""
    path = Path(tempfile.gettempdir()) / f"pe-rlhf-{os.getuid()}-{nodes}x{slots}.hosts"
    path.write_text("".join(f"node-{number} slots={slots}\n" for number in range(nodes)), encoding="utf-8")
    return str(path)
