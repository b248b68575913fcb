"""Stages run in this process here: what they cache and the threads they set must not outlast a test."""

from pathlib import Path

import pytest

from tests.stage_support import byte_model, caches_apart

__all__ = ["caches_apart"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return byte_model(tmp_path / "byte-model", pad_is_eos=True, initializer_range=0.1)
