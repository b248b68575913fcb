"""`deterministic: true`: the same bits from the same run on the same GPU.

On CUDA attention's backward pass, scattered sums and cuBLAS with several workspaces add in an order that changes from
call to call. torch's strict mode takes kernels that do not: attention by flash and memory-efficient kernels included,
which with `warn_only` would stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WORKSPACE = ":4096:8"  # one of the two settings of cuBLAS that give the same bits


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it torch takes deterministic kernels only; to be entered before CUDA starts."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    if torch.cuda.is_available():
        # For the engines that this process starts: their LoRA kernels add with atomics otherwise.
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # time for nothing: what is not set is not read here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        memory.fill_uninitialized_memory = fill


def is_refused(error: BaseException) -> bool:
    """Whether an error says that an operation has no deterministic kernel."""
    return isinstance(error, RuntimeError) and "deterministic implementation" in str(error)


def cumulative(values_BN: Tensor) -> Tensor:
    """Cumulative sums over the last dimension; in deterministic mode a product: torch has no such scan on CUDA."""
    if not torch.are_deterministic_algorithms_enabled():
        return values_BN.cumsum(dim=-1)
    n = values_BN.shape[-1]
    return values_BN @ values_BN.new_ones(n, n).triu()
