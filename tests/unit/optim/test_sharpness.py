"""SAM, ASAM and RWP against their formulas on a dense loss; AdamW to the bit without them; the base untouched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pe_rlhf.config import OptimizerConfig, RewardOptimizerConfig
from pe_rlhf.config.sft import SFTOptimizerConfig
from pe_rlhf.model.backbone import FastPath, load_backbone
from pe_rlhf.model.noise import filter_noise
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer
from pe_rlhf.optim.sharpness import perturbation
from pe_rlhf.system.failures import TrainingError
from reward.errors import InputError, Kind
from tests.failures import refuses
from tests.tiny import backbone_with, perturb, ragged_sequences, tiny_model

STEPS = 4
X, Y = (torch.randn(16, 3, generator=torch.Generator().manual_seed(i)) for i in (1, 2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(model: nn.Module, rows: list[int]) -> Tensor:
    return (model(X[rows]) - Y[rows]).square().mean()


def rows_at(step: int) -> list[int]:
    return [(5 * step + i) % 16 for i in range(6)]


def trained(steps: int = STEPS, model: nn.Module | None = None, **sharpness: Any) -> tuple[nn.Module, RoleOptimizer]:
    model = model or network()
    config = OptimizerConfig(max_grad_norm=0.2, weight_decay=0.1, **sharpness)
    optimizer = RoleOptimizer([RoleGroup("policy", dict(model.named_parameters()), 1e-2)], config, STEPS, seed=7)
    go_on(model, optimizer, range(steps))
    return model, optimizer


def go_on(model: nn.Module, optimizer: RoleOptimizer, steps: range) -> None:
    for step in steps:
        first, second = optimizer.batches(rows_at(step))
        optimizer.backward(loss_of(model, first))
        optimizer.step(lambda rows=second: optimizer.backward(loss_of(model, rows)))


def gradients(model: nn.Module, rows: list[int]) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(model, rows), [*model.parameters()]))


def sam(model: nn.Module, rho: float, first: list[int], second: list[int]) -> list[Tensor]:
    found = gradients(model, first)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in found))
    return gradients(moved(model, [rho * g / norm for g in found]), second)


def asam(model: nn.Module, rho: float, first: list[int], second: list[int]) -> list[Tensor]:
    found, weights = gradients(model, first), [p.detach() for p in model.parameters()]
    norm = math.sqrt(sum((w * g).double().square().sum().item() for w, g in zip(weights, found, strict=True)))
    return gradients(moved(model, [rho * w**2 * g / norm for w, g in zip(weights, found, strict=True)]), second)


def moved(model: nn.Module, by: list[Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, move in zip(copied.parameters(), by, strict=True):
            parameter += move
    return copied


@pytest.mark.parametrize("batches", ["one", "two"])
@pytest.mark.parametrize(("method", "naive", "rho"), [("sam", sam, 0.3), ("asam", asam, 0.5)])
def test_steps_are_those_of_a_naive_implementation(
    method: str, naive: Callable[..., list[Tensor]], rho: float, batches: str
) -> None:
    model, plain = network(), network()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.1)
    for step in range(STEPS):
        rows = rows_at(step)
        first, second = (rows[:3], rows[3:]) if batches == "two" else (rows, rows)
        for parameter, gradient in zip(model.parameters(), naive(model, rho, first, second), strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        adamw.step()
    found, _ = trained(sharpness=method, rho=rho, sharpness_batches=batches)
    usual, _ = trained(model=plain)
    for parameter, wanted, without in zip(found.parameters(), model.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, atol=1e-6, rtol=1e-5)
        assert (parameter - without).abs().max() > 1e-4  # the premise: it makes a difference


def test_a_role_without_a_gradient_leaves_the_other_one_its_perturbation() -> None:
    """As a critic that starts at 0 beside returns of 0: the policy's step is the one that it makes by itself."""
    settings = OptimizerConfig(sharpness="sam", rho=0.3, max_grad_norm=0.2)
    by_itself, beside = network(), network()
    idle = nn.Parameter(torch.ones(2))
    for model, others in ((by_itself, []), (beside, [RoleGroup("value", {"w": idle}, 1e-2)])):
        groups = [RoleGroup("policy", dict(model.named_parameters()), 1e-2), *others]
        go_on(model, RoleOptimizer(groups, settings, STEPS), range(1))
    for one, other in zip(by_itself.parameters(), beside.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(idle.detach(), torch.ones(2))


def test_rwp_mixes_the_gradients_at_the_weights_and_beside_them() -> None:
    """The noise is read off from where the second gradient is asked for."""
    model, plain = network(), network()
    settings = OptimizerConfig(max_grad_norm=100, sharpness="rwp", noise=0.1, noise_weight=0.3)
    optimizer = RoleOptimizer([RoleGroup("policy", dict(model.named_parameters()), 1e-2)], settings, STEPS, seed=7)
    seen: list[list[Tensor]] = []

    def again() -> None:
        seen.append([p.detach().clone() for p in model.parameters()])
        optimizer.backward(loss_of(model, rows_at(0)))

    optimizer.backward(loss_of(model, rows_at(0)))
    norm = optimizer.step(again)["policy"]
    noise = [there - p.detach() for there, p in zip(seen[0], plain.parameters(), strict=True)]
    assert all(move.abs().max() > 1e-3 for move in noise)
    usual, beside = gradients(plain, rows_at(0)), gradients(moved(plain, noise), rows_at(0))
    mixed = [0.3 * b + 0.7 * u for u, b in zip(usual, beside, strict=True)]
    assert norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in mixed)), rel=1e-5)


