"""`lora_dash` and `redrawn`: kinds that change in the middle of training."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_rlhf.adapters.kind import AdapterKind, Restart, Time
from pe_rlhf.adapters.layer import AdapterLayer, weight_out_in
from pe_rlhf.config import AdapterConfig, OptimizerConfig
from pe_rlhf.model.backbone import load_backbone
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
from pe_rlhf.optim.zero import init_processes
from reward.errors import InputError
from tests.tiny import IDS_BT, tiny_model
from tests.unit.adapters.dense import (
    IN,
    OUT,
    assert_close,
    base_layer,
    batches,
    check_all,
    check_change,
    check_output_and_gradients,
    check_saved,
    inputs,
    made,
    perturbed,
    wide,
)

RANK, DIRECTIONS, SWITCH, STEPS = 3, 4, 4, 10
DASH: dict[str, Any] = {
    "rank": RANK,
    "alpha": 1.5 * RANK,
    "directions": DIRECTIONS,
    "warmup_steps": SWITCH,
}
RATE = 0.02


def optimizer_of(kind: AdapterKind[Any], layer: AdapterLayer, deepspeed: dict[str, Any] | None = None) -> RoleOptimizer:
    parameters = {f"layer.{name}": parameter for name, parameter in layer.named_parameters()}
    config = OptimizerConfig(eps=1e-4, max_grad_norm=1e9)
    group = RoleGroup("policy", parameters, RATE, {}, kind, {"layer": layer})
    return RoleOptimizer([group], config, STEPS, deepspeed)


def train(optimizer: RoleOptimizer, layer: AdapterLayer, base: nn.Module, start: int = 0, stop: int = STEPS) -> None:
    for x, target in list(batches(STEPS))[start:stop]:
        dtype = weight_out_in(base).dtype
        optimizer.backward((layer(x.to(dtype), base).float() - target).square().mean())
        optimizer.step()


def dense_adamw(leaves: list[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(leaves, lr=RATE, eps=1e-4, weight_decay=0)


def dense_loss(base: Any, delta_OI: Tensor, x: Tensor, target: Tensor) -> Tensor:
    x = x.to(base.weight.dtype).double()
    y = F.linear(x, weight_out_in(base).double() + delta_OI, base.bias.double())
    return (y - target.double()).square().mean()


def placed(base: nn.Module, **given: Any) -> tuple[AdapterKind[Any], Any]:
    kind, layer = made(base, "lora_dash", **{**DASH, **given})
    layer.put_on(base)
    return kind, layer


def lora_part(tensors: dict[str, Tensor]) -> Tensor:
    delta = 1.5 * tensors["lora_B"] @ tensors["lora_A"]
    if "initial_B_OR" in tensors:
        delta = delta - 1.5 * tensors["initial_B_OR"] @ tensors["initial_A_RI"]
    return delta


def top_by_hand(base: nn.Module, delta_OI: Tensor) -> list[Tensor]:
    """Outer products u vᵀ of W0's directions with the greatest |uᵀ ΔW v| / σ, the greatest first."""
    U, S, Vh = np.linalg.svd(weight_out_in(base).double().numpy())
    scores = [abs(U[:, k] @ delta_OI.detach().numpy() @ Vh[k]) / S[k] for k in range(len(S))]
    return [torch.tensor(np.outer(U[:, k], Vh[k])) for k in np.argsort(scores)[::-1][:DIRECTIONS]]


def with_directions(tensors: dict[str, Tensor]) -> Tensor:
    directions = zip(tensors["delta_sigma"], tensors["dash_U_OS"].T, tensors["dash_Vh_SI"], strict=True)
    return sum((sigma * torch.outer(u, v) for sigma, u, v in directions), lora_part(tensors))


@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_before_the_switch_dash_is_the_lora(init: str) -> None:
    check_all("lora_dash", lambda tensors: lora_part(tensors) + 0 * tensors["delta_sigma"].sum(), init=init, **DASH)


