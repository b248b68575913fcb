"""A and B with random orthonormal directions: AAᵀ = BᵀB = I, both uniformly distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pe_rlhf.adapters.lora.init_registry import InitContext, refuse_rank, register_init

if TYPE_CHECKING:
    from torch import Tensor


@register_init("orthogonal")
def orthogonal(context: InitContext) -> tuple[Tensor, Tensor]:
    """A's rows and B's columns from the QR decomposition of normal matrices, signs as in arXiv math-ph/0609050."""
    out_features, in_features = context.weight_OI.shape
    refuse_rank(context.rank, min(out_features, in_features))
    A_RI = _orthonormal_columns(in_features, context).T
    return A_RI.to(context.weight_OI.device), _orthonormal_columns(out_features, context).to(context.weight_OI.device)


def _orthonormal_columns(rows: int, context: InitContext) -> Tensor:
    import torch

    Q, R = torch.linalg.qr(torch.randn(rows, context.rank, generator=context.generator))
    # QR leaves the signs to the library; with R's diagonal made positive every Q is as likely as every other.
    return Q * R.diagonal().sign()
