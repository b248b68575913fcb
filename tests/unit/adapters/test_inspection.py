"""`pe-rlhf inspect`: its figures against gradients of every sample formed one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pe_rlhf.adapters.inspection import inspect_inits, spectrum_position
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.report.format import number
from pe_rlhf.stages.inspect import low_rank
from pe_rlhf.system.seeding import derive_seed
from tests.runs import Outcome, recipe, write_recipe
from tests.tiny import ALL_INITS, add_role, statistics_for, tiny_model
from tests.unit.adapters.first_steps import best_cosine, cosine, first_update
from tests.unit.adapters.test_gradients import brute_force
from tests.unit.report.parsed import assert_fetches_nothing, parse, plots, section, table


@pytest.mark.parametrize("init", ["lora", "lora_ga", "pissa"])
def test_kernels_and_cosines_are_those_of_the_gradients_themselves(family: str, init: str) -> None:
    backbone = load_backbone(tiny_model(family))
    add_role(backbone, "policy", init, rank=3, alpha=6)
    spec = backbone.adapter_spec("policy")
    state = backbone.role_state("policy")
    (probe,) = statistics_for(backbone).probes("gradient")
    layers = {name: backbone.base_layer(name) for name in spec.modules}
    result = inspect_inits(layers, probe, [low_rank(spec.settings)], lambda name: derive_seed(0, "policy", name))
    samples = [brute_force(family, [row]) for row in range(6)]
    full, adapter = np.zeros((6, 6)), np.zeros((6, 6))
    for name in spec.modules:
        A, B = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        for i, first in enumerate(samples):
            for j, second in enumerate(samples):
                full[i, j] += float((first[name] * second[name]).sum())
                adapter[i, j] += 4 * float((B.T @ first[name] * (B.T @ second[name])).sum())
                adapter[i, j] += 4 * float((first[name] @ A.T * (second[name] @ A.T)).sum())
    np.testing.assert_allclose(result.kernel.numpy(), full, atol=1e-5 * np.abs(full).max(), rtol=1e-3)
    found = result.inits[0].kernel.numpy()
    np.testing.assert_allclose(found, adapter, atol=1e-5 * np.abs(adapter).max(), rtol=1e-3)
    (total,) = result.totals()
    error = np.linalg.norm(adapter - full) / np.linalg.norm(full)
    assert total["kernel_error"] == pytest.approx(error, rel=1e-3)

    whole = brute_force(family, list(range(6)))
    assert [row.layer for row in result.inits[0].layers] == list(spec.modules)
    for row in result.inits[0].layers:
        A, B = state[f"{row.layer}.lora_A"], state[f"{row.layer}.lora_B"]
        G = whole[row.layer]
        assert row.cosine == pytest.approx(cosine(first_update(A, B, G), G), abs=1e-4)
        assert row.best == pytest.approx(best_cosine(G, 6), abs=1e-4)
        assert row.norm_A == pytest.approx(float(A.norm()), rel=1e-5)


def test_the_position_is_0_at_the_top_of_the_spectrum_and_1_at_the_bottom() -> None:
    Vh, _ = torch.linalg.qr(torch.randn(8, 8))
    assert spectrum_position(Vh[:1], Vh) == pytest.approx(0, abs=1e-6)
    assert spectrum_position(Vh[-1:], Vh) == pytest.approx(1, abs=1e-6)
    assert spectrum_position(Vh, Vh) == pytest.approx(0.5, abs=1e-6)
    assert spectrum_position(torch.zeros(2, 8), Vh) is None


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_the_command_shows_every_init_on_a_page(cli: Callable[..., Outcome], tmp_path: Path, stage: str) -> None:
    path = write_recipe(tmp_path, recipe("reward", "ppo", ppo__rollout__max_new_tokens=6))
    page = tmp_path / "out" / "page.html"
    done = cli("inspect", path, "--inits", "all", "--stage", stage, "--to", page, "seed=1")
    assert done.code == 0, done
    metrics = json.loads(page.with_suffix(".json").read_text())
    fitting = [name for name in ALL_INITS if name != "loftq"]  # which is for quantised bases
    assert [row["init"] for row in metrics["inits"]] == fitting
    best = max(metrics["inits"], key=lambda row: row["cosine"])
    assert best["init"] == "lora_ga"
    for row in best["layers"]:  # the theorem, on the gradients of the stage's own loss
        assert row["cosine"] == pytest.approx(row["best"], abs=1e-3)
    tree = parse(page)
    assert_fetches_nothing(tree, page.read_text(encoding="utf-8"))
    assert len(plots(tree)) == 2 * len(fitting) + 1
    shown = table(section(tree, "All layers"))
    assert {name: row["cosine with G"] for name, row in shown.items()} == {
        row["init"]: number(row["cosine"]) for row in metrics["inits"]
    }