@pytest.mark.parametrize("module", ["linear", "conv1d"])
@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_after_the_switch_it_has_the_directions_with_the_greatest_share(init: str, module: str) -> None:
    base = base_layer(module)
    kind, layer = placed(base, init=init)
    perturbed(layer)
    with torch.no_grad():
        layer.delta_sigma.zero_()
    before = layer(inputs(), base)
    kind.after_step({"layer": layer}, Time(SWITCH, STEPS))
    assert torch.equal(layer(inputs(), base), before)
    for outer_OI, u, v in zip(
        top_by_hand(base, lora_part(wide(layer))), layer.dash_U_OS.T, layer.dash_Vh_SI, strict=True
    ):
        torch.testing.assert_close(torch.outer(u, v).double(), outer_OI, atol=1e-5, rtol=1e-5)
    perturbed(layer)
    check_output_and_gradients(base, layer, with_directions)
    check_change(base, layer, with_directions)
    check_saved(base, kind, layer)


def test_dash_picks_the_directions_of_a_planted_change() -> None:
    base = base_layer()
    kind, layer = placed(base, rank=DIRECTIONS)
    U, _, Vh = np.linalg.svd(weight_out_in(base).numpy(), full_matrices=False)
    planted = [1, 5, 8, 11]
    with torch.no_grad():
        layer.lora_B.copy_(torch.tensor(U[:, planted]))
        layer.lora_A.copy_(torch.tensor(Vh[planted]))
    kind.after_step({"layer": layer}, Time(SWITCH, STEPS))
    overlap = (layer.dash_U_OS.T @ torch.tensor(U)).abs()
    assert sorted(overlap.argmax(1).tolist()) == planted
    assert overlap.max(1).values.min() > 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_ten_steps_of_dash_are_those_of_a_dense_implementation(init: str, dtype: torch.dtype) -> None:
    base = base_layer(dtype=dtype)
    kind, layer = placed(base, init=init)
    tensors = wide(layer)
    dense = dense_adamw([tensors["lora_A"], tensors["lora_B"]])
    fresh = dense_adamw([tensors["delta_sigma"]])
    directions = [torch.zeros(OUT, IN, dtype=torch.double)] * DIRECTIONS

    def delta() -> Tensor:
        return sum((s * d for s, d in zip(tensors["delta_sigma"], directions, strict=True)), lora_part(tensors))

    for step, (x, target) in enumerate(batches(STEPS), start=1):
        dense.zero_grad()
        fresh.zero_grad()
        dense_loss(base, delta(), x, target).backward()
        dense.step()
        if step > SWITCH:  # Δσ is not there before: its optimizer has made no step yet
            fresh.step()
        if step == SWITCH:
            directions = top_by_hand(base, lora_part(tensors))
    train(optimizer_of(kind, layer), layer, base)
    assert tensors["delta_sigma"].abs().min() > 0.01
    assert_close(layer.delta_sigma, tensors["delta_sigma"], dtype)
    assert_close(layer.delta_weight(base.weight), delta().detach(), dtype)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_role_of_a_model_chooses_from_the_weights_it_is_on_and_so_does_its_copy(family: str) -> None:
    backbone = load_backbone(tiny_model(family))
    backbone.add_adapter("policy", kind="lora_dash", rank=2, directions=3, warmup_steps=2)
    backbone.copy_role("policy", "policy_2")
    for role in ("policy", "policy_2"):
        optimizer = RoleOptimizer([RoleGroup.of(backbone, role, RATE)], OptimizerConfig(), STEPS)
        for _ in range(4):
            with backbone.role(role):
                logits_BTV = backbone(IDS_BT).logits
            optimizer.backward(F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten()))
            optimizer.step()
        for name, layer in backbone.role_layers(role).items():
            sigma = torch.linalg.svdvals(backbone.base_weight(name).double())
            along = torch.einsum("os,oi,si->s", layer.dash_U_OS, backbone.base_weight(name), layer.dash_Vh_SI)
            assert all((sigma - value).abs().min() < 1e-4 for value in along), name  # directions of this weight
            assert layer.get_parameter("delta_sigma").all()


