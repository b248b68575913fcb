import pytest
import torch
from torch import nn

from pe_rlhf.adapters.lora.anchored import AnchoredLoRA, LoRA
from pe_rlhf.config import LoRAConfig, OptimizerConfig
from pe_rlhf.optim.role_optimizer import RoleGroup, RoleOptimizer


def test_every_b_takes_steps_of_its_own_size() -> None:
    """AdamW's first step has the length of the learning rate, whatever the gradient: the ratio can be read off it."""
    layer = AnchoredLoRA({"lora_A": torch.zeros(1, 3), "lora_B": torch.zeros(3, 1)}, LoRAConfig(rank=1))
    parameters = {"x.lora_A": layer.lora_A, "x.lora_B": layer.lora_B, "head.weight": nn.Parameter(torch.zeros(3))}
    config = OptimizerConfig(lora_plus_ratio=16, eps=1e-12, max_grad_norm=1e9)
    optimizer = RoleOptimizer(
        [RoleGroup("policy", parameters, 1e-3, kind=LoRA(LoRAConfig(rank=1)), layers={"x": layer})],
        config,
        total_steps=2,
    )
    optimizer.backward(sum(parameter.sum() for parameter in parameters.values()))  # type: ignore[arg-type]
    assert optimizer.learning_rates() == {"policy": 1e-3}
    optimizer.step()
    steps = {name: float(-parameter.detach().mean()) for name, parameter in parameters.items()}
    assert steps == pytest.approx({"x.lora_A": 1e-3, "x.lora_B": 1.6e-2, "head.weight": 1e-3}, rel=1e-4)
