"""Assert on what a failure is, never on its sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pe_rlhf.config.explain import explain_validation_error
from reward.errors import Failure, InputError, Kind


@contextmanager
def raises(kind: Kind, error: type[Failure] = InputError, **fields: Any) -> Iterator[None]:
    """Expect a failure of a class and kind with those fields: `with raises("unknown", key="ppo.kl.betta"): …`."""
    with pytest.raises(error) as raised:
        yield
    assert raised.type is error
    found = raised.value.fields()
    expected = {
        "kind": kind,
        **{name: str(value) if isinstance(value, Path) else value for name, value in fields.items()},
    }
    assert {name: found.get(name) for name in expected} == expected


@contextmanager
def refuses(key: str, kind: Kind = "conflict") -> Iterator[None]:
    """Expect that a section of a recipe refuses its settings: by the key and kind that a recipe's error would have."""
    with pytest.raises(ValidationError) as raised:
        yield
    mistake = explain_validation_error(raised.value)
    assert (mistake.key, mistake.kind) == (key, kind)
