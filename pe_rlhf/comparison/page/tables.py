"""The tables of a comparison's page: numbers as text, a dash for what was not measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pe_rlhf.comparison.page.comparison_plots import Look, looks
from pe_rlhf.comparison.paired_runs import SIGNIFICANT
from pe_rlhf.comparison.run_result import Analysis, ArmResult, Estimate, PairResult
from pe_rlhf.comparison.trajectory import known
from pe_rlhf.report.format import duration, number, percent

MISSING = number(None)


@dataclass(frozen=True)
class Cell:
    """What stands in a table: lines of text, and an interval below them."""

    lines: tuple[str, ...]
    interval: str = ""


@dataclass(frozen=True)
class Column:
    """One column of a table by arm; columns side by side with the same group have a heading in common."""

    group: str
    heading: str
    cell: Callable[[ArmResult], Cell]
    css: str = "figure"


@dataclass(frozen=True)
class Table:
    """A table with an arm in each row."""

    title: str
    note: str
    columns: Sequence[Column]
    rows: list[tuple[Look, list[Cell]]]

    @property
    def groups(self) -> list[tuple[str, int]]:
        return [(name, len(list(columns))) for name, columns in groupby(self.columns, lambda column: column.group)]


@dataclass(frozen=True)
class PairRow:
    """Two arms against each other, in numbers and in words."""

    a: str
    b: str
    difference: Cell
    p_value: str
    p_holm: str
    improvement: Cell
    sentence: str
    found: bool


# --- by arm ----------------------------------------------------------------------------------------------------------


def arm_tables(analysis: Analysis) -> list[Table]:
    """What came of each arm, and what it took."""
    judge, end, model = "Judge, held-out prompts", "Last quarter of PPO", "Reward model"
    equal = "At equal KL" if analysis.equal_kl is None else f"At KL {number(analysis.equal_kl)}"
    results = [
        Column("", "Seeds", lambda arm: _listed(arm.seeds)),
        Column("", "Failed", lambda arm: _listed(arm.failed)),
        Column(judge, "Win-rate", lambda arm: estimate(arm.win_rate, percent)),
        Column(judge, "IQM of runs", lambda arm: estimate(arm.win_rate_iqm, percent)),
        Column(judge, "Mean score", lambda arm: estimate(arm.gold, number)),
        Column(end, "Reward", lambda arm: estimate(arm.reward, number)),
        Column(end, "KL", lambda arm: estimate(arm.kl, number)),
        Column(equal, "Reward", lambda arm: estimate(arm.at_equal_kl, number)),
        Column(equal, "Win-rate", lambda arm: estimate(arm.judge_at_equal_kl, percent)),
        Column(model, "Accuracy", lambda arm: _value(arm.reward_accuracy, percent)),
    ]
    note = (
        "Below a number its 95 % interval, over prompts and seeds for the win-rate, over seeds for all others. "
        "IQM: mean of the middle half of the runs. KL in nats per response. Failed runs do not count."
    )
    return [_table(analysis, "Results", note, results), _cost_table(analysis)]


def _cost_table(analysis: Analysis) -> Table:
    ppo, reward = "PPO", "Reward stage"
    target = "To the target" if analysis.target_reward is None else f"To a reward of {number(analysis.target_reward)}"
    columns = [
        Column("", "Trained parameters", lambda arm: _value(arm.trainable_parameters, number)),
        Column(ppo, "Peak memory", lambda arm: _value(arm.peak_mib, gibibytes)),
        Column(ppo, "Per step", lambda arm: _value(arm.seconds_per_step, seconds)),
        Column(reward, "Peak memory", lambda arm: _value(arm.reward_peak_mib, gibibytes)),
        Column(reward, "Per step", lambda arm: _value(arm.reward_seconds_per_step, seconds)),
        Column(target, "Steps", lambda arm: _value(arm.steps_to_target, _whole)),
        Column(target, "Time", lambda arm: _value(arm.seconds_to_target, duration)),
        Column("", "Collapses", _collapses, "words"),
    ]
    note = (
        "Peak memory: the highest of the runs; time per step: their median; "
        "until the target: their mean, a dash where one never came there."
    )
    return _table(analysis, "Cost and collapses", note, columns)


def _table(analysis: Analysis, title: str, note: str, columns: Sequence[Column]) -> Table:
    keys = looks([arm.arm for arm in analysis.arms])
    rows = [(look, [column.cell(arm) for column in columns]) for look, arm in zip(keys, analysis.arms, strict=True)]
    return Table(title, note, columns, rows)


def _collapses(arm: ArmResult) -> Cell:
    words = [
        f"seed {c.seed}: {c.kind} at step {c.step}" + (f" ({c.detail})" if c.detail else "") for c in arm.collapses
    ]
    return Cell(tuple(words) or (MISSING,))


def settings_table(analysis: Analysis) -> Table | None:
    """What the arms change in the recipe, with the learning rates that were chosen; None where they change nothing."""
    keys = dict.fromkeys(key for arm in analysis.arms for key in arm.settings)
    columns = [Column("", key, lambda arm, key=key: _setting(arm.settings.get(key)), "setting") for key in keys]
    note = "Where they differ from the recipe. The learning rates are those that the runs were made with."
    return _table(analysis, "Settings", note, columns) if columns else None


def _setting(value: Any) -> Cell:
    if value is None or isinstance(value, str):
        return Cell((value or MISSING,))
    return Cell((f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False),))


# --- by pair ---------------------------------------------------------------------------------------------------------


def pair_rows(analysis: Analysis) -> list[PairRow]:
    """The pairs of arms, in the order of the analysis."""
    shown = signed_share if analysis.measure == "win_rate" else signed
    return [_pair_row(pair, shown) for pair in analysis.pairs]


def _pair_row(pair: PairResult, shown: Callable[[float], str]) -> PairRow:
    return PairRow(
        pair.a,
        pair.b,
        estimate(pair.difference, shown),
        p_text(pair.p_value),
        p_text(pair.p_holm),
        estimate(pair.improvement, percent),
        pair.sentence,
        found=pair.p_holm < SIGNIFICANT,
    )


# --- numbers ---------------------------------------------------------------------------------------------------------


def estimate(value: Estimate | None, shown: Callable[[float], str]) -> Cell:
    """A number with its interval, as far as they are known."""
    if value is None or not known(value.value):
        return Cell((MISSING,))
    bounded = known(value.low) and known(value.high)
    interval = f"{shown(value.low).removesuffix(' %')} to {shown(value.high)}" if bounded else ""
    return Cell((shown(value.value),), interval)


def p_text(p: float) -> str:
    """A p-value with three decimals."""
    if not known(p):
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def signed_share(value: float) -> str:
    """A difference of shares, written as in the sentences of the pairs."""
    return _sign(value) + f"{abs(value):.3f}"


def signed(value: float) -> str:
    """A number with its sign."""
    return _sign(value) + number(abs(value))


def _sign(value: float) -> str:
    return "−" if value < 0 else "+" if value > 0 else ""


def gibibytes(mib: float) -> str:
    return f"{mib / 1024:.2f} GiB"


def seconds(value: float) -> str:
    return f"{number(float(value))} s"


def _whole(value: float) -> str:
    return number(int(value) if value == int(value) else value)


def _value(value: float | None, shown: Callable[[float], str]) -> Cell:
    return Cell((MISSING if value is None or not known(value) else shown(value),))


def _listed(numbers: Sequence[int]) -> Cell:
    return Cell((", ".join(map(str, numbers)) or MISSING,))
