"""The page of a run: results, curves, samples, stages and recipe.

Read from the run directory only, so it can be written again at any time. A stage that is not there is left out; one
that failed or has not finished says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from pe_rlhf.report.charts import Line, draw_lines, draw_reliability, points
from pe_rlhf.report.curves import PPO, REWARD, SFT, Curves
from pe_rlhf.report.format import conversation, duration, gibibytes, number, percent, preferred
from pe_rlhf.report.members_table import members_table
from pe_rlhf.report.page import Interval, Page, PageSection, Plot, Sample, Table, Text, Tile
from pe_rlhf.runs.layout import STAGE_INFO, RunFiles, StageFiles
from pe_rlhf.runs.learning_flags import ppo_flags, reward_flags
from pe_rlhf.runs.metrics import read_metrics
from pe_rlhf.runs.over_optimisation import Row, judge_turned_down
from pe_rlhf.system.files import read_json, read_jsonl, write_whole
from reward.errors import InputError

SAMPLES_SHOWN = 10
PPO_STEPS_SHOWN, PPO_SAMPLES_PER_STEP = 5, 2
# What a stage did, with the numbers of its summary; a stage that has no row here is described by the table of stages.
SENTENCES = {
    "sft": "{steps} steps on {train_rows} rows; loss on {eval_rows} held-out rows {eval_loss_before} → {eval_loss}",
    "preferences": "{pairs} pairs from {prompts} prompts, {pairs_dropped} without a clear winner",
    "reward": "{train_pairs} training and {eval_pairs} held-out pairs; margin {eval_margin}, "
    "calibration error {calibration_error}",
    "ppo": "{steps} steps, {episodes} episodes; {seconds_per_step} s per step, {tokens_per_second} tokens/s",
    "evaluate": "{n} comparisons; mean length {mean_length_policy} tokens, anchor {mean_length_anchor}",
}


@dataclass(frozen=True)
class Stage:
    """What a stage has left in its folder; `summary` is empty where it has not finished."""

    name: str
    summary: Row
    metrics: list[Row]
    samples: list[Row]

    @classmethod
    def read(cls, files: StageFiles) -> Stage:
        """Raises `InputError` with the file, and the line, that is damaged."""
        summary = read_json(files.summary) if files.summary.exists() else {}
        return cls(files.folder.name, summary, read_metrics(files.metrics), read_jsonl(files.samples))


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from what the stages left there and return its path.

    Raises `InputError` where the recipe is missing or a file cannot be parsed, with its name and line.
    """
    files = RunFiles(run_dir)
    text, recipe = _read_recipe(files.recipe)
    there = [files.stage(name) for name in STAGE_INFO if files.stage(name).folder.is_dir()]
    stages = {stage.folder.name: Stage.read(stage) for stage in there}
    failure = read_json(files.failure) if files.failure.exists() else {}
    unfinished = [name for name, stage in stages.items() if not stage.summary]
    page = Page(
        title=recipe.get("name") or run_dir.resolve().name,
        kind="report",
        subtitle=f"PE-RLHF on {recipe['model']}" if recipe.get("model") else "",
        alert=f"Failed: {failure.get('message', '')}" if failure and unfinished else "",
        tiles=_tiles(stages),
        sections=[
            PageSection("Warnings", items=_warnings(stages)),
            _ppo(stages.get("ppo")),
            _reward(stages.get("reward")),
            PageSection("Supervised fine-tuning", plots=_plots(stages.get("sft"), SFT)),
            _side_by_side(stages.get("evaluate")),
            _ppo_samples(stages.get("ppo")),
            _stages(stages, unfinished[-1] if failure and unfinished else ""),
            _changes(read_jsonl(files.changes, may_be_cut=True)),
            PageSection("Recipe, as resolved", code=text, folded=True),
        ],
    )
    write_whole(files.report, page.html())
    return files.report


