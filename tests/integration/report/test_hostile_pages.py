"""What models, judges and names say runs nothing in a real browser: no page, no place, no way to start a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.comparison.page.comparison_page import write_comparison_report
from pe_rlhf.report.evaluation_page import write_evaluation_report, write_reward_report
from pe_rlhf.report.inspect_page import inspect_page
from pe_rlhf.report.run_page import write_report
from pe_rlhf.report.tasks_page import write_tasks_report
from reward.asking import Pair
from reward.verdicts import FIRST, SECOND
from tests.integration.report.test_pages_in_browser import browse
from tests.unit.comparison.analyses import analysis_of
from tests.unit.report import test_evaluation_page as evaluation
from tests.unit.report import test_run_page as runs
from tests.unit.runs.test_task_table import table

MARK = "document.documentElement.dataset.ran=1"
# Each closes what a page may have opened around it, and starts a script in another way.
ATTACK = (
    f"</script></style></title></textarea></svg></pre>--><script>{MARK}</script><img src=x onerror={MARK}>"
    f"<svg onload={MARK}></svg><iframe srcdoc='<script>parent.{MARK}</script>'></iframe>"
)
# The last of these events needs no focus, which a headless browser gives a page or not.
VISIBLE = f"style='content-visibility:auto' oncontentvisibilityautostatechange={MARK}"
ATTRIBUTE = f"\" autofocus onfocus={MARK} onload={MARK} tabindex=1 {VISIBLE} '"
SCHEME = f"javascript:{MARK} {{{{7*7}}}} ${{{MARK}}} $\\frac$ ]]>"
HOSTILE = f"{ATTACK}{ATTRIBUTE}{SCHEME}"


def hostile(value: Any) -> Any:
    """The same with every text in it replaced, as a value; numbers and keys stay."""
    if isinstance(value, dict):
        return {key: hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


def run_page(folder: Path) -> Path:
    line = {"step": 1} | runs.PPO_LINE | {f"reward_{HOSTILE}": 0.5, f"seconds_{HOSTILE}": 1.0}
    summary = runs.PPO_SUMMARY | {f"reward_{HOSTILE}_last": 1.0}
    runs.write_stage(folder, "ppo", summary, metrics=[line], samples=[hostile(runs.PPO_SAMPLE) | {"step": 1}])
    runs.write_stage(folder, "reward", runs.REWARD_SUMMARY, metrics=[{"step": 1} | runs.REWARD_LINE])
    samples = [hostile(runs.EVALUATE_SAMPLE)]
    runs.write_stage(folder, "evaluate", runs.EVALUATE_SUMMARY | {"judge": HOSTILE}, samples=samples)
    said = {"name": HOSTILE, "model": HOSTILE, "ppo": {"kl": {"form": HOSTILE, "beta": 0.05}}}
    (folder / "recipe.yaml").write_text(json.dumps(said))
    return write_report(folder)


def tasks_page(folder: Path) -> Path:
    place = folder / HOSTILE.replace("/", "⁄")[:100]
    place.mkdir()
    (place / "recipe.yaml").write_text(json.dumps({"name": HOSTILE}))
    return write_tasks_report(place, table())


def evaluation_page(folder: Path) -> Path:
    verdicts = [
        evaluation.verdict(0, order, preference, judge=HOSTILE)
        | dict.fromkeys(("prompt", "response_candidate", "response_baseline", "reason", "raw"), HOSTILE)
        for order, preference in ((FIRST, 1.0), (SECOND, 0.2))
    ] + [evaluation.verdict(1, FIRST, None, judge=HOSTILE, raw=HOSTILE, invalid=HOSTILE, prompt=HOSTILE)]
    evaluation.write(folder, hostile(evaluation.SUMMARY), verdicts)
    return write_evaluation_report(folder, [Pair(HOSTILE, HOSTILE, HOSTILE, 0), Pair(HOSTILE, "<b>yes</b>", "no", 1)])


def reward_page(folder: Path) -> Path:
    subsets = {HOSTILE: evaluation.REWARD["subsets"]["chat"]}
    page = write_reward_report(evaluation.REWARD | {"model": HOSTILE, "pairs": HOSTILE, "subsets": subsets})
    (folder / "page.html").write_text(page, encoding="utf-8")
    return folder / "page.html"


def inspection_page(folder: Path) -> Path:
    layer = {"layer": HOSTILE, "cosine": 0.5, "best": 0.6}
    init = {"init": HOSTILE, "layers": [layer, layer], "best": 0.6, "kernel": [[1.0, 0.5], [0.5, 1.0]], "cosine": 0.5}
    page = inspect_page({"inits": [init], "kernel": init["kernel"]}, HOSTILE, HOSTILE)
    (folder / "page.html").write_text(page, encoding="utf-8")
    return folder / "page.html"


def comparison_page(folder: Path) -> Path:
    analysis = analysis_of(HOSTILE, f"{HOSTILE} too", name=HOSTILE)
    path = folder / "comparison.html"
    write_comparison_report(analysis, path, recipe=json.dumps({"name": HOSTILE}), facts={HOSTILE: HOSTILE})
    return path


def ran(page: Path) -> bool:
    document = browse(page, "#<img src=x onerror=document.documentElement.dataset.ran=1>")
    return "data-ran" in document[: document.index(">", document.index("<html"))]


@pytest.mark.parametrize("text", [ATTACK, f'<p title="{ATTRIBUTE}">x</p>'])
def test_the_attack_works_where_nothing_is_escaped(tmp_path: Path, text: str) -> None:
    page = tmp_path / "open.html"
    page.write_text(f"<!doctype html><html><body>{text}</body></html>")
    assert ran(page)


@pytest.mark.parametrize(
    "make",
    [run_page, tasks_page, evaluation_page, reward_page, inspection_page, comparison_page],
    ids=lambda m: m.__name__,
)
def test_no_page_runs_what_others_wrote(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    page = make(tmp_path)
    assert "&lt;script&gt;" in page.read_text(encoding="utf-8")
    assert not ran(page)
