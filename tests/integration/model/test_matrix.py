"""Every architecture against plain transformers, and the page that says what works with it."""

from __future__ import annotations

import warnings

import pytest

from pe_rlhf.system.progress import console
from tests.model_matrix import check, row_of
from tests.model_types import MODELS
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_computes_what_plain_transformers_does_and_the_page_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "quiet", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = check(name)
    assert row_of(name, outcome) in PAGE.splitlines()


def test_there_are_enough_of_them() -> None:
    assert len({name.partition(":")[0] for name in MODELS}) >= 80