def noise_of(roles: dict[str, dict[str, nn.Parameter]], steps: int, seed: int) -> list[dict[str, Tensor]]:
    """What RWP adds to the parameters of roles in each step, by role and name."""
    settings = OptimizerConfig(sharpness="rwp", noise=0.1)
    groups = [RoleGroup(role, named, 1e-9) for role, named in roles.items()]
    optimizer = RoleOptimizer(groups, settings, steps, seed=seed)
    found: list[dict[str, Tensor]] = []
    for _ in range(steps):
        there = {f"{role}/{name}": p for role, named in roles.items() for name, p in named.items()}
        before = {name: p.detach().clone() for name, p in there.items()}
        optimizer.step(
            lambda there=there, before=before: found.append({n: p.detach() - before[n] for n, p in there.items()})
        )
    return found


def test_the_noise_of_rwp_is_another_one_in_each_step_role_parameter_and_seed() -> None:
    def roles() -> dict[str, dict[str, nn.Parameter]]:
        return {role: {name: nn.Parameter(torch.ones(4, 3)) for name in ("a", "b")} for role in ("policy", "value")}

    first, second = noise_of(roles(), 2, seed=7)
    other, _ = noise_of(roles(), 2, seed=8)
    drawn = [*first.values(), *second.values(), *other.values()]
    assert all(move.abs().max() > 1e-3 for move in drawn)
    for i, move in enumerate(drawn):
        assert all(not torch.allclose(move, again, rtol=1e-3) for again in drawn[:i])
    assert all(torch.equal(move, noise_of(roles(), 1, seed=7)[0][name]) for name, move in first.items())


def test_halves_of_a_batch_and_a_step_that_cannot_ask_again() -> None:
    def optimizer(**settings: Any) -> RoleOptimizer:
        group = RoleGroup("policy", {"w": nn.Parameter(torch.ones(2))}, 0.1)
        return RoleOptimizer([group], OptimizerConfig(**settings), STEPS)

    two = optimizer(sharpness="sam", sharpness_batches="two")
    assert two.batches([4, 5, 6]) == ([4], [5, 6])
    assert two.batches([4]) == ([4], [4])  # a batch of one row has no halves
    for of_one in (optimizer(), optimizer(sharpness="sam")):
        assert of_one.batches([4, 5, 6]) == ([4, 5, 6], [4, 5, 6])
    with pytest.raises(ValueError, match="sam"):
        two.step()
    optimizer().step()


