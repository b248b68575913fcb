"""One model of each mechanism through everything that the matrix of models tries (`tests/model_matrix.py`)."""

from __future__ import annotations

import warnings

import pytest

from pe_rlhf.system.progress import console
from tests.model_matrix import check

# Model: whether it is packed, and how its experts get adapters.
MECHANISMS = {
    "llama": (True, ""),
    "gpt2": (True, ""),  # Conv1D
    "gemma2": (False, ""),  # sliding windows, and caps on logits
    "mamba": (False, ""),  # states in place of attention
    "jamba": (False, "by name"),  # both, and experts
    "mixtral": (True, "all-linear"),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_it_computes_what_plain_transformers_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "quiet", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = check(name)
    assert (outcome.refused, (outcome.packed, outcome.experts)) == ("", MECHANISMS[name])
