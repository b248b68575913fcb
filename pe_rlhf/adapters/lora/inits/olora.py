"""OLoRA (arXiv 2406.01775): A and B from the QR decomposition of W, so that B's columns are orthonormal."""

from __future__ import annotations

import torch
from torch import Tensor

from pe_rlhf.adapters.lora.init_registry import InitContext
from reward.errors import InputError


def olora(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = R[:r], B = Q[:, :r] of W = Q·R (algorithm 1)."""
    if context.rank > min(context.weight_OI.shape):
        raise InputError(
            f"adapter.rank: {context.rank} is more than the {min(context.weight_OI.shape)} directions of a target"
        )
    Q_OK, R_KI = torch.linalg.qr(context.weight_OI)
    return R_KI[: context.rank], Q_OK[:, : context.rank]
