"""The first step of SGD under an adapter, as a change of the weight, and how close it is to the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from pe_rlhf.model.backbone import Backbone
from tests.tiny import ALL_INITS


def matrix(shape: tuple[int, int], seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def first_update(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    return B @ B.T @ G + G @ A.T @ A


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def best_cosine(G: Tensor, rank: int) -> float:
    S = np.linalg.svd(G.double().numpy(), compute_uv=False)
    return float(np.sqrt((S[:rank] ** 2).sum() / (S**2).sum()))


def assert_none_is_closer_than_lora_ga(
    gradients: Mapping[str, Tensor], rank: int, with_policy: Callable[[str], Backbone]
) -> None:
    """In a model with a policy of any init: LoRA-GA reaches G's best approximation of rank 2r, and no other does."""
    cosines: dict[str, float] = {}
    for init in ALL_INITS:
        backbone = with_policy(init)
        state = backbone.role_state("policy")
        inner = square = whole = 0.0
        for name in backbone.adapter_spec("policy").modules:
            G = gradients[name]
            update = first_update(state[f"{name}.lora_A"], state[f"{name}.lora_B"], G)
            inner, square = inner + float((update * G).sum()), square + float(update.square().sum())
            whole += float(G.square().sum())
            if init == "lora_ga":
                assert cosine(update, G) == pytest.approx(best_cosine(G, 2 * rank), abs=1e-3)
        cosines[init] = inner / math.sqrt(square * whole)
    assert max(cosines, key=cosines.__getitem__) == "lora_ga", cosines
