"""The commands, examples and names in README and docs, for the tests that hold them to the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"# ([\w/.-]+\.(?:py|yaml))\n")
NAME_BEFORE = re.compile(r"`([\w.-]+\.jsonl|hosts)`:\n\n\Z")  # JSON has no comments
OF_A_CHANGED_PACKAGE = ("my_batch_mean.yaml", "my_lengths.yaml")  # recipes of what a page adds to the package
COMMANDS = ("pe-rlhf ", "python ", "make ", "sbatch ", "pip ")


@dataclass(frozen=True)
class Block:
    """A fenced block. `name` is the file that its first line, or the line before it, says it is, else ""."""

    page: Path
    line: int
    language: str
    text: str
    name: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A shell command of a page, a word each; variables set in front of it are left out."""

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {shlex.join(self.words)}"


def blocks(*languages: str) -> list[Block]:
    """All fenced blocks in those languages."""
    return [block for page in PAGES for block in _blocks(page) if block.language in languages]


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        body = match[3]
        named, before = NAME.match(body), NAME_BEFORE.search(text, 0, match.start())
        name = named[1] if named else before[1] if before else ""
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match[2], body[named.end() :] if named else body, name)


def commands() -> list[Command]:
    """Every command of the bash blocks, and every one in the text that is more than a name."""
    found = [Command(b.page, words) for b in blocks("bash") for line in b.text.splitlines() for words in words_of(line)]
    for page, code in inline_code():
        # The generated page has headings such as `pe-rlhf evaluate sampling`: whose settings they are.
        if code.startswith(COMMANDS) and "…" not in code and page.name != "recipe.md":
            found += [Command(page, words) for words in words_of(code)]
    return list(dict.fromkeys(found))


def inline_code() -> list[tuple[Path, str]]:
    """The page and the text of every `code` outside of blocks."""
    return [
        (page, code)
        for page in PAGES
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
    ]


def words_of(line: str) -> Iterator[tuple[str, ...]]:
    """The words of each command in a line of a shell."""
    for part in line.split(" && "):
        words = shlex.split(part, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield tuple(words)


def apply_changes(block: Block, root: Path) -> None:
    """Make the changes of a `diff` block that names its file: hunks apart by empty lines, each in one place only."""
    path = root / block.name
    for hunk in block.text.split("\n\n"):
        lines = hunk.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{block}: {block.name} does not hold once:\n{old}"
        path.write_text(text.replace(old, new), encoding="utf-8")
