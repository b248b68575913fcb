import pytest
import torch
from torch import nn

from pe_rlhf.config import OptimizerConfig
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer


def test_every_b_takes_steps_of_its_own_size() -> None:
    """AdamW's first step has the length of the learning rate, whatever the gradient: the ratio can be read off it."""
    names = ("x.lora_A", "x.lora_B", "head.weight")
    parameters = {name: nn.Parameter(torch.zeros(3)) for name in names}
    config = OptimizerConfig(lora_plus_ratio=16, eps=1e-12, max_grad_norm=1e9)
    optimizer = RoleOptimizer([RoleGroup("policy", parameters, 1e-3)], config, total_steps=2)
    optimizer.backward(sum(parameter.sum() for parameter in parameters.values()))  # type: ignore[arg-type]
    assert optimizer.learning_rates() == {"policy": 1e-3}
    optimizer.step()
    steps = {name: float(-parameter.detach().mean()) for name, parameter in parameters.items()}
    assert steps == pytest.approx({"x.lora_A": 1e-3, "x.lora_B": 1.6e-2, "head.weight": 1e-3}, rel=1e-4)
