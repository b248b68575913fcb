"""Do two runs have the same numbers? `python tests/benchmarks/same_run.py runs/before runs/after`.

Compares every line of each stage's metrics.jsonl, and the bytes of the saved weights. Seconds, rates and memory are
left out. Exit code 1 where a number differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OF_THE_MACHINE = ("seconds", "tokens_per_second", "peak", "time")


def read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(OF_THE_MACHINE)} for line in lines]


def differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """The keys that differ, line by line; NaN equals NaN."""
    found = [] if len(before) == len(after) else [f"{len(before)} lines before, {len(after)} after"]
    for number, (old, new) in enumerate(zip(before, after, strict=False), start=1):
        keys = [key for key in dict.fromkeys([*old, *new]) if repr(old.get(key)) != repr(new.get(key))]
        found += [f"line {number}: {key}: {old.get(key)} → {new.get(key)}" for key in keys]
    return found


def main(before: Path, after: Path) -> int:
    names = sorted(path.relative_to(before) for path in before.glob("*/metrics.jsonl"))
    weights = sorted(path.relative_to(before) for path in before.glob("*/*/*.safetensors"))
    if not names:
        print(f"{before} has no metrics.jsonl")
        return 1
    failed = False
    for name in [*names, *weights]:
        if not (after / name).is_file():
            found = [f"missing in {after}"]
        elif name.suffix == ".jsonl":
            found = differences(read(before / name), read(after / name))
        else:
            found = [] if (before / name).read_bytes() == (after / name).read_bytes() else ["other bytes"]
        print(f"{name}: {'; '.join(found[:5]) or 'equal'}")
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: same_run.py BEFORE AFTER")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
