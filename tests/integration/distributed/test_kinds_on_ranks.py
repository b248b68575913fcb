"""Every kind of adapter on two ranks and with split states: one process and two ranks that make all runs in turn."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from pe_rlhf.adapters.kind import KINDS
from tests.forked import Forked
from tests.integration.distributed.launching import run_in_turn, start_ranks
from tests.integration.distributed.test_ranks import CONFIGURATIONS, assert_same_run, small, write_all_split
from tests.runs import write_recipe
from tests.stage_support import gpt2_of_bytes

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

SMALLER = "ppo.learning_rate=1e-3"
# At a LoRA's rate some hardly leave the anchor, and what is measured over their distance from there is rounding.
FURTHER = "ppo.learning_rate=0.05"
# Settings of kinds; then ways to make a step, which look at gradients and write into weights, too.
SETTINGS: dict[str, list[str]] = {
    **{kind: [] for kind in sorted(KINDS)},
    "adalora": ["adapter.every=1", "adapter.warmup_share=0.1", FURTHER],
    "dora": ["adapter.init=pissa", "adapter.rank=4"],
    # The directions are chosen in the middle of the stage.
    "lora_dash": ["adapter.rank=4", "adapter.directions=3", "adapter.warmup_steps=4", SMALLER],
    # Of full rank, it makes much of the ranks' rounding: its steps are smaller.
    "redrawn": ["adapter.every=2", SMALLER],
    # All layers share one vector.
    "tinylora": ["adapter.size=13", "adapter.vectors=1", FURTHER],
    "vera": ["ppo.learning_rate=0.1"],
    # Its init and its entries are both of the gradient.
    "rosa": ["adapter.init=lora_ga", "adapter.rank=4"],
    "sam": ["ppo.optimizer.sharpness=sam", "ppo.optimizer.rho=0.1"],
    # A noisy model makes much of the ranks' rounding.
    "rwp": ["ppo.optimizer.sharpness=rwp", "ppo.optimizer.noise_on=model", SMALLER],
}
RUNS = [*((name, "zero2") for name in SETTINGS), *((kind, "all_split") for kind in sorted(KINDS))]


def overrides(name: str, gpt2: str) -> list[str]:
    """Every other kind on a GPT-2, whose weights are the other way round."""
    model = [f"model={gpt2}"] if name in sorted(KINDS)[::2] else []
    return [f"adapter.kind={name}" if name in KINDS else "adapter.kind=lora", *model, *SETTINGS[name]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Path:
    """A folder with the runs of the tests that were selected."""
    folder = tmp_path_factory.mktemp("kinds")
    path = str(write_recipe(folder, {**small("ppo"), "adapter": {}}))
    write_all_split(folder)
    gpt2 = gpt2_of_bytes(folder / "gpt2")
    wanted = [
        (str(item.callspec.params["name"]), str(item.callspec.params["zero"]))
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_two_ranks_are_one
    ]
    single = [["run", path, *overrides(name, gpt2), f"--run-dir=one-{name}"] for name in dict(wanted)]
    together = [
        ["run", path, *overrides(name, gpt2), *CONFIGURATIONS[zero], f"--run-dir={zero}-{name}"]
        for name, zero in wanted
    ]
    one = Forked(single[-1], folder, model_cache, before=partial(run_in_turn, single[:-1]))
    two = start_ranks(together[-1], folder, model_cache, before=partial(run_in_turn, together[:-1]))
    try:
        for process in (one, *two):
            process.finish()
    finally:
        for process in (one, *two):
            process.kill()
    return folder


@pytest.mark.parametrize(("name", "zero"), RUNS)
def test_two_ranks_are_one(runs: Path, name: str, zero: str) -> None:
    assert_same_run(runs / f"{zero}-{name}", runs / f"one-{name}", ("ppo",), weights=1e-3)
