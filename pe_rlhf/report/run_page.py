"""The report of a run: one self-contained HTML page with its results, curves and samples.

Read from the run directory only, so it can be written again at any time. A stage that is not there is left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from pe_rlhf.report.charts import Curves, Panel, Plot, draw_curves, draw_reliability, draw_stacked
from pe_rlhf.report.format import conversation, duration, number, percent, preferred
from pe_rlhf.runs.layout import STAGE_INFO, RunFiles, StageFiles
from pe_rlhf.runs.over_optimisation import Row, judge_turned_down
from pe_rlhf.system.files import write_whole
from reward.errors import InputError

SAMPLES_SHOWN = 10
PPO_STEPS_SHOWN, PPO_SAMPLES_PER_STEP = 5, 2

PPO_STEP, OPTIMIZER_STEP = "PPO step", "optimizer step"
PPO_CURVES = (
    Curves(
        "Reward",
        (Panel("mean score", {"reward": "reward"}, band="reward_std"),),
        PPO_STEP,
        "band: ± one standard deviation in a step",
    ),
    Curves("KL to the anchor", (Panel("nats per response", {"kl": "KL"}),), PPO_STEP),
    Curves("Entropy", (Panel("nats per token", {"entropy": "entropy"}),), PPO_STEP),
    Curves(
        "Clipping and explained variance",
        (
            Panel("clipped share", {"clip_fraction": "policy", "value_clip_fraction": "value"}),
            Panel("expl. variance", {"explained_variance": "explained variance"}),
        ),
        PPO_STEP,
    ),
    Curves("Response length", (Panel("tokens", {"response_length": "mean length"}),), PPO_STEP),
)
JUDGE_CURVES = Curves(
    "Reward and judge",
    (Panel("mean score", {"reward": "reward"}), Panel("win rate", {"judge_win_rate": "judge"})),
    PPO_STEP,
    "the judge compares policy and anchor",
)
PPO_SECONDS = Curves(
    "Time per step",
    (Panel("seconds", {"seconds_rollout": "rollout", "seconds_score": "score", "seconds_update": "update"}),),
    PPO_STEP,
)
SFT_CURVES = Curves("Loss", (Panel("nats per token", {"loss": "training", "eval_loss": "held out"}),), OPTIMIZER_STEP)
REWARD_CURVES = (
    Curves("Pairwise loss", (Panel("nats per pair", {"loss": "training", "eval_loss": "held out"}),), OPTIMIZER_STEP),
    Curves(
        "Accuracy", (Panel("share of pairs", {"accuracy": "training", "eval_accuracy": "held out"}),), OPTIMIZER_STEP
    ),
)


@dataclass(frozen=True)
class Stage:
    """What a stage has left in its directory; `summary` is empty while it has not finished."""

    summary: Row
    metrics: list[Row]
    samples: list[Row]


@dataclass(frozen=True)
class Tile:
    """One result: `interval` is (low, point, high) as shares, drawn as a bar around the 50 % line."""

    label: str
    value: str
    detail: str
    interval: tuple[float, float, float] | None = None


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from what the stages left there and return its path.

    Raises `InputError` where the recipe is missing or a file cannot be parsed, with its name and line.
    """
    files = RunFiles(run_dir)
    recipe_text, recipe = _read_recipe(files.recipe)
    there = {name: files.stage(name) for name in STAGE_INFO}
    stages = {name: _read_stage(stage) for name, stage in there.items() if stage.folder.is_dir()}
    html = page_template("report.html.j2").render(
        name=recipe.get("name") or run_dir.resolve().name,
        model=recipe.get("model"),
        tiles=_tiles(stages),
        ppo_plots=_ppo_plots(stages),
        reward_plots=_reward_plots(stages),
        sft_plots=_sft_plots(stages),
        comparisons=_comparisons(stages),
        ppo_samples=_ppo_samples(stages),
        stages=[_stage_row(name, stage.summary) for name, stage in stages.items()],
        recipe=recipe_text,
    )
    path = files.report
    write_whole(path, html)
    return path


