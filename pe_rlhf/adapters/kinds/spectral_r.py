"""Rotational spectral adapter (arXiv 2405.13952): the top r singular vectors of W0 = U S Vᵀ are rotated.

    W = [U1 R_U, U2] S [V1 R_V, V2]ᵀ,    ΔW = U1 (R_U S1 R_Vᵀ − S1) V1ᵀ

R is orthogonal by Cayley, R = (I − K)(I + K)⁻¹ with K skew-symmetric: r(r−1)/2 parameters a side, whatever the layer's
size. K starts at zero. With D = R − I = −2K(I + K)⁻¹ the bracket is D_U S1 + (S1 + D_U S1) D_Vᵀ, whose terms have a
factor that is exactly zero at step 0. The small matrices are in fp64, so that R stays orthogonal to fp32's last bits.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pe_rlhf.adapters.kinds.spectral import SpectralConfig, SpectralKind, SpectralLayer
from pe_rlhf.config.adapter import AdapterConfig


class SpectralRConfig(SpectralConfig):
    """The top singular vectors of each weight are rotated among themselves."""

    rank: int = Field(default=16, ge=2, description="how many singular vectors r of each side")


class SpectralRLayer(SpectralLayer):
    """The trained tensors are the entries of K below the diagonal, `skew_U` and `skew_V`."""

    trained: ClassVar[tuple[str, ...]] = ("skew_U", "skew_V")
    skew_U: nn.Parameter
    skew_V: nn.Parameter

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(R_U S1 R_Vᵀ − S1) V1ᵀ` and U1."""
        S_RR = self.S_R.double().diag()
        turn_U, turn_V = (_turn(skew, len(self.S_R)) for skew in (self.skew_U, self.skew_V))
        left_RR = turn_U @ S_RR
        core_RR = left_RR + (S_RR + left_RR) @ turn_V.T
        return core_RR.float() @ self.Vh_RI, self.U_OR

    @torch.no_grad()
    def rotations(self) -> tuple[Tensor, Tensor]:
        """R_U and R_V, _RR, fp32."""
        eye_RR = torch.eye(len(self.S_R), dtype=torch.double, device=self.S_R.device)
        turn_U, turn_V = (_turn(skew, len(eye_RR)) for skew in (self.skew_U, self.skew_V))
        return (eye_RR + turn_U).float(), (eye_RR + turn_V).float()


def _turn(skew_P: Tensor, rank: int) -> Tensor:
    """R − I = −2K(I + K)⁻¹ of a skew-symmetric K, given by its entries below the diagonal; _RR, fp64."""
    below = torch.tril_indices(rank, rank, -1, device=skew_P.device)
    lower_RR = skew_P.new_zeros(rank, rank, dtype=torch.double).index_put((below[0], below[1]), skew_P.double())
    skew_RR = lower_RR - lower_RR.T
    eye_RR = torch.eye(rank, dtype=torch.double, device=skew_P.device)
    return torch.linalg.solve(eye_RR + skew_RR, -2 * skew_RR)  # K and (I + K)⁻¹ commute


class SpectralR(SpectralKind[SpectralRConfig]):
    """Singular vectors of the weight, rotated."""

    settings_type: ClassVar[type[AdapterConfig]] = SpectralRConfig
    layer = SpectralRLayer

    def sizes(self, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
        count = self.settings.rank * (self.settings.rank - 1) // 2
        return {"skew_U": (count,), "skew_V": (count,)}
