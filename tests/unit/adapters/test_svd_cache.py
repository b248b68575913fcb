"""SVDs of base weights: their signs, and how they are kept on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from pe_rlhf.adapters import svd_cache
from pe_rlhf.adapters.lora.inits.svd import bottom_directions, top_directions
from tests.unit.adapters.first_steps import matrix


@pytest.mark.parametrize("niter", [None, 4])
def test_signs_do_not_follow_the_library(niter: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK and MKL choose signs by CPU; whichever come, the directions are the same ones."""
    weight_OI = matrix((24, 16))
    first = top_directions(weight_OI, 6, niter)
    name, home = ("svd", torch.linalg) if niter is None else ("svd_lowrank", torch)
    real = getattr(home, name)

    def of_another_cpu(*args: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        U_OK, S_K, V = real(*args, **settings)
        sign_K = torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(4).to(U_OK)[: len(S_K)]
        return U_OK * sign_K, S_K, V * (sign_K[:, None] if niter is None else sign_K)

    monkeypatch.setattr(home, name, of_another_cpu)
    again = top_directions(weight_OI, 6, niter)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact = numpy.linalg.svd(weight_OI.double().numpy(), full_matrices=False)
    best = (exact[0][:, :6] * exact[1][:6]) @ exact[2][:6]
    found = (first.U_OK * first.S_K) @ first.Vh_KI
    assert found.numpy() == pytest.approx(best, abs=1e-4 if niter is None else 1e-2)
    columns = first.U_OK.T
    assert all(column[column.abs().argmax()] > 0 for column in columns)


def test_svds_are_kept_by_weight_and_survive_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(svd_cache, "SMALLEST", 8)
    weight_OI = matrix((24, 16))
    first = top_directions(weight_OI, 3, cache=True)
    (file,) = (tmp_path / "svd").iterdir()
    monkeypatch.setattr(torch.linalg, "svd", None)  # from here on only the file can answer
    again, minor = top_directions(weight_OI, 3, cache=True), bottom_directions(weight_OI, 5, cache=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert minor.U_OK.shape == (24, 5)
    monkeypatch.undo()
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(svd_cache, "SMALLEST", 8)
    file.write_bytes(file.read_bytes()[:100])
    mended = top_directions(weight_OI, 3, cache=True)
    assert all(torch.equal(a, b) for a, b in zip(first, mended, strict=True))
    assert file.stat().st_size > 1000
    other = top_directions(weight_OI + 1e-3, 3, cache=True)
    assert not torch.equal(other.S_K, first.S_K)
    assert len(list((tmp_path / "svd").iterdir())) == 2


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "svd").write_text("a file where the folder should be")
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(svd_cache, "SMALLEST", 8)
    assert top_directions(matrix((24, 16)), 3, cache=True).S_K.shape == (3,)


def test_a_file_with_too_few_directions_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(svd_cache, "SMALLEST", 8)
    monkeypatch.setattr(svd_cache, "WIDTH", 2)
    weight_OI = matrix((24, 16))
    exact_S = numpy.linalg.svd(weight_OI.double().numpy(), compute_uv=False)
    for count in (2, 5, 3):
        assert top_directions(weight_OI, count, cache=True).S_K.numpy() == pytest.approx(exact_S[:count], rel=1e-5)


def test_weights_that_differ_only_in_their_last_value_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(svd_cache, "SMALLEST", 8)
    first_OI = matrix((40, 64))
    second_OI = first_OI.clone()
    second_OI[-1, -1] += 50
    kept = [top_directions(weight_OI, 3, cache=True).S_K for weight_OI in (first_OI, second_OI)]
    for weight_OI, S_K in zip((first_OI, second_OI), kept, strict=True):
        exact_S = numpy.linalg.svd(weight_OI.double().numpy(), compute_uv=False)
        assert S_K.numpy() == pytest.approx(exact_S[:3], rel=1e-5)


def test_a_weight_that_differs_in_one_value_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PE_RLHF_CACHE", str(tmp_path))
    weight_OI = torch.zeros(svd_cache.SMALLEST, svd_cache.SMALLEST)
    svd_cache.write(weight_OI, "kind", {"top_S": torch.ones(3)})
    assert svd_cache.read(weight_OI, "kind", 3) is not None
    for place in ((0, 0), (200, 7), (-1, -1)):
        other_OI = weight_OI.clone()
        other_OI[place] = 1e-3
        assert svd_cache.read(other_OI, "kind", 3) is None
    assert svd_cache.read(weight_OI, "another", 3) is None
