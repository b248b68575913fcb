"""AdaLoRA's budget: its schedule, and which triplets stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from pe_rlhf.adapters.kind import LayerContext, Time
from pe_rlhf.adapters.kinds.adalora import AdaLoRA, AdaLoRAConfig, AdaLoRALayer
from pe_rlhf.config.load import make_recipe
from tests.failures import raises

SIDES = {"a": (6, 5), "b": (4, 7)}
TOTAL = 20


def kind_and_layers(**settings: Any) -> tuple[AdaLoRA, dict[str, AdaLoRALayer]]:
    usual: dict[str, Any] = {"rank": 4, "target_rank": 2, "every": 1, "warmup_share": 0.2, "final_share": 0.3}
    kind = AdaLoRA(AdaLoRAConfig(kind="adalora", **usual | settings))
    layers = {}
    for name, size in SIDES.items():
        weight_OI = torch.zeros(size)
        made = kind.build(kind.tensors(LayerContext(weight_OI, torch.Generator().manual_seed(1))), weight_OI)
        assert isinstance(made, AdaLoRALayer)
        layers[name] = made
    return kind, layers


def set_gradients(layers: dict[str, AdaLoRALayer], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_the_budget_falls_with_the_cube_of_time() -> None:
    """Two layers of rank 4 to 2 on average; steps 5 to 14 of 20 lie between warm-up and end."""
    kind, _ = kind_and_layers()
    by_hand = [8] * 4 + [4 + int(4 * (1 - (step - 4) / 10) ** 3) for step in range(5, 14)] + [4] * 7
    assert [kind.budget(2, Time(step, TOTAL)) for step in range(1, TOTAL + 1)] == by_hand
    assert by_hand[4:8] == [6, 6, 5, 4]


def test_the_most_important_triplets_of_all_layers_stay() -> None:
    """By the formulas of the paper in plain loops: sensitivity, uncertainty, importance, the top of all."""
    kind, layers = kind_and_layers()
    smooth = {n: {p: torch.zeros_like(t) for p, t in layer.named_parameters()} for n, layer in layers.items()}
    unsure = {n: {p: torch.zeros_like(t) for p, t in layer.named_parameters()} for n, layer in layers.items()}
    for step in range(1, 9):
        set_gradients(layers, step)
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_E.add_(0.1 * step)
        for name, layer in layers.items():
            for part, w in layer.named_parameters():
                assert w.grad is not None
                now = (w.detach() * w.grad).abs()
                smooth[name][part] = 0.85 * smooth[name][part] + 0.15 * now
                unsure[name][part] = 0.85 * unsure[name][part] + 0.15 * (now - smooth[name][part]).abs()
        kind.after_backward(layers, Time(step, TOTAL))
        with torch.no_grad():
            assert kind.after_step(layers, Time(step, TOTAL)) == set()
    score = {}
    for name in layers:
        of = {part: smooth[name][part] * unsure[name][part] for part in smooth[name]}
        for i in range(4):
            score[name, i] = float(of["lora_E"][i, 0] + of["lora_B"][:, i].mean() + of["lora_A"][i].mean())
    best = sorted(score, key=lambda place: -score[place])[:4]  # the budget after step 8
    for name, layer in layers.items():
        assert layer.alive.tolist() == [(name, i) in best for i in range(4)]
        assert (layer.lora_E[:, 0] != 0).tolist() == layer.alive.tolist()


def test_the_same_triplets_stay_as_in_peft() -> None:
    """PEFT's allocator on the same weights and gradients, step for step."""
    kind, layers = kind_and_layers()
    model = nn.Module()
    for name, layer in layers.items():
        module = nn.Module()
        for part, value in layer.named_parameters():
            module.add_module(part, nn.ParameterDict({"default": value.detach().clone()}))
        model.add_module(name, module)
    config = AdaLoraConfig(target_r=2, init_r=4, tinit=4, tfinal=6, deltaT=1, total_step=TOTAL)
    allocator = RankAllocator(model, config, "default")
    for step in range(1, 15):
        set_gradients(layers, step)
        for name, layer in layers.items():
            for part, value in layer.named_parameters():
                twin = model.get_submodule(name).get_submodule(part)["default"]  # type: ignore[index]
                with torch.no_grad():
                    if part == "lora_E":
                        value.add_(0.1 * step)
                    twin.copy_(value)
                twin.grad = value.grad
        allocator.update_ipt(model)
        kind.after_backward(layers, Time(step, TOTAL))
        with torch.no_grad():
            kind.after_step(layers, Time(step, TOTAL))
        if step > 4:
            allocator.mask_to_budget(model, kind.budget(2, Time(step, TOTAL)))
        for name, layer in layers.items():
            twin = model.get_submodule(name).get_submodule("lora_E")["default"]  # type: ignore[index]
            assert torch.equal(layer.lora_E, twin), step


def test_the_penalty_is_the_distance_from_orthonormal() -> None:
    kind, layers = kind_and_layers(orthogonality=0.5)
    expected = 0.0
    for layer in layers.values():
        for factor in (layer.lora_A, layer.lora_B.T):
            for i in range(4):
                for j in range(4):
                    expected += 0.5 * (float(factor[i].detach() @ factor[j].detach()) - (i == j)) ** 2
    penalty = kind.penalty(layers)
    assert penalty is not None
    torch.testing.assert_close(penalty.item(), expected)
    assert kind_and_layers(orthogonality=0.0)[0].penalty(layers) is None


def test_a_layer_that_lost_all_is_still_a_lora() -> None:
    _, layers = kind_and_layers()
    layers["a"].alive.zero_()
    factors = layers["a"].lora_factors()
    assert factors.A_RI.shape == (1, 5)
    assert not factors.A_RI.any()


def test_between_two_budgets_what_leaves_is_what_a_layer_computes() -> None:
    """A triplet that is out trains on until the next budget, which may take it in again."""
    kind, layers = kind_and_layers(every=4, warmup_share=0.0, final_share=0.0)
    optimizer = torch.optim.SGD([p for layer in layers.values() for p in layer.parameters()], lr=0.1)
    grown = 0
    for step in range(1, TOTAL + 1):
        set_gradients(layers, step)
        kind.after_backward(layers, Time(step, TOTAL))
        optimizer.step()
        with torch.no_grad():
            kind.after_step(layers, Time(step, TOTAL))
        for layer in layers.values():
            grown += int((layer.lora_E[~layer.alive] != 0).sum())
            outputs, inputs = len(layer.lora_B), layer.lora_A.shape[1]
            nothing = nn.Linear(inputs, outputs, bias=False)
            nn.init.zeros_(nothing.weight)
            factors = layer.lora_factors()
            computed_OI = layer(torch.eye(inputs), nothing).T
            torch.testing.assert_close(factors.scale * factors.B_OR @ factors.A_RI, computed_OI)
            torch.testing.assert_close(layer.delta_weight(nothing.weight), computed_OI)
    assert grown > 10
    # The last step has the last budget, whatever `every` is.
    assert sum(int((layer.lora_E != 0).sum()) for layer in layers.values()) == 4


def test_settings_that_exclude_each_other() -> None:
    for wrong, key in (({"target_rank": 13}, "target_rank"), ({"warmup_share": 0.8}, "final_share")):
        adapter = {"kind": "adalora", "final_share": 0.5, **wrong}
        with raises("conflict", key=f"adapter.{key}"):
            make_recipe({"model": "random:tiny-llama", "adapter": adapter, "ppo": {}}, Path("here"))
