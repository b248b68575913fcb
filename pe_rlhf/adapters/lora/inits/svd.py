"""The singular value decomposition that the spectral inits share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pe_rlhf.adapters import svd_cache
from pe_rlhf.adapters.lora.init_registry import refuse_rank
from pe_rlhf.system.seeding import current_gpu


class Directions(NamedTuple):
    """Some singular directions of a matrix: U_OK, S_K, Vh_KI, singular values descending, fp32."""

    U_OK: Tensor
    S_K: Tensor
    Vh_KI: Tensor


def balanced_factors(directions: Directions, scale: float) -> tuple[Tensor, Tensor]:
    """Split `U·diag(S)·Vh` evenly into `scale · B @ A`: A = sqrt(S/s)·Vh, B = U·sqrt(S/s)."""
    root_K = torch.sqrt(directions.S_K / scale)
    return root_K[:, None] * directions.Vh_KI, directions.U_OK * root_K[None, :]


def top_directions(matrix_OI: Tensor, count: int, niter: int | None = None, *, cache: bool = False) -> Directions:
    """The directions of the `count` greatest singular values.

    Args:
        niter: power iterations of a randomised SVD (arXiv 0909.4061, algorithm 4.4), which takes a fraction of the time
            where `count` is small; None for the exact one.
        cache: look on the disk for it first, and keep it there: for base weights, which come again with every run.

    Raises `InputError` where the matrix has fewer directions.
    """
    refuse_rank(count, min(matrix_OI.shape))
    if niter is not None:
        return _randomised(matrix_OI, count, niter, cache)
    return Directions(*(part for part in _ends(matrix_OI, count, cache)[0]))


def bottom_directions(matrix_OI: Tensor, count: int, *, cache: bool = False) -> Directions:
    """The directions of the `count` least singular values, exactly. Arguments and errors as of `top_directions`."""
    refuse_rank(count, min(matrix_OI.shape))
    return Directions(*(part for part in _ends(matrix_OI, count, cache)[1]))


def full_svd(matrix_OI: Tensor) -> Directions:
    """All singular directions of a matrix, the same on every CPU to rounding.

    In fp64 on a CPU, where it takes about as long: in fp32 the least directions differ from one CPU to another by more
    than rounding. Many GPUs are slow at fp64.
    """
    wide_OI = matrix_OI.double() if matrix_OI.device.type == "cpu" else matrix_OI.float()
    return _with_fixed_signs(*(part.float() for part in torch.linalg.svd(wide_OI, full_matrices=False)))


def _with_fixed_signs(U_OK: Tensor, S_K: Tensor, Vh_KI: Tensor) -> Directions:
    """A pair (u, v) may as well be (-u, -v), and libraries choose by CPU: the greatest entry of each u is positive."""
    greatest_1K = U_OK.gather(0, U_OK.abs().argmax(dim=0, keepdim=True))
    sign_K = torch.where(greatest_1K[0] < 0, -1.0, 1.0)
    return Directions(U_OK * sign_K, S_K, Vh_KI * sign_K[:, None])


def _ends(matrix_OI: Tensor, count: int, cache: bool) -> tuple[Directions, Directions]:
    """The first and the last `count` directions."""
    kept = svd_cache.read(matrix_OI, "exact", count) if cache else None
    if kept is None:
        # Both ends, and more than were asked for, so that another init or rank finds them, too.
        U_OK, S_K, Vh_KI = full_svd(matrix_OI)
        width = min(len(S_K), max(svd_cache.WIDTH, count))
        kept = {
            "top_U": U_OK[:, :width],
            "top_S": S_K[:width],
            "top_Vh": Vh_KI[:width],
            "bottom_U": U_OK[:, -width:],
            "bottom_S": S_K[-width:],
            "bottom_Vh": Vh_KI[-width:],
        }
        if cache:
            svd_cache.write(matrix_OI, "exact", kept)
    top = Directions(kept["top_U"][:, :count], kept["top_S"][:count], kept["top_Vh"][:count])
    return top, Directions(kept["bottom_U"][:, -count:], kept["bottom_S"][-count:], kept["bottom_Vh"][-count:])


def _randomised(matrix_OI: Tensor, count: int, niter: int, cache: bool) -> Directions:
    kind = f"niter{niter}-{count}"
    kept = svd_cache.read(matrix_OI, kind, count) if cache else None
    if kept is None:
        # Always the same random directions: a decomposition that is kept must not depend on who asked for it first.
        with torch.random.fork_rng(current_gpu()), torch.no_grad():
            torch.manual_seed(0)
            sketch = min(2 * count + 8, *matrix_OI.shape)
            U_OK, S_K, V_IK = torch.svd_lowrank(matrix_OI.float(), q=sketch, niter=niter)
        top = _with_fixed_signs(U_OK[:, :count], S_K[:count], V_IK[:, :count].T)
        kept = {"top_U": top.U_OK, "top_S": top.S_K, "top_Vh": top.Vh_KI}
        if cache:
            svd_cache.write(matrix_OI, kind, kept)
    return Directions(kept["top_U"], kept["top_S"], kept["top_Vh"])
