"""`pe-rlhf launch`: the very commands, and what is refused before anything is started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from pe_rlhf.config.load import load_deepspeed_config
from reward.errors import Failure, InputError
from tests.runs import Outcome, Tree, recipe, write_recipe

Cli = Callable[..., Outcome]
Fails = Callable[..., Failure]
START = f"{sys.executable} -m deepspeed.launcher.runner --master_port=29500"
RUN = "--no_local_rank --module pe_rlhf run"
NODES = ["--num-nodes", "2", "--node-rank"]


@pytest.mark.parametrize("dashes", [[], ["--"]])
def test_one_node_with_the_options_of_run(cli: Cli, tmp_path: Path, dashes: list[str]) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    options = ["--resume", "--run-dir", "runs/beta=0.1", "--from", "ppo", "--may-change", "seed"]
    outcome = cli("launch", path, "deepspeed=zero2", "--num-procs", "8", "--dry-run", *dashes, *options)
    command = f"{START} --num_accelerators=8 {RUN} {path} deepspeed=zero2 {' '.join(options)}"
    assert (outcome.code, outcome.out) == (0, f"{command}\n")


def test_options_may_come_first_and_between(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    outcome = cli("launch", "--run-dir", "out", "--num-procs", "2", path, "--to", "ppo", "--dry-run", "seed=3")
    assert outcome.out == f"{START} --num_accelerators=2 {RUN} --run-dir out {path} --to ppo seed=3\n"


def test_four_nodes_by_ssh(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    (tmp_path / "hosts").write_text("# ours\n\n" + "".join(f"node-{i} slots=8\n" for i in range(4)))
    outcome = cli("launch", path, "--hostfile", "hosts", "--master-addr", "node-0", "--dry-run")
    assert outcome.code == 0
    assert outcome.out == f"{START} --master_addr=node-0 --hostfile=hosts {RUN} {path}\n"
    fewer = cli("launch", path, "--hostfile", "hosts", "--num-procs", "4", "--dry-run")
    assert fewer.out == f"{START} --hostfile=hosts --num_accelerators=4 {RUN} {path}\n"


@pytest.mark.parametrize("node", [0, 3])
def test_four_nodes_without_ssh(cli: Cli, tmp_path: Path, node: int) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    nodes = ["--num-nodes", "4", "--node-rank", str(node), "--master-addr", "10.0.0.1", "--num-procs", "8"]
    outcome = cli("launch", path, *nodes, "--dry-run")
    assert outcome.code == 0
    words = outcome.out.split()
    (hosts,) = [Path(word.removeprefix("--hostfile=")) for word in words if word.startswith("--hostfile=")]
    assert hosts.read_text() == "".join(f"node-{i} slots=8\n" for i in range(4))
    assert [word for word in words if "hostfile" not in word] == [
        *f"{START} --master_addr=10.0.0.1 --num_accelerators=8 --no_ssh --node_rank={node}".split(),
        *f"{RUN} {path}".split(),
    ]


@pytest.mark.parametrize(
    ("options", "kind", "key", "row"),
    [
        (["--node-rank", "0"], "missing", "--num-nodes", None),
        (["--num-nodes", "2"], "missing", "--node-rank", None),
        ([*NODES, "0"], "missing", "--master-addr", None),
        ([*NODES, "2", "--master-addr", "a"], "invalid", "--node-rank", None),
        (["--hostfile", "absent"], "missing", "--hostfile", None),
        (["--hostfile", "empty"], "empty", "--hostfile", None),
        (["--hostfile", "wrong"], "invalid", "--hostfile", 2),
        (["--hostfile", "hosts", "--node-rank", "1"], "invalid", "--node-rank", None),
        (["--hostfile", "hosts", "--num-nodes", "2"], "conflict", "--num-nodes", None),
        (["ppo.stepz=3"], "unknown", "ppo.stepz", None),
        (["deepspeed=zero7"], "unknown", "deepspeed", None),
        (["stray"], "invalid", "stray", None),
    ],
)
def test_mistakes_are_told_before_anything_is_started(
    fails: Fails, tmp_path: Path, options: list[str], kind: str, key: str, row: int | None
) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    (tmp_path / "wrong").write_text("node-0 slots=8\nnode-1\n")
    (tmp_path / "hosts").write_text("node-0 slots=8\n")
    failure = fails("launch", write_recipe(tmp_path, recipe("ppo")), *options)
    assert (failure.kind, failure.key, failure.row) == (kind, key, row)


@pytest.mark.parametrize(
    ("tree", "options"),
    [
        (recipe("ppo", ppo__prompts="absent.jsonl"), []),
        (recipe("ppo", compare={"grid": {"init": ["lora", "pissa"]}}), []),
        (recipe("ppo"), ["--to", "pppo"]),
        (recipe("ppo", adapter__init="pisa"), []),
    ],
)
def test_what_run_refuses_is_refused(fails: Fails, tmp_path: Path, tree: Tree, options: list[str]) -> None:
    path = write_recipe(tmp_path, tree)
    expected = fails("run", path, *options)
    assert fails("launch", path, *options).fields() == expected.fields()


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (["--bogus"], "--bogus"),
        (["--run-dir"], "--run-dir"),
        (["--master-port", "0"], "--master-port"),
        (["--master-port", "65536"], "--master-port"),
        (["--num-procs", "0"], "--num-procs"),
    ],
)
def test_options_that_are_wrong(cli: Cli, tmp_path: Path, options: list[str], option: str) -> None:
    outcome = cli("launch", write_recipe(tmp_path, recipe("ppo")), *options)
    assert outcome.code == 2
    assert isinstance(outcome.error, typer.TyperException)
    assert option in outcome.errors[0]


def test_without_a_recipe(cli: Cli) -> None:
    outcome = cli("launch")
    assert outcome.code == 2
    assert "recipe" in outcome.errors[0]


@pytest.mark.parametrize("stage", range(4))
def test_configurations(stage: int) -> None:
    assert load_deepspeed_config(f"zero{stage}")["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(("content", "kind"), [("{", "unreadable"), ("[1]", "unreadable"), (None, "missing")])
def test_a_configuration_of_ones_own(tmp_path: Path, content: str | None, kind: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"comment": "mine", "zero_optimization": {"stage": 1}}')
    assert load_deepspeed_config(str(path)) == {"zero_optimization": {"stage": 1}}
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError) as raised:
        load_deepspeed_config(str(path))
    assert (raised.value.kind, raised.value.key, raised.value.file) == (kind, "deepspeed", str(path))
