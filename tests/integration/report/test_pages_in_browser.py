"""Pages and documentation in a real browser: they fit a phone, and the filters of the evaluation work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pe_rlhf.comparison.page.comparison_page import write_comparison_report
from pe_rlhf.report.run_page import write_report
from tests.integration.cli.test_evaluate_command import write_outputs
from tests.paths import ROOT
from tests.runs import Outcome
from tests.unit.comparison.analyses import TWELVE, analysis_of
from tests.unit.report.parsed import parse
from tests.unit.report.test_run_page import EVALUATE_SAMPLE, EVALUATE_SUMMARY, PPO_LINE, PPO_SUMMARY, write_stage

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PHONE, DESKTOP = 390, 1440


@pytest.fixture
def evaluation(cli: Callable[..., Outcome], tmp_path: Path) -> Path:
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
    """The page's document after its scripts have run."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", *more]
    command += ["--dump-dom", f"{page.as_uri()}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def assert_fits(pages: Sequence[Path], scratch: Path, width: int = PHONE) -> None:
    """No page is wider than the screen: a frame of that width says how wide the document in it is."""
    probe = scratch / "probe.html"
    frames = "".join(
        f'<iframe src="{page.as_uri()}" style="width:{width}px;height:800px;border:0"></iframe>' for page in pages
    )
    script = (
        "<script>onload = () => { document.title = [...document.querySelectorAll('iframe')].map("
        "f => f.contentDocument.documentElement.scrollWidth).join(' '); }</script>"
    )
    probe.write_text(frames + script)
    found = re.search(r"<title>([\d ]+)</title>", browse(probe, "", "--allow-file-access-from-files"))
    assert found is not None
    widths = dict(zip(pages, map(int, found[1].split()), strict=True))
    assert {page.as_posix(): wide for page, wide in widths.items() if not 0 < wide <= width} == {}


def test_the_evaluation_filters_by_outcome(evaluation: Path, tmp_path: Path) -> None:
    document = browse(evaluation, "#flip")
    kinds = dict(re.findall(r'data-show="(\w+)"[^>]*>\w+ \((\d+)\)', document))
    assert kinds == {"all": "12", "win": "4", "loss": "4", "flip": "4"}
    shown = re.findall(r'<article data-kind="(\w+)"( hidden="")?', document)
    assert len(shown) == 12
    assert {kind for kind, hidden in shown if not hidden} == {"flip"}
    assert 'data-show="flip" aria-pressed="true"' in document
    assert not list(parse(evaluation).iter("b"))  # a response is text, not markup
    assert_fits([evaluation], tmp_path)


def test_a_run_and_a_comparison_fit_a_phone(tmp_path: Path) -> None:
    write_stage(tmp_path, "ppo", PPO_SUMMARY, metrics=[{"step": 1} | PPO_LINE])
    long = dict.fromkeys(("prompt", "response_policy", "response_anchor"), "x" * 400)
    write_stage(tmp_path, "evaluate", EVALUATE_SUMMARY, samples=[EVALUATE_SAMPLE | long])
    assert_fits([write_report(tmp_path)], tmp_path)
    page = tmp_path / "comparison.html"
    recipe = json.dumps({"name": "x" * 400})
    write_comparison_report(analysis_of(*TWELVE), page, recipe=recipe, facts={"command": "y" * 400})
    assert_fits([page], tmp_path)


def test_the_documentation_fits_a_phone_and_a_desktop(tmp_path: Path) -> None:
    """Every page of the site, as mkdocs builds it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    pages = [path for path in sorted((tmp_path / "site").rglob("*.html")) if path.name != "404.html"]
    assert len(pages) > 20
    for width in (PHONE, DESKTOP):
        assert_fits(pages, tmp_path, width)
