"""Gradient checkpointing of a model's blocks: less memory for about a third more time in updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pe_rlhf.model.fast.trunk import blocks_of


class BlockCheckpointing:
    """Recomputes each block's activations in the backward pass, in the role they were computed in.

    The blocks' own forward passes are wrapped. Transformers' switch stays as it is: it asks for train mode, some models
    have none, and Zamba has one inside the other, whose recomputation matches the wrong tensors.

    `role_now` gives a context manager for the role that is active when it is called: a backward pass may run when that
    role has long been left.
    """

    def __init__(self, model: PreTrainedModel, role_now: Callable[[], AbstractContextManager[Any]]) -> None:
        marked = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        inner = {id(part) for block in marked for part in block.modules() if part is not block}
        self._blocks = [block for block in marked if id(block) not in inner] or blocks_of(model)
        self._run = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), role_now()))

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """On within a forward pass that wants gradients, and off again: generation would compute twice under it."""
        if not torch.is_grad_enabled():
            yield
            return
        before = [vars(block).get("forward") for block in self._blocks]
        for block in self._blocks:
            block.forward = partial(self._run, block.forward)
        try:
            yield
        finally:
            for block, forward in zip(self._blocks, before, strict=True):
                _set_forward(block, forward)


def _set_forward(block: nn.Module, forward: Any) -> None:
    """Give a block back what it had in place of its class's forward pass, or None."""
    if forward is None:
        del block.forward
    else:
        block.forward = forward