def _read_recipe(path: Path) -> tuple[str, Row]:
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
    except OSError as error:
        raise InputError(
            f"{path}: not found; a run directory holds the recipe it was made from", kind="missing", file=path
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        row = mark.line + 1 if mark else None
        raise InputError(f"{path}: not valid YAML: {error}", kind="unreadable", file=path, row=row) from error
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys to values", kind="unreadable", file=path)
    return text, recipe


def _warnings(stages: dict[str, Stage]) -> list[str]:
    """What the record says is wrong, of unfinished stages too."""
    found = {"reward": reward_flags, "ppo": lambda _: ppo_flags(stages["ppo"].metrics)}
    return [
        f"{name}: {text}" for name, flags in found.items() if name in stages for text in flags(stages[name].summary)
    ]


def _tiles(stages: dict[str, Stage]) -> list[Tile]:
    """The results of the finished stages."""
    reward, ppo, evaluate = (stages[name].summary if name in stages else {} for name in ("reward", "ppo", "evaluate"))
    tiles = []
    if evaluate.get("win_rate") is not None:
        counts = "against the anchor: {wins} wins, {ties} ties, {losses} losses".format_map(evaluate)
        tiles.append(Tile("Win-rate", percent(evaluate["win_rate"]), counts, _interval(evaluate, "ci", "win_rate")))
    if evaluate.get("best_of_win_rate") is not None:
        title, detail = f"Best of {evaluate['best_of']}", f"the anchor's, at a KL of {number(evaluate['best_of_kl'])}"
        bounds = _interval(evaluate, "best_of_ci", "best_of_win_rate")
        tiles.append(Tile(title, percent(evaluate["best_of_win_rate"]), detail, bounds))
    if evaluate.get("gold_policy") is not None:
        change = _change(evaluate["gold_anchor"], evaluate["gold_policy"])
        tiles.append(Tile("Gold score", change, "judge's mean, anchor → policy"))
    if evaluate.get("reward_policy") is not None:
        change = _change(evaluate["reward_anchor"], evaluate["reward_policy"])
        tiles.append(Tile("Reward", change, "reward model's mean, anchor → policy"))
    elif ppo:
        tiles.append(Tile("Reward", _change(ppo["reward_first"], ppo["reward_last"]), "first → last training step"))
    if evaluate.get("kl") is not None:
        tiles.append(Tile("KL to the anchor", number(evaluate["kl"]), "nats per response, held-out prompts"))
    elif ppo:
        tiles.append(Tile("KL to the anchor", number(ppo["kl_last"]), "nats per response, last training step"))
    if reward.get("eval_accuracy") is not None:
        detail = f"on {reward['eval_pairs']} held-out pairs"
        interval = _interval(reward, "eval_accuracy", "eval_accuracy")
        tiles.append(Tile("Reward model's accuracy", percent(reward["eval_accuracy"]), detail, interval))
    return tiles


def _interval(summary: Row, bounds: str, key: str) -> Interval:
    return Interval(summary[f"{bounds}_low"], summary[key], summary[f"{bounds}_high"])


def _change(before: float | None, after: float | None) -> str:
    return f"{number(before)} → {number(after)}"


def _plots(stage: Stage | None, curves: Sequence[Curves]) -> list[Plot]:
    """The curves of a stage, those that it has metrics of."""
    if stage is None:
        return []
    plots = []
    for c in curves:
        lines = [points(stage.metrics, key, label) for key, label in c.lines.items()]
        if c.band:  # the first line's
            key, label = next(iter(c.lines.items()))
            lines[0] = points(stage.metrics, key, label, *c.band)
        style = {"log": c.log, "shares": c.shares, "reference": c.reference}
        x_label = "PPO step" if stage.name == "ppo" else "optimizer step"
        plots.append(draw_lines(c.title, c.unit, lines, x_label=x_label, note=c.note, **style))
    return [plot for plot in plots if plot]


def _reward(stage: Stage | None) -> PageSection:
    tables = members_table(stage.summary) if stage else []
    return PageSection("Reward model", tables=tables, plots=_plots(stage, REWARD) + _reliability(stage))


def _reliability(stage: Stage | None) -> list[Plot]:
    plot = draw_reliability(stage.summary.get("reliability") or []) if stage else None
    return [plot] if plot else []


def _ppo(stage: Stage | None) -> PageSection:
    if stage is None:
        return PageSection("PPO")
    for row in stage.metrics:
        if row.get("reward") is not None:
            deviation = row.get("reward_std") or 0.0
            row |= {"reward_low": row["reward"] - deviation, "reward_high": row["reward"] + deviation}
    judged = [row for row in stage.metrics if None not in (row.get("judge_win_rate"), row.get("reward_shaped"))]
    reward = PPO[0]
    if all(row.get("reward_shaped") == row.get("reward") for row in stage.metrics):  # there are no penalties
        reward = replace(reward, lines={"reward": "reward"})
    plots = [*_plots(stage, (reward, *_sources(stage.metrics), *PPO[1:])), *_gold(stage.metrics)]
    return PageSection("PPO", note=over_optimisation(judged) if judged else "", plots=plots)


def _gold(metrics: list[Row]) -> list[Plot]:
    """The judge's own score of the policy over the policy's KL: it turns down where the reward is over-optimised."""
    rows = [row for row in metrics if None not in (row.get("judge_score_policy"), row.get("judge_kl"))]
    if not rows:
        return []
    kl = [0.0, *(row["judge_kl"] for row in rows)]  # before training the policy is the anchor
    line = Line("policy", kl, [rows[0]["judge_score_anchor"], *(row["judge_score_policy"] for row in rows)])
    note, x_label = "held-out prompts, from the anchor on", "KL to the anchor, nats per response"
    plot = draw_lines("Judge's score and KL", "judge's mean score", [line], x_label=x_label, note=note)
    return [plot] if plot else []


def _sources(metrics: list[Row]) -> list[Curves]:
    """A plot for each source of the reward that is logged, and of how far the members of an ensemble are apart."""
    found: list[Curves] = []
    for key in dict.fromkeys(key for row in metrics for key in row if key.startswith("source_")):
        name, _, last = key.rpartition("_")
        shown = name.removeprefix("source_")
        if last == "disagreement":
            note = "standard deviation over the members; it grows where the reward is exploited"
            found.append(Curves(f"Disagreement of {shown}", "reward units", {key: "mean over responses"}, note=note))
        if last != "std":
            continue
        for row in metrics:
            if row.get(name) is not None:
                deviation = row.get(key) or 0.0
                row |= {f"{name}_low": row[name] - deviation, f"{name}_high": row[name] + deviation}
        note = "before normalising and weight; band: ± one standard deviation in a step"
        found.append(Curves(f"Reward of {shown}", "mean score", {name: name}, note, (f"{name}_low", f"{name}_high")))
    return found


def over_optimisation(rows: Sequence[Row]) -> str:
    """A warning where the judge has turned down since its best step while the reward has risen; rows have both."""
    if (turn := judge_turned_down(list(rows))) is None:
        return ""
    best, last = turn
    rates = f"{percent(best['judge_win_rate'])} at step {best['step']} to {percent(last['judge_win_rate'])}"
    return f"over-optimised: the judge fell from {rates} while the reward rose"


def _side_by_side(stage: Stage | None) -> PageSection:
    """The first samples of the evaluation, not a selection."""
    samples = stage.samples if stage else []
    shown = [
        Sample(
            facts=[f"preferred: {preferred(row['preference'])}"],
            prompt=conversation(row["prompt"]),
            responses=[
                Text(f"{side}, score {number(row.get(f'score_{side}'))}", row[f"response_{side}"])
                for side in ("policy", "anchor")
            ],
        )
        for row in samples[:SAMPLES_SHOWN]
    ]
    note = f"The first {len(shown)} of {len(samples)} samples, not selected." if shown else ""
    return PageSection("Policy and anchor side by side", note=note, samples=shown)


def _ppo_samples(stage: Stage | None) -> PageSection:
    """The first samples of some steps, evenly spaced from the first step to the last."""
    by_step: dict[int, list[Row]] = defaultdict(list)
    for row in stage.samples if stage else []:
        by_step[row["step"]].append(row)
    steps, gaps = sorted(by_step), PPO_STEPS_SHOWN - 1
    chosen = sorted({steps[round(i * (len(steps) - 1) / gaps)] for i in range(PPO_STEPS_SHOWN)}) if steps else []
    shown = [
        Sample(
            facts=[f"step {step}", f"score {number(row['score'])}", f"KL {number(row['kl'])}"],
            prompt=conversation(row["prompt"]),
            responses=[Text("policy", row["response"])],
        )
        for step in chosen
        for row in by_step[step][:PPO_SAMPLES_PER_STEP]
    ]
    note = "The first samples of evenly spaced steps, not selected. KL in nats per response." if shown else ""
    return PageSection("Samples during PPO", note=note, samples=shown)


def _stages(stages: dict[str, Stage], failed: str) -> PageSection:
    """What each stage did, how long it took and what it held in memory; `failed` is the one that the run ended in."""
    if not stages:
        return PageSection("Stages", note="No stage has started yet.")
    columns = ("Stage", "What it did", "Time", "Peak memory", "Trained parameters")
    rows = []
    for name, stage in stages.items():
        s = stage.summary
        state = _sentence(name, s) if s else "failed" if name == failed else "not finished"
        memory = s.get("peak_cuda_mib", s.get("peak_rss_mib"))
        used = "–" if memory is None else gibibytes(memory)
        rows.append((name, state, duration(s.get("seconds")), used, number(s.get("trainable_parameters"))))
    return PageSection("Stages", tables=[Table(columns, rows, words=["What it did"])])


def _changes(rows: list[Row]) -> PageSection:
    """The settings that changed when the run was resumed; the recipe below has the last value of each."""
    shown = [
        (
            row["key"],
            str(row["before"]),
            str(row["after"]),
            f"{row['stage']}, step {row['step']}" if row["stage"] else "–",
        )
        for row in rows
    ]
    columns = ("Setting", "Before", "After", "In effect from")
    return PageSection("Changed on the way", tables=[Table(columns, shown, words=columns[1:])] if shown else [])


def _sentence(stage: str, summary: Row) -> str:
    """What a stage did; a dash for a number that its summary has not."""
    shown = {key: number(value) for key, value in summary.items() if value is None or isinstance(value, int | float)}
    scores = ""
    if "mean_score_chosen" in summary:
        scores = "; mean score {mean_score_chosen} chosen, {mean_score_rejected} rejected"
    return (SENTENCES.get(stage, STAGE_INFO[stage].sentence) + scores).format_map(defaultdict(lambda: "–", shown))
