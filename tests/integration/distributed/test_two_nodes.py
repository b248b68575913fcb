"""Two nodes, each with a launcher of its own, against one process."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import Forked
from tests.integration.distributed.launching import finish, free_port, launch, start
from tests.integration.distributed.test_ranks import assert_same_run, small
from tests.runs import write_recipe

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, list[str]]]]:
    """Two hosts as (address, what to put before a command that is to run there): of a network of their own, or, where
    none can be made (that takes Linux, iproute2 and root), both this machine.
    """
    ids = [f"pe-rlhf-{os.getpid()}-{node}" for node in range(2)]
    made = [ip("netns", "add", name) for name in ids]
    try:
        pair = ["pe0", "netns", ids[0], "type", "veth", "peer", "pe1", "netns", ids[1]]
        if not all(made) or not ip("link", "add", *pair):
            yield [("127.0.0.1", [])] * 2
            return
        for node, name in enumerate(ids):
            assert ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", f"pe{node}")
            assert ip("-n", name, "link", "set", f"pe{node}", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        # gloo would take the address that the machine's name has, which is not of this network.
        inside = [["env", f"GLOO_SOCKET_IFNAME=pe{node}", "ip", "netns", "exec", name] for node, name in enumerate(ids)]
        yield [(f"10.77.0.{node + 1}", before) for node, before in enumerate(inside)]
    finally:
        for name in ids:
            ip("netns", "delete", name)


def ip(*arguments: str) -> bool:
    return (
        bool(shutil.which("ip"))
        and subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0
    )


def test_two_nodes_are_one(tmp_path: Path, model_cache: Path, hosts: list[tuple[str, list[str]]]) -> None:
    """A launcher for each node, as `srun` starts them, against one process."""
    path = write_recipe(tmp_path, small("ppo"))
    port = free_port()
    nodes = ["deepspeed=zero1", "--num-nodes=2", f"--master-addr={hosts[0][0]}"]
    launchers = []
    for node, (_, before) in enumerate(hosts):
        command = launch(path, *nodes, f"--node-rank={node}", "--", "--run-dir=two", ranks=1, port=port)
        launchers.append(start([*before, *command], tmp_path, model_cache))
    for launcher in launchers:
        finish(launcher)
    Forked(["run", str(path), "--run-dir=one"], tmp_path, model_cache).finish()
    assert_same_run(tmp_path / "two", tmp_path / "one", ("ppo",))
