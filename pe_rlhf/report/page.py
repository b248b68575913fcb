"""What a page is made of: tiles, tables, charts and samples in sections. One template draws all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from pe_rlhf.system.render import render


class Interval(NamedTuple):
    """A share with its interval, drawn as a bar from 0 to 1 with a line at one half."""

    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Tile:
    """One result: its name, its value and what it is about."""

    label: str
    value: str
    detail: str
    interval: Interval | None = None


class Cell(NamedTuple):
    """A table's cell with small print below, an interval for example."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading.

    words: the columns that hold text; the others hold numbers and are aligned to the right.
    scrolls: on a narrow screen it is scrolled sideways, where otherwise each row becomes a list.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    note: str = ""
    words: Sequence[str] = ()
    scrolls: bool = False


@dataclass(frozen=True)
class Plot:
    """A drawing with its title and a remark."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Key:
    """An entry of the legend that several plots share; `style` is a CSS border style."""

    label: str
    colour: str
    style: str


class Text(NamedTuple):
    """A text that a model wrote, with its heading."""

    heading: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A prompt and the responses to it, side by side. `kind` is what the filters show it by; `answers` fold away."""

    facts: Sequence[str]
    prompt: str
    responses: Sequence[Text]
    kind: str = ""
    answers: Sequence[Text] = ()


@dataclass(frozen=True)
class PageSection:
    """A part of a page; its content comes in the order of the fields. `filters`: how many samples of each kind."""

    title: str
    note: str = ""
    items: Sequence[str] = ()
    tables: Sequence[Table] = ()
    legend: Sequence[Key] = ()
    plots: Sequence[Plot] = ()
    filters: dict[str, int] | None = None
    samples: Sequence[Sample] = ()
    code: str = ""
    folded: bool = False

    @property
    def has_content(self) -> bool:
        return bool(self.note or self.items or self.tables or self.plots or self.samples or self.code)


@dataclass(frozen=True)
class Page:
    """A page. Sections without content are left out. `alert` says what went wrong."""

    title: str
    kind: str
    subtitle: str = ""
    alert: str = ""
    facts: dict[str, str] | None = None
    tiles: Sequence[Tile] = ()
    sections: Sequence[PageSection] = ()

    def html(self) -> str:
        """One file that fetches nothing; every text is escaped."""
        return render(Path(__file__).parent / "templates" / "page.html.j2", page=self)
