"""What holds for every test of this tier."""

import sys

import pytest

PIPELINE = "pe_rlhf.stages.pipeline"


@pytest.fixture(autouse=True)
def no_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no page: it takes half of their time. Tests that read it have the mark `page`."""
    if PIPELINE in sys.modules and request.node.get_closest_marker("page") is None:
        monkeypatch.setattr(f"{PIPELINE}.write_report", lambda run_dir: run_dir / "report.html")
