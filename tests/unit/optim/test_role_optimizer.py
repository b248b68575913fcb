"""The optimizer against AdamW written out in numpy: schedule, clipping per role, exact resumption, refusal of NaN."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pe_rlhf.config import OptimizerConfig
from pe_rlhf.optim.adamw import PlainAdamW
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer, schedule_factor
from pe_rlhf.system.failures import TrainingError
from tests.failures import raises
from tests.tiny import backbone_with

Arrays = dict[str, dict[str, np.ndarray]]

SHAPES = {"policy": {"a": (3, 2), "b": (4,)}, "value": {"a": (2, 2), "head": (5,)}}
RATES = {"policy": 0.05, "value": 0.3}
CONFIG = OptimizerConfig(
    schedule="linear", warmup_ratio=0.25, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, max_grad_norm=0.7
)
TOTAL = 8


def fresh(seed: int = 0) -> dict[str, dict[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        role: {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        for role, shapes in SHAPES.items()
    }


def optimizer_on(parameters: dict[str, dict[str, nn.Parameter]], **changes: Any) -> RoleOptimizer:
    groups = [RoleGroup(role, parameters[role], RATES[role]) for role in parameters]
    return RoleOptimizer(groups, CONFIG.model_copy(update=changes), TOTAL)


def targets(step: int) -> Arrays:
    generator = np.random.default_rng(step)
    return {
        role: {name: generator.normal(size=shape) for name, shape in shapes.items()} for role, shapes in SHAPES.items()
    }


def loss_of(parameters: dict[str, dict[str, nn.Parameter]], role: str, step: int) -> torch.Tensor:
    """½·size·‖p − target‖², whose gradient is size·(p − target); only the value's is small enough not to be clipped."""
    size = {"policy": 2.0, "value": 0.1}[role]
    goal = targets(step)[role]
    parts = [(p - torch.tensor(goal[name], dtype=p.dtype)).square().sum() for name, p in parameters[role].items()]
    return 0.5 * size * torch.stack(parts).sum()


def train(
    optimizer: RoleOptimizer, parameters: dict[str, dict[str, nn.Parameter]], steps: range
) -> list[dict[str, float]]:
    """Real steps, each role's loss in a backward pass of its own."""
    norms = []
    for step in steps:
        for role in parameters:
            optimizer.backward(loss_of(parameters, role, step))
        norms.append(optimizer.step())
    return norms


def numpy_adamw(
    start: Arrays, steps: int, pull: dict[str, np.ndarray] | None = None
) -> tuple[Arrays, list[dict[str, float]]]:
    """AdamW (arXiv 1711.05101, algorithm 2) in float64 with the settings of `CONFIG`, a role at a time."""
    weights = {role: {name: w.astype(np.float64) for name, w in named.items()} for role, named in start.items()}
    first, second = ({r: {n: np.zeros_like(w) for n, w in ws.items()} for r, ws in weights.items()} for _ in "mv")
    beta1, beta2 = 0.8, 0.95
    rates = [0.5, 1.0, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]  # two steps up, then down to 0 at step 8
    all_norms = []
    for step in range(steps):
        norms = {}
        for role, named in weights.items():
            size = {"policy": 2.0, "value": 0.1}[role]
            gradients = {name: size * (w - targets(step)[role][name]) for name, w in named.items()}
            norms[role] = math.sqrt(sum(float(np.square(g).sum()) for g in gradients.values()))
            clip = min(1.0, 0.7 / norms[role])
            rate = RATES[role] * rates[step]
            for name, w in named.items():
                g = clip * gradients[name]
                m = first[role][name] = beta1 * first[role][name] + (1 - beta1) * g
                v = second[role][name] = beta2 * second[role][name] + (1 - beta2) * g**2
                corrected = (m / (1 - beta1 ** (step + 1))) / (np.sqrt(v / (1 - beta2 ** (step + 1))) + 1e-3)
                named[name] = w - rate * 0.1 * (w - (pull or {}).get(name, 0.0)) - rate * corrected
        all_norms.append(norms)
    return weights, all_norms