@pytest.mark.parametrize(
    "nothing",
    [
        {"sharpness": "sam", "rho": 0},
        {"sharpness": "asam", "rho": 0, "sharpness_batches": "two"},
        {"sharpness": "rwp", "noise_weight": 0},
        {"sharpness": "rwp", "noise": 0, "noise_on": "model"},
    ],
)
def test_without_a_perturbation_it_is_adamw_to_the_bit(nothing: dict[str, Any]) -> None:
    found, usual = trained(**nothing)[0], trained()[0]
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), usual.parameters(), strict=True))


@pytest.mark.parametrize("method", [{"sharpness": "sam"}, {"sharpness": "asam"}, {"sharpness": "rwp", "noise": 0.1}])
def test_from_its_state_it_goes_on_to_the_last_bit(method: dict[str, Any]) -> None:
    whole, _ = trained(**method)
    half, first = trained(2, **method)
    state = first.state()
    rest, second = trained(0, copy.deepcopy(half), **method)
    second.load_state(state)
    go_on(rest, second, range(2, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))


def test_the_norm_is_of_all_weights_of_a_role_by_hand() -> None:
    a, b = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([1.0, 0.0]))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
    found = perturbation("policy", {"a": a, "b": b}, OptimizerConfig(sharpness="sam", rho=10.0), 0)
    assert {name: move.tolist() for name, move in found.items()} == {"a": [6.0], "b": [0.0, 8.0]}  # 10·g/5
    found = perturbation("policy", {"a": a, "b": b}, OptimizerConfig(sharpness="asam", rho=10.0), 0)
    assert {name: move.tolist() for name, move in found.items()} == {"a": [20.0], "b": [0.0, 0.0]}  # 10·4·3/6


