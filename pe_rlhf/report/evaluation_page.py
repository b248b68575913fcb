"""The pages of `pe-rlhf evaluate` and `pe-rlhf evaluate-reward`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pe_rlhf.report.charts import draw_reliability
from pe_rlhf.report.format import conversation, number, percent
from pe_rlhf.report.page import Cell, Interval, Page, PageSection, Sample, Table, Text, Tile
from pe_rlhf.runs.layout import EvaluationFiles
from pe_rlhf.system.files import read_json, read_jsonl, write_whole
from reward.asking import Pair
from reward.summary import combine_orders
from reward.verdicts import FIRST, SECOND

Row = dict[str, Any]

PAIRS_SHOWN = 500
KINDS = ("win", "loss", "tie", "flip", "invalid")
ORDERS = {FIRST: "Candidate shown first", SECOND: "Baseline shown first", None: "Verdict"}


def write_evaluation_report(folder: Path, pairs: Sequence[Pair]) -> Path:
    """Write `folder/report.html` from `summary.json` and the verdicts on `pairs` there and return its path.

    Raises `InputError` where one of the two files is damaged.
    """
    files = EvaluationFiles(folder)
    summary = read_json(files.summary)
    samples = _samples(read_jsonl(files.verdicts), summary, pairs)
    counts = Counter(sample.kind for sample in samples)
    note = f"The first {PAIRS_SHOWN} of {len(samples)} pairs, not selected." if len(samples) > PAIRS_SHOWN else ""
    page = Page(
        title=f"{summary['candidate']} against {summary['baseline']}",
        kind="evaluation",
        subtitle=f"Judge: {summary['judge']}",
        tiles=_tiles(summary),
        sections=[
            PageSection(
                "Side by side",
                note=note,
                filters={"all": len(samples)} | {kind: counts[kind] for kind in KINDS if counts[kind]},
                samples=samples[:PAIRS_SHOWN],
            )
        ],
    )
    write_whole(files.report, page.html())
    return files.report


def write_reward_report(summary: Row) -> str:
    """The page of a reward model's evaluation, from its summary."""
    plot = draw_reliability(summary["reliability"])
    subsets = [
        (
            name,
            number(int(row["n"])),
            Cell(percent(row["accuracy"]), f"{percent(row['ci_low'])} – {percent(row['ci_high'])}"),
            number(row["margin"]),
        )
        for name, row in summary["subsets"].items()
    ]
    columns = ("Subset", "Pairs", "Accuracy, 95 % interval", "Mean margin")
    return Page(
        title=summary["model"],
        kind="reward evaluation",
        subtitle=f"Reward model on {summary['pairs']}",
        tiles=_reward_tiles(summary),
        sections=[
            PageSection("Calibration", plots=[plot] if plot else []),
            PageSection("Subsets", tables=[Table(columns, subsets)]),
        ],
    ).html()


def _tiles(s: Row) -> list[Tile]:
    counts = f"{s['n']} pairs: {s['wins']} wins, {s['ties']} ties, {s['losses']} losses"
    tiles = [Tile("Win-rate", percent(s["win_rate"]), counts, Interval(s["ci_low"], s["win_rate"], s["ci_high"]))]
    if s.get("best_of_win_rate") is not None:
        detail = f"the anchor's, at a KL of {number(s['best_of_kl'])}; the policy's KL is {number(s['kl'])}"
        bounds = Interval(s["best_of_ci_low"], s["best_of_win_rate"], s["best_of_ci_high"])
        tiles.append(Tile(f"Best of {s['best_of']}", percent(s["best_of_win_rate"]), detail, bounds))
    if (controlled := s.get("length_controlled_win_rate")) is not None:
        lengths = f"{s['mean_len_candidate']:.0f} against {s['mean_len_baseline']:.0f} characters"
        low, high = s["length_controlled_ci_low"], s["length_controlled_ci_high"]
        interval = None if low is None or high is None else Interval(low, controlled, high)
        detail = f"at equal length; on average {lengths}"
        tiles.append(Tile("Length-controlled win-rate", percent(controlled), detail, interval))
    if s.get("flip_share") is not None:
        detail = f"{s['flips']} verdicts turned with the order"
        tiles.append(Tile("Flips", percent(s["flip_share"]), detail))
        bias = f"{100 * s['position_bias']:+.1f} points".replace("-", "−")
        tiles.append(Tile("Position bias", bias, "how much more often than half the response shown first wins"))
    if (mass := s.get("label_mass")) is not None:
        detail = "of A and B as the judge's first token; low: it was about to say something else, and its text is read"
        tiles.append(Tile("Label mass", percent(mass), detail))
    if (equal := s.get("jury_agreement")) is not None:
        rates = ", ".join(f"{name} {percent(rate)}" for name, rate in s["jury_win_rates"].items())
        tiles.append(Tile("Agreement of the jury", percent(equal), f"two members decide alike; win-rates: {rates}"))
    if s["invalid"]:
        tiles.append(Tile("Invalid", number(s["invalid"]), "pairs without a verdict that could be understood"))
    return tiles


