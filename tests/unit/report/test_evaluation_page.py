"""The page of `pe-rlhf evaluate` in a real browser, and what the report of a run says of its judge."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cli.test_evaluate_command import write_outputs
from tests.runs import Outcome

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def page(cli: Callable[..., Outcome], tmp_path: Path) -> Path:
    """A page with wins, losses, ties and flips; the judge has a leaning to A."""
    mine, other = write_outputs(tmp_path)
    (tmp_path / "leaning.py").write_text(
        "def judge(prompts, a, b):\n"
        "    return [min(1, max(0, 0.6 + 0.3 * (x.count('good') - y.count('good')))) for x, y in zip(a, b)]\n"
    )
    outcome = cli("evaluate", mine, "--against", other, "--judge", "leaning:judge", "--out", "e")
    assert outcome.code == 0, outcome
    return tmp_path / "e" / "report.html"


def browse(page: Path, fragment: str = "", *more: str) -> str:
    """The page's document after its scripts have run, in a real browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", *more]
    command += ["--dump-dom", f"{page.as_uri()}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_page_filters_by_outcome_in_a_browser(page: Path) -> None:
    document = browse(page, "#flip")
    kinds = dict(re.findall(r'data-show="(\w+)"[^>]*>\w+ \((\d+)\)', document))
    assert kinds == {"all": "12", "win": "4", "loss": "4", "flip": "4"}
    articles = re.findall(r'<article class="pair" data-kind="(\w+)"( hidden="")?', document)
    assert len(articles) == 12
    assert {kind for kind, hidden in articles if not hidden} == {"flip"}
    assert 'data-show="flip" aria-pressed="true"' in document
    assert "&lt;b&gt;x&lt;/b&gt;" in document  # a response is text, not markup


def test_the_page_fits_a_phone(page: Path, tmp_path: Path) -> None:
    """Nothing is wider than a screen of 390 pixels: a script beside the page's own says how wide the document is."""
    probe = tmp_path / "probe.html"
    frame = f'<iframe id="f" src="{page.as_uri()}" style="width:390px;height:800px"></iframe>'
    script = (
        "<script>f.onload = () => { document.title = "
        "f.contentDocument.documentElement.scrollWidth + ' of ' + f.contentWindow.innerWidth; }</script>"
    )
    probe.write_text(frame + script)
    document = browse(probe, "", "--allow-file-access-from-files")
    width = re.search(r"<title>(\d+) of 390</title>", document)
    assert width is not None, document
    assert int(width[1]) <= 390


def test_over_optimisation_is_told() -> None:
    from pe_rlhf.report.run_page import over_optimisation

    def row(step: int, reward: float, rate: float, low: float = 0.1, high: float = 0.1) -> dict[str, Any]:
        interval = {"judge_ci_low": rate - low, "judge_ci_high": rate + high}
        return {"step": step, "reward": reward, "judge_win_rate": rate, **interval}

    up = [row(5, 0.1, 0.5), row(10, 0.5, 0.8)]
    assert over_optimisation(up) == ""
    assert over_optimisation([*up, row(15, 0.9, 0.75)]) == ""  # within the interval
    assert over_optimisation([*up, row(15, 0.9, 0.6)]).startswith(
        "over-optimised: the judge fell from 80.0 % at step 10"
    )
    assert over_optimisation([*up, row(15, 0.4, 0.6)]) == ""  # both fell: no sign of it
    # Newcombe's interval by hand: 0.2 against √(0.1² + 0.1²) = 0.141 above; here 0.2 against √(0.1² + 0.18²) = 0.206.
    assert over_optimisation([*up, row(15, 0.9, 0.6, high=0.18)]) == ""
    # 39 of 40 after 40 of 40, with Wilson's intervals.
    assert over_optimisation([row(5, 0.1, 1.0, 0.0876, 0.0), row(10, 0.5, 0.975, 0.1038, 0.0206)]) == ""