def test_where_no_direction_is_the_worst_there_is_no_second_gradient() -> None:
    """As of A at the first step, where B is 0, under ASAM."""
    weight = nn.Parameter(torch.zeros(2))
    config = OptimizerConfig(sharpness="asam")
    optimizer = RoleOptimizer([RoleGroup("policy", {"w": weight}, 0.1)], config, STEPS)
    optimizer.backward((weight * torch.tensor([1.0, -1.0])).sum())
    optimizer.step(lambda: pytest.fail("asked for a second gradient"))
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.1, 0.1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["sam", "rwp"])
def test_weights_are_back_after_a_failure(method: Any) -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = RoleOptimizer(
        [RoleGroup("policy", dict(model.named_parameters()), 1e-2)], OptimizerConfig(sharpness=method), STEPS
    )
    optimizer.backward(loss_of(model, rows_at(0)))

    def fail() -> None:
        assert not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    optimizer.backward(loss_of(model, rows_at(0)))
    next(model.parameters()).grad[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(TrainingError) as raised:
        optimizer.step(lambda: optimizer.backward(loss_of(model, rows_at(0))))
    assert raised.value.kind == "not_finite"
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# ---- noise on the base ----------------------------------------------------------------------------------------------


def test_noise_is_as_large_as_its_row() -> None:
    weight = torch.zeros(3, 40_000)
    weight[0, 0], weight[1] = 5.0, 0.02  # rows as long as 5, 4 and 0
    noise = filter_noise(weight, 0.1, seed=3)
    assert noise.std(dim=1).tolist() == pytest.approx([0.5, 0.4, 0.0], rel=0.02)
    assert filter_noise(torch.full((40_000,), 0.02), 0.1, seed=3).std().item() == pytest.approx(0.4, rel=0.02)
    assert torch.equal(noise, filter_noise(weight, 0.1, seed=3))
    assert not torch.equal(noise, filter_noise(weight, 0.1, seed=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_on_the_base_leaves_it_as_it_was(dtype: torch.dtype) -> None:
    """The same bytes in the same memory, also after a failure; within it roles and the anchor compute another model."""
    backbone = load_backbone(tiny_model("llama", dtype))
    backbone.add_adapter("policy", init="pissa", rank=2)
    ids = torch.tensor([[5, 6, 7]])
    before, memory = backbone.base_fingerprint(), {n: p.data_ptr() for n, p in backbone.model.named_parameters()}
    with backbone.role("policy"), torch.no_grad():
        usual = noisy = backbone(ids).logits
        with suppress(KeyboardInterrupt), backbone.noisy_base(0.05, seed=1):
            noisy = backbone(ids).logits
            assert backbone.base_fingerprint() != before
            raise KeyboardInterrupt
        assert torch.equal(backbone(ids).logits, usual)
    assert (noisy - usual).abs().max() > 1e-2
    assert backbone.base_fingerprint() == before
    assert {n: p.data_ptr() for n, p in backbone.model.named_parameters()} == memory


def test_noise_on_the_base_reaches_what_the_trunk_keeps() -> None:
    """With adapters on the last layer only, the states below it are kept: those of the base without noise."""
    backbone = load_backbone(tiny_model("llama"), fast=FastPath(trunk_cache_mib=64))
    backbone.add_adapter("policy", rank=2, last_layers=1)
    sequences = ragged_sequences()

    def logprobs() -> Tensor:
        with backbone.role("policy"), torch.no_grad(), backbone.noisy_base(0.05, seed=1):
            return backbone.response_logprobs(sequences)[0]

    wanted = logprobs()
    backbone.compute_once(sequences, 1000)
    assert len(backbone._trunk) > 0
    torch.testing.assert_close(logprobs(), wanted, atol=1e-5, rtol=0)
    assert len(backbone._trunk) > 0


def test_a_step_with_noise_on_the_model() -> None:
    """Its norm is that of λ·g(θ+ε, W+E) + (1−λ)·g(θ, W); the base is as it was."""
    backbone = backbone_with("policy")
    perturb(backbone, "policy", 0.05)
    config = OptimizerConfig(sharpness="rwp", noise=0.05, noise_weight=1.0, noise_on="model", max_grad_norm=100)
    optimizer = RoleOptimizer([RoleGroup.of(backbone, "policy", 1e-3)], config, STEPS)
    before, seen = backbone.base_fingerprint(), []

    def backward() -> None:
        seen.append(backbone.base_fingerprint())
        with backbone.role("policy"):
            optimizer.backward(backbone.response_logprobs(ragged_sequences())[0].mean())

    backward()
    optimizer.step(backward)
    assert seen[0] == before != seen[1]
    assert backbone.base_fingerprint() == before


def test_a_quantised_base_has_no_weights_for_noise() -> None:
    backbone = load_backbone(tiny_model("llama"))
    layer = backbone.model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError) as raised, backbone.noisy_base(0.1, 0):
        pass
    assert (raised.value.kind, raised.value.key) == ("conflict", "optimizer.noise_on")


# ---- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "key", "kind"),
    [
        ({"rho": 0.1}, "rho", "conflict"),
        ({"sharpness": "rwp", "rho": 0.1}, "rho", "conflict"),
        ({"sharpness": "sam", "noise": 0.1}, "noise", "conflict"),
        ({"sharpness": "asam", "noise_on": "model"}, "noise_on", "conflict"),
        ({"sharpness_batches": "two"}, "sharpness_batches", "conflict"),
        ({"sharpness": "sam", "rho": -1}, "rho", "invalid"),
    ],
)
def test_a_key_without_effect_is_refused(keys: dict[str, Any], key: str, kind: Kind) -> None:
    with refuses(key, kind):
        RewardOptimizerConfig.model_validate(keys)
    with pytest.raises(ValidationError):
        SFTOptimizerConfig.model_validate({"sharpness": "sam"})


@pytest.mark.parametrize("method", ["none", "sam", "asam", "rwp"])
def test_what_was_saved_can_be_read_again(method: str) -> None:
    config = RewardOptimizerConfig.model_validate({"sharpness": method})
    assert RewardOptimizerConfig.model_validate(config.model_dump(mode="json")) == config
    assert (config.cost is None) == (method == "none")