def test_a_role_that_has_its_directions_keeps_them_in_the_next_stage() -> None:
    base = base_layer()
    kind, layer = placed(base)
    perturbed(layer)
    kind.after_step({"layer": layer}, Time(SWITCH, STEPS))
    chosen = layer.dash_U_OS.clone()
    perturbed(layer, 5.0)
    again = copy.deepcopy(layer)
    kind.after_step({"layer": again}, Time(SWITCH, STEPS))
    assert torch.equal(again.dash_U_OS, chosen)


def test_more_directions_than_a_layer_has_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        made(base_layer(), "lora_dash", **{**DASH, "directions": 14})
    assert (caught.value.kind, caught.value.key) == ("conflict", "adapter.directions")


def folded(tensors: dict[str, Tensor], side: str) -> Tensor:
    A, B = (tensors[name] for name in (("drawn", "learned") if side == "inputs" else ("learned", "drawn")))
    return tensors["change_OI"] + B @ A


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_redrawn_is_a_dense_change_and_a_product(side: str) -> None:
    check_all("redrawn", lambda tensors: folded(tensors, side), rank=RANK, side=side)
    base = base_layer()
    kind, layer = made(base, "redrawn", rank=RANK, side=side)
    perturbed(layer)
    before, projection = layer.delta_weight(base.weight), layer.drawn.clone()
    layer.fold()
    assert torch.equal(layer.delta_weight(base.weight), before)
    assert not layer.learned.any()
    assert not torch.equal(layer.drawn, projection)
    perturbed(layer)
    check_output_and_gradients(base, layer, lambda tensors: folded(tensors, side))
    check_change(base, layer, lambda tensors: folded(tensors, side))
    check_saved(base, kind, layer)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_redrawn_each_step_has_full_trainings_step_of_sgd_in_the_mean(side: str) -> None:
    base = base_layer()
    kind, layer = made(base, "redrawn", rank=RANK, side=side, every=1)
    (x, target), *_ = batches(1)
    weight = weight_out_in(base).clone().requires_grad_()
    (F.linear(x, weight, base.bias) - target).square().mean().backward()  # type: ignore[arg-type]
    assert weight.grad is not None
    draws, mean_OI = 2000, torch.zeros(OUT, IN)
    for step in range(draws):
        layer.change_OI.zero_()  # each draw starts at the base
        layer.zero_grad()
        (layer(x, base) - target).square().mean().backward()
        with torch.no_grad():
            layer.learned -= layer.learned.grad
        kind.after_step({"layer": layer}, Time(step + 1, draws))
        mean_OI += layer.change_OI / draws
        if step == 0:
            assert (mean_OI * draws + weight.grad).norm() > weight.grad.norm()  # one draw is far from it
    assert (mean_OI + weight.grad).norm() < 0.1 * weight.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_steps_of_redrawn_are_those_of_a_dense_implementation(dtype: torch.dtype) -> None:
    """AdamW by hand: momentum and its bias correction start again at every draw, the second moment goes on."""
    base = base_layer(dtype=dtype)
    kind, layer = made(base, "redrawn", rank=RANK, every=3)
    learned, change_OI = torch.zeros(OUT, RANK, dtype=torch.double, requires_grad=True), torch.zeros(OUT, IN)
    own, draws = optimizer_of(kind, layer), []
    momentum, square, since = torch.zeros(OUT, RANK), torch.zeros(OUT, RANK), 0
    for step, (x, target) in enumerate(batches(STEPS), start=1):
        projection, since = layer.drawn.double(), since + 1
        (gradient,) = torch.autograd.grad(dense_loss(base, change_OI + learned @ projection, x, target), [learned])
        momentum, square = 0.9 * momentum + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        size = (square / (1 - 0.999**step)).sqrt() + 1e-4
        learned = (learned - RATE * momentum / (1 - 0.9**since) / size).detach().requires_grad_()
        if step % 3 == 0:
            change_OI = change_OI + (learned @ projection).detach()
            draws.append(projection)
            momentum, since = torch.zeros(OUT, RANK), 0
            learned = torch.zeros_like(learned).requires_grad_()
        train(own, layer, base, step - 1, step)
    expected = change_OI + learned.detach() @ layer.drawn.double()
    assert len({float(draw[0, 0]) for draw in draws}) == 3
    assert_close(layer.delta_weight(base.weight), expected, dtype)


