"""A sparse change S of a weight: where its entries are, its product, and the product's gradients.

Time and memory follow the number of entries P and not O×I, in the backward pass too: the gradient of an entry (o, i) is
Σ_tokens dy_o·x_i, computed at the entries only (a sampled dense-dense product, SDDMM).

The products are in fp32 whatever the base's dtype, since torch's sparse ones on a CPU have no other, and are rounded
when they are added to the base's output. S is kept by rows for `S·x` and by columns for `Sᵀ·dy`: the product with a
transposed sparse matrix takes up to three times as long, and on a GPU adds in an order that varies. For the same
reason dense matrices are turned by a copy first: torch's products and sums with a turned view take two to four times as
long as the copy and the product with it.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.layer import AdapterLayer
from pe_rlhf.adapters.layer_statistics import LayerStatistics
from pe_rlhf.adapters.lora.anchored import writable
from reward.errors import InputError

Density = Annotated[float, Field(gt=0, le=1)]
PATTERN = ("row_starts", "columns", "column_starts", "rows", "order")

with warnings.catch_warnings():  # torch says once in a process that this layout is in beta: here, where it is not heard
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


class SparseLayer(AdapterLayer):
    """A layer with a sparse part.

    The tensors are `values` _P row after row, and their places as int32: `row_starts` and `columns` (CSR),
    `column_starts` and `rows` of the transposed matrix, and the `order` of the values there.
    """

    trained: ClassVar[tuple[str, ...]] = ("values",)
    kept: ClassVar[tuple[str, ...]] = PATTERN
    values: nn.Parameter

    def add_sparse(self, x: Tensor, y: Tensor) -> Tensor:
        """`y + S x`, written into y where it can be."""
        return _AddSparse.apply(writable(y), x, self.values, *(getattr(self, name) for name in PATTERN))

    @torch.no_grad()
    def sparse_change(self) -> Tensor:
        """S as a dense _OI."""
        size = len(self.get_buffer("row_starts")) - 1, len(self.get_buffer("column_starts")) - 1
        return _csr(self.get_buffer("row_starts"), self.get_buffer("columns"), self.values.detach(), size).to_dense()


def entry_count(density: float, out_features: int, in_features: int) -> int:
    """How many entries P a layer's sparse part has: at least one."""
    return max(1, round(density * out_features * in_features))


def sparse_tensors(statistics: LayerStatistics, density: float) -> dict[str, Tensor]:
    """Zeros at the places of the greatest accumulated squared gradients of a layer.

    Raises `InputError` where there is no gradient, or one that is zero or not finite.
    """
    if not statistics.gradients_OI:
        fix = "give add_adapter(…, statistics=…); the stages reward and ppo do"
        raise InputError("the sparse mask needs the layers' gradient", kind="missing", key="adapter.kind", fix=fix)
    score_OI = sum((g.float().square() for g in statistics.gradients_OI[1:]), statistics.gradients_OI[0].float() ** 2)
    if not bool(score_OI.isfinite().all()):
        raise InputError("the gradient for the sparse mask is not finite", kind="not_finite", key="adapter.kind")
    if not bool(score_OI.any()):
        raise InputError(
            "the gradient for the sparse mask is zero (in ppo: all responses have the same score)",
            kind="empty",
            key="adapter.kind",
            fix="raise adapter.batch_size",
        )
    return {"values": torch.zeros(entry_count(density, *score_OI.shape)), **_places(score_OI, density)}


def _places(score_OI: Tensor, density: float) -> dict[str, Tensor]:
    """The places of the greatest scores, by rows and by columns."""
    out_features, in_features = score_OI.shape
    chosen_P = score_OI.flatten().topk(entry_count(density, *score_OI.shape), sorted=False).indices.sort().values
    rows_P, columns_P = chosen_P // in_features, chosen_P % in_features
    order_P = (columns_P * out_features + rows_P).argsort()
    found = {
        "row_starts": _starts(rows_P, out_features),
        "columns": columns_P,
        "column_starts": _starts(columns_P, in_features),
        "rows": rows_P[order_P],
        "order": order_P,
    }
    return {name: places.int() for name, places in found.items()}


def _starts(of_P: Tensor, count: int) -> Tensor:
    """Where each row begins in a list that is sorted by rows, and at last where the list ends."""
    counts = torch.bincount(of_P, minlength=count)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _csr(starts: Tensor, places: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(starts, places, values, size, check_invariants=False)


def _turned(x: Tensor) -> Tensor:
    """Rows of features as fp32 columns, one feature after the other in memory."""
    return x.flatten(0, -2).T.float().contiguous()


class _AddSparse(torch.autograd.Function):
    """`y += S x`, in place, since nothing else needs y; gradients go to x and to the values."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, values: Tensor, *pattern: Tensor) -> Tensor:
        ctx.size = y.shape[-1], x.shape[-1]
        x_IN = _turned(x)
        S_OI = _csr(pattern[0], pattern[1], values, ctx.size)
        if x_IN.shape[1]:  # an expert may have no token
            y.view(-1, y.shape[-1]).add_(torch.sparse.mm(S_OI, x_IN).T.contiguous())
        ctx.mark_dirty(y)
        # A copy, of a few numbers: a fused optimizer changes values without counting up their version.
        ctx.save_for_backward(x, values.clone(), *pattern)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, values, row_starts, columns, column_starts, rows, order = ctx.saved_tensors
        x_NI, grad_ON = x.flatten(0, -2).float(), _turned(gradients[0])
        if not len(x_NI):
            return (gradients[0], torch.zeros_like(x), torch.zeros_like(values), *[None] * len(PATTERN))
        grad_x = None
        if ctx.needs_input_grad[1]:
            S_IO = _csr(column_starts, rows, values[order], ctx.size[::-1])
            grad_x = torch.sparse.mm(S_IO, grad_ON).T.to(x.dtype).reshape(x.shape)
        places_OI = _csr(row_starts, columns, torch.zeros_like(values), ctx.size)
        grad_values = torch.sparse.sampled_addmm(places_OI, grad_ON, x_NI, beta=0.0).values()
        return (gradients[0], grad_x, grad_values, *[None] * len(PATTERN))
