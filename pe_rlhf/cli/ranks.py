"""The command of DeepSpeed's launcher: which nodes there are, how many ranks on each, and on which GPUs.

A rank gets a GPU of CUDA_VISIBLE_DEVICES where that is set, and no other one. DeepSpeed's own `deepspeed` command
ignores and deletes the variable when it gets a number of processes (DeepSpeed issues 1331, 2976), so ranks of this
machine are started by the launcher below it, which takes the devices by name.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from reward.errors import InputError
from reward.row_files import refuse_pipe

# The name goes to ssh, through a shell: it starts no option and holds nothing that a shell reads.
HOST_NAME = re.compile(r"[\w:][\w.:-]*")
HOST = re.compile(rf"({HOST_NAME.pattern})\s+slots=([1-9]\d*)(\s+#.*)?")  # a line of a hostfile
PORT_OF_SEVERAL_NODES = 29500


@dataclass(frozen=True)
class Placement:
    """What the options of `pe-rlhf launch` say about nodes; `hosts` are the slots of each node by its name."""

    hosts: dict[str, int]
    hostfile: Path | None
    node_rank: int | None  # None: this machine, or all by ssh
    master_addr: str | None
    master_port: int | None
    num_procs: int | None

    @property
    def by_ssh(self) -> bool:
        return self.hostfile is not None and self.node_rank is None


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by node. DeepSpeed would train on one process where the file is missing or has no nodes."""
    try:
        refuse_pipe(path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        message = f"--hostfile: {path} cannot be read: {error}"
        raise InputError(message, kind=kind, key="--hostfile", file=path) from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line[0] == "#":
            continue
        if not (found := HOST.fullmatch(line)):
            message = f"--hostfile: {path} line {number}: {line!r} is not of the form `HOST slots=N`"
            raise InputError(message, kind="invalid", key="--hostfile", file=path, row=number)
        if found[1] in hosts:
            message = f"--hostfile: {path} line {number}: {found[1]} is there twice"
            raise InputError(message, kind="conflict", key="--hostfile", file=path, row=number)
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise InputError(f"--hostfile: {path} names no node", kind="empty", key="--hostfile", file=path)
    return hosts


def visible_gpus() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES, numbers or names, or None where all GPUs are visible.

    As CUDA reads it: what comes after -1 or an empty entry is invisible.
    """
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return None
    entries = [entry.strip() for entry in given.split(",")]
    return entries[: next((i for i, entry in enumerate(entries) if entry in ("", "-1")), len(entries))]


def ranks_here(wanted: int | None) -> int:
    """Ranks on this machine where no hostfile says how many: `wanted`, else one for each GPU that the mask names."""
    return wanted or len(visible_gpus() or [0])


def launcher_command(placement: Placement) -> list[str]:
    """The launcher and its options, up to the module that the ranks run.

    Raises `InputError` where CUDA_VISIBLE_DEVICES has fewer GPUs than a node is to have ranks.
    """
    python = [sys.executable, "-u", "-m"]  # -u: lines of the ranks appear as they are written
    if placement.by_ssh:
        return [*python, "deepspeed.launcher.runner", *_port(placement), *_ssh_options(placement)]
    node = placement.node_rank or 0
    ranks = {host: placement.num_procs or slots for host, slots in placement.hosts.items()}
    devices = _gpus(list(ranks.values())[node])
    # Other nodes know their own devices; here only the number of their ranks counts.
    world = {name: list(range(count)) for name, count in ranks.items()}
    world[list(world)[node]] = [int(entry) if entry.isdecimal() else entry for entry in devices]  # type: ignore[misc]
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    address = placement.master_addr or (next(iter(world)) if len(world) > 1 else "127.0.0.1")
    options = [*_port(placement), f"--master_addr={address}", f"--world_info={encoded}", f"--node_rank={node}"]
    return [*python, "deepspeed.launcher.launch", *options]


def _ssh_options(placement: Placement) -> list[str]:
    """DeepSpeed starts a launcher on every node: on the same GPUs of each where the mask names some."""
    options = [] if placement.master_addr is None else [f"--master_addr={placement.master_addr}"]
    options.append(f"--hostfile={placement.hostfile}")
    if visible_gpus() is None:
        return options if placement.num_procs is None else [*options, f"--num_accelerators={placement.num_procs}"]
    chosen = []
    for host, slots in placement.hosts.items():
        gpus = _gpus(placement.num_procs or min(slots, len(visible_gpus() or [])))
        if not all(entry.isdecimal() and int(entry) < slots for entry in gpus):
            raise InputError(
                f"CUDA_VISIBLE_DEVICES names {','.join(gpus)}, and {host} has the GPUs 0 to {slots - 1} by --hostfile",
                kind="conflict",
                key="CUDA_VISIBLE_DEVICES",
                file=placement.hostfile,
                fix="unset it, name numbers, or raise slots to the number of GPUs of a node",
            )
        chosen.append(f"{host}:{','.join(gpus)}")
    return [*options, f"--include={'@'.join(chosen)}"]


def _gpus(ranks: int) -> list[str]:
    """The devices of the ranks of a node: the first ones that are visible."""
    visible = visible_gpus()
    if not visible:  # no mask, or one that hides all GPUs: the ranks then compute on the CPU
        return [str(index) for index in range(ranks)] if visible is None else ["-1"] * ranks
    if ranks > len(visible):
        raise InputError(
            f"--num-procs: {ranks} processes, and CUDA_VISIBLE_DEVICES={','.join(visible)} has {len(visible)} GPUs",
            kind="conflict",
            key="--num-procs",
            fix=f"use --num-procs {len(visible)}, or make more GPUs visible",
        )
    return visible[:ranks]


def _port(placement: Placement) -> list[str]:
    """A port of rank 0 that no other run uses: a free one of this machine; of several nodes, one that all can tell."""
    port = placement.master_port
    if port is None and len(placement.hosts) > 1:
        job = os.environ.get("SLURM_JOB_ID", "")
        port = 20000 + int(job) % 20000 if job.isdecimal() else PORT_OF_SEVERAL_NODES
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    return [f"--master_port={port}"]
