"""The device of the unit tier: `pytest --device cuda tests/unit`; by default the CPU.

Files whose models follow it are listed here, and skip nothing; the others compute on the CPU only, or on no device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

DEVICE = torch.device("cpu")
FOLLOW = ("tests/unit/test_invariants.py",)


def choose(name: str) -> None:
    """Take a device for this session. Raises `pytest.UsageError` for one that is not there."""
    global DEVICE
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: there is no GPU that this torch ({torch.__version__}) can use")
    DEVICE = device


def skip_others(items: list[pytest.Item]) -> None:
    """Where the device is not the CPU, skip the tests that would not notice."""
    if DEVICE.type == "cpu":
        return
    for item in items:
        if not item.nodeid.startswith(FOLLOW):
            item.add_marker(pytest.mark.skip(reason=f"it computes on the CPU, whatever --device says ({DEVICE})"))


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """The model on the session's device; what it is given comes there, too."""
    if DEVICE.type == "cpu":
        return model
    model.register_forward_pre_hook(_moved, with_kwargs=True)
    return model.to(DEVICE)  # type: ignore[arg-type]  # hidden by a decorator


def _moved(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    return tuple(map(move, arguments)), {name: move(value) for name, value in named.items()}
