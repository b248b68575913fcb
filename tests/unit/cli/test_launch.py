"""`pe-rlhf launch`: the very commands, and what is refused before anything is started."""

from __future__ import annotations

import base64
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from pe_rlhf.config.load import load_deepspeed_config
from pe_rlhf.model.names import resolve_model
from reward.errors import Failure, InputError
from tests.runs import Outcome, Tree, recipe, write_recipe

Cli = Callable[..., Outcome]
Fails = Callable[..., Failure]
BY_SSH = f"{sys.executable} -u -m deepspeed.launcher.runner"
HERE = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
RUN = "--no_local_rank --module pe_rlhf run"
NODES = ["--num-nodes", "2", "--node-rank"]


@pytest.fixture(autouse=True)
def _no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def parsed(out: str) -> tuple[list[str], dict[str, str], dict[str, list[object]]]:
    """The words of a command outside of the launcher's options, these options, and the devices by node."""
    words = shlex.split(out)
    options = {k: v for k, _, v in (w[2:].partition("=") for w in words[: words.index("--no_local_rank")]) if v}
    world = json.loads(base64.urlsafe_b64decode(options.pop("world_info")))
    assert words[:4] == HERE
    return words[words.index("--no_local_rank") :], options, world


@pytest.mark.parametrize("dashes", [[], ["--"]])
def test_one_node_with_the_options_of_run(cli: Cli, tmp_path: Path, dashes: list[str]) -> None:
    resolve_model("random:tiny-llama")  # of a model that is not on this machine there is no plan
    path = write_recipe(tmp_path, recipe("ppo"))
    given = ["--resume", "--run-dir", "runs/beta=0.1", "--from", "ppo", "--may-change", "seed"]
    outcome = cli("launch", path, "deepspeed=zero2", "--num-procs", "8", "--dry-run", *dashes, *given)
    words, options, world = parsed(outcome.out)
    assert "ppo update: 0." in outcome.err  # the memory plan, beside stdout
    assert words == [*RUN.split(), str(path), "deepspeed=zero2", *given]
    assert (options["master_addr"], options["node_rank"]) == ("127.0.0.1", "0")
    assert world == {"node-0": list(range(8))}


def test_options_may_come_first_and_between(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    outcome = cli("launch", "--run-dir", "out", "--num-procs", "2", path, "--to", "ppo", "--dry-run", "seed=3")
    assert parsed(outcome.out)[0] == [*RUN.split(), *f"--run-dir out {path} --to ppo seed=3".split()]


@pytest.mark.parametrize(
    ("mask", "wanted", "devices"),
    [
        (None, None, [0]),
        (None, "3", [0, 1, 2]),
        ("4,5,6,7", None, [4, 5, 6, 7]),
        ("4, 5,6,7", "2", [4, 5]),
        ("7,3", "2", [7, 3]),
        ("GPU-8932f937,MIG-a1", None, ["GPU-8932f937", "MIG-a1"]),
        ("2,-1,3", None, [2]),
        ("", "2", [-1, -1]),
        ("-1", None, [-1]),
    ],
)
def test_ranks_get_the_gpus_of_the_mask(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mask: str | None,
    wanted: str | None,
    devices: list[object],
) -> None:
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    path = write_recipe(tmp_path, recipe("ppo"))
    outcome = cli("launch", path, "--dry-run", *(["--num-procs", wanted] if wanted else []))
    world = parsed(outcome.out)[2]
    assert [str(device) for device in world["node-0"]] == [str(device) for device in devices]


@pytest.mark.parametrize("options", [["--num-procs", "3"], ["--num-procs", "4", "--hostfile", "hosts"]])
def test_more_ranks_than_gpus_in_the_mask(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    (tmp_path / "hosts").write_text("node-0 slots=8\nnode-1 slots=8\n")
    failure = fails("launch", write_recipe(tmp_path, recipe("ppo")), *options)
    assert (failure.kind, failure.key) == ("conflict", "--num-procs")


def test_four_nodes_by_ssh(cli: Cli, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    (tmp_path / "hosts").write_text("# ours\n\n" + "".join(f"node-{i} slots=8\n" for i in range(4)))
    outcome = cli("launch", path, "--hostfile", "hosts", "--master-addr", "node-0", "--dry-run")
    assert outcome.code == 0
    assert outcome.out == f"{BY_SSH} --master_port=29500 --master_addr=node-0 --hostfile=hosts {RUN} {path}\n"
    fewer = cli("launch", path, "--hostfile", "hosts", "--num-procs", "4", "--dry-run")
    assert fewer.out == f"{BY_SSH} --master_port=29500 --hostfile=hosts --num_accelerators=4 {RUN} {path}\n"


def test_by_ssh_the_mask_is_that_of_every_node(
    cli: Cli, fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    outcome = cli("launch", path, "--hostfile", "hosts", "--num-procs", "2", "--dry-run")
    assert "--include=a:4,5@b:4,5" in shlex.split(outcome.out)
    assert "--num_accelerators" not in outcome.out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9")
    failure = fails("launch", path, "--hostfile", "hosts")
    assert (failure.kind, failure.key) == ("conflict", "CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("node", [0, 3])
def test_four_nodes_without_ssh(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, node: int) -> None:
    path = write_recipe(tmp_path, recipe("ppo"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    nodes = ["--num-nodes", "4", "--node-rank", str(node), "--master-addr", "10.0.0.1", "--num-procs", "2"]
    words, options, world = parsed(cli("launch", path, *nodes, "--dry-run").out)
    assert words == [*RUN.split(), str(path)]
    # The same port on all nodes, and another one for each job of a node.
    assert options == {"master_port": "34567", "master_addr": "10.0.0.1", "node_rank": str(node)}
    assert list(world) == [f"node-{i}" for i in range(4)]
    assert [len(devices) for devices in world.values()] == [2] * 4
    assert world[f"node-{node}"] == [2, 3]


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
        (["--hostfile", "twice"], "conflict", "--hostfile", 3),
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
    (tmp_path / "twice").write_text("node-0 slots=8\nnode-1 slots=8\nnode-0 slots=4\n")
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
