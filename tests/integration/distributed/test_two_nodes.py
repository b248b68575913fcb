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
    """Two hosts of a network of their own, as (address, what to put before a command that is to run there)."""
    ids = [f"pe-rlhf-{os.getpid()}-{node}" for node in range(2)]
    made = [ip("netns", "add", name) for name in ids]
    try:
        if not all(made) or not ip(
            "link", "add", "pe0", "netns", ids[0], "type", "veth", "peer", "pe1", "netns", ids[1]
        ):
            pytest.skip("network namespaces cannot be made here: that takes Linux, iproute2 and root")
        for node, name in enumerate(ids):
            assert ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", f"pe{node}")
            assert ip("-n", name, "link", "set", f"pe{node}", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield [(f"10.77.0.{node + 1}", ["ip", "netns", "exec", name]) for node, name in enumerate(ids)]
    finally:
        for name in ids:
            ip("netns", "delete", name)


def ip(*arguments: str) -> bool:
    return (
        bool(shutil.which("ip"))
        and subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0
    )


def assert_two_nodes_are_one(folder: Path, cache: Path, master: str, inside: list[list[str]]) -> None:
    """A launcher for each node, as `srun` starts them, against one process; `inside`: how to run something there."""
    path = write_recipe(folder, small("ppo"))
    port = free_port()
    nodes = ["deepspeed=zero1", "--num-nodes=2", f"--master-addr={master}"]
    launchers = []
    for node, before in enumerate(inside):
        command = launch(path, *nodes, f"--node-rank={node}", "--", "--run-dir=two", ranks=1, port=port)
        launchers.append(start([*before, *command], folder, cache))
    for launcher in launchers:
        finish(launcher)
    Forked(["run", str(path), "--run-dir=one"], folder, cache).finish()
    assert_same_run(folder / "two", folder / "one", ("ppo",))


def test_two_nodes_that_are_both_this_machine(tmp_path: Path, model_cache: Path) -> None:
    assert_two_nodes_are_one(tmp_path, model_cache, "127.0.0.1", [[], []])


def test_two_nodes_of_a_network(tmp_path: Path, model_cache: Path, hosts: list[tuple[str, list[str]]]) -> None:
    # gloo would take the address that the machine's name has, which is not of this network.
    inside = [["env", f"GLOO_SOCKET_IFNAME=pe{node}", *before] for node, (_, before) in enumerate(hosts)]
    assert_two_nodes_are_one(tmp_path, model_cache, hosts[0][0], inside)
