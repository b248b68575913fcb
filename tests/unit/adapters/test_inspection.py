"""`pe-rlhf inspect`: its figures against gradients of every sample formed one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pe_rlhf.adapters.inspection import inspect_inits, spectrum_position
from pe_rlhf.adapters.kind import KINDS
from pe_rlhf.adapters.layer_statistics import LayerStatistics
from pe_rlhf.adapters.specs import AdapterSpec, new_adapters
from pe_rlhf.config.adapter import settings_of
from pe_rlhf.config.load import make_recipe
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.report.format import number
from pe_rlhf.stages.inspect import adapters_named, low_rank
from pe_rlhf.system.seeding import derive_seed
from reward.errors import Failure
from tests.failures import raises
from tests.runs import Outcome, recipe, write_recipe
from tests.tiny import ALL_INITS, add_role, statistics_for, tiny_model
from tests.unit.adapters.first_steps import best_cosine, cosine, first_update
from tests.unit.adapters.test_gradients import brute_force
from tests.unit.adapters.test_kinds import OF_RANK_4, ORACLES
from tests.unit.report.parsed import assert_fetches_nothing, parse, plots, section, table

FEW_LAYERS = {"targets": ["q_proj", "down_proj"]}


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


def dense_weight(kind: str, layer: Any, W: Tensor) -> Callable[..., Tensor]:
    """W + ΔW of a layer's parameters in fp64."""
    kept = {name: buffer.double() if buffer.is_floating_point() else buffer for name, buffer in layer.named_buffers()}
    return lambda *values: ORACLES[kind](kept | dict(zip(layer.trained, values, strict=True)), W.double())


@pytest.mark.parametrize("kind", sorted(ORACLES))
def test_the_first_step_and_kernel_of_a_kind_are_those_of_its_dense_weight(kind: str) -> None:
    """Against the Jacobian of W + ΔW by autograd: gradients g = JᵀG of each sample, the step J·g, products of the g.

    DoRA's gradient holds the norm constant, and its step moves the norm: J of the gradient and of the step differ.
    """
    backbone = load_backbone(tiny_model("llama"))
    spec = AdapterSpec.on(backbone.model, settings_of(kind).model_validate({"kind": kind, **OF_RANK_4.get(kind, {})}))
    (probe,) = statistics_for(backbone).probes("gradient")
    layers = {name: backbone.base_layer(name) for name in spec.modules}

    def seed(name: str) -> int:
        return derive_seed(0, "policy", name)

    result = inspect_inits(layers, probe, [spec.settings], seed)
    samples, whole = [brute_force("llama", [row]) for row in range(6)], brute_force("llama", list(range(6)))
    statistics = {name: LayerStatistics((whole[name],)) for name in spec.modules}
    made = new_adapters(spec, backbone.base_weight, seed, statistics)
    kernel, inner, square, full = torch.zeros(6, 6, dtype=torch.double), 0.0, 0.0, 0.0
    for name in spec.modules:
        layer: Any = made[name]
        W = backbone.base_weight(name)
        dense = dense_weight(kind, layer, W)
        start = tuple(getattr(layer, part).detach().double().requires_grad_() for part in layer.trained)

        def gradients(G: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad((dense(*start) * G.double()).sum(), start))  # noqa: B023

        of_samples = torch.stack([torch.cat([g.flatten() for g in gradients(sample[name])]) for sample in samples])
        kernel += of_samples @ of_samples.T
        G = whole[name].double()
        direction = tuple(gradients(G))
        if kind == "dora":  # the oracle's norm has no gradient: here it has to have one
            moved = lambda A, B, m: m[:, None] * F.normalize(W.double() + 8.0 * B @ A)  # noqa: B023, E731
            update = torch.func.jvp(moved, start, direction)[1]
        else:
            update = torch.func.jvp(dense, start, direction)[1]
        (row,) = (row for row in result.inits[0].layers if row.layer == name)
        assert row.cosine == pytest.approx(cosine(update.detach(), G), abs=1e-3), name
        inner, square = inner + float((update.detach() * G).sum()), square + float(update.detach().square().sum())
        full += float(G.square().sum())
    torch.testing.assert_close(result.inits[0].kernel.double(), kernel, atol=1e-4 * float(kernel.max()), rtol=1e-3)
    (total,) = result.totals()
    assert total["cosine"] == pytest.approx(inner / (square * full) ** 0.5, abs=1e-3)


def test_the_position_is_0_at_the_top_of_the_spectrum_and_1_at_the_bottom() -> None:
    Vh, _ = torch.linalg.qr(torch.randn(8, 8))
    assert spectrum_position(Vh[:1], Vh) == pytest.approx(0, abs=1e-6)
    assert spectrum_position(Vh[-1:], Vh) == pytest.approx(1, abs=1e-6)
    assert spectrum_position(Vh, Vh) == pytest.approx(0.5, abs=1e-6)
    assert spectrum_position(torch.zeros(2, 8), Vh) is None


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_the_command_shows_every_init_on_a_page(cli: Callable[..., Outcome], tmp_path: Path, stage: str) -> None:
    path = write_recipe(tmp_path, recipe("reward", "ppo", ppo__rollout__max_new_tokens=6, adapter=FEW_LAYERS))
    page = tmp_path / "neither" / "there" / "page.html"
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


def test_the_command_compares_kinds_and_leaves_out_what_does_not_fit(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe("reward", adapter=FEW_LAYERS))
    page = tmp_path / "page.html"
    done = cli("inspect", path, "--kinds", "all", "--to", page)
    assert done.code == 0, done
    rows = {row["init"]: row for row in json.loads(page.with_suffix(".json").read_text())["inits"]}
    left_out = {line.split(": ")[1] for line in done.out.splitlines() if line.startswith("left out: ")}
    assert rows.keys() | left_out == KINDS.keys()
    assert {"lora", "dora", "shira", "redrawn", "adalora"} <= rows.keys()
    assert all(0 < row["cosine"] <= 1 and row["kernel_alignment"] > 0 for row in rows.values())
    before, change = page.read_bytes(), "adapter={kind: adalora, targets: [q_proj]}"
    other = cli("inspect", path, "--to", page, change)
    assert isinstance(other.error, Failure)
    assert (other.code, other.error.kind, other.error.file) == (2, "changed", str(page.with_suffix(".json")))
    assert page.read_bytes() == before
    page = tmp_path / "own.html"
    for _ in range(2):  # the same question may be asked again
        own = cli("inspect", path, "--to", page, change)
        assert own.code == 0, own
    assert [row["init"] for row in json.loads(page.with_suffix(".json").read_text())["inits"]] == ["adalora", "lora"]


def test_inits_of_a_kind_that_has_none_are_refused(tmp_path: Path) -> None:
    settings = make_recipe(recipe("reward", adapter={"kind": "adalora"}), tmp_path / "recipe.yaml")
    with raises("conflict", key="adapter.kind"):
        adapters_named("pissa", "", settings, "reward")
    with raises("unknown", key="adapter.init"):
        adapters_named("pisa", "", make_recipe(recipe("reward"), tmp_path / "recipe.yaml"), "reward")
    with raises("unknown", key="kind"):
        adapters_named("", "dorra", settings, "reward")