def as_numpy(parameters: dict[str, dict[str, nn.Parameter]]) -> Arrays:
    return {role: {name: p.detach().numpy().copy() for name, p in named.items()} for role, named in parameters.items()}


@pytest.mark.parametrize("deepspeed", [None, {}, {"zero_optimization": {"stage": 2}}], ids=["plain", "ds", "zero2"])
def test_weight_decay_pulls_to_where_a_parameter_started(deepspeed: dict[str, Any] | None) -> None:
    """Of both roles `a` has a place that it is pulled to; `b` and `head` are pulled to 0."""
    if deepspeed is not None:
        from pe_rlhf.optim.zero import init_processes

        init_processes(wants_deepspeed=True)
    for role, named in fresh().items():
        place = np.full(SHAPES[role]["a"], 3.0)
        start = {name: parameter.detach().numpy().copy() for name, parameter in named.items()}
        expected, _ = numpy_adamw({role: start}, 5, {"a": place})
        group = RoleGroup(role, named, RATES[role], {"a": torch.tensor(place, dtype=torch.float32)})
        train(RoleOptimizer([group], CONFIG, TOTAL, deepspeed), {role: named}, range(5))
        for name, parameter in named.items():
            np.testing.assert_allclose(parameter.detach().numpy(), expected[role][name], atol=2e-6)


