"""OLoRA (arXiv 2406.01775): A and B from the QR decomposition of W, so that B's columns are orthonormal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pe_rlhf.adapters.lora.init_registry import InitContext, refuse_rank, register_init

if TYPE_CHECKING:
    from torch import Tensor


@register_init("olora")
def olora(context: InitContext) -> tuple[Tensor, Tensor]:
    """A = R[:r], B = Q[:, :r] of W = Q·R (algorithm 1)."""
    import torch

    refuse_rank(context.rank, min(context.weight_OI.shape))
    Q_OK, R_KI = torch.linalg.qr(context.weight_OI)
    return R_KI[: context.rank], Q_OK[:, : context.rank]
