"""One evaluation: responses of two policies, a judge's verdicts on them, the result and its page.

Everything lies in one folder and is written as it comes, so the same command goes on where it was interrupted:
`candidate.jsonl`, `baseline.jsonl` (the responses), `verdicts.jsonl` (one line per question), `summary.json`,
`report.html`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pe_rlhf.evaluation.sources import Policy
from pe_rlhf.runs.layout import EvaluationFiles
from pe_rlhf.scoring.model_judges import ask_judge
from pe_rlhf.system.files import append_jsonl, write_json, write_whole
from pe_rlhf.system.progress import progress
from reward.asking import Pair
from reward.errors import InputError
from reward.judges import Judge
from reward.records import Prompt
from reward.summary import summarise

Summary = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Responses under a name: a policy that is loaded when it is needed, or finished `outputs`.

    identity: what the responses depend on; a folder of other responses is refused.
    """

    name: str
    identity: str
    load: Callable[[], Policy] | None = None
    outputs: Sequence[str] | None = None


def responses_of(source: Source, prompts: Sequence[Prompt], path: Path) -> list[str]:
    """One response per prompt, from the file where they are there already.

    The file's first line says what the rest was made from. Raises `InputError` where it holds other responses.
    """
    if source.outputs is not None:
        return list(source.outputs)
    head = {"identity": source.identity, "prompts": fingerprint(prompts)}
    done = _finished(path, head, prompts)
    _write_outputs(path, head, prompts, done)
    if len(done) < len(prompts):
        assert source.load is not None
        with progress(f"sampling {source.name}", len(prompts) - len(done), "responses") as advance:
            for response in source.load().responses(prompts, len(done)):
                append_jsonl(path, {"prompt": prompts[len(done)], "response": response})
                done.append(response)
                advance(1)
    return done


def fingerprint(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def evaluate_pairs(
    judge: Judge,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    candidate: str,
    baseline: str,
    max_invalid_share: float,
    level: float = 0.95,
) -> Summary:
    """Have all pairs judged, with progress, and write `verdicts.jsonl` and `summary.json`. Raises as `judge_pairs`."""
    verdicts, names = EvaluationFiles(folder).verdicts, (candidate, baseline)
    outcomes = ask_judge(judge, pairs, verdicts, title="judging", names=names, max_invalid=max_invalid_share)
    summary = {**summarise(candidate, outcomes, level=level), "baseline": baseline, "judge": judge.identity}
    write_json(EvaluationFiles(folder).summary, summary)
    return summary


def _finished(path: Path, head: dict[str, Any], prompts: Sequence[Prompt]) -> list[str]:
    """The responses in the file, up to one that a kill left half written, or that is not the next prompt's."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    try:
        found_head = json.loads(lines[0])
    except ValueError:
        if len(lines) > 1:
            raise InputError(f"{path} line 1 is damaged") from None
        return []
    if found_head != head:
        raise InputError(
            f"{path} holds responses of other prompts, another policy or other settings; use another --out"
        )
    found: list[str] = []
    for prompt, line in zip(prompts, lines[1:-1], strict=False):  # what stands after the last line feed is not whole
        try:
            row = json.loads(line)
            if row["prompt"] != prompt:
                break
            found.append(row["response"])
        except (ValueError, KeyError, TypeError):
            break
    return found


def _write_outputs(path: Path, head: dict[str, Any], prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": p, "response": r} for p, r in zip(prompts, responses, strict=False)]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (head, *rows)))