@pytest.mark.parametrize(("given", "expected"), [({}, 4), ({"reduce_bucket_size": 2}, 2)])
def test_zeros_buckets_have_the_size_of_the_role(given: dict[str, int], expected: int) -> None:
    """DeepSpeed's own are of 5e8 numbers, for each role."""
    from pe_rlhf.optim.zero import ZeRO, init_processes

    init_processes(wants_deepspeed=True)
    parameter = nn.Parameter(torch.ones(3))
    zero = ZeRO({"a": parameter}, CONFIG, {"zero_optimization": {"stage": 2, **given}}, {})
    parameter.grad = torch.ones(3)
    zero.step(0.1)
    assert zero._engine.optimizer.reduce_bucket_size == expected


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pe_rlhf.optim.zero import init_processes

    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises("conflict", key="backbone.device"):
        init_processes(wants_deepspeed=False, device="cuda:1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_correction_is_of_the_moments_part_and_not_of_the_decay(dtype: torch.dtype) -> None:
    """By hand: of the first step both moments are the gradient's. A narrow parameter moves by what it has in fp32."""
    parameter = nn.Parameter(torch.tensor([1.0, -3.0], dtype=dtype))
    optimizer, expected = PlainAdamW({"w": parameter}, CONFIG), np.array([1.0, -3.0])
    gradient = np.array([0.5, -0.25])
    for _ in range(8):  # each is less than a step of bf16's grid
        parameter.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step(1e-3, correction=0.5)
        optimizer.restart("moments")
        expected = expected * (1 - 1e-3 * 0.1) - 1e-3 * 0.5 * gradient / (np.abs(gradient) + 1e-3)
    state = optimizer.state(copy=True)
    wide = state["w/master"] if dtype == torch.bfloat16 else parameter.detach()
    np.testing.assert_allclose(wide.numpy(), expected, rtol=1e-6)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(parameter.detach(), torch.tensor(expected, dtype=dtype))
    assert (parameter.detach() != torch.tensor([1.0, -3.0], dtype=dtype)).any()
    # Another optimizer goes on from there as this one does.
    copy = nn.Parameter(parameter.detach().clone())
    other = PlainAdamW({"w": copy}, CONFIG)
    other.load_state(state, 0)
    for each, own in ((parameter, optimizer), (copy, other)):
        each.grad = torch.tensor(gradient, dtype=dtype)
        own.step(1e-3)
    assert torch.equal(copy, parameter)
    assert all(torch.equal(tensor, other.state(copy=True)[name]) for name, tensor in optimizer.state(copy=True).items())


def test_a_parameter_that_the_loss_does_not_reach_is_decayed_all_the_same() -> None:
    """As on every rank, where another rank's loss may reach it; and it has moments, which a checkpoint wants."""
    reached, other = (nn.Parameter(torch.tensor([2.0, -4.0])) for _ in range(2))
    group = RoleGroup("policy", {"reached": reached, "other": other}, 0.05)
    optimizer = RoleOptimizer([group], CONFIG.model_copy(update={"schedule": "constant", "warmup_ratio": 0.0}), TOTAL)
    for _ in range(2):
        optimizer.backward(reached.sum())
        optimizer.step()
    expected = np.array([2.0, -4.0]) * (1 - 0.05 * 0.1) ** 2
    np.testing.assert_allclose(other.detach().numpy(), expected, rtol=1e-6)
    assert not optimizer.state()["policy/other/exp_avg"].any()
    assert reached.grad is None
    assert other.grad is None


def test_steps_are_those_of_adamw_written_out() -> None:
    parameters = fresh()
    expected, expected_norms = numpy_adamw(as_numpy(parameters), TOTAL)
    norms = train(optimizer_on(parameters), parameters, range(TOTAL))
    clipped = [norm["policy"] > 0.7 for norm in expected_norms], [norm["value"] > 0.7 for norm in expected_norms]
    assert all(clipped[0])  # the premise: one role is clipped and the other is not, so that a joint norm would show
    assert not any(clipped[1])
    for found, wanted in zip(norms, expected_norms, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for role, named in as_numpy(parameters).items():
        for name, weight in named.items():
            np.testing.assert_allclose(weight, expected[role][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "warmup_ratio", "total", "expected"),
    [
        ("constant", 0.0, 4, [1, 1, 1, 1]),
        ("constant", 0.5, 4, [1 / 2, 1, 1, 1]),
        ("linear", 0.0, 4, [1, 3 / 4, 1 / 2, 1 / 4]),
        ("linear", 0.5, 4, [1 / 2, 1, 1, 1 / 2]),
        ("linear", 1.0, 4, [1 / 4, 1 / 2, 3 / 4, 1]),
        ("linear", 0.1, 4, [1, 3 / 4, 1 / 2, 1 / 4]),  # less than half a step of warm-up is none
        ("linear", 0.0, 1, [1]),
    ],
)
def test_the_schedule_by_hand(schedule: Any, warmup_ratio: float, total: int, expected: list[float]) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_ratio=warmup_ratio)
    assert [schedule_factor(config, step, total) for step in range(total)] == pytest.approx(expected)
    assert schedule_factor(config, total, total) == (1.0 if schedule == "constant" else 0.0)


def test_a_role_is_cut_only_where_its_kind_or_lora_plus_asks_for_it() -> None:
    """LoRA restarts nothing and has one rate; under LoRA+ each B is apart."""
    backbone = backbone_with("policy")
    group = RoleGroup.of(backbone, "policy", 1e-2)
    assert group.by_rate(1.0) == [(1.0, "", group.parameters)]
    slow, fast = group.by_rate(4.0)
    assert (slow[:2], fast[:2]) == ((1.0, ""), (4.0, ""))
    assert {name.rpartition(".")[2] for name in fast[2]} == {"lora_B"}
    assert slow[2] | fast[2] == group.parameters


def test_learning_rates_are_those_of_the_next_step() -> None:
    parameters = fresh()
    optimizer = optimizer_on(parameters)
    seen = []
    for step in range(3):
        seen.append(optimizer.learning_rates())
        train(optimizer, parameters, range(step, step + 1))
    assert seen == [
        {"policy": pytest.approx(0.05 * factor), "value": pytest.approx(0.3 * factor)} for factor in (0.5, 1.0, 1.0)
    ]
    assert optimizer.steps == 3


def test_gradients_of_several_losses_add_up_and_are_cleared() -> None:
    parameters = fresh()
    optimizer = optimizer_on(parameters)
    whole = loss_of(parameters, "policy", 0)
    for share in (0.25, 0.75):
        optimizer.backward(share * loss_of(parameters, "policy", 0))
    optimizer.backward(loss_of(parameters, "value", 0))
    (expected,) = torch.autograd.grad(whole, [parameters["policy"]["b"]])
    torch.testing.assert_close(parameters["policy"]["b"].grad, expected)
    optimizer.step()
    assert all(p.grad is None for named in parameters.values() for p in named.values())


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_from_its_state_it_goes_on_to_the_last_bit(stop: int) -> None:
    parameters = fresh()
    optimizer = optimizer_on(parameters)
    train(optimizer, parameters, range(stop))
    state = optimizer.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    weights = as_numpy(parameters)
    norms = train(optimizer, parameters, range(stop, TOTAL))

    resumed_parameters = fresh(seed=1)
    for role, named in resumed_parameters.items():
        for name, parameter in named.items():
            parameter.data = torch.tensor(weights[role][name])
    resumed = optimizer_on(resumed_parameters)
    resumed.load_state(state)
    assert resumed.steps == stop
    assert train(resumed, resumed_parameters, range(stop, TOTAL)) == norms
    for role, named in parameters.items():
        assert all(torch.equal(parameter, resumed_parameters[role][name]) for name, parameter in named.items())
    # The state that was handed out is a copy: training on changed neither it nor what is loaded from it.
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state.items())
    again = optimizer_on(fresh())
    again.load_state(state)
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in state.items())


