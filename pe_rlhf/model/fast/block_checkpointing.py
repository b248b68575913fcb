"""Gradient checkpointing of a model's blocks: less memory for about a third more time in updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


class BlockCheckpointing:
    """Recomputes each block's activations in the backward pass, in the role they were computed in.

    `role_now` gives a context manager for the role that is active when it is called: a backward pass may run when that
    role has long been left.
    """

    def __init__(self, model: PreTrainedModel, role_now: Callable[[], AbstractContextManager[Any]]) -> None:
        model.gradient_checkpointing_enable()
        model.disable_input_require_grads()  # or blocks below the first adapter would be computed backwards, too
        self._blocks: list[Any] = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
        recompute = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), role_now()))
        for block in self._blocks:
            block._gradient_checkpointing_func = recompute
            block.gradient_checkpointing = False

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """On within a forward pass that wants gradients, and off again: generation would lose its KV cache under it."""
        if not torch.is_grad_enabled():
            yield
            return
        # Transformers asks for train mode too. The blocks' own flags alone are set; what is in them stays as it is.
        for block in self._blocks:
            block.gradient_checkpointing = block.training = True
        try:
            yield
        finally:
            for block in self._blocks:
                block.gradient_checkpointing = block.training = False
