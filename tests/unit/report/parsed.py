"""A page as a tree, and what the tests ask of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder

import numpy as np

VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.builder, self.open = TreeBuilder(), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        self.open.append(tag)
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        self.builder.end(tag)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.builder.data(data)


def parse(page: Path | str) -> Element:
    """The `html` element; a tag that is not closed, or closes another, fails."""
    tree = _Tree()
    tree.feed(page.read_text(encoding="utf-8") if isinstance(page, Path) else page)
    assert tree.open == []
    return tree.builder.close()


def text(element: Element) -> str:
    """The text in an element, without those of its children `small`, `svg`, `style` and `script`."""
    parts = [element.text or ""]
    for child in element:
        parts += ["" if child.tag in ("small", "svg", "style", "script") else text(child), child.tail or ""]
    return " ".join("".join(parts).split())


def section(page: Element, title: str) -> Element | None:
    """The section, open or folded away, with that title."""
    found = (e for e in page.iter() if e.tag in ("section", "details") and len(e) and text(e[0]) == title)
    return next(found, None)


def table(part: Element | None, number: int = 0) -> dict[str, dict[str, str]]:
    """Cells by row and column heading. An interval in small print comes after a `|`."""
    assert part is not None
    found = list(part.iter("table"))[number]
    headings = [text(cell) for cell in found.iter("th") if cell.get("scope") == "col"]
    rows = [row for body in found.iter("tbody") for row in body]
    cells = [["|".join([text(cell), *(text(small) for small in cell.iter("small"))]) for cell in row] for row in rows]
    return {row[0]: dict(zip(headings[1:], row[1:], strict=True)) for row in cells}


def plots(part: Element | None) -> dict[str, Element]:
    """The `figure` elements by title."""
    assert part is not None
    return {text(figure[0][0]): figure for figure in part.iter("figure")}


def path_of(svg: str, style: str, number: int = 0) -> np.ndarray:
    """The points of the n-th path whose style has this."""
    found = re.findall(rf'<path d="([^"]+)"[^>]*style="[^"]*{style}', svg)
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] (\S+) (\S+)", found[number])])


def assert_fetches_nothing(page: Element, html: str) -> None:
    """No tag and no style that loads something; ids are there once, and what refers to one finds it."""
    tags = {element.tag for element in page.iter()}
    assert {"img", "link", "iframe", "object", "base"}.isdisjoint(tags)
    assert not re.search(r'@import|(src|href)="(?!#|data:)|url\((?!#)', html)
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert {a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)} <= set(ids)