def test_what_is_loaded_lies_where_the_parameters_do() -> None:
    """The step count, too: the fused kernel of a GPU reads it there, and a count on the CPU ends the process."""
    away = torch.device("meta")
    optimizer = PlainAdamW({"a": nn.Parameter(torch.zeros(3, device=away))}, OptimizerConfig())
    optimizer.load_state({"a/exp_avg": torch.zeros(3), "a/exp_avg_sq": torch.zeros(3)}, steps=4)
    (state,) = optimizer._adamw.state.values()
    assert {name: tensor.device for name, tensor in state.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), away
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_reaches_no_weight(value: float) -> None:
    parameters = fresh()
    optimizer = optimizer_on(parameters)
    train(optimizer, parameters, range(2))
    before, state = as_numpy(parameters), optimizer.state()
    with raises("not_finite", TrainingError, key=None):
        optimizer.backward(loss_of(parameters, "policy", 0) * value)
    assert all(p.grad is None for p in parameters["policy"].values())
    assert_untouched(optimizer, parameters, before, state)


@pytest.mark.parametrize("role", ["policy", "value"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_reaches_no_weight(role: str, value: float) -> None:
    parameters = fresh()
    optimizer = optimizer_on(parameters)
    train(optimizer, parameters, range(2))
    before, state = as_numpy(parameters), optimizer.state()
    optimizer.backward(loss_of(parameters, "policy", 0) + loss_of(parameters, "value", 0))
    gradient = parameters[role]["a"].grad
    assert gradient is not None
    gradient[0, 0] = value
    with raises("not_finite", TrainingError, key=role):
        optimizer.step()
    assert_untouched(optimizer, parameters, before, state)


def assert_untouched(
    optimizer: RoleOptimizer,
    parameters: dict[str, dict[str, nn.Parameter]],
    before: Arrays,
    state: dict[str, torch.Tensor],
) -> None:
    for role, named in as_numpy(parameters).items():
        assert all(np.array_equal(weight, before[role][name]) for name, weight in named.items())
    assert all(torch.equal(tensor, optimizer.state()[name]) for name, tensor in state.items())
