"""SVDs of base weights on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pe_rlhf.adapters import svd_cache
from pe_rlhf.adapters.inits.svd import bottom_directions, top_directions
from tests.adapters.first_steps import matrix


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
