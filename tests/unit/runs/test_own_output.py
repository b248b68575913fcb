import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pe_rlhf.runs.own_output import claim_place
from reward.errors import InputError


@contextmanager
def no_superuser() -> Iterator[None]:
    """Root may read and write everywhere: as another user, if this is root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("place", ["out", "out/run", "out/run/page.html"])
def test_a_place_below_a_folder_that_may_not_be_entered(tmp_path: Path, place: str) -> None:
    (tmp_path / "out").mkdir(mode=0o600)
    path = tmp_path / place / "x"
    with no_superuser(), pytest.raises(InputError) as raised:
        claim_place(path, "--out")
    assert (raised.value.kind, raised.value.key) == ("disk", "--out")
    assert raised.value.file is not None
    assert path.is_relative_to(raised.value.file)
