"""What the source looks like in numbers: `make stats`. Counts text and syntax trees only, in a second.

Lines are all lines of Python files. The comment share is that of lines with a `#` comment. A nested function counts
on its own and in the one around it.
"""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / ".reports"
TIERS = ("unit", "integration", "real", "gpu")


def comment_lines(text: str) -> int:
    """Lines with a comment, beside code or on their own."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def function_lengths(path: Path) -> list[tuple[int, str]]:
    """Lines and place of every function and method of a file."""
    name = path.relative_to(ROOT).as_posix()
    return [
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{name}:{node.lineno} {node.name}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def room(path: Path) -> str:
    """`pe_rlhf/model` for a file anywhere below it; the package's own name for files at its root."""
    parts = path.relative_to(ROOT).parts[:-1]
    return "/".join(parts[:2])


def test_seconds(report: Path) -> dict[str, tuple[float, int]]:
    """Seconds of all tests together, and their number, by tier. Two workers need about half of these seconds."""
    tiers: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for case in ElementTree.parse(report).iter("testcase"):
        parts = (case.get("classname") or "").split(".")
        tier = parts[1] if len(parts) > 1 and parts[1] in TIERS else "other"
        seconds, count = tiers[tier]
        tiers[tier] = seconds + float(case.get("time") or 0), count + 1
    return dict(tiers)


def main() -> None:
    files = [path for folder in ("pe_rlhf", "reward") for path in sorted((ROOT / folder).rglob("*.py"))]
    print(f"files at the root of pe_rlhf: {sum(path.parent.name == 'pe_rlhf' for path in files)}")

    print(f"\n{'room':<22}{'files':>6}{'lines':>8}{'longest':>9}{'comments':>10}")
    rooms: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for path in files:
        text = path.read_text(encoding="utf-8")
        rooms[room(path)].append((text.count("\n"), comment_lines(text)))
    rooms["total"] = [counts for found in list(rooms.values()) for counts in found]
    for name, found in rooms.items():
        lines, comments = (sum(column) for column in zip(*found, strict=True))
        longest = max(count for count, _ in found)
        print(f"{name:<22}{len(found):>6}{lines:>8}{longest:>9}{comments / max(lines, 1):>10.1%}")
    tests = sum(path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "tests").rglob("*.py"))
    print(f"{'tests':<22}{'':>6}{tests:>8}")

    lengths = sorted(length for path in files for length in function_lengths(path))
    sizes = [length for length, _ in lengths]
    print(f"\nfunctions: {len(sizes)}, median {statistics.median(sizes):.0f} lines, 95th percentile ", end="")
    print(f"{statistics.quantiles(sizes, n=20)[-1]:.0f}, longest {lengths[-1][0]} ({lengths[-1][1]})")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    print(f"README: {len(readme.split())} words, {len(readme.splitlines())} lines")

    reports = sorted(REPORTS.glob("*.xml"))
    for report in reports:
        suites = ElementTree.parse(report).iter("testsuite")
        wall = sum(float(suite.get("time") or 0) for suite in suites)
        print(f"\nmake {report.stem}: {wall:.0f} s")
        for tier, (seconds, count) in test_seconds(report).items():
            print(f"  tests/{tier:<13}{count:>6} tests{seconds:>8.0f} s added up over the workers")
    if not reports:
        print("\ntests: no times; `make test` and `make test-all` leave them")


if __name__ == "__main__":
    main()
