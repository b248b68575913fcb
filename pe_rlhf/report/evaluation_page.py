"""The pages of `pe-rlhf evaluate` and `pe-rlhf evaluate-reward`: self-contained HTML, readable on a phone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pe_rlhf.report.charts import draw_reliability
from pe_rlhf.report.format import conversation, number, percent
from pe_rlhf.report.run_page import Tile, page_template
from pe_rlhf.runs.layout import EvaluationFiles
from pe_rlhf.system.files import read_jsonl, write_whole
from reward.asking import Pair
from reward.errors import InputError
from reward.summary import combine_orders
from reward.verdicts import FIRST, SECOND

Row = dict[str, Any]

PAIRS_SHOWN = 500
KINDS = ("all", "win", "loss", "tie", "flip", "invalid")
ORDERS = {FIRST: "Candidate shown first", SECOND: "Baseline shown first", None: "Verdict"}


def write_evaluation_report(folder: Path, pairs: Sequence[Pair]) -> Path:
    """Write `folder/report.html` from `summary.json` and the verdicts on `pairs` there and return its path."""
    try:
        summary = json.loads(EvaluationFiles(folder).summary.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{EvaluationFiles(folder).summary} cannot be read: {error}") from error
    judged = _judged(read_jsonl(EvaluationFiles(folder).verdicts), summary["judge"], pairs)
    counts = Counter(pair["kind"] for pair in judged)
    html = page_template("evaluation.html.j2").render(
        candidate=summary["candidate"],
        baseline=summary["baseline"],
        judge=summary["judge"],
        tiles=_tiles(summary),
        counts={"all": len(judged)} | {kind: counts[kind] for kind in KINDS if counts[kind]},
        pairs=judged[:PAIRS_SHOWN],
    )
    path = EvaluationFiles(folder).report
    write_whole(path, html)
    return path


def write_reward_report(summary: Row) -> str:
    """The page of a reward model's evaluation, from its summary."""
    plot = draw_reliability("Reliability", summary["reliability"])
    return page_template("reward_evaluation.html.j2").render(
        model=summary["model"],
        source=summary["pairs"],
        tiles=_reward_tiles(summary),
        plots=[plot] if plot else [],
        subsets=[
            {
                "name": name,
                "n": number(int(row["n"])),
                "accuracy": percent(row["accuracy"]),
                "interval": f"{percent(row['ci_low'])} – {percent(row['ci_high'])}",
                "margin": number(row["margin"]),
            }
            for name, row in summary["subsets"].items()
        ],
    )


def _tiles(s: Row) -> list[Tile]:
    counts = f"{s['n']} pairs: {s['wins']} wins, {s['ties']} ties, {s['losses']} losses"
    tiles = [Tile("Win rate", percent(s["win_rate"]), counts, (s["ci_low"], s["win_rate"], s["ci_high"]))]
    if (controlled := s.get("length_controlled_win_rate")) is not None:
        detail = (
            f"at equal length; on average {s['mean_len_candidate']:.0f} against {s['mean_len_baseline']:.0f} characters"
        )
        interval = [s["length_controlled_ci_low"], controlled, s["length_controlled_ci_high"]]
        known = None if None in interval else (interval[0], interval[1], interval[2])
        tiles.append(Tile("Length-controlled win rate", percent(controlled), detail, known))
    if s.get("flip_share") is not None:
        detail = f"{s['flips']} verdicts turned with the order; such a pair counts half"
        tiles.append(Tile("Flips", percent(s["flip_share"]), detail))
        bias = f"{100 * s['position_bias']:+.1f} points".replace("-", "−")
        tiles.append(Tile("Position bias", bias, "how much more often than half the response shown first wins"))
    if s["invalid"]:
        tiles.append(Tile("Invalid", number(s["invalid"]), "pairs without a verdict that could be understood"))
    return tiles


def _reward_tiles(s: Row) -> list[Tile]:
    tiles = [
        Tile("Accuracy", percent(s["accuracy"]), f"on {s['n']} pairs", (s["ci_low"], s["accuracy"], s["ci_high"])),
        Tile("Calibration error", percent(s["calibration_error"]), "mean gap of confidence and accuracy"),
    ]
    length = s["length"]
    if (wins := length["longer_wins"]) is not None:
        reach = 1.96 * length["standard_error"]
        interval = (max(0.0, wins - reach), wins, min(1.0, wins + reach))
        tiles.append(Tile("Longer wins", percent(wins), "at equal quality; 50 % is no length bias", interval))
    if "agreement" in s:
        kappa = "—" if s["agreement_kappa"] is None else f"{s['agreement_kappa']:.2f}"
        detail = f"{s['second']['model']}: right {percent(s['second']['accuracy'])}, kappa {kappa}"
        tiles.append(Tile("Agreement with the second model", percent(s["agreement"]), detail))
    return tiles


def _judged(rows: list[Row], judge: str, pairs: Sequence[Pair]) -> list[Row]:
    """One entry per pair with its verdict in words; a pair that lacks an order is left out.

    The file may hold verdicts of other judges, and on other responses, that were asked for in the same folder.
    """
    asked = {(p.position, p.sample): (p.prompt, p.candidate, p.baseline) for p in pairs}
    grouped: dict[tuple[int, int], dict[str | None, Row]] = {}
    for row in rows:
        content = row["prompt"], row["response_candidate"], row["response_baseline"]
        if row["judge"] == judge and asked.get((row["position"], row["sample"])) == content:
            grouped.setdefault((row["position"], row["sample"]), {})[row["order"]] = row
    return [_pair(orders) for _, orders in sorted(grouped.items()) if None in orders or len(orders) == 2]


def _pair(orders: dict[str | None, Row]) -> Row:
    row = next(iter(orders.values()))
    value = {order: math.nan if r["preference"] is None else r["preference"] for order, r in orders.items()}
    preference, flipped = (value[None], False) if None in value else combine_orders(value[FIRST], value[SECOND])
    each = [f"{ORDERS[o].lower()}: {percent(v)}" for o, v in value.items() if o is not None and not math.isnan(v)]
    answers = [
        {"order": ORDERS[order], **{key: orders[order][key] for key in ("reason", "raw", "invalid")}}
        for order in (FIRST, SECOND, None)
        if order in orders
    ]
    return {
        "kind": _kind(preference, flipped),
        "position": row["position"],
        "verdict": "no valid verdict"
        if math.isnan(preference)
        else f"candidate wins {percent(preference)}" + (f" ({', '.join(each)})" if each else ""),
        "prompt": conversation(row["prompt"]),
        "candidate": row["response_candidate"],
        "baseline": row["response_baseline"],
        "answers": [a for a in answers if a["reason"] or a["raw"] or a["invalid"]],
    }


def _kind(preference: float, flipped: bool) -> str:
    if math.isnan(preference):
        return "invalid"
    if flipped:
        return "flip"
    return "tie" if preference == 0.5 else "win" if preference > 0.5 else "loss"