def page_template(name: str) -> Template:
    """A page of `templates/`; what is put into it is escaped."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


# --- reading -----------------------------------------------------------------------------------------------------


def _read_recipe(path: Path) -> tuple[str, Row]:
    if not path.is_file():
        raise InputError(f"{path}: not found; a run directory holds the recipe it was made from")
    text = path.read_text(encoding="utf-8")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values")
    return text, recipe


def _read_stage(files: StageFiles) -> Stage:
    summary = files.summary
    return Stage(
        summary=_parse(summary.read_bytes(), str(summary)) if summary.exists() else {},
        metrics=_read_jsonl(files.metrics),
        samples=_read_jsonl(files.samples),
    )


def _read_jsonl(path: Path) -> list[Row]:
    if not path.exists():
        return []
    # Split at "\n" alone: str.splitlines would also cut at characters that may stand inside a JSON string.
    lines = path.read_bytes().split(b"\n")
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse(text: bytes, where: str) -> Row:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


# --- results -----------------------------------------------------------------------------------------------------


def _tiles(stages: dict[str, Stage]) -> list[Tile]:
    """The strip of results at the top, with what the finished stages know."""
    reward, ppo, evaluate = (stages[name].summary if name in stages else {} for name in ("reward", "ppo", "evaluate"))
    tiles = []
    if evaluate.get("win_rate") is not None:
        interval = (evaluate["ci_low"], evaluate["win_rate"], evaluate["ci_high"])
        counts = f"against the anchor: {evaluate['wins']} wins, {evaluate['ties']} ties, {evaluate['losses']} losses"
        tiles.append(Tile("Win rate", percent(evaluate["win_rate"]), counts, interval))
    if evaluate.get("gold_policy") is not None:
        tiles.append(
            _change("Gold score", evaluate["gold_anchor"], evaluate["gold_policy"], "judge's mean, anchor → policy")
        )
    if evaluate.get("reward_policy") is not None:
        detail = "reward model's mean, anchor → policy"
        tiles.append(_change("Reward", evaluate["reward_anchor"], evaluate["reward_policy"], detail))
    elif ppo:
        tiles.append(_change("Reward", ppo["reward_first"], ppo["reward_last"], "mean in training, first → last step"))
    if evaluate.get("kl") is not None:
        tiles.append(Tile("KL to the anchor", number(evaluate["kl"]), "nats per response, held-out prompts"))
    elif ppo:
        tiles.append(Tile("KL to the anchor", number(ppo["kl_last"]), "nats per response, last training step"))
    if reward.get("eval_accuracy") is not None:
        interval = (reward["eval_accuracy_low"], reward["eval_accuracy"], reward["eval_accuracy_high"])
        detail = f"on {reward['eval_pairs']} held-out pairs"
        tiles.append(Tile("Reward model's accuracy", percent(reward["eval_accuracy"]), detail, interval))
    return tiles


def _change(label: str, before: float | None, after: float | None, detail: str) -> Tile:
    return Tile(label, f"{number(before)} → {number(after)}", detail)


def _stage_row(name: str, summary: Row) -> dict[str, str]:
    """One line of the stage table: what it did, how long it took and what it held in memory."""
    scored = "mean_score_chosen" in summary
    texts = {
        "sft": "{steps} steps on {train_rows} rows; loss on {eval_rows} held-out rows {eval_loss_before} → {eval_loss}",
        "preferences": "{pairs} pairs from {prompts} prompts, {pairs_dropped} without a clear winner"
        + ("; mean score {mean_score_chosen} chosen, {mean_score_rejected} rejected" if scored else ""),
        "reward": "{train_pairs} training and {eval_pairs} held-out pairs; margin {eval_margin}, "
        "calibration error {calibration_error}",
        "ppo": "{steps} steps, {episodes} episodes; {seconds_per_step} s per step, {tokens_per_second} tokens/s",
        "evaluate": "{n} comparisons; mean length {mean_length_policy} tokens, anchor {mean_length_anchor}",
    }
    shown = {key: number(value) for key, value in summary.items() if value is None or isinstance(value, int | float)}
    memory = summary.get("peak_rss_mib")
    return {
        "name": name,
        "did": texts[name].format_map(defaultdict(lambda: "–", shown)) if summary else "not finished",
        "seconds": duration(summary.get("seconds")),
        "memory": number(None) if memory is None else f"{memory / 1024:.1f} GiB",
        "parameters": number(summary.get("trainable_parameters")),
    }


# --- plots and samples -------------------------------------------------------------------------------------------


def _ppo_plots(stages: dict[str, Stage]) -> list[Plot]:
    rows = stages["ppo"].metrics if "ppo" in stages else []
    judged = [row for row in rows if row.get("judge_win_rate") is not None]
    judge = [replace(JUDGE_CURVES, note=over_optimisation(judged) or JUDGE_CURVES.note)] if judged else []
    plots = [draw_curves(curves, rows) for curves in (*judge, *PPO_CURVES)] + [draw_stacked(PPO_SECONDS, rows)]
    return [plot for plot in plots if plot]


def _reward_plots(stages: dict[str, Stage]) -> list[Plot]:
    if "reward" not in stages:
        return []
    stage = stages["reward"]
    plots = [draw_curves(curves, stage.metrics) for curves in REWARD_CURVES]
    plots.append(draw_reliability("Reliability", stage.summary.get("reliability") or []))
    return [plot for plot in plots if plot]


def _sft_plots(stages: dict[str, Stage]) -> list[Plot]:
    plot = draw_curves(SFT_CURVES, stages["sft"].metrics) if "sft" in stages else None
    return [plot] if plot else []


def _comparisons(stages: dict[str, Stage]) -> dict[str, Any]:
    """The first samples of the evaluation, not a selection, and how many there are."""
    samples = stages["evaluate"].samples if "evaluate" in stages else []
    rows = [
        {
            "prompt": conversation(sample["prompt"]),
            "policy": sample["response_policy"],
            "anchor": sample["response_anchor"],
            "score_policy": number(sample.get("score_policy")),
            "score_anchor": number(sample.get("score_anchor")),
            "preferred": preferred(sample["preference"]),
        }
        for sample in samples[:SAMPLES_SHOWN]
    ]
    return {"rows": rows, "total": len(samples)}


def _ppo_samples(stages: dict[str, Stage]) -> list[dict[str, str]]:
    """The first samples of some steps, evenly spaced from the first step to the last."""
    samples = stages["ppo"].samples if "ppo" in stages else []
    by_step: dict[int, list[Row]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], []).append(sample)
    steps = sorted(by_step)
    last, gaps = len(steps) - 1, max(PPO_STEPS_SHOWN - 1, 1)
    chosen = sorted({steps[round(i * last / gaps)] for i in range(PPO_STEPS_SHOWN)}) if steps else []
    return [
        {
            "step": str(step),
            "prompt": conversation(sample["prompt"]),
            "response": sample["response"],
            "score": number(sample["score"]),
            "kl": number(sample["kl"]),
        }
        for step in chosen
        for sample in by_step[step][:PPO_SAMPLES_PER_STEP]
    ]


def over_optimisation(rows: list[Row]) -> str:
    """A warning where the judge has turned down since its best step while the reward has risen; rows have both."""
    if (turn := judge_turned_down(rows)) is None:
        return ""
    best, last = turn
    rates = f"{percent(best['judge_win_rate'])} at step {best['step']} to {percent(last['judge_win_rate'])}"
    return f"over-optimised: the judge fell from {rates} while the reward rose"