DEEPSPEED: dict[str, dict[str, Any] | None] = {"plain": None, "zero2": {"zero_optimization": {"stage": 2}}}


@pytest.mark.parametrize("deepspeed", list(DEEPSPEED))
@pytest.mark.parametrize("what", ["moments", "momentum"])
def test_parameters_that_start_again_take_steps_of_the_size_of_the_rate(what: Restart, deepspeed: str) -> None:
    """Under a constant gradient each step of AdamW has the length of the rate, before and after a restart."""
    if deepspeed != "plain":
        init_processes(wants_deepspeed=True)
    kind = Restarts(AdapterConfig())
    kind.restarted = {"shift": what}  # type: ignore[misc]
    layer = nn.Module()
    layer.shift, layer.other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    parameters = {f"layer.{name}": parameter for name, parameter in layer.named_parameters()}
    group = RoleGroup("policy", parameters, RATE, {}, kind, {"layer": layer})  # type: ignore[dict-item]
    config = OptimizerConfig(eps=1e-12, max_grad_norm=1e9, weight_decay=0.1)
    optimizer = RoleOptimizer([group], config, 6, DEEPSPEED[deepspeed])
    for step in range(6):
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        # Before the restart `shift` has no gradient at all, as directions that are not chosen yet.
        loss = layer.other.sum() + (layer.shift.sum() if what == "momentum" or step > 2 else 0 * layer.shift.sum())
        optimizer.backward(loss)
        optimizer.step()
        for name, parameter in parameters.items():
            moves = name != "layer.shift" or what == "momentum" or step > 2
            expected = before[name] * (1 - RATE * 0.1) - RATE * moves
            torch.testing.assert_close(parameter.detach(), expected, atol=2e-6, rtol=1e-5)


class Restarts(AdapterKind[AdapterConfig]):
    """Lets `shift` start again after the third step."""

    def after_step(self, layers: Any, time: Time) -> set[str]:
        return {"shift"} if time.step == 3 else set()


@pytest.mark.parametrize(
    ("deepspeed", "stop"), [("plain", 3), ("plain", 4), ("plain", 5), ("plain", 6), ("zero2", 4), ("zero2", 6)]
)
@pytest.mark.parametrize(("name", "given"), [("lora_dash", DASH), ("redrawn", {"rank": RANK, "every": 5})])
def test_a_run_that_is_cut_off_around_the_change_ends_with_the_same_bits(
    name: str, given: dict[str, Any], deepspeed: str, stop: int
) -> None:
    if deepspeed != "plain":
        init_processes(wants_deepspeed=True)
    zero = DEEPSPEED[deepspeed]
    base = base_layer()
    kind, whole = made(base, name, **given)
    _, first = made(base, name, **given)
    whole.put_on(base)
    first.put_on(base)
    train(optimizer_of(kind, whole, zero), whole, base)

    own = optimizer_of(kind, first, zero)
    train(own, first, base, 0, stop)
    saved, state = {n: t.clone() for n, t in first.state_dict().items()}, own.state()
    second = kind.build(saved, weight_out_in(base))
    second.put_on(base)
    resumed = optimizer_of(kind, second, zero)
    resumed.load_state(state)
    train(resumed, second, base, stop)
    assert all(torch.equal(tensor, whole.state_dict()[n]) for n, tensor in second.state_dict().items())