def _reward_tiles(s: Row) -> list[Tile]:
    interval = Interval(s["ci_low"], s["accuracy"], s["ci_high"])
    tiles = [
        Tile("Accuracy", percent(s["accuracy"]), f"on {s['n']} pairs", interval),
        Tile("Calibration error", percent(s["calibration_error"]), "mean gap of confidence and accuracy"),
    ]
    length = s["length"]
    if (wins := length["longer_wins"]) is not None:
        reach = 1.96 * length["standard_error"]
        interval = Interval(max(0.0, wins - reach), wins, min(1.0, wins + reach))
        tiles.append(Tile("Longer wins", percent(wins), "at equal quality; 50 % is no length bias", interval))
    if "agreement" in s:
        kappa = "–" if s["agreement_kappa"] is None else f"{s['agreement_kappa']:.2f}"
        detail = f"{s['second']['model']}: right {percent(s['second']['accuracy'])}, kappa {kappa}"
        tiles.append(Tile("Agreement with the second model", percent(s["agreement"]), detail))
    return tiles


def _samples(rows: Sequence[Row], summary: Row, pairs: Sequence[Pair]) -> list[Sample]:
    """One sample per pair with its verdict in words; a pair that lacks an order is left out.

    The file may hold verdicts of other judges, and on other responses, that were asked for in the same folder.
    """
    asked = {(p.position, p.sample): (p.prompt, p.candidate, p.baseline) for p in pairs}
    grouped: dict[tuple[int, int], dict[str | None, Row]] = {}
    for row in rows:
        content = row["prompt"], row["response_candidate"], row["response_baseline"]
        by = row["judge"], row.get("judge_version")
        if (
            by == (summary["judge"], summary.get("judge_version"))
            and asked.get((row["position"], row["sample"])) == content
        ):
            grouped.setdefault((row["position"], row["sample"]), {})[row["order"]] = row
    whole = [orders for _, orders in sorted(grouped.items()) if None in orders or len(orders) == 2]
    return [_sample(orders, summary) for orders in whole]


def _sample(orders: dict[str | None, Row], summary: Row) -> Sample:
    row = next(iter(orders.values()))
    value = {order: math.nan if r["preference"] is None else r["preference"] for order, r in orders.items()}
    preference, flipped = (value[None], False) if None in value else combine_orders(value[FIRST], value[SECOND])
    each = [f"{ORDERS[o].lower()}: {percent(v)}" for o, v in value.items() if o is not None and not math.isnan(v)]
    verdict = f"candidate wins {percent(preference)}" + (f" ({', '.join(each)})" if each else "")
    return Sample(
        kind=_kind(preference, flipped),
        facts=[f"prompt {row['position']}", "no valid verdict" if math.isnan(preference) else verdict],
        prompt=conversation(row["prompt"]),
        responses=[
            Text(summary["candidate"], row["response_candidate"]),
            Text(summary["baseline"], row["response_baseline"]),
        ],
        answers=[Text(ORDERS[o], said) for o in ORDERS if o in orders and (said := _said(orders[o]))],
    )


def _said(row: Row) -> str:
    invalid = f"Invalid: {row['invalid']}" if row.get("invalid") else ""
    return "\n\n".join(text for text in (row.get("reason"), invalid, row.get("raw")) if text)


def _kind(preference: float, flipped: bool) -> str:
    if math.isnan(preference):
        return "invalid"
    if flipped:
        return "flip"
    return "tie" if preference == 0.5 else "win" if preference > 0.5 else "loss"
