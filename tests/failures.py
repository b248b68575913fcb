"""Assert on what a failure is, never on its sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

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
